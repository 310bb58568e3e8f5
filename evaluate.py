"""How good a trained model is, over a whole split:  python evaluate.py --out_dir=out-shakespeare-char [--json]
Several, side by side:  python evaluate.py --compare out-a out-b gpt2

Each token is predicted once, in windows that do not overlap. Perplexity is exp(loss): among how many tokens the
model hesitates; word perplexity is exp(total nats / words between white space). That, and bits per byte, do not depend
on the tokenizer, so they compare models that cut text differently.
"""

import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import math
import sys
import time
from itertools import groupby
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from minutegpt.checkpoint import build_model
from minutegpt.config import configure, require
from minutegpt.device import init_machine
from minutegpt.huggingface import load_any
from minutegpt import metrics
from minutegpt.quantize import FORMATS, packed_format, quantize_model
from minutegpt.data.dataset import Split, open_data
from minutegpt.errors import UserError
from minutegpt.data.tokenizer import Tokenizer, from_json, gpt2_tokenizer
from model import GPT

# ----------------------------------------------------------------------------------------------------------------
# every knob, with its default; --key=value overrides it
out_dir = "out"  # the run's folder; or a folder of GPT-2 as Hugging Face has it, or gpt2
compare = ""  # several of them, `--compare out-a out-b gpt2`: a table and a picture, all on the first one's text
ckpt = "best"  # best (lowest validation loss), latest
split = "val"  # val, train
dataset = ""  # the run's own; another one must have the same tokenizer
json = False  # one object on one line of standard output
more = False  # in --json too: by words, and the floor, counting pairs of tokens
by_position = False  # the loss by how many tokens stand before, and a picture of it
sampled = 0  # tokens that the model writes, which are held to the training text: does it recite?
temperature = 0.8  # of these; 1 draws from the model's own probabilities
picture = ""  # where the picture goes; by itself compare.png or by_position.png in the run's folder
stride = 0  # sliding windows: each predicts its last `stride` tokens from a fuller context; 0 is off
block_size = 0  # tokens a window; 0 is the model's own. beyond it with rotary positions only
batch_size = 32  # windows at once
quantize = ""  # int8, int4, int4-tensor: what rounding the weights to 8 or 4 bits costs
device = "auto"  # auto, cpu, cuda, mps
dtype = "float32"  # float32 is exact; bfloat16 is faster on a GPU
# ----------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), __file__, lists=("compare",))
globals().update(config)
require(
    config,
    at_least={"stride": 0, "block_size": 0, "batch_size": 1, "sampled": 0, "temperature": 0},
    at_most={"sampled": 1_000_000, "temperature": 1000},
    one_of={"split": ("train", "val"), "quantize": ("", *FORMATS)},
)
machine = init_machine(device, dtype, compile="false")
wide = more or bool(compare) or not json  # what takes another look at the text
places = [out_dir] if not compare or "out_dir" in given else []
places = list(dict.fromkeys([*places, *filter(None, compare.split(","))])) or [out_dir]  # each once
if not Path(picture).parent.is_dir():
    raise UserError(f"--picture={picture}: there is no folder {Path(picture).parent}. Make it, or name another")
for place in places:
    if not Path(place).is_dir():  # told before the first one takes its time
        load_any(place, ckpt)


def open_model(place: str) -> tuple[GPT, Tokenizer, Split, dict[str, Any]]:
    """The model, its tokenizer, the split in its ids, its whole state. All models read the first one's text."""
    global dataset
    state = load_any(place, ckpt)
    model = build_model(state).to(machine.device).eval()
    if form := quantize or packed_format(state["model"]):
        quantize_model(model, form)
    own = str(state["config"].get("dataset", ""))
    if not (dataset := dataset or own):
        raise UserError(f"the model in {place} says of no text: name a prepared one with its words, --dataset=NAME")
    data = open_data(dataset, split)
    tokenizer = from_json(data.meta["tokenizer"])
    if not state["tokenizer"] and not own and model.config.vocab_size == 50257:  # GPT-2's weights without its words
        state["tokenizer"] = gpt2_tokenizer().to_json()
    same = not state["tokenizer"] or state["tokenizer"] == data.meta["tokenizer"]
    if not same and (len(places) > 1 or not own):
        theirs = from_json(state["tokenizer"])
        data, tokenizer, same = metrics.reencode(data, tokenizer, theirs), theirs, True
    if not same or tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{dataset} was prepared with another tokenizer than the model in {place} was trained with, so its ids "
            "mean other things. Type --dataset=NAME, the dataset it was trained on, or prepare this one again as it was"
        )
    if len(data) < 2:
        raise UserError(
            f"the {split} split of {dataset} has {len(data)} token, and nothing to predict. Prepare it with more text"
        )
    return model, tokenizer, data, state


