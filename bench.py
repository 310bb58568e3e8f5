"""How fast this machine trains and writes:  python bench.py [config/FILE.py] [--parts=train,decode] [--json]

Matrix products, which are the physical limit; a training step and its parts; decoding with and without the cache, from
one token and after a full context; reading of text; the start of train.py, from the command to its first step; and
compressing with a trained model. dev/compare.py measures nanoGPT next to it.

    python bench.py config/gpt2.py --vocab_size=50257 --needs=settings --card=A100  # arithmetic; measures nothing
"""

import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import statistics
import subprocess
import sys
import tempfile
from functools import partial
from json import dumps, loads
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minutegpt.checkpoint import load_run
from minutegpt.config import configure, model_defaults, settings_of
from minutegpt.data.dataset import open_data
from minutegpt.data.readers import read_speed
from minutegpt.data.tokenizer import from_json
from minutegpt.device import device_name, init_machine, matmul_flops, peak_flops, peak_memory, usable_dtypes
from minutegpt.errors import ROOT, UserError
from minutegpt.log import si_number
from minutegpt.scaling import print_plans
from minutegpt import timing
from model import GPTConfig

# ----------------------------------------------------------------------------------------------------------------
# every setting, with its default. The model's settings (n_layer, n_embd, block_size, ...) and config files are those of
# train.py; what does not change the speed has no effect here
parts = "matmul,train,decode"  # what is measured: some of matmul, train, decode, read, start, compress
repeats = 5  # rounds; the median is printed
steps = 4  # training steps per round
needs = ""  # instead of measuring: print what models need on --card. settings: this one; or gpt2,gpt2-medium,...
card = "H100"  # for --needs: H200, H100, A100, L4, T4, RTX 4090, ...
decode_batches = "1,32"  # batch sizes of decoding
decode_formats = "float32,bfloat16"  # of the weights in decoding; int8, int4 and int4-tensor too
new_tokens = 500  # decoded from one token, and after a full context, where the cache is refilled on the way
read_megabytes = 50.0  # of each text that is read
out_dir = "out"  # the run whose model compresses its validation text
compress_streams = "0,16,64,256"  # numbers of streams of compress.py; 0 follows the length of the text
compress_megabytes = 1.0  # at most so much of it; evaluate.py, which is printed next to it, reads all of it
json = False  # print one JSON object on one line
init_from = "scratch"  # no effect: the weights are random, and the model's size is that of the settings
dataset = "shakespeare_char"
batch_size = 64
gradient_accumulation_steps = 1  # for --needs: the tokens per step
vocab_size = 0  # 0 is the dataset's
optimizer = "adamw"  # adamw, muon
device = "auto"
dtype = "auto"
compile = "auto"
# ----------------------------------------------------------------------------------------------------------------
TRAINING = settings_of(ROOT / "train.py")
config, given = configure(globals(), __file__, model=GPTConfig, ignore=TRAINING)
TRAINING |= model_defaults(GPTConfig).keys()
globals().update(config)
block_size = int(config["block_size"])
MEASURED = ("matmul", "train", "decode", "read", "start", "compress")
if unknown := [part for part in parts.split(",") if part not in MEASURED]:
    raise UserError(f"--parts={','.join(unknown)} is not one of {', '.join(MEASURED)}. dev/compare.py has others")
formats, batch_sizes = timing.decoding_formats(decode_formats), timing.batch_sizes(decode_batches)
if needs:
    print_plans(config, as_json=json)
    raise SystemExit
machine = init_machine(device, dtype, compile)


def print_line(text: str) -> None:
    print(text, file=sys.stderr if json else sys.stdout, flush=True)


def measure_matmul() -> dict[str, float]:
    flops = {name: matmul_flops(machine, kind) for name, kind in usable_dtypes(machine.device).items()}
    for name, value in flops.items():
        print_line(f"matrix product, {name}: {si_number(value, 'FLOP/s')}")
    return flops


