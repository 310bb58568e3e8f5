"""minuteGPT next to other programs:  python dev/compare.py --nanogpt=PATH config/shakespeare_cpu.py

Training steps and decoding next to nanoGPT; BPE training next to tokenizers and minbpe; encoding next to tiktoken.
The programs alternate, A B A B, and the medians are compared. The part `recipe` trains nanoGPT's CPU recipe, then the
config that is named, and evaluates both on the whole validation split.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from json import dumps, loads
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure

from minutegpt import plot, timing
from minutegpt.config import configure, model_defaults, settings_of
from minutegpt.data.dataset import open_data
from minutegpt.data.pipeline import ensure_dataset
from minutegpt.data.tokenizer import from_json
from minutegpt.device import device_name, init_machine
from minutegpt.errors import ROOT, UserError
from minutegpt.log import si_number
from minutegpt.results import read_log
from model import GPTConfig

# ----------------------------------------------------------------------------------------------------------------
# every setting, with its default. The model's settings and config files are those of train.py
nanogpt = ""  # a checkout of nanoGPT, for the parts train and decode
minbpe = ""  # a checkout of minbpe, for the part bpe
parts = "train,decode"  # what is compared: some of train, decode, recipe, bpe, encode
picture = ""  # part recipe: a PNG file of both losses over the seconds, start-up included
walls = 0.0  # part recipe: ours trains for this many times nanoGPT's seconds; 0: as long as the config says
repeats = 5  # rounds of the alternation
steps = 4  # training steps per round
decode_batches = "1,32"  # batch sizes of decoding
decode_formats = "float32,bfloat16"  # of our weights in decoding; int8, int4 and int4-tensor too
new_tokens = 500  # decoded from one token, and after a full context
json = False  # print one JSON object on one line
init_from = "scratch"  # no effect: the weights are random, and the model's size is that of the settings
dataset = "shakespeare_char"
batch_size = 64
vocab_size = 0  # 0 is the dataset's
optimizer = "adamw"  # adamw, muon; nanoGPT's is AdamW
device = "auto"
dtype = "auto"
compile = "auto"
# ----------------------------------------------------------------------------------------------------------------
TRAINING = settings_of(ROOT / "train.py")
config, given = configure(globals(), __file__, model=GPTConfig, ignore=TRAINING)
globals().update(config)
PARTS = ("train", "decode", "recipe", "bpe", "encode")
NANOGPT_RECIPE = (  # its README's, for a CPU; it keeps the checkpoint of its lowest estimate
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
chosen = parts.split(",")
if unknown := [part for part in chosen if part not in PARTS]:
    raise UserError(f"--parts={','.join(unknown)} is not one of {', '.join(PARTS)}. python bench.py has others")
if {"train", "decode", "recipe"} & {*chosen} and not Path(nanogpt, "model.py").is_file():
    raise UserError(f"--nanogpt={nanogpt}: there is no {Path(nanogpt) / 'model.py'}. Name a checkout of nanoGPT")
formats, batch_sizes = timing.decoding_formats(decode_formats), timing.batch_sizes(decode_batches)
machine = init_machine(device, dtype, compile)


def print_line(text: str) -> None:
    print(text, file=sys.stderr if json else sys.stdout, flush=True)


def nanogpt_model() -> Any:
    """The model of the checkout, with the settings that it has too."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(nanogpt) / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    shape = {key: config[key] for key in ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}
    return module.GPT(module.GPTConfig(vocab_size=model.config.vocab_size, **shape)).to(machine.device)


def compare_training() -> dict[str, Any]:
    """Tokens per second of training steps."""
    ours, optimizers = machine.wrap(model), timing.optimizers_of(model, optimizer, machine)
    # on a CPU nanoGPT trains uncompiled and in float32, as its README says
    baseline = their_model if machine.is_cpu else torch.compile(their_model)
    their_optimizer = their_model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), machine.device.type)
    their_machine = init_machine(device, "float32", "false") if machine.is_cpu else machine

    def train_ours() -> None:
        for step in range(steps):
            timing.training_step(ours, optimizers, partial(get_batch, step), machine)

    def train_nanogpt() -> None:
        for step in range(steps):
            timing.training_step(baseline, [their_optimizer], partial(get_batch, step), their_machine)

    runs: dict[str, Callable[[], None]] = {"ours": train_ours, "nanogpt": train_nanogpt}
    for run in runs.values():
        run()  # warms up, compiles
    tokens = steps * batch_size * model.config.block_size
    speed = {name: tokens / s for name, s in timing.median_seconds(runs, repeats, machine.device).items()}
    ratio = speed["ours"] / speed["nanogpt"]
    print_line(
        f"training: {si_number(speed['ours'])} tokens/s, nanoGPT {si_number(speed['nanogpt'])}: ratio {ratio:.2f}"
    )
    return {"tokens_per_second": speed, "ratio": ratio}


