"""The metrics of evaluate.py: loss and perplexity per word and by position, a bigram baseline, memorization.

A split of N tokens has N-1 predictions, because nothing predicts its first token. A document ends at the id END. The
letters <|endoftext|> in a text are text.
"""

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minutegpt.baseline import pair_counts
from minutegpt.data.dataset import Split
from minutegpt.data.tokenizer import Tokenizer, from_json
from minutegpt.generate import hide_padding
from minutegpt.log import format_seconds, read_log, si_number
from model import GPT

# of a run, not for --json
MODEL_KEYS = ("name", "dataset", "params", "block_size", "steps", "trained_seconds", "verdict")
PIECE = 1_000_000  # tokens at a time, so that a large split does not fill the memory
MAX_TRAIN_TOKENS = 10_000_000  # of the training split, for metrics that hold them in memory
SPAN = 50  # bytes, a line of a poem; people's own texts share only shorter spans with what they read


def scoring_windows(n: int, T: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, length, scored) of each window over n predictions, of which its last `scored` count: each one once.

    Windows have T predictions, the last one what is left. stride 0: they lie one after another. With a stride each
    window moves on by `stride` and scores only what is new, so that most predictions see a long context.

    >>> list(scoring_windows(10, 4, 0))
    [(0, 4, 4), (4, 4, 4), (8, 2, 2)]
    >>> list(scoring_windows(10, 4, 3))
    [(0, 4, 4), (3, 4, 3), (6, 4, 3)]
    """
    scored = 0  # predictions up to here
    while scored < n:
        stop = min(n, scored + stride if scored and stride else scored + T)
        start = max(0, stop - T) if 0 < stride < T else scored
        yield start, stop - start, stop - scored
        scored = stop


def documents(ids: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The documents in ids (N,), without the END tokens between them."""
    if tokenizer.end_token is None:
        return [ids]
    ends = np.flatnonzero(ids == tokenizer.end_token)
    return [ids[start:stop] for start, stop in zip([0, *(ends + 1)], [*ends, len(ids)], strict=True)]


