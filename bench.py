"""How fast this machine trains and writes:  python bench.py [config/FILE.py] [--nanogpt=PATH] [--json]

Matrix products give the physical limit; then a training step, split into its parts; then decoding, with the cache and
without. With --nanogpt the same work is done by that checkout of nanoGPT in alternation, A B A B, and medians compared.
"""

import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import copy
import importlib.util
import statistics
import subprocess
import sys
import time
from dataclasses import fields
from json import dumps, loads
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minutegpt.config import configure, require
from minutegpt.generate import compile_decode
from minutegpt.device import (
    DTYPES, cpu_name, fast_dropout, init_machine, matmul_seconds, peak_flops, peak_memory, synchronize,
)  # fmt: skip
from minutegpt.optim import make_optimizers
from minutegpt.data.pipeline import ensure_dataset
from minutegpt.quantize import FORMATS, quantize_model
from minutegpt.log import si_number
from minutegpt.data.dataset import open_data
from minutegpt.errors import ROOT, UserError
from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------------------------
# every knob, with its default. the model's are those of train.py, and so is a config file for it
parts = "matmul,train,decode"  # what is measured. bpe, encode: training a tokenizer on the dataset, and encoding
nanogpt = ""  # the folder of a nanoGPT checkout to measure beside
minbpe = ""  # the folder of a minbpe checkout to measure its trainer too
repeats = 5  # rounds of the alternation; medians are told
steps = 4  # training steps a round
decode_batches = "1,32"  # batch sizes that decoding is measured at
decode_formats = "float32,bfloat16"  # and what the weights are read in: int8 and int4 too (sample.py --quantize)
new_tokens = 500  # decoded from one token, and behind a full context; the cache is filled anew on the way
json = False  # one object on one line of standard output
dataset = "shakespeare_char"
batch_size = 64
block_size = 256
vocab_size = 0  # 0 is the dataset's
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
bias = False
pos = "learned"
norm = "layernorm"
norm_position = "pre"
activation = "gelu"
qk_norm = False
tie = True
softcap = 0.0
n_kv_head = 0
zero_init = False
ngram = 0
ngram_rows = 32768
n_expert = 0
n_expert_active = 2
optimizer = "adamw"
device = "auto"
dtype = "auto"
compile = "auto"
# ----------------------------------------------------------------------------------------------------------------
OTHERS = (  # knobs of train.py that a config file may set, and that do not change the speed
    "qat out_dir eval_interval eval_iters log_interval max_iters max_minutes learning_rate weight_decay beta1 beta2 "
    "muon_lr muon_weight_decay grad_clip decay_lr lr_schedule decay_fraction warmup_iters lr_decay_iters min_lr seed "
    "gradient_accumulation_steps ngram_weight_decay"
).split()
config, _ = configure(globals(), __file__, ignore=OTHERS)
globals().update(config)
require(config, at_least={"repeats": 1, "steps": 1, "batch_size": 1, "new_tokens": 1})
for name in str(decode_formats).split(","):
    require({"decode_formats": name}, one_of={"decode_formats": ("float32", "bfloat16", *FORMATS)})
machine = init_machine(device, dtype, compile)
found: dict[str, Any] = {"device": machine.device.type, "dtype": str(machine.dtype).removeprefix("torch.")}


def tell(text: str) -> None:
    print(text, file=sys.stderr if json else sys.stdout, flush=True)


def rates(runs: dict[str, Any], work: float) -> dict[str, float]:
    """Runs each of `runs` in turn, `repeats` times over; work a second of each, by the median time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            synchronize(machine.device)
            began = time.perf_counter()
            run()
            synchronize(machine.device)
            times[name].append(time.perf_counter() - began)
    return {name: work / statistics.median(each) for name, each in times.items()}


def their_model() -> Any:
    """nanoGPT's model.py, from the checkout."""
    path = Path(nanogpt) / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--nanogpt={nanogpt}: there is no {path}. It names a checkout of nanoGPT")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    shape = {key: config[key] for key in ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}
    return module.GPT(module.GPTConfig(vocab_size=model.config.vocab_size, **shape)).to(machine.device)


