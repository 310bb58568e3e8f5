"""How fast this machine trains and writes:  python bench.py [config/FILE.py] [--nanogpt=PATH] [--json]

Matrix products give the physical limit; then a training step, split into its parts; then decoding, with the cache and
without. With --nanogpt the same work is done by that checkout of nanoGPT in alternation, A B A B, and medians compared.
"""

import minutegpt.start  # noqa: F401, I001  first: it finds the environment that has torch

import importlib.util
import statistics
import sys
import time
from dataclasses import fields
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minutegpt import bpe_bench
from minutegpt.configurator import configure, require
from minutegpt.device import DTYPES, cpu_name, matmul_seconds, peak_flops, peak_memory, pick, synchronize
from minutegpt.optim import make_optimizers
from minutegpt.prepare import ensure_dataset
from minutegpt.report import amount
from minutegpt.shards import open_data
from minutegpt.start import UserError
from minutegpt.tokenizer import from_json, train_bpe
from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------------------------
# every knob, with its default. the model's are those of train.py, and so is a config file for it
parts = "matmul,train,decode"  # what is measured. bpe, encode: training a tokenizer on the dataset, and encoding
nanogpt = ""  # the folder of a nanoGPT checkout to measure beside
minbpe = ""  # the folder of a minbpe checkout to measure its trainer too
repeats = 5  # rounds of the alternation; medians are told
steps = 4  # training steps a round
decode_batches = "1,32"  # batch sizes that decoding is measured at
new_tokens = 500  # decoded behind a full context
json = False  # one object on one line of standard output
dataset = "shakespeare_char"
batch_size = 64
block_size = 256
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
    "gradient_accumulation_steps"
).split()
config, _ = configure(globals(), __file__, others=OTHERS)
globals().update(config)
require(config, at_least={"repeats": 1, "steps": 1, "batch_size": 1, "new_tokens": 1})
machine = pick(device, dtype, compile)
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
for choice, reason in machine.why:
    tell(f"  {choice}: {reason}")

if "matmul" in parts:
    found["matmul_flops"] = {}
    for name, kind in DTYPES.items():
        if name != "float16" or machine.device.type == "cuda":
            n = 1024 if machine.device.type == "cpu" else 8192
            found["matmul_flops"][name] = 2 * n**3 / matmul_seconds(machine.device, kind, n)
            tell(f"matrix product, {name}: {amount(found['matmul_flops'][name], 'FLOP/s')}")

knobs: dict[str, Any] = {f.name: config[f.name] for f in fields(GPTConfig) if f.name != "vocab_size"}
dataset = ensure_dataset(dataset, fallback="python_code")
data = open_data(dataset, "train", block_size)
torch.manual_seed(1337)
model = GPT(GPTConfig(vocab_size=data.meta["tokenizer"]["vocab_size"], **knobs)).to(machine.device)
theirs: Any = their_model() if nanogpt else None
tokens = batch_size * block_size


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = data.starts(block_size, 1337, np.arange(step * batch_size, (step + 1) * batch_size))
    windows = data.windows(starts, block_size + 1).to(machine.device)  # (B, T+1)
    return windows[:, :-1], windows[:, 1:].contiguous()


if "train" in parts:
    ours = torch.compile(model) if machine.compile else model
    optimizers = make_optimizers(
        model, str(optimizer), ns_dtype=torch.bfloat16 if machine.dtype == torch.bfloat16 else torch.float32
    )
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
    tell(f"training step, {batch_size} x {block_size} tokens, {amount(model.n_params())} parameters:")
    tell(f"  {amount(speed['ours'])} tokens/s, {tokens / speed['ours']:.3g} s a step, {mfu:.1%} of the peak ({source})")
    tell("  " + ", ".join(f"{part} {1000 * s:.3g} ms" for part, s in found["train"]["seconds"].items()))
    if theirs:
        found["train"]["ratio"] = speed["ours"] / speed["nanogpt"]
        tell(f"  nanoGPT {amount(speed['nanogpt'])} tokens/s: ours is {found['train']['ratio']:.2f} times as fast")

if "decode" in parts:
    found["decode"] = {}
    model.eval()

    @torch.no_grad()
    def uncached(x: torch.Tensor, new: int) -> None:
        for _ in range(new):
            logits, _ = model(x[:, -block_size:])
            x = torch.cat((x, logits[:, -1].argmax(-1, keepdim=True)), dim=1)

    for B in [int(size) for size in decode_batches.split(",")]:
        x = batch(0)[0][:1].repeat(B, 1)  # (B, T): the context is full from the start
        few = max(2, min(20, 60 // B))  # the slow ways are measured on fewer tokens
        model.generate(x, 10)
        cached = rates({"cached": lambda x=x: model.generate(x, new_tokens, top_k=200)}, B * new_tokens)
        runs = {"uncached": lambda x=x, few=few: uncached(x, few)}
        if theirs:
            theirs.eval()
            runs["nanogpt"] = lambda x=x, few=few: theirs.generate(x, few, top_k=200)
        slow = rates(runs, B * few)
        prefill = rates({"prefill": lambda x=x: model.generate(x, 1)}, x.numel())
        found["decode"][str(B)] = cached | slow | prefill
        tell(f"decoding, batch {B}: {amount(cached['cached'])} tokens/s, {amount(slow['uncached'])} without the cache")
        tell(f"  prefill {amount(prefill['prefill'])} tokens/s")
        if theirs:
            ratio = cached["cached"] / slow["nanogpt"]
            tell(f"  nanoGPT {amount(slow['nanogpt'])} tokens/s: ours is {ratio:.1f} times as fast")

if "bpe" in parts or "encode" in parts:
    text = from_json(data.meta["tokenizer"]).decode(data.tokens(0, len(data)))
if "bpe" in parts:
    seconds = bpe_bench.train_seconds(text, 4096, minbpe)
    found["bpe_seconds"] = seconds
    tell("BPE, 4096 ids: " + ", ".join(f"{name} {each:.3g} s" for name, each in seconds.items()))
if "encode" in parts:
    seconds = bpe_bench.encode_seconds([text] * max(1, 250_000_000 // len(text)), train_bpe([text], 4096))
    found["encode_seconds"] = seconds
    tell(f"encoding 250 MB: ours {seconds['ours']:.3g} s, tiktoken's batches {seconds['tiktoken']:.3g} s: "
         f"{seconds['tiktoken'] / seconds['ours']:.2f} times its speed")  # fmt: skip

found["peak_memory_bytes"] = peak_memory(machine.device)
tell(f"peak memory: {amount(found['peak_memory_bytes'], 'B')}")
if json:
    print(dumps(found))