def measure_training() -> dict[str, Any]:
    train_model, optimizers = machine.wrap(model), timing.optimizers_of(model, optimizer, machine)
    laps: list[list[float]] = []  # the seconds of the parts of each step

    def train_steps() -> None:
        for step in range(steps):
            laps.append(timing.training_step(train_model, optimizers, partial(get_batch, step), machine))

    train_steps()  # warms up, compiles
    laps.clear()
    tokens = batch_size * block_size  # per step
    seconds = timing.median_seconds({"train": train_steps}, repeats, machine.device)["train"] / steps
    peak, source = peak_flops(machine)
    mfu = tokens / seconds * model.flops_per_token() / peak
    print_line(f"training step, {batch_size} x {block_size} tokens, {si_number(model.n_params())} parameters:")
    print_line(f"  {si_number(tokens / seconds)} tokens/s, {seconds:.3g} s per step, {mfu:.1%} of the peak ({source})")
    result: dict[str, Any] = {"tokens_per_second": tokens / seconds, "mfu": mfu}
    result |= {"peak_flops": peak, "peak_source": source}
    if machine.is_cpu:  # a GPU works while Python goes on, so the parts cannot be told apart
        result["seconds"] = dict(zip(timing.PARTS, map(statistics.median, zip(*laps, strict=True)), strict=True))
        print_line("  " + ", ".join(f"{part} {1000 * s:.3g} ms" for part, s in result["seconds"].items()))
    return result


@torch.no_grad()
def generate_uncached(x: Tensor, n: int) -> None:
    """What nanoGPT does: the whole context again for each new token."""
    for _ in range(n):
        logits, _ = model(x[:, -block_size:])
        x = torch.cat((x, logits[:, -1].argmax(-1, keepdim=True)), dim=1)


