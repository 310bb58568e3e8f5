"""How good a model is, beside its loss: by words, by position, against counting pairs, against the training text.

evaluate.py asks for these. A split of N tokens has N-1 predictions: its first token is given, here as there.
"""

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minutegpt.data.dataset import Split
from minutegpt.data.tokenizer import END, Tokenizer, from_json
from minutegpt.log import format_seconds, read_log, si_number
from model import GPT

ABOUT = ("name", "params", "block_size", "steps", "trained_seconds")  # of a run, beside what --json tells
PIECE = 1_000_000  # tokens at a time: what keeps memory small on a large split
LOOKED_AT = 10_000_000  # tokens of the training split at most, for what has to hold them in memory
SPAN = 50  # bytes: a line of a poem. what people write by themselves shares shorter spans with what they read


def text_pieces(data: Split, tokenizer: Tokenizer, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The text of tokens start to stop, piece after piece; END stands as its name."""
    stop = len(data) if stop is None else stop
    for i in range(start, stop, PIECE):
        yield tokenizer.decode_bytes(data.tokens(i, min(stop, i + PIECE)).tolist())


def count_words(pieces: Iterator[bytes]) -> int:
    """Words between white space; END is white space too. Pieces may cut a word: it counts once.

    >>> count_words(iter([b"to be", b"come or", b" not"]))
    4
    """
    words, inside = 0, False
    for piece in pieces:
        piece = piece.replace(END.encode(), b" ")
        if piece:
            words += len(piece.split()) - (inside and not piece[:1].isspace())
            inside = not piece[-1:].isspace()
    return words


def reencode(data: Split, ours: Tokenizer, theirs: Tokenizer) -> Split:
    """The split's text in the ids of another tokenizer, in memory; its own END, if it has one, between documents."""
    between = [] if theirs.end_token is None else [theirs.end_token]
    ids: list[np.ndarray] = []
    for document in b"".join(text_pieces(data, ours)).split(END.encode()):
        ids += [theirs.encode_bytes(document), np.array(between, np.uint32)]
    whole = np.concatenate(ids[:-1])
    return Split([whole], [(len(whole), 1.0)], {"tokenizer": theirs.to_json()})


def bigram_nats(train: Split, data: Split, vocab_size: int) -> tuple[float, int]:
    """What counting pairs gives: the summed loss of data's predictions, in nats, and how many pairs were counted.

    p(j after i) = (n_ij + k_i p(j)) / (n_i + k_i), where i was followed n_i times by k_i different tokens: what k_i
    followers were new once, a new one may come again (Witten and Bell 1991). p(j) = (n_j + 1) / (n + V). Only pairs
    that occur take memory, so a vocabulary of 50,000 is no trap.
    """
    V = vocab_size
    ids = train.tokens(0, min(len(train), LOOKED_AT)).astype(np.int64)  # (n,)
    pairs, counts = np.unique(ids[:-1] * V + ids[1:], return_counts=True)  # (P,) each, a pair as one number
    followed = np.bincount(ids[:-1], minlength=V)  # (V,) n_i
    kinds = np.maximum(np.bincount(pairs // V, minlength=V), 1)  # (V,) k_i
    single = (np.bincount(ids, minlength=V) + 1) / (len(ids) + V)  # (V,) p(j)
    pairs, counts = np.append(pairs, V * V), np.append(counts, 0)  # a last one, where a search may end
    nats = 0.0
    for start in range(0, len(data) - 1, PIECE):
        ids = data.tokens(start, min(len(data), start + PIECE + 1)).astype(np.int64)
        i, j = ids[:-1], ids[1:]  # each piece begins with the last token of the one before
        at = np.searchsorted(pairs, i * V + j)
        n = np.where(pairs[at] == i * V + j, counts[at], 0)
        nats -= float(np.log((n + kinds[i] * single[j]) / (followed[i] + kinds[i])).sum())
    return nats, len(pairs) - 1


def loss_by_context(nats: np.ndarray, counts: np.ndarray) -> list[dict[str, float]]:
    """Summed losses (T,) of the predictions with 1, 2 ... T tokens before them -> the mean of 1, 2, 3-4, 5-8, ..."""
    starts = [0, *(2**k for k in range(math.ceil(math.log2(len(nats)))))]
    sums, n = np.add.reduceat(nats, starts), np.add.reduceat(counts, starts)
    stops = [*starts[1:], len(nats)]
    return [
        {"from": first + 1, "to": last, "loss": float(s / c), "tokens": int(c)}
        for first, last, s, c in zip(starts, stops, sums, n, strict=True)
    ]


def overlap_with_training(texts: list[bytes], training: bytes) -> tuple[float, float]:
    """How much of these texts comes from the training text: the share of their words that stand in it, and the share
    of their bytes that lie in spans of SPAN bytes or more found in it verbatim.

    A model that knows the language has the first near that of unseen text; one that recites has the second above it.
    """
    known = set(re.findall(r"\w+", training.decode(errors="replace")))
    words = [word for text in texts for word in re.findall(r"\w+", text.decode(errors="replace"))]
    wanted = {text[i : i + SPAN] for text in texts for i in range(len(text) - SPAN + 1)}
    ends = range(SPAN, len(training) + 1)
    found = {span for end in ends if (span := training[end - SPAN : end]) in wanted} if wanted else set()
    copied = 0
    for text in texts:
        covered = 0  # bytes up to here are counted or not copied
        for i in range(len(text) - SPAN + 1):
            if text[i : i + SPAN] in found:
                copied += i + SPAN - max(covered, i)
                covered = i + SPAN
    n_bytes = sum(map(len, texts))
    return sum(word in known for word in words) / max(1, len(words)), copied / max(1, n_bytes)


def summary(
    split: str, nats: float, data: Split, tokenizer: Tokenizer, began: float, wide: bool = True
) -> dict[str, Any]:
    """What the summed loss of a split comes to, by the names of evaluate.py --json; wide: by words too."""
    N, bytes_of, loss = len(data), tokenizer.token_bytes(), nats / (len(data) - 1)
    n_bytes = sum(int(bytes_of[data.tokens(i, min(N, i + LOOKED_AT))].sum()) for i in range(1, N, LOOKED_AT))
    result = {"split": split, "loss": loss, "perplexity": math.exp(min(loss, 700))}
    result |= {"bits_per_byte": nats / math.log(2) / n_bytes, "tokens": N - 1, "bytes": n_bytes}
    result["seconds"] = time.perf_counter() - began
    if wide:
        words = count_words(text_pieces(data, tokenizer, start=1))
        result |= {"word_perplexity": math.exp(min(nats / max(1, words), 700)), "words": words}
    return result


def bigram_baseline(split: str, data: Split, train: Split) -> dict[str, Any]:
    """What every model must beat: counting pairs of the text's tokens."""
    began, tokenizer = time.perf_counter(), from_json(data.meta["tokenizer"])
    nats, pairs = bigram_nats(train, data, tokenizer.vocab_size)
    return {"name": "bigram", "params": pairs} | summary(split, nats, data, tokenizer, began)


def memorization(
    model: GPT, tokenizer: Tokenizer, data: Split, train: Split, n_tokens: int, temperature: float
) -> dict[str, float]:
    """What the model writes after data's first token, and as much of data itself, held to the training text."""
    device = next(model.parameters()).device
    torch.manual_seed(1337)
    T = min(model.config.block_size, n_tokens)  # a row never outgrows the context
    ids: list[list[int]] = []
    while len(ids) * T < n_tokens:
        rows = min(32, math.ceil(n_tokens / T) - len(ids))
        start = torch.full((rows, 1), int(data.tokens(0, 1)[0]), device=device)  # (B, 1)
        ids += model.generate(start, T, temperature=temperature)[:, 1:].tolist()
    written = [tokenizer.decode_bytes([i for i in row if i < tokenizer.vocab_size]) for row in ids]  # without padding
    theirs = from_json(train.meta["tokenizer"])
    training = b"".join(text_pieces(train, theirs, 0, min(len(train), LOOKED_AT)))
    own = b"".join(text_pieces(data, tokenizer, 0, min(len(data), len(ids) * T)))
    (known, copied), (own_known, own_copied) = (
        overlap_with_training(written, training),
        overlap_with_training([own], training),
    )
    return {"tokens": len(ids) * T, "known_words": known, "copied": copied,
            "text_known_words": own_known, "text_copied": own_copied}  # fmt: skip


# ---------------------------------------------------------------------------------------------- for people


def comparison(runs: list[dict[str, Any]]) -> str:
    """One line a model: its numbers on the same text, its size, and what its training took."""
    return table([
        {
            "": run["name"], "loss": f"{run['loss']:.4f}", "perplexity": f"{run['perplexity']:.3f}",
            "bits/byte": f"{run['bits_per_byte']:.4f}", "word perplexity": f"{run['word_perplexity']:,.1f}",
            "params": si_number(run["params"]), "steps": f"{run.get('steps') or '-'}",
            "time": format_seconds(run["trained_seconds"]) if run.get("trained_seconds") else "-",
        }
        for run in runs
    ])  # fmt: skip


def positions(runs: list[dict[str, Any]]) -> str:
    """The loss by how many tokens stand before, a column a model; what is beyond its training context has a *."""
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
    return table(rows) + "\n* beyond the context it was trained with" * starred


def recitations(runs: list[dict[str, Any]]) -> str:
    """How much of what the models wrote comes from the training text."""
    runs = [run for run in runs if "sampled" in run]
    rows = [(run["name"], run["sampled"]["known_words"], run["sampled"]["copied"]) for run in runs]
    own = runs[0]["sampled"]
    rows.append((f"the {runs[0]['split']} split", own["text_known_words"], own["text_copied"]))
    return table([
        {f"of {own['tokens']:,} tokens, from the training text": name, "words": f"{known:.1%}",
         f"bytes in spans of {SPAN} or more": f"{copied:.1%}"}
        for name, known, copied in rows
    ])  # fmt: skip


def draw(runs: list[dict[str, Any]], by_position: bool, path: str | Path) -> None:
    """The loss by position, or the losses that the runs logged; in bits a byte where they cut text differently."""
    from minutegpt import plot  # imports matplotlib: a second

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
    plot.compare_picture(logs, path, levels, "bits a byte" if bits else "nats a token")


def table(rows: list[dict[str, str]]) -> str:
    """Rows of the same keys as aligned columns under their names: the first to the left, numbers to the right."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{w}}" if i else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