def compare_decoding(B: int) -> dict[str, Any]:
    """Tokens per second with a batch of B rows. nanoGPT's context is full, and ours starts from one token and full."""
    full = get_batch(0)[0][:1].repeat(B, 1)  # (B, T)
    few = max(2, min(20, 60 // B))  # tokens for nanoGPT, which reads the whole context for each
    result: dict[str, Any] = {}
    for name, compile_seconds, generate in timing.decoders(model, B, formats, machine):
        runs: dict[str, Callable[[], Any]] = {
            "from_one": partial(generate, full[:, :1], new_tokens),
            "from_full": partial(generate, full, new_tokens),
            "nanogpt": partial(their_model.generate, full, few, top_k=200),
        }
        seconds = timing.median_seconds(runs, repeats, machine.device)
        speed = {key: B * (few if key == "nanogpt" else new_tokens) / s for key, s in seconds.items()}
        ratios = {f"{key}_ratio": speed[key] / speed["nanogpt"] for key in ("from_one", "from_full")}
        result[name] = speed | ratios | {"compile_seconds": compile_seconds}
        print_line(
            f"decoding, batch {B}, {name.replace('_', ', ')}: {si_number(speed['from_one'])} tokens/s from one token, "
            f"{si_number(speed['from_full'])} after a full context, nanoGPT {si_number(speed['nanogpt'])}: "
            f"ratios {ratios['from_one_ratio']:.1f} and {ratios['from_full_ratio']:.1f}"
        )
    return result


def timed_lines(argv: list[str], folder: Path) -> list[tuple[float, str]]:
    """Runs a script in a folder. Returns the lines that it prints, each with its second, and the whole time, ""."""
    began, lines = time.perf_counter(), []
    command, env = [sys.executable, *argv], os.environ | {"PYTHONUNBUFFERED": "1"}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=env, encoding="utf-8", errors="replace", **streams) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append((time.perf_counter() - began, line.rstrip()))
    lines.append((time.perf_counter() - began, ""))
    if process.returncode:
        last = next((line for _, line in reversed(lines) if line.strip()), "no output")
        raise UserError(f"{argv[0]} failed: {last}. Try python {' '.join(argv)} there")
    return lines


def nanogpt_rows(lines: list[tuple[float, str]]) -> list[dict[str, float]]:
    """The losses that nanoGPT printed, as rows like those of log.jsonl."""
    patterns = {"train_loss": r"iter \d+: loss ([\d.]+)", "val_loss": r"step \d+: .*val loss ([\d.]+)"}
    found = [(second, key, re.match(pattern, line)) for second, line in lines for key, pattern in patterns.items()]
    return [{"seconds": second, key: float(match[1])} for second, key, match in found if match]


def our_rows(lines: list[tuple[float, str]], out: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl, with the seconds since the command, where the log has those since the first step."""
    rows = read_log(out / "log.jsonl")
    printed = {int(match[1]): second for second, line in lines if (match := re.match(r"step +(\d+)", line))}
    start = min(printed[row["step"]] - row["seconds"] for row in rows if row["step"] in printed)
    return [row | {"seconds": start + row["seconds"]} for row in rows]


def draw_recipes(curves: dict[str, list[dict[str, Any]]], losses: dict[str, float], path: str) -> None:
    """Training losses as lines, validation losses as dots, over the seconds since the command."""
    figure = Figure(figsize=(6, 3.5), dpi=120, layout="constrained")
    (ax,) = plot.new_axes(figure)
    drawn: list[float] = []
    for (name, rows), colour in zip(curves.items(), (plot.COLOURS[1], plot.COLOURS[0]), strict=True):
        seconds, train = plot.points(rows, "seconds", "train_loss")
        means = [fmean(train[max(0, i - len(train) // 100) : i + 1]) for i in range(len(train))]  # of 1% of the run
        ax.plot(seconds, means, color=colour, linewidth=1, alpha=0.5)
        seconds, val = plot.points(rows, "seconds", "val_loss")
        ax.plot(seconds, val, color=colour, marker=".", linewidth=1.8, label=f"{name}: {losses[name]:.3f}")
        drawn += [*means, *val]
    plot.loss_axis(ax, drawn)
    ax.set_xlabel(f"seconds since the command, {device_name(machine.device.type)}", color=plot.INK)
    ax.legend(frameon=False, fontsize=8, labelcolor=plot.INK, title="validation loss", title_fontsize=8)
    plot.save(figure, path)


def whole_split_loss(out_dir: Path) -> float:
    argv = ["evaluate.py", f"--out_dir={out_dir}", f"--dataset={dataset}", "--json", f"--device={machine.device}"]
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the run in {out_dir} could not be evaluated. The reason is printed above")
    return float(loads(done.stdout.splitlines()[-1])["loss"])


def compare_recipes() -> dict[str, Any]:
    """Seconds from command to exit, and whole-split losses, of nanoGPT's CPU recipe and of ours after it."""
    data = [open_data(ensure_dataset(dataset), split) for split in ("train", "val")]
    text = "".join(from_json(each.meta["tokenizer"]).decode(each.tokens(0, len(each)).tolist()) for each in data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "nanoGPT"  # a copy: its script writes next to itself
        shutil.copytree(nanogpt, folder, ignore=shutil.ignore_patterns(".git", "*.bin", "out*"))
        (folder / "data" / "shakespeare_char" / "input.txt").write_text(text, encoding="utf-8")
        timed_lines(["data/shakespeare_char/prepare.py"], folder)
        recipe = ["train.py", "config/train_shakespeare_char.py", *NANOGPT_RECIPE, "--out_dir=out"]
        their_lines = timed_lines(recipe, folder)
        wall = their_lines[-1][0]
        result = {"nanogpt": {"seconds": wall, "loss": whole_split_loss(folder / "out")}}
        out = Path(name) / "ours"
        files = [str(Path(word).resolve()) for word in sys.argv[1:] if word.endswith(".py")]
        typed = given & (TRAINING | model_defaults(GPTConfig).keys()) - {"init_from", "dataset"}
        ours = ["train.py", *files, *(f"--{key}={config[key]}" for key in sorted(typed))]
        ours += [f"--max_minutes={walls * wall / 60}"] if walls else []
        lines = timed_lines([*ours, f"--dataset={dataset}", f"--out_dir={out}"], ROOT)
        seconds = lines[-1][0]
        result["ours"] = {"seconds": seconds, "loss": whole_split_loss(out), "walls": seconds / wall}
        if picture:
            curves = {"nanoGPT, CPU recipe": nanogpt_rows(their_lines), "minuteGPT": our_rows(lines, out)}
            losses = [values["loss"] for values in result.values()]
            draw_recipes(curves, dict(zip(curves, losses, strict=True)), picture)
    for program, values in result.items():
        print_line(f"{program}: loss {values['loss']:.4f} after {values['seconds']:.1f} s")
    return result


def compare_tokenizers() -> dict[str, Any]:
    """Seconds of BPE training and of encoding, from a separate process: its workers import the script that it runs."""
    command = [sys.executable, "-m", "dev.time_tokenizers", dataset, parts, minbpe and str(Path(minbpe).resolve())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise UserError("the tokenizers could not be measured. The reason is printed above")
    result = loads(done.stdout)
    if seconds := result.get("bpe_seconds"):
        print_line("BPE, 4096 ids: " + ", ".join(f"{name} {s:.3g} s" for name, s in seconds.items()))
    if seconds := result.get("encode_seconds"):
        ratio = seconds["tiktoken"] / seconds["ours"]
        print_line(f"encoding 250 MB: {seconds['ours']:.3g} s, tiktoken {seconds['tiktoken']:.3g} s: ratio {ratio:.2f}")
    return result


print_line(f"{device_name(machine.device.type)}, torch {torch.__version__}")
result: dict[str, Any] = {"device": machine.device.type, "dtype": str(machine.dtype).removeprefix("torch.")}
if {"train", "decode"} & {*chosen}:
    model, get_batch = timing.random_model(config, machine)
    their_model = nanogpt_model()
if "train" in chosen:
    result["train"] = compare_training()
if "decode" in chosen:
    model.eval(), their_model.eval()
    result["decode"] = {str(size): compare_decoding(size) for size in batch_sizes}
if "recipe" in chosen:
    result["recipe"] = compare_recipes()
if {"bpe", "encode"} & {*chosen}:
    result |= compare_tokenizers()
if json:
    print(dumps(result))