tell(f"{cpu_name() if machine.device.type == 'cpu' else torch.cuda.get_device_name()}, torch {torch.__version__}")
for choice, reason in machine.reasons.items():
    tell(f"  {choice}: {reason}")

if "matmul" in parts:
    found["matmul_flops"] = {}
    for name, kind in DTYPES.items():
        if name != "float16" or machine.device.type == "cuda":
            n = 1024 if machine.device.type == "cpu" else 8192
            found["matmul_flops"][name] = 2 * n**3 / matmul_seconds(machine.device, kind, n)
            tell(f"matrix product, {name}: {si_number(found['matmul_flops'][name], 'FLOP/s')}")

knobs: dict[str, Any] = {f.name: config[f.name] for f in fields(GPTConfig) if f.name != "vocab_size"}
dataset = ensure_dataset(dataset, fallback="python_code")
data = open_data(dataset, "train", block_size)
torch.manual_seed(1337)
model = GPT(GPTConfig(vocab_size=vocab_size or data.meta["tokenizer"]["vocab_size"], **knobs)).to(machine.device)
fast_dropout(model)
theirs: Any = their_model() if nanogpt else None
tokens = batch_size * block_size


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = data.starts(block_size, 1337, np.arange(step * batch_size, (step + 1) * batch_size))
    windows = data.windows(starts, block_size + 1).to(machine.device)  # (B, T+1)
    return windows[:, :-1], windows[:, 1:].contiguous()


if "train" in parts:
    ours = torch.compile(model) if machine.compile else model
    rates_of = {"learning_rate": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "muon_lr": 0.02}
    rates_of |= {"muon_weight_decay": 0.0, "ngram_weight_decay": 5.0}
    optimizers = make_optimizers(model, {"optimizer": optimizer, **rates_of}, machine.matmul_dtype)
    split: dict[str, list[float]] = {"data": [], "forward": [], "backward": [], "optimizer": []}

    def our_steps() -> None:
        for step in range(steps):
            marks = [time.perf_counter()]

            def mark(marks: list[float] = marks) -> None:
                if machine.device.type == "cpu":  # a GPU would be slowed by waiting in between
                    marks.append(time.perf_counter())

            x, y = batch(step)
            mark()
            with machine.training():
                _, loss = ours(x, y)
            mark()
            loss.backward()
            mark()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            for each in optimizers:
                each.step()
                each.zero_grad(set_to_none=True)
            mark()
            for part, seconds in zip(split, np.diff(marks), strict=False):
                split[part].append(float(seconds))

    def their_steps() -> None:
        for step in range(steps):
            x, y = batch(step)
            with machine.autocast() if machine.device.type == "cuda" else torch.autocast("cpu", enabled=False):
                _, loss = their_train_model(x, y)  # on a CPU nanoGPT trains in float32, uncompiled (its README)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            their_optimizer.step()
            their_optimizer.zero_grad(set_to_none=True)

    runs: dict[str, Any] = {"ours": our_steps}
    if theirs:
        their_optimizer = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.99), machine.device.type)
        their_train_model = torch.compile(theirs) if machine.device.type == "cuda" else theirs
        runs["nanogpt"] = their_steps
    for run in runs.values():
        run()  # warm up, compile
    for times in split.values():
        times.clear()
    speed = rates(runs, steps * tokens)
    peak, source = peak_flops(machine)
    mfu = speed["ours"] * model.flops_per_token() / peak
    found["train"] = {"tokens_per_second": speed, "mfu": mfu, "peak_flops": peak, "peak_source": source}
    found["train"]["seconds"] = {part: statistics.median(times) for part, times in split.items() if times}
    tell(f"training step, {batch_size} x {block_size} tokens, {si_number(model.n_params())} parameters:")
    tell(
        f"  {si_number(speed['ours'])} tokens/s, {tokens / speed['ours']:.3g} s a step, {mfu:.1%} of the peak ({source})"  # noqa: E501
    )
    tell("  " + ", ".join(f"{part} {1000 * s:.3g} ms" for part, s in found["train"]["seconds"].items()))
    if theirs:
        found["train"]["ratio"] = speed["ours"] / speed["nanogpt"]
        tell(f"  nanoGPT {si_number(speed['nanogpt'])} tokens/s: ours is {found['train']['ratio']:.2f} times as fast")

