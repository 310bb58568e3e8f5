"""How good a trained model is, over a whole split:  python evaluate.py --out_dir=out-shakespeare-char [--json]
Several models on the same text:  python evaluate.py --compare out-a out-b gpt2

Each token is predicted once, in windows that do not overlap. The loss of a mixture is the mean of its datasets' losses,
by weight, and so are its bits per byte. Perplexity is exp(loss): the number of tokens among which the model hesitates.
Word perplexity is exp(total nats / words between white space). Word perplexity and bits per byte do not depend on the
tokenizer, so they compare models whose tokenizers differ.
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

from minutegpt import metrics, truth
from minutegpt.checkpoint import build_model
from minutegpt.config import configure
from minutegpt.data.dataset import Split, open_data, parse_mixture
from minutegpt.data.parallel import batches
from minutegpt.data.tokenizer import Tokenizer, from_json, gpt2_tokenizer
from minutegpt.device import init_machine
from minutegpt.errors import UserError
from minutegpt.huggingface import load_any
from minutegpt.log import read_log
from minutegpt.quantize import packed_format, quantize_model
from minutegpt.verdict import verdict_of_run
from model import GPT

# ----------------------------------------------------------------------------------------------------------------
# every setting, with its default; --key=value overrides it
out_dir = "out"  # the run's folder; or gpt2, or a folder with GPT-2 as Hugging Face has it
compare = ""  # several of them, `--compare out-a out-b gpt2`: a table and a plot, all on the text of the first one
ckpt = "best"  # best (lowest validation loss), latest
split = "val"  # val, train
dataset = ""  # default: the run's own; another one must have the same tokenizer
json = False  # print one JSON object on one line
extra = False  # add word perplexity and the bigram baseline to --json
by_position = False  # the loss by the number of tokens before, with a plot
memorization_tokens = 0  # generate this many tokens and report how much of them is in the training text; 0 is off
temperature = 0.8  # of these tokens; 1 draws from the model's own probabilities
plot_file = ""  # PNG file for the plot; default: compare.png or by_position.png in the run's folder
stride = 0  # sliding windows: each predicts its last `stride` tokens from a longer context; 0 is off
block_size = 0  # tokens per window; 0 is the model's own. Only rotary positions allow more
batch_size = 32  # windows at once
quantize = ""  # int8, int4, int4-tensor: measures what rounding the weights to 8 or 4 bits costs
device = "auto"  # auto, cpu, cuda, mps
dtype = "float32"  # float32 is exact; bfloat16 is faster on a GPU
# ----------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), __file__, lists=("compare",))
globals().update(config)
machine = init_machine(device, dtype, compile="false", training=False)
baselines = extra or bool(compare) or not json  # they take another pass over the text
paths = [out_dir] if not compare or "out_dir" in given else []
paths = list(dict.fromkeys([*paths, *filter(None, compare.split(","))])) or [out_dir]  # without repetitions
if not Path(plot_file).parent.is_dir():
    raise UserError(f"--plot_file={plot_file}: there is no folder {Path(plot_file).parent}. Make it, or name another")
for path in paths:
    if not Path(path).is_dir():  # a mistake is reported before the first evaluation, which takes its time
        load_any(path, ckpt)


def open_text(path: str, state: dict[str, Any], dataset: str) -> tuple[Split, Tokenizer]:
    """The split that the model at `path` is evaluated on, in ids of its own tokenizer."""
    own_dataset = str(state["config"].get("dataset", ""))
    data = open_data(dataset, split)
    trained_on, found = state.get("data_fingerprint", ""), getattr(data, "fingerprint", "")
    if dataset == own_dataset and trained_on and found and trained_on != found:
        print(
            f"warning: {dataset} holds another text than when {path} was trained. These losses are for the new text",
            file=sys.stderr,
        )
    tokenizer = data_tokenizer = from_json(data.meta["tokenizer"])
    saved, vocab_size = state["tokenizer"], state["model_config"]["vocab_size"]
    if not saved and not own_dataset and vocab_size == 50257:  # GPT-2's weights without a tokenizer
        saved = gpt2_tokenizer().to_json()
    same = not saved or saved == data.meta["tokenizer"]
    if not same and (len(paths) > 1 or not own_dataset):
        tokenizer, same = from_json(saved), True
        data = metrics.reencode(data, data_tokenizer, tokenizer)
    if not same or tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{dataset} was prepared with another tokenizer than the model in {path} was trained with, so its ids "
            "mean other tokens. Type --dataset=NAME, the dataset it was trained on, or prepare that dataset again"
        )
    if min(n_tokens for n_tokens, _ in data.parts) < 2:
        raise UserError(
            f"the {split} split of {dataset} has 1 token, and nothing to predict. Prepare it with more text"
        )
    return data, tokenizer


@torch.no_grad()
def losses(model: GPT, tokens: Tensor, scored: int) -> Tensor:
    """tokens (B, T+1) -> the loss of each of the last `scored` predictions (B, scored), in nats."""
    tokens = tokens.to(machine.device)
    with machine.autocast():
        x = model.hidden(tokens[:, :-1])[:, -scored:]  # (B, scored, C)
        # row by row, because the logits of all rows can be gigabytes
        rows = [
            F.cross_entropy(model.unembed(row), targets, reduction="none")
            for row, targets in zip(x, tokens[:, -scored:], strict=True)
        ]
    return torch.stack(rows)


def weighted_losses(model: GPT, data: Split) -> tuple[list[float], np.ndarray, np.ndarray]:
    """The summed loss of each dataset of a mixture, and losses_by_context() of the whole, by weight."""
    found = [losses_by_context(model, part) for part in data.datasets()]
    if len(found) == 1:
        return [float(found[0][0].sum())], *found[0]
    sums, counts = np.zeros((2, max(len(sums) for sums, _ in found)))
    n, total_weight = sum(counts.sum() for _, counts in found), sum(weight for _, weight in data.parts)
    for (own_sums, own_counts), (_, weight) in zip(found, data.parts, strict=True):
        share = weight / total_weight * n / own_counts.sum()
        sums[: len(own_sums)] += share * own_sums
        counts[: len(own_sums)] += share * own_counts
    return [float(own_sums.sum()) for own_sums, _ in found], sums, counts


def losses_by_context(model: GPT, data: Split) -> tuple[np.ndarray, np.ndarray]:
    """For each number of tokens before a prediction, 1 to T: the summed loss and the number of predictions, (T,)."""
    n = len(data) - 1  # predictions
    T = min(block_size or model.config.block_size, n)
    if model.config.pos == "learned" and model.config.block_size < T:
        raise UserError(
            f"--block_size={block_size}: the model has learned {model.config.block_size} positions and no others. "
            "Type a smaller one. Only a model with pos='rope' can read more"
        )
    if stride > T:
        raise UserError(f"--stride={stride} would skip tokens: a window has {T}. Type a smaller one")
    sums, counts = np.zeros(T), np.zeros(T, np.int64)
    bar = tqdm(total=n, disable=not sys.stderr.isatty(), leave=False, unit="token", unit_scale=True)
    windows = metrics.scoring_windows(n, T, stride)
    for (length, scored), same_shape in groupby(windows, key=lambda window: window[1:]):
        for batch in batches(same_shape, batch_size, lambda window: 1):
            starts = np.array([start for start, _, _ in batch])  # (B,)
            nats = losses(model, data.windows(starts, length + 1), scored)  # (B, scored)
            sums[length - scored : length] += nats.cpu().double().sum(0).numpy()
            counts[length - scored : length] += len(batch)
            bar.update(nats.numel())
    bar.close()
    assert counts.sum() == n
    return sums, counts


def measure(path: str, dataset: str) -> dict[str, Any]:
    """All metrics of one model, by the names of --json, and what the tables show of its training.

    dataset: "" is the model's own.
    """
    state = load_any(path, ckpt)
    model = build_model(state).to(machine.device).eval()
    n_params = model.n_params()  # quantized weights are no parameters
    truth.check_once(machine, model)
    if weight_format := quantize or packed_format(state["model"]):
        quantize_model(model, weight_format)
    dataset = dataset or str(state["config"].get("dataset", ""))
    if not dataset:
        raise UserError(
            f"the checkpoint in {path} does not record its dataset. Type --dataset=NAME, a prepared text to measure it "
            "on"
        )
    data, tokenizer = open_text(path, state, dataset)
    began = time.perf_counter()
    nats, sums, counts = weighted_losses(model, data)
    if not math.isfinite(sum(nats)):
        raise UserError(
            f"the loss of the model in {path} is {sum(nats)}: its weights are not finite. Try --ckpt=latest"
        )
    result = {
        "name": path, "dataset": dataset, "params": n_params, "block_size": model.config.block_size,
        "steps": state["step"], "trained_seconds": state.get("seconds"),
        "verdict": verdict_of_run(path, read_log(Path(path) / "log.jsonl")),
    }  # fmt: skip
    parts = [
        metrics.summarize(split, part_nats, part, tokenizer, began, words=baselines)
        for part_nats, part in zip(nats, data.datasets(), strict=True)
    ]
    result |= metrics.mixture_summary(parts, data) | {"seconds": time.perf_counter() - began}
    for part, name in zip(result.get("parts", []), parse_mixture(dataset), strict=False):
        part["dataset"] = name
    if by_position:
        result["by_position"] = metrics.loss_by_context(sums, counts)
    if memorization_tokens:
        train = open_data(dataset, "train")
        with machine.autocast():
            result["memorization"] = metrics.memorization(
                model, tokenizer, data, train, n_tokens=memorization_tokens, temperature=temperature
            )
    return result


def print_results(runs: list[dict[str, Any]]) -> None:
    """Tables and sentences; the first of the runs is the model, or what the others are compared with."""
    first = runs[0]
    if compare:
        print(f"{split} split of {dataset}, {first['words']:,} words; bigram: a model that counts pairs of tokens\n")
        print(metrics.comparison_table(runs))
    else:
        window = block_size or first["block_size"]
        sliding = f" (sliding windows, stride {stride})" if 0 < stride < window else ""
        print(
            f"{split} split of {dataset}, {first['tokens']:,} predictions: loss {first['loss']:.4f} nats per token, "
            f"perplexity {first['perplexity']:.3f}, {first['bits_per_byte']:.4f} bits per byte{sliding}\n"
            f"word perplexity {metrics.format_perplexity(first['word_perplexity'])} over {first['words']:,} words; "
            f"bigram baseline: loss {runs[-1]['loss']:.4f}"
        )
        if first["verdict"]:
            print(f"verdict: {first['verdict']}")
    for part in first.get("parts", []):
        print(
            f"  {part['dataset']}, weight {part['weight']:.3g}, {part['tokens']:,} predictions: loss "
            f"{part['loss']:.4f}, {part['bits_per_byte']:.4f} bits per byte"
        )
    if by_position:
        print("\n" + metrics.position_table(runs))
    if memorization_tokens:
        print("\n" + metrics.memorization_table(runs))


runs: list[dict[str, Any]] = []
for path in paths:
    runs.append(measure(path, dataset))
    dataset = runs[0]["dataset"]  # the other models read the text of the first one
if baselines:
    runs.append(metrics.bigram_baseline(split, open_data(dataset, split), open_data(dataset, "train")))
if json:
    result = {key: value for key, value in runs[0].items() if key not in metrics.MODEL_KEYS}
    result |= {"bigram_loss": runs[-1]["loss"]} if extra else {}
    print(dumps(result | ({"compare": runs} if compare else {})))
else:
    print_results(runs)
if compare or by_position or plot_file:
    folder = Path(paths[0] if Path(paths[0]).is_dir() else ".")
    plot_file = plot_file or str(folder / ("by_position.png" if by_position else "compare.png"))
    metrics.draw_plot(runs, by_position, plot_file)
    print(f"plot: {plot_file}", file=sys.stderr)