def text_pieces(data: Split, tokenizer: Tokenizer, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The text of tokens start to stop, piece after piece; END becomes a new line."""
    stop = len(data) if stop is None else stop
    for i in range(start, stop, PIECE):
        yield decode_documents(data.tokens(i, min(stop, i + PIECE)), tokenizer)


def decode_documents(ids: np.ndarray, tokenizer: Tokenizer) -> bytes:
    """The text of ids (N,), with a new line for END."""
    return b"\n".join(tokenizer.decode_bytes(document.tolist()) for document in documents(ids, tokenizer))


def count_words(pieces: Iterator[bytes]) -> int:
    """Words between white space. Pieces may cut a word: it counts once.

    >>> count_words(iter([b"to be", b"come or", b" not"]))
    4
    """
    words, inside = 0, False
    for piece in pieces:
        if piece:
            words += len(piece.split()) - (inside and not piece[:1].isspace())
            inside = not piece[-1:].isspace()
    return words


def reencode(data: Split, old: Tokenizer, new: Tokenizer) -> Split:
    """The split's text in the ids of another tokenizer, in memory, with that one's END (if any) between documents."""
    if len(data.parts) > 1:
        parts = [reencode(part, old, new).shards[0] for part in data.datasets()]
        weights = [weight for _, weight in data.parts]
        return Split(parts, list(zip(map(len, parts), weights, strict=True)), {"tokenizer": new.to_json()})
    end = np.array([] if new.end_token is None else [new.end_token], np.uint32)
    ids: list[np.ndarray] = []
    for document in documents(data.tokens(0, len(data)), old):
        pieces = [old.decode_bytes(document[i : i + PIECE].tolist()) for i in range(0, len(document), PIECE)]
        ids += [new.encode_bytes(b"".join(pieces)), end]
    whole = np.concatenate(ids[:-1])
    return Split([whole], [(len(whole), 1.0)], {"tokenizer": new.to_json()})


def bigram_nats(train: Split, data: Split, vocab_size: int) -> tuple[float, int]:
    """The summed loss in nats of a model that counts pairs of tokens in `train`, and the number of distinct pairs."""
    most = MAX_TRAIN_TOKENS // len(train.parts)  # of each dataset of a mixture
    ids = np.concatenate([part.tokens(0, min(len(part), most)) for part in train.datasets()])  # (n,)
    nats, pairs = pair_counts(ids.astype(np.int64), vocab_size)
    starts = range(0, len(data) - 1, PIECE)  # each piece begins with the last token of the one before
    pieces = (data.tokens(start, min(len(data), start + PIECE + 1)).astype(np.int64) for start in starts)
    return sum(map(nats, pieces)), pairs


def loss_by_context(nats: np.ndarray, counts: np.ndarray) -> list[dict[str, float]]:
    """Mean losses for 1, 2, 3-4, 5-8, ... tokens of context, from the sums and counts (T,) for 1, 2 ... T tokens."""
    starts = [0, *(2**k for k in range(math.ceil(math.log2(len(nats)))))]
    sums, n = np.add.reduceat(nats, starts), np.add.reduceat(counts, starts)
    stops = [*starts[1:], len(nats)]
    return [
        {"from": first + 1, "to": last, "loss": float(s / c), "tokens": int(c)}
        for first, last, s, c in zip(starts, stops, sums, n, strict=True)
    ]


def overlap_with_training(texts: list[bytes], training: bytes) -> tuple[float, float]:
    """How much of these texts is in the training text: the share of their words, and the share of their bytes that lie
    in spans of SPAN bytes or more that occur in it.

    Compare both with those of an unseen text: a model that memorised its training text has a higher share of bytes.
    """
    known = set(re.findall(r"\w+", training.decode(errors="replace")))
    words = [word for text in texts for word in re.findall(r"\w+", text.decode(errors="replace"))]
    wanted = {text[i : i + SPAN] for text in texts for i in range(len(text) - SPAN + 1)}
    ends = range(SPAN, len(training) + 1)
    found = {span for end in ends if (span := training[end - SPAN : end]) in wanted} if wanted else set()
    copied = 0
    for text in texts:
        covered = 0  # up to here, bytes are counted already
        for i in range(len(text) - SPAN + 1):
            if text[i : i + SPAN] in found:
                copied += i + SPAN - max(covered, i)
                covered = i + SPAN
    n_bytes = sum(map(len, texts))
    return sum(word in known for word in words) / max(1, len(words)), copied / max(1, n_bytes)


def summarize(
    split: str, nats: float, data: Split, tokenizer: Tokenizer, began: float, words: bool = True
) -> dict[str, Any]:
    """The metrics of a split with this summed loss, by the names of evaluate.py --json. words: perplexity per word too.

    began: time.perf_counter() before the evaluation.
    """
    N, bytes_of, loss = len(data), tokenizer.token_bytes(), nats / (len(data) - 1)
    n_bytes = sum(int(bytes_of[data.tokens(i, min(N, i + PIECE))].sum()) for i in range(1, N, PIECE))
    result = {"split": split, "loss": loss, "perplexity": math.exp(min(loss, 700))}
    result |= {"bits_per_byte": nats / math.log(2) / n_bytes, "tokens": N - 1, "bytes": n_bytes}
    result["seconds"] = time.perf_counter() - began
    if words:
        n_words = count_words(text_pieces(data, tokenizer, start=1))
        result |= {"word_perplexity": math.exp(min(nats / max(1, n_words), 700)), "words": n_words}
    return result


def mixture_summary(parts: list[dict[str, Any]], data: Split) -> dict[str, Any]:
    """The metrics of a mixture from those of its datasets, which summarize() returns: the means by weight.

    Counts and seconds are sums. The perplexities are exp of a mean.
    """
    if len(parts) == 1:
        return parts[0]
    total = sum(weight for _, weight in data.parts)
    weights = [weight / total for _, weight in data.parts]

    def mean(values: list[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    result = parts[0] | {key: sum(part[key] for part in parts) for key in ("tokens", "bytes", "seconds")}
    result |= {key: mean([part[key] for part in parts]) for key in ("loss", "bits_per_byte")}
    result["perplexity"] = math.exp(min(result["loss"], 700))
    if "words" in result:
        result["words"] = sum(part["words"] for part in parts)
        result["word_perplexity"] = math.exp(mean([math.log(part["word_perplexity"]) for part in parts]))
    shown = ("loss", "bits_per_byte", "tokens")
    result["parts"] = [
        {"weight": weight} | {key: part[key] for key in shown} for weight, part in zip(weights, parts, strict=True)
    ]
    return result


def bigram_baseline(split: str, data: Split, train: Split) -> dict[str, Any]:
    """The metrics of a model that counts pairs of tokens, which every model should beat."""
    tokenizer, parts = from_json(data.meta["tokenizer"]), []
    for part in data.datasets():
        began = time.perf_counter()
        nats, pairs = bigram_nats(train, part, tokenizer.vocab_size)
        parts.append(summarize(split, nats, part, tokenizer, began))
    return {"name": "bigram", "params": pairs} | mixture_summary(parts, data)


def memorization(
    model: GPT, tokenizer: Tokenizer, data: Split, train: Split, n_tokens: int, temperature: float
) -> dict[str, float]:
    """How much of n_tokens that the model writes is in the training text, and how much of as many of data's tokens."""
    device = model.transformer.wte.weight.device
    torch.manual_seed(1337)
    T = min(model.config.block_size, n_tokens)  # tokens per row, so that no row is longer than the context
    start = torch.tensor(tokenizer.start_ids(), device=device)
    rows: list[np.ndarray] = []
    with hide_padding(model, tokenizer):
        while len(rows) * T < n_tokens:
            B = min(32, math.ceil(n_tokens / T) - len(rows))
            ids = model.generate(start.expand(B, -1), T, temperature=temperature)  # (B, start + T)
            rows += list(ids[:, len(start) :].cpu().numpy())
    written = [decode_documents(row, tokenizer) for row in rows]
    train_tokenizer = from_json(train.meta["tokenizer"])
    training = b"".join(text_pieces(train, train_tokenizer, 0, min(len(train), MAX_TRAIN_TOKENS)))
    text = b"".join(text_pieces(data, tokenizer, 0, min(len(data), len(rows) * T)))
    known_words, copied = overlap_with_training(written, training)
    text_known_words, text_copied = overlap_with_training([text], training)
    return {
        "tokens": len(rows) * T, "known_words": known_words, "copied": copied,
        "text_known_words": text_known_words, "text_copied": text_copied,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- tables


def format_perplexity(perplexity: float) -> str:
    """
    >>> format_perplexity(1234.56), format_perplexity(1e300)
    ('1,234.6', '1e+300')
    """
    return f"{perplexity:,.1f}" if perplexity < 1e9 else f"{perplexity:.3g}"


def comparison_table(runs: list[dict[str, Any]]) -> str:
    """One line per model: its metrics on the same text, its size, and its training."""
    return table([
        {
            "": run["name"], "loss": f"{run['loss']:.4f}", "perplexity": f"{run['perplexity']:.3f}",
            "bits/byte": f"{run['bits_per_byte']:.4f}", "word perplexity": format_perplexity(run["word_perplexity"]),
            "params": si_number(run["params"]), "steps": f"{run.get('steps') or '-'}",
            "time": format_seconds(run["trained_seconds"]) if run.get("trained_seconds") else "-",
        }
        for run in runs
    ])  # fmt: skip


def position_table(runs: list[dict[str, Any]]) -> str:
    """The loss by the number of tokens before, one column per model. A * marks what is beyond its training context."""
    runs = [run for run in runs if "by_position" in run]
    rows = []
    for group in max((run["by_position"] for run in runs), key=len):
        span = f"{group['from']}-{group['to']}"
        row = {"tokens before": span if group["from"] < group["to"] else str(group["to"])}
        for run in runs:
            mine = [g for g in run["by_position"] if g["from"] == group["from"]]
            beyond = "*" if mine and mine[0]["to"] > run["block_size"] else ""
            row[run["name"]] = f"{mine[0]['loss']:.4f}{beyond}" if mine else ""
        rows.append(row)
    starred = any(cell.endswith("*") for row in rows for cell in row.values())
    return table(rows) + "\n* beyond the training context" * starred


def memorization_table(runs: list[dict[str, Any]]) -> str:
    """How much of the text that the models wrote is in the training text."""
    runs = [run for run in runs if "memorization" in run]
    rows = [(run["name"], run["memorization"]["known_words"], run["memorization"]["copied"]) for run in runs]
    first = runs[0]["memorization"]
    rows.append((f"the {runs[0]['split']} split", first["text_known_words"], first["text_copied"]))
    return table([
        {f"of {first['tokens']:,} tokens, in the training text": name, "words": f"{known:.1%}",
         f"bytes in spans of {SPAN} or more": f"{copied:.1%}"}
        for name, known, copied in rows
    ])  # fmt: skip


def draw_plot(runs: list[dict[str, Any]], by_position: bool, path: str | Path) -> None:
    """The loss by position, or the losses that the runs logged: in bits per byte if their tokenizers differ."""
    from minutegpt import plot  # imports matplotlib, which takes a second

    if by_position:
        groups = {run["name"]: run["by_position"] for run in runs if "by_position" in run}
        plot.position_picture(groups, {run["name"]: run["block_size"] for run in runs if "by_position" in run}, path)
        return
    logs, levels = {}, {}
    bits = len({(run["tokens"], run["bytes"]) for run in runs}) > 1
    for run in runs:
        factor = run["tokens"] / run["bytes"] / math.log(2) if bits else 1.0
        rows = read_log(Path(run["name"]) / "log.jsonl")
        if "steps" in run and plot.points(rows, "step", "val_loss")[0]:
            logs[run["name"]] = [row | {"val_loss": row["val_loss"] and row["val_loss"] * factor} for row in rows]
        else:
            levels[run["name"]] = run["loss"] * factor
    plot.compare_picture(logs, path, levels, "bits per byte" if bits else "nats per token")


def table(rows: list[dict[str, str]]) -> str:
    """Rows with the same keys as aligned columns with a header. The first is flush left, the others flush right."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{w}}" if i else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