if "decode" in parts:
    found["decode"] = {}
    model.eval()

    @torch.no_grad()
    def uncached(x: torch.Tensor, new: int) -> None:
        for _ in range(new):
            logits, _ = model(x[:, -block_size:])
            x = torch.cat((x, logits[:, -1].argmax(-1, keepdim=True)), dim=1)

    def generate(writer: GPT, dtype: torch.dtype, x: torch.Tensor) -> None:
        with torch.autocast(machine.device.type, dtype, enabled=dtype == machine.dtype != torch.float32):
            writer.generate(x, new_tokens, top_k=200)

    for B in [int(size) for size in decode_batches.split(",")]:
        full = batch(0)[0][:1].repeat(B, 1)  # (B, T): the context is full from the start
        one = full[:, :1]
        few = max(2, min(20, 60 // B))  # the slow ways are measured on fewer tokens
        runs = {"uncached": lambda full=full, few=few: uncached(full, few)}
        if theirs:
            theirs.eval()
            runs["nanogpt"] = lambda full=full, few=few: theirs.generate(full, few, top_k=200)
        told: dict[str, Any] = rates(runs, B * few)
        told |= rates({"prefill": lambda full=full: model.generate(full, 1)}, full.numel())
        found["decode"][str(B)] = told
        beside = f"nanoGPT {si_number(told['nanogpt'])}; " if theirs else ""
        tell(f"decoding, batch {B}: {si_number(told['uncached'])} tokens/s without the cache; {beside}"
             f"prefill {si_number(told['prefill'])}")  # fmt: skip
        for name in str(decode_formats).split(","):
            writer, kind = model, DTYPES.get(name, torch.float32)
            if name in FORMATS:
                quantize_model(writer := copy.deepcopy(model), name)
            ways: dict[str, Any] = {"eager": False} | ({"compiled": True} if machine.compile else {})
            for way, compiled in ways.items():
                if kind == torch.bfloat16 != machine.dtype and not compiled:
                    continue  # not native: all but the compiled step would be emulated
                warm_up = compile_decode(writer, B, kind if kind != torch.float32 else None) if compiled else 0.0
                speed = rates(
                    {
                        "from_one": lambda writer=writer, kind=kind, one=one: generate(writer, kind, one),
                        "from_full": lambda writer=writer, kind=kind, full=full: generate(writer, kind, full),
                    },
                    B * new_tokens,
                )
                vars(writer).pop("next_logits", None)  # undoes compile_decode
                told[f"{name}_{way}"] = speed | {"warm_up_seconds": warm_up}
                tell(f"  {name}, {way}: {si_number(speed['from_one'])} tokens/s from one token, "
                     f"{si_number(speed['from_full'])} behind a full context"
                     + (f", after a warm-up of {warm_up:.1f} s" if compiled else "")
                     + (f"; {speed['from_one'] / told['nanogpt']:.1f} and {speed['from_full'] / told['nanogpt']:.1f} "
                        "times nanoGPT" if theirs else ""))  # fmt: skip

if "bpe" in parts or "encode" in parts:  # a process of its own: its workers import the script that started them
    command = [sys.executable, "-m", "dev.tokenizers", dataset, parts, minbpe]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if result.returncode:
        raise UserError("the tokenizers could not be measured: see above")
    found |= loads(result.stdout)
if seconds := found.get("bpe_seconds"):
    tell("BPE, 4096 ids: " + ", ".join(f"{name} {each:.3g} s" for name, each in seconds.items()))
if seconds := found.get("encode_seconds"):
    tell(f"encoding 250 MB: ours {seconds['ours']:.3g} s, tiktoken's batches {seconds['tiktoken']:.3g} s: "
         f"{seconds['tiktoken'] / seconds['ours']:.2f} times its speed")  # fmt: skip

found["peak_memory_bytes"] = peak_memory(machine.device)
tell(f"peak memory: {si_number(found['peak_memory_bytes'], 'B')}")
if json:
    print(dumps(found))
