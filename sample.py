"""Writes text with a trained model:  python sample.py --out_dir=out-shakespeare-char [--start="ROMEO:"]"""

import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import codecs
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from minutegpt import stdin, truth
from minutegpt.checkpoint import load_model
from minutegpt.config import configure
from minutegpt.device import init_machine
from minutegpt.errors import UserError
from minutegpt.generate import compile_decode, hide_padding
from minutegpt.log import si_number
from minutegpt.native import use_native_decoding
from minutegpt.quantize import packed_format, quantize_model
from model import KVCache

# ----------------------------------------------------------------------------------------------------------------
# every setting, with its default; --key=value overrides it
out_dir = "out"  # the run's folder
ckpt = "best"  # best (lowest validation loss), latest
# the prompt: a text, in which \n is a new line, \r a carriage return, \t a tab and \\ a backslash; FILE:path; or - for
# standard input.
# without --start, a text that is piped or redirected into sample.py is the prompt: echo "ROMEO:" | python sample.py.
# standard input that sample.py shares with a shell, as in a `while read` loop, is left alone
start = ""
interactive = False  # ask for one prompt after another
num_samples = 1  # in one batch; the first is printed as it grows
max_new_tokens = 500
temperature = 0.8  # 0 always takes the likeliest token; 1 draws from the model's own probabilities
top_k = 200  # draw from the k likeliest only; 0 is off
top_p = 1.0  # draw from the likeliest that make up this probability together; 1 is off
repetition_penalty = 1.0  # above 1: tokens that occurred before become less likely
stop = ""  # end before this text; \n is a new line, as in --start
attention_plot = ""  # PNG file for the attention weights of each head of each layer in the prompt
embedding_plot = ""  # PNG file for the token embedding; the nearest tokens of each are printed too
seed = 1337
dataset = ""  # the dataset that has the vocabulary, for a checkpoint without one: nanoGPT's
quantize = ""  # int8, int4, int4-tensor: smaller weights, faster on a CPU
device = "auto"  # auto, cpu, cuda, mps
dtype = "auto"  # auto is float32, exact; bfloat16 halves the memory
# faster decoding. auto, on a CPU: few samples by a C function, many by torch.compile from 20,000 new tokens.
# true: torch.compile, after 15 to 40 s; false: PyTorch as it is
compile = "auto"
# ----------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), __file__)
globals().update(config)
for name, path in (("attention_plot", attention_plot), ("embedding_plot", embedding_plot)):
    if not Path(path).parent.is_dir():
        raise UserError(f"--{name}={path}: there is no folder {Path(path).parent}. Make it, or name another")


def unescape(text: str) -> str:
    r"""A text as typed on a command line, with \n, \r, \t and \\ replaced by what they mean."""
    return re.sub(r"\\([nrt\\])", lambda match: {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[match[1]], text)


stop = unescape(stop)
compile_asked = compile != "auto"
if not compile_asked and (quantize or max_new_tokens < 20_000):  # compiling would take longer than writing
    compile = "false"
machine = init_machine(device, "float32" if dtype == "auto" else dtype, compile, training=False)
model, tokenizer, state = load_model(out_dir, ckpt, machine.device, dataset)
truth.check_once(machine, model, narrow=True)
model.to(machine.dtype)
if tokenizer.vocab_size > model.config.vocab_size:
    raise UserError(
        f"the vocabulary has {tokenizer.vocab_size} tokens, the model in {out_dir} only {model.config.vocab_size}. "
        "Type --dataset=NAME, the dataset it was trained on"
    )
cache_bytes = KVCache(model.config, num_samples, torch.device("meta"), machine.dtype).bytes()
n_params, cache_size = si_number(model.n_params()), si_number(cache_bytes, "B")
print(f"{n_params} parameters on {machine.device}; key-value cache of {cache_size}", file=sys.stderr)
quantize = quantize or packed_format(state["model"])
if quantize:
    if compile_asked and machine.compile:
        raise UserError(f"--compile=true does not go with {quantize} weights. Leave --compile or --quantize out")
    quantize_model(model, quantize)
hide_padding(model, tokenizer)
native = not compile_asked and use_native_decoding(model, num_samples)
if not native and not quantize and machine.compile and (compile_asked or machine.is_cpu):  # a GPU gains less from it
    print(f"compiled the decoding step in {compile_decode(model, num_samples):.1f} s", file=sys.stderr)
torch.manual_seed(seed)


@torch.no_grad()
def knows_crlf() -> bool:
    """Whether the model was trained on text with Windows' line ends, so that a prompt keeps its own."""
    if tokenizer.kind == "byte":  # whose vocabulary does not show it: does the model expect \n after \r?
        return model(torch.tensor([[13]], device=machine.device))[0].argmax().item() == 10
    return ("\r" if tokenizer.kind == "char" else b"\r\n") in tokenizer.tokens


def read_prompt() -> str:
    """The prompt: --start, the file that it names, or standard input."""
    piped = start == "-" or (not start and "start" not in given and stdin.has_input())
    if piped and start != "-" and stdin.belongs_to_shell():
        print("standard input belongs to a shell, so it is not the prompt. Type --start=- to use it", file=sys.stderr)
        piped = False
    if not piped and not start.startswith("FILE:"):
        return unescape(start)
    try:
        raw = sys.stdin.buffer.read() if piped else Path(os.path.expanduser(start.removeprefix("FILE:"))).read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the prompt {start}: {error.strerror}. Type --start=FILE:PATH") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8: byte {error.start} does not fit. Save it as UTF-8") from None
    if "\0" in text:  # UTF-16 is read as UTF-8 with a NUL after each letter
        raise UserError(f"the prompt is not plain text: byte {raw.index(0)} is a NUL. Save it as UTF-8")
    if not knows_crlf():
        text = text.replace("\r\n", "\n")
    return re.sub(r"\r?\n\Z", "", text) if piped else text  # without the line end that echo adds