@torch.no_grad()
def losses(model: GPT, tokens: Tensor, scored: int) -> Tensor:
    """tokens (B, T+1) -> the loss of each of the last `scored` predictions (B, scored), in nats."""
    tokens = tokens.to(machine.device)
    with machine.autocast():
        x = model.hidden(tokens[:, :-1])[:, -scored:]  # (B, scored, C)
        # row by row: the logits of all the rows can be gigabytes
        rows = [
            F.cross_entropy(model.unembed(row), targets, reduction="none")
            for row, targets in zip(x, tokens[:, -scored:], strict=True)
        ]
    return torch.stack(rows)


def total_losses(model: GPT, data: Split) -> tuple[np.ndarray, np.ndarray]:
    """The summed loss of the predictions with 1 .. T tokens before them, and their number: (T,) each."""
    N = len(data)
    T = min(block_size or model.config.block_size, N - 1)
    if model.config.pos == "learned" and model.config.block_size < T:
        raise UserError(
            f"--block_size={block_size}: the model has learned {model.config.block_size} positions and knows no "
            "others. Type a smaller one; only pos='rope' goes beyond"
        )
    if stride > T:
        raise UserError(f"--stride={stride} would skip tokens: a window has {T}. Type a smaller one")
    step = stride or T
    bounds = np.unique(np.r_[0, np.arange(T, N - 1, step), N - 1])  # a window scores the targets between two of them
    seen, stops = bounds[:-1], bounds[1:]
    firsts = seen if step == T else np.maximum(0, stops - T)  # with a stride, as much context as fits
    windows = zip((stops - firsts).tolist(), (stops - seen).tolist(), firsts.tolist(), strict=True)
    nats, counts = np.zeros(T), np.zeros(T, np.int64)
    bar = tqdm(total=N - 1, disable=not sys.stderr.isatty(), leave=False, unit="token", unit_scale=True)
    for (length, scored), alike in groupby(windows, key=lambda window: window[:2]):  # the last one is shorter
        starts = np.array([first for _, _, first in alike])
        for i in range(0, len(starts), batch_size):
            found = losses(model, data.windows(starts[i : i + batch_size], length + 1), scored)  # (B, scored)
            nats[length - scored : length] += found.cpu().double().sum(0).numpy()
            counts[length - scored : length] += len(found)
            bar.update(found.numel())
    bar.close()
    assert counts.sum() == N - 1
    return nats, counts


def measure(place: str) -> dict[str, Any]:
    """All that is to say of one model, by the names of --json, and a few more for the table."""
    model, tokenizer, data, state = open_model(place)
    began = time.perf_counter()
    nats, counts = total_losses(model, data)
    if not math.isfinite(nats.sum()):
        raise UserError(
            f"the loss of the model in {place} is {nats.sum()}: its weights are no numbers. Try --ckpt=latest"
        )
    result = metrics.summary(split, float(nats.sum()), data, tokenizer, began, wide)
    if by_position:
        result["by_position"] = metrics.loss_by_context(nats, counts)
    if sampled:
        with machine.autocast():
            result["sampled"] = metrics.memorization(
                model, tokenizer, data, open_data(dataset, "train"), sampled, temperature
            )
    about = {"name": place, "params": model.n_params(), "block_size": model.config.block_size}
    return about | {"steps": state["step"], "trained_seconds": state.get("seconds")} | result


runs = [measure(place) for place in places]
first = runs[0]
if wide:
    runs.append(metrics.bigram_baseline(split, open_data(dataset, split), open_data(dataset, "train")))
if json:
    found = {key: value for key, value in first.items() if key not in metrics.ABOUT}
    found |= {"bigram_loss": runs[-1]["loss"]} if more else {}
    print(dumps(found | ({"compare": runs} if compare else {})))
elif compare:
    print(f"{split} split of {dataset}, {first['words']:,} words; bigram counts pairs of its tokens\n")
    print(metrics.comparison(runs))
else:
    print(
        f"{split} split of {dataset}, {first['tokens']:,} predictions: loss {first['loss']:.4f} nats, "
        f"perplexity {first['perplexity']:.3f}, {first['bits_per_byte']:.4f} bits per byte"
        + (f" (sliding windows, stride {stride})" if 0 < stride < (block_size or first["block_size"]) else "")
        + f"\nby words: perplexity {first['word_perplexity']:,.1f} over {first['words']:,} words; counting pairs of "
        f"tokens, the floor: loss {runs[-1]['loss']:.4f}"
    )
if by_position and not json:
    print("\n" + metrics.positions(runs))
if sampled and not json:
    print("\n" + metrics.recitations(runs))
if compare or by_position or picture:
    folder = Path(places[0] if Path(places[0]).is_dir() else ".")
    picture = picture or str(folder / ("by_position.png" if by_position else "compare.png"))
    metrics.draw(runs, by_position, picture)
    print(f"picture: {picture}", file=sys.stderr)
