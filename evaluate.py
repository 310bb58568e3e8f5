"""How good a trained model is, over a whole split:  python evaluate.py --out_dir=out-shakespeare-char [--json]

Each token is predicted once, in windows that do not overlap. Perplexity is exp(loss): among how many tokens the
model hesitates. Bits per byte does not depend on the tokenizer, so it compares models that cut text differently.
"""

import minutegpt.start  # noqa: F401, I001  first: it finds the environment that has torch

import math
import sys
import time
from itertools import groupby
from json import dumps

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from minutegpt.checkpoint import load_model
from minutegpt.configurator import configure, require
from minutegpt.device import pick
from minutegpt.quantize import FORMATS, packed_format, quantize_model
from minutegpt.shards import open_data
from minutegpt.start import UserError

# ----------------------------------------------------------------------------------------------------------------
# every knob, with its default; --key=value overrides it
out_dir = "out"  # the run's folder
ckpt = "best"  # best (lowest validation loss), latest
split = "val"  # val, train
dataset = ""  # the run's own; another one must have the same tokenizer
json = False  # one object on one line of standard output
stride = 0  # sliding windows: each predicts its last `stride` tokens from a fuller context; 0 is off
block_size = 0  # tokens a window; 0 is the model's own. beyond it with rotary positions only
batch_size = 32  # windows at once
quantize = ""  # int8, int4: what rounding the weights to 8 or 4 bits costs
device = "auto"  # auto, cpu, cuda, mps
dtype = "float32"  # float32 is exact; bfloat16 is faster on a GPU
# ----------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), __file__)
globals().update(config)
require(
    config,
    at_least={"stride": 0, "block_size": 0, "batch_size": 1},
    one_of={"split": ("train", "val"), "quantize": ("", *FORMATS)},
)

machine = pick(device, dtype, compile="false")
model, tokenizer, state = load_model(out_dir, ckpt, machine.device, dataset)
if quantize := quantize or packed_format(state["model"]):
    quantize_model(model, quantize)
dataset = dataset or state["config"].get("dataset", "")
data = open_data(dataset, split)
same = not state["tokenizer"] or data.meta["tokenizer"] == state["tokenizer"]
if not same or tokenizer.vocab_size > model.config.vocab_size:
    raise UserError(
        f"{dataset} was prepared with another tokenizer than the model in {out_dir} was trained with, so its ids mean "
        "other things. Type --dataset=NAME, the dataset it was trained on, or prepare this one again as it was"
    )
N = len(data)
if N < 2:
    raise UserError(f"the {split} split of {dataset} has {N} token, and nothing to predict. Prepare it with more text")
T = min(block_size or model.config.block_size, N - 1)
if model.config.pos == "learned" and model.config.block_size < T:
    raise UserError(
        f"--block_size={block_size}: the model has learned {model.config.block_size} positions and knows no others. "
        "Type a smaller one; only pos='rope' goes beyond"
    )
if stride > T:
    raise UserError(f"--stride={stride} would skip tokens: a window has {T}. Type a smaller one")
stride = stride or T


@torch.no_grad()
def losses(tokens: torch.Tensor, scored: int) -> torch.Tensor:
    """tokens (B, T+1) -> the loss of each of the last `scored` predictions (B, scored), in nats."""
    tokens = tokens.to(machine.device)
    with machine.autocast():
        x = model.hidden(tokens[:, :-1])[:, -scored:]  # (B, scored, C)
        # row by row: the logits of all the rows can be gigabytes
        rows = [
            F.cross_entropy(model.head(row), targets, reduction="none")
            for row, targets in zip(x, tokens[:, -scored:], strict=True)
        ]
    return torch.stack(rows)


began = time.perf_counter()
bounds = np.unique(np.r_[0, np.arange(T, N - 1, stride), N - 1])  # a window scores the targets between two of them
seen, stops = bounds[:-1], bounds[1:]
firsts = seen if stride == T else np.maximum(0, stops - T)  # with a stride, as much context as fits
windows = zip((stops - firsts).tolist(), (stops - seen).tolist(), firsts.tolist(), strict=True)
total, predictions = 0.0, 0
bar = tqdm(total=N - 1, disable=not sys.stderr.isatty(), leave=False, unit="token", unit_scale=True)
for (length, scored), alike in groupby(windows, key=lambda window: window[:2]):  # the last one is shorter
    starts = np.array([first for _, _, first in alike])
    for i in range(0, len(starts), batch_size):
        found = losses(data.windows(starts[i : i + batch_size], length + 1), scored)  # (B, scored)
        total += found.double().sum().item()
        predictions += found.numel()
        bar.update(found.numel())
bar.close()
assert predictions == N - 1
if not math.isfinite(total):
    raise UserError(f"the loss of the model in {out_dir} is {total}: its weights are no numbers. Try --ckpt=latest")

bytes_of = tokenizer.token_bytes()
n_bytes = sum(int(bytes_of[data.tokens(i, min(N, i + 10_000_000))].sum()) for i in range(1, N, 10_000_000))
loss = total / predictions
result = {
    "split": split,
    "loss": loss,
    "perplexity": math.exp(min(loss, 700)),
    "bits_per_byte": total / math.log(2) / n_bytes,
    "tokens": predictions,
    "bytes": n_bytes,
    "seconds": time.perf_counter() - began,
}
if json:
    print(dumps(result))
else:
    print(
        f"{split} split of {dataset}, {predictions:,} predictions: loss {loss:.4f} nats, "
        f"perplexity {result['perplexity']:.3f}, {result['bits_per_byte']:.4f} bits per byte"
        + (f" (sliding windows, stride {stride})" if stride < T else "")
    )