class Row:
    """One sample as it grows. Its text ends before `stop`, or where the model writes END."""

    def __init__(self, prompt: str) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.before = prompt[max(0, len(prompt) - len(stop) + 1) :] if stop else ""
        self.text, self.printed, self.ended = "", 0, False

    def add(self, token: int) -> None:
        if self.ended or token == tokenizer.end_token:
            self.ended = True
            return
        self.text += self.decoder.decode(tokenizer.decode_bytes([token]))  # a character may take several tokens
        if stop and (at := (self.before + self.text).find(stop)) >= 0:  # it may begin in the prompt
            self.text, self.ended = self.text[: max(0, at - len(self.before))], True

    def next_text(self) -> str:
        """The text that was not printed yet. Characters that may be the beginning of `stop` wait."""
        seen = self.before + self.text
        waiting = next((n for n in range(len(stop) - 1, 0, -1) if seen.endswith(stop[:n])), 0)
        end = len(self.text) if self.ended else max(self.printed, len(self.text) - waiting)
        new, self.printed = self.text[self.printed : end], end
        return new


def print_text(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def draw_plots(ids: torch.Tensor) -> None:
    """Draws the plots that the settings ask for; ids (T,) is the prompt."""
    if attention_plot or embedding_plot:
        from minutegpt import plot  # imports matplotlib, which takes a second

    if attention_plot:
        plot.save_attention_maps(model, tokenizer, ids, attention_plot)
    if embedding_plot:
        print(plot.save_embedding_map(model, tokenizer, ids, embedding_plot), file=sys.stderr)


@torch.no_grad()
def write(prompt: str) -> None:
    """Prints num_samples continuations of the prompt, the first one as it grows."""
    ids = torch.tensor(tokenizer.encode(prompt) or tokenizer.start_ids(), device=machine.device)  # (T,)
    if not model(ids[None, -1:])[0].isfinite().all():
        raise UserError("the model's predictions are not finite, so its weights are damaged. Try --ckpt=latest")
    draw_plots(ids)
    rows = [Row(prompt) for _ in range(num_samples)]
    drawing: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    drawing["repetition_penalty"] = repetition_penalty
    print_text(prompt)
    for tokens in model.stream(ids.expand(num_samples, -1), max_new_tokens, **drawing):  # (B,)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.add(token)
        print_text(rows[0].next_text())
        if all(row.ended for row in rows):
            break
    rows[0].ended = True  # nothing waits for more
    print_text(rows[0].next_text() + "\n")
    for row in rows[1:]:
        print_text(f"---------------\n{prompt}{row.text}\n")


def converse() -> None:
    """One prompt after another, until an empty line or the end of the input."""
    print("type an empty line to end", file=sys.stderr)
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # encode() reports what is wrong
    while prompt := input("> "):
        try:
            write(unescape(prompt))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # ends this sample only
            print()


try:
    if interactive:
        converse()
    else:
        write(read_prompt())
except EOFError:
    print()
except BrokenPipeError:  # `| head` has read enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would fail
except RuntimeError as error:
    if "memory" not in str(error):
        raise
    raise UserError(
        f"not enough memory for {num_samples} samples at once: their key-value cache alone takes {cache_size}. "
        "Type a smaller --num_samples"
    ) from None