def measure_decoding(B: int) -> dict[str, Any]:
    """Tokens per second with a batch of B rows."""
    full = get_batch(0)[0][:1].repeat(B, 1)  # (B, T)
    few = max(2, min(20, 60 // B))  # tokens for what is slow
    runs: dict[str, partial] = {"uncached": partial(generate_uncached, full, few)}
    runs["prefill"] = partial(model.generate, full, 1)
    seconds = timing.median_seconds(runs, repeats, machine.device)
    result: dict[str, Any] = {"uncached": B * few / seconds["uncached"], "prefill": full.numel() / seconds["prefill"]}
    print_line(
        f"decoding, batch {B}: {si_number(result['uncached'])} tokens/s without the cache; "
        f"prefill {si_number(result['prefill'])}"
    )
    for name, compile_seconds, generate in timing.decoders(model, B, formats, machine):
        runs = {"from_one": partial(generate, full[:, :1], new_tokens)}
        runs |= {"from_full": partial(generate, full, new_tokens)}
        speed = {key: B * new_tokens / s for key, s in timing.median_seconds(runs, repeats, machine.device).items()}
        result[name] = speed | {"compile_seconds": compile_seconds}
        compiling = f", after compiling for {compile_seconds:.1f} s" if compile_seconds else ""
        print_line(
            f"  {name.replace('_', ', ')}: {si_number(speed['from_one'])} tokens/s from one token, "
            f"{si_number(speed['from_full'])} after a full context{compiling}"
        )
    return result


def measure_reading() -> dict[str, float]:
    speeds = read_speed(read_megabytes)
    print_line(f"reading {read_megabytes:g} MB: " + ", ".join(f"{name} {v:,.0f} MB/s" for name, v in speeds.items()))
    return speeds


def measure_start() -> dict[str, float]:
    """Seconds of `import torch`, and of train.py until its first step, with the settings of this call."""
    files = [word for word in sys.argv[1:] if word.endswith(".py") and not word.startswith("--")]
    result = timing.start_seconds([*files, *(f"--{key}={config[key]}" for key in sorted(given & TRAINING))], repeats)
    print_line(
        f"import torch: {result['import_torch']:.2f} s; train.py, from the command to its first step: "
        f"{result['first_step']:.2f} s, {result['ratio']:.2f} times as long (medians of {repeats})"
    )
    return result


def run_json(script: str, *argv: str) -> dict[str, Any]:
    """What a script of ours prints with --json. Its process has the machine to itself: this one waits."""
    options = [f"--out_dir={out_dir}", f"--device={machine.device}", "--json", *argv]
    done = subprocess.run([sys.executable, str(ROOT / script), *options], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{script} fails: {done.stderr.strip().removeprefix('error: ')}")
    return loads(done.stdout)


def measure_compression() -> dict[str, Any]:
    """compress.py on the validation text, both ways, next to the loss of evaluate.py and to other compressors."""
    loss = run_json("evaluate.py")
    name = str(load_run(out_dir, "best")["config"].get("dataset", ""))
    data = open_data(name, "val")
    ids = data.tokens(0, min(len(data), int(compress_megabytes * 1e6)))
    text = from_json(data.meta["tokenizer"]).decode_bytes(ids.tolist())[: int(compress_megabytes * 1e6)]
    result: dict[str, Any] = {"bytes": len(text), "evaluate_bits_per_byte": loss["bits_per_byte"], "streams": {}}
    print_line(f"compressing {len(text):,} bytes of {name}; evaluate.py: {loss['bits_per_byte']:.4f} bits per byte")
    with tempfile.TemporaryDirectory() as folder:
        source, packed, restored = (str(Path(folder) / part) for part in ("text", "text.mgpt", "restored"))
        Path(source).write_bytes(text)
        for streams in compress_streams.split(","):
            there = run_json("compress.py", source, f"--to={packed}", f"--streams={streams}", "--overwrite")
            back = run_json("compress.py", "--decompress", packed, f"--to={restored}", "--overwrite")
            if Path(restored).read_bytes() != text:
                raise UserError("compress.py does not give the text back. Please report it")
            bits = 8 * there["mgpt"] / len(text)
            row = {
                "bits_per_byte": bits, "added_to_evaluate": bits / loss["bits_per_byte"] - 1,
                "added_by_coder": there["coder_bytes"] / there["model_bytes"] - 1,
                "compress_bytes_per_second": there["bytes_per_second"],
                "decompress_bytes_per_second": back["bytes_per_second"],
            }  # fmt: skip
            result["streams"][str(there["streams"])] = row
            print_line(
                f"  {there['streams']} streams: {bits:.4f} bits per byte ({row['added_to_evaluate']:+.2%} of "
                f"evaluate.py's, {row['added_by_coder']:+.3%} by the coder); "
                f"{si_number(there['bytes_per_second'])} bytes/s there, {si_number(back['bytes_per_second'])} back"
            )
    result |= {name: 8 * there[name] / len(text) for name in ("xz", "bzip2", "gzip")}
    print_line("  " + ", ".join(f"{name} {result[name]:.4f}" for name in ("xz", "bzip2", "gzip")))
    return result


print_line(f"{device_name(machine.device.type)}, torch {torch.__version__}")
for choice, reason in machine.reasons.items():
    print_line(f"  {choice}: {reason}")
if init_from != "scratch":
    print_line(f"  init_from={init_from} has no effect here: the model has the size of the settings, n_layer and so on")
result: dict[str, Any] = {"device": machine.device.type, "dtype": str(machine.dtype).removeprefix("torch.")}
chosen = parts.split(",")
if "matmul" in chosen:
    result["matmul_flops"] = measure_matmul()
if "train" in chosen or "decode" in chosen:
    model, get_batch = timing.random_model(config, machine)
if "train" in chosen:
    result["train"] = measure_training()
if "decode" in chosen:
    model.eval()
    result["decode"] = {str(size): measure_decoding(size) for size in batch_sizes}
if "read" in chosen:
    result["read_megabytes_per_second"] = measure_reading()
if "start" in chosen:
    result["start"] = measure_start()
if "compress" in chosen:
    result["compress"] = measure_compression()
result["peak_memory_bytes"] = peak_memory(machine.device)
print_line(f"peak memory: {si_number(result['peak_memory_bytes'], 'B')}")
if json:
    print(dumps(result))
