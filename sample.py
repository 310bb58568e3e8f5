"""Writes text with a trained model:  python sample.py --out_dir=out-shakespeare-char [--start="ROMEO:"]"""

import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import codecs
import os
import select
import sys
from pathlib import Path

import torch

from minutegpt.checkpoint import load_model
from minutegpt.config import configure, require
from minutegpt.generate import compile_decode
from minutegpt.device import init_machine
from minutegpt.quantize import FORMATS, packed_format, quantize_model
from minutegpt.log import si_number
from minutegpt.errors import UserError
from model import KVCache

# ----------------------------------------------------------------------------------------------------------------
# every knob, with its default; --key=value overrides it
out_dir = "out"  # the run's folder
ckpt = "best"  # best (lowest validation loss), latest
start = ""  # the prompt: a text, FILE:path, or - for standard input; what is piped in is taken too
interactive = False  # ask for one prompt after another
num_samples = 1  # in one batch; the first is shown as it grows
max_new_tokens = 500
temperature = 0.8  # 0 always takes the likeliest token; 1 draws from the model's own probabilities
top_k = 200  # draw from the k likeliest only; 0 is off
top_p = 1.0  # draw from the likeliest that make up this probability together; 1 is off
repetition_penalty = 1.0  # above 1: what was said before becomes less likely
stop = ""  # end where this text appears
attention = ""  # a PNG file to draw: what each head of each layer looks at in the prompt
embedding = ""  # a PNG file to draw: which tokens the model holds to be alike; a table of them too
seed = 1337
dataset = ""  # where the vocabulary comes from, for a checkpoint that has none: nanoGPT's
quantize = ""  # int8, int4, int4-tensor: smaller weights, faster on a CPU
device = "auto"  # auto, cpu, cuda, mps
dtype = "auto"  # auto is float32, exact; bfloat16 halves the memory
compile = "auto"  # true: several times the speed, after a wait; auto: from 20,000 new tokens on a CPU
# ----------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), __file__)
globals().update(config)
require(
    config,
    at_least={"num_samples": 1, "max_new_tokens": 0, "temperature": 0, "top_k": 0, "top_p": 1e-9,
              "repetition_penalty": 0.01},
    at_most={"num_samples": 10_000, "temperature": 1000, "top_p": 1, "repetition_penalty": 100},
    one_of={"quantize": ("", *FORMATS)},
)  # fmt: skip
for knob, path in (("attention", attention), ("embedding", embedding)):
    if not Path(path).parent.is_dir():
        raise UserError(f"--{knob}={path}: there is no folder {Path(path).parent}. Make it, or name another")

if compile == "auto" and (quantize or max_new_tokens < 20_000):  # where the wait would be longer than the writing
    compile = "false"
asked = compile != "auto"  # by name
machine = init_machine(device, "float32" if dtype == "auto" else dtype, compile)
model, tokenizer, state = load_model(out_dir, ckpt, machine.device, dataset)
model.to(machine.dtype)
if tokenizer.vocab_size > model.config.vocab_size:
    raise UserError(
        f"the vocabulary has {tokenizer.vocab_size} tokens, the model in {out_dir} only {model.config.vocab_size}. "
        "Type --dataset=NAME, the dataset it was trained on"
    )
if tokenizer.vocab_size < model.config.vocab_size:  # padded to a round number: what stands for no text is never drawn
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[: tokenizer.vocab_size])
cache_bytes = KVCache(model.config, num_samples, torch.device("meta"), machine.dtype).bytes()
print(f"{si_number(model.n_params())} parameters on {machine.device}; key-value cache of {si_number(cache_bytes, 'B')}",
      file=sys.stderr)  # fmt: skip
if quantize := quantize or packed_format(state["model"]):
    if asked and machine.compile:
        raise UserError(f"--compile=true does not go with {quantize} weights. Leave --compile or --quantize out")
    quantize_model(model, quantize)
elif machine.compile and (asked or machine.device.type == "cpu"):  # a GPU waits less for each step
    print(f"compiled the decoding step in {compile_decode(model, num_samples):.1f} s", file=sys.stderr)
torch.manual_seed(seed)


def piped() -> bool:
    """Whether standard input brings something right now. An open terminal, or an idle pipe, does not."""
    if sys.stdin is None or sys.stdin.isatty():
        return False
    try:
        return bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):  # windows can ask sockets alone: there, --start=- says it
        return False


def read_prompt() -> str:
    try:
        if start == "-" or ("start" not in given and piped()):
            raw = sys.stdin.buffer.read()
        elif start.startswith("FILE:"):
            raw = Path(start.removeprefix("FILE:")).read_bytes()
        else:
            return start
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")  # as windows' editors and shells write it
    except OSError as error:
        raise UserError(f"cannot read the prompt {start}: {error.strerror}. Type --start=FILE:PATH") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8: byte {error.start} does not fit. Save it as UTF-8") from None
    return text if start.startswith("FILE:") else text.removesuffix("\n")  # the one that echo adds


def first_ids() -> list[int]:
    """What an empty prompt goes on from: a new document, or a new line."""
    if tokenizer.end_token is not None:
        return [tokenizer.end_token]
    try:
        return tokenizer.encode("\n")
    except UserError:  # a vocabulary without it
        return [0]


def settled(text: str) -> int:
    """How many of its characters can be shown: what might be the beginning of `stop` waits."""
    return next((len(text) - n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), len(text))


def say(text: str) -> None:
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:  # a terminal that cannot show it, as windows' can be
        sys.stdout.write(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))
    sys.stdout.flush()


def look(ids: torch.Tensor) -> None:
    """Draws what is asked for of the prompt, ids (T,)."""
    if attention or embedding:
        from minutegpt import plot  # imports matplotlib: a second

    if attention:
        plot.save_attention_maps(model, tokenizer, ids, attention)
    if embedding:
        print(plot.save_embedding_map(model, tokenizer, ids, embedding), file=sys.stderr)


def write(prompt: str) -> None:
    """Prints num_samples continuations of the prompt, the first one as it grows."""
    ids = torch.tensor(tokenizer.encode(prompt) or first_ids(), device=machine.device)  # (T,)
    look(ids)
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(num_samples)]
    texts = [""] * num_samples
    ended = [False] * num_samples
    shown = 0  # characters of texts[0]
    say(prompt)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    for new in model.stream(ids.expand(num_samples, -1), max_new_tokens, **sampling):  # (B,)
        for i, token in enumerate(new.tolist()):
            if ended[i] or token == tokenizer.end_token:
                ended[i] = True
                continue
            texts[i] += decoders[i].decode(tokenizer.decode_bytes([token]))  # whole characters: one may take several
            if stop and stop in texts[i]:
                texts[i], ended[i] = texts[i].split(stop)[0], True
        now = max(shown, settled(texts[0]))
        say(texts[0][shown:now])
        shown = now
        if all(ended):
            break
    say(texts[0][shown:] + "\n")
    for text in texts[1:]:
        say("---------------\n" + prompt + text + "\n")


def converse() -> None:
    """One prompt after another, until an empty line or the end of the input."""
    print("an empty line ends", file=sys.stderr)
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # encode() says what is wrong with it
    prompt = input("> ")
    while prompt:
        try:
            write(prompt)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # enough of this one
            print()
        prompt = input("> ")


try:
    if interactive:
        converse()
    else:
        write(read_prompt())
except EOFError:
    print()
except BrokenPipeError:  # `| head` has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor is there anyone for what is left
except RuntimeError as error:
    if "memory" not in str(error):
        raise
    raise UserError(
        f"not enough memory for {num_samples} samples at once, whose key-value cache alone takes "
        f"{si_number(cache_bytes, 'B')}. Type a smaller --num_samples"
    ) from None
