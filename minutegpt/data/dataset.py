"""The token ids of a dataset, and the windows of them that a training step reads.

    train = open_data("shakespeare_char", "train", block_size=256)
    rows = np.arange(step * batch_size, (step + 1) * batch_size)  # (B,)
    tokens = train.windows(train.starts(256, seed, rows), 257)  # (B, T+1)
    x, y = tokens[:, :-1], tokens[:, 1:]  # (B, T) each

Datasets are folders in data/, or in the folder that the environment variable MINUTEGPT_DATA names.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
from numpy.lib.stride_tricks import sliding_window_view

from minutegpt.data.shards import open_dataset, open_shard
from minutegpt.errors import ROOT, UserError
from minutegpt.files import atomic_write

if TYPE_CHECKING:
    import torch  # imported only where needed, to save memory in the processes that prepare data

DATA = Path(os.environ.get("MINUTEGPT_DATA") or ROOT / "data")
ALWAYS_VERIFIED = 1_000_000_000  # bytes of a split; in larger ones a shard is verified once per size and time stamp
MIXTURE_ROWS = 1000  # rows of the pattern in which the datasets of a mixture alternate
# a dataset's name: letters of any script, with their marks and joiners, digits, and - _ . inside
NAME = r"\w[\w\p{M}\u200c\u200d.-]*"


class Split:
    """The memory-mapped ids of one split: shard after shard, and dataset after dataset in a mixture.

    len(split) is its number of tokens. parts: (tokens, weight) of each dataset. meta: meta.json of the first one.
    fingerprint: 16 hex digits that depend on the ids and the tokenizer of all datasets (shards.dataset_fingerprint).
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        parts: Sequence[tuple[int, float]],
        meta: dict[str, Any],
        fingerprint: str = "",
    ) -> None:
        self.shards, self.parts, self.meta = list(shards), list(parts), meta
        self.fingerprint = fingerprint or meta.get("fingerprint", "")
        self.ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def datasets(self) -> "list[Split]":
        """Each dataset of a mixture by itself; a list of one where it is not a mixture."""
        splits, shards = [], iter(self.shards)
        for n_tokens, _ in self.parts:
            own: list[np.ndarray] = []
            while sum(map(len, own)) < n_tokens:
                own.append(next(shards))
            splits.append(Split(own, [(n_tokens, 1.0)], self.meta))
        return splits

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids start to stop, (stop - start,), uint16 or uint32; a view where they are in one shard."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        first = int(np.searchsorted(self.ends, start, side="right"))
        pieces, position = [], start
        for shard, end in zip(self.shards[first:], self.ends[first:], strict=True):
            pieces.append(shard[position - int(end) + len(shard) : stop - int(end) + len(shard)])
            position = int(end)
            if stop <= position:
                break
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.uint16)])

    def windows(self, starts: np.ndarray, length: int) -> "torch.Tensor":
        """`length` ids from each of starts, (B,) -> (B, length) int64."""
        import torch

        if len(starts) and not 0 <= starts.min() <= starts.max() <= len(self) - length:
            raise IndexError(f"windows of {length} tokens from {starts.min()} to {starts.max()}, of {len(self)}")
        out = np.empty((len(starts), length), np.int64)
        first, last = np.searchsorted(self.ends, [starts, starts + length - 1], side="right")  # shards, (B,) each
        for shard in set(first[first == last].tolist()):  # one read of all windows inside a shard
            rows, ids = np.flatnonzero((first == shard) & (last == shard)), self.shards[shard]
            out[rows] = sliding_window_view(ids, length)[starts[rows] - (self.ends[shard] - len(ids))]
        for row in np.flatnonzero(first != last).tolist():  # one that crosses into the next shard
            out[row] = self.tokens(int(starts[row]), int(starts[row]) + length)
        return torch.from_numpy(out)

    def starts(self, block_size: int, seed: int, rows: np.ndarray) -> np.ndarray:
        """First tokens of the windows of these rows of the run, by weight in a mixture: (B,) -> (B,) int64."""
        if len(self.parts) == 1:
            return window_starts(len(self), block_size, seed, rows)
        dataset, dataset_rows = mixture_rows([weight for _, weight in self.parts], rows)
        starts, first = np.empty(len(rows), np.int64), 0
        for i, (n_tokens, _) in enumerate(self.parts):
            chosen = dataset == i
            starts[chosen] = first + window_starts(n_tokens, block_size, seed + i, dataset_rows[chosen])
            first += n_tokens
        return starts

    def eval_starts(self, block_size: int, n_windows: int) -> np.ndarray:
        """First tokens of about n_windows fixed windows, (n,) int64, whose mean loss is the split's.

        In a mixture each dataset has its weight's share of them, at least one. A dataset too short for its share has
        its windows repeated, so that the plain mean follows the weights.
        """
        if len(self.parts) == 1:
            return eval_starts(len(self), block_size, n_windows)
        n_windows = min(n_windows, sum((n_tokens - 1) // block_size for n_tokens, _ in self.parts))
        total_weight = sum(weight for _, weight in self.parts)
        starts, first = [], 0
        for n_tokens, weight in self.parts:
            share = max(1, round(n_windows * weight / total_weight))
            starts.append(first + np.resize(eval_starts(n_tokens, block_size, share), share))
            first += n_tokens
        return np.concatenate(starts)


def open_split(folder: str | Path, split: str, block_size: int | None = None) -> Split:
    """One split of one dataset. Raises UserError for a shard that is not exactly what meta.json says.

    block_size: the context length that the split must hold at least once, with the token after it.
    """
    folder = Path(folder)
    meta = open_dataset(folder)
    entry = meta["splits"][split]
    dtype = np.dtype("<u2" if meta["tokenizer"]["vocab_size"] <= 1 << 16 else "<u4")
    verified = _read_verified(folder) if entry["tokens"] * dtype.itemsize >= ALWAYS_VERIFIED else None
    shards = [open_shard(folder / shard["file"], shard, dtype, meta, verified) for shard in entry["shards"]]
    if verified:
        with suppress(OSError, UserError), atomic_write(folder / "verified.json") as file:  # a folder may be read-only
            file.write(json.dumps(verified).encode())
    if block_size is not None and entry["tokens"] < block_size + 1:
        longest = min(other["tokens"] for other in meta["splits"].values()) - 1  # training needs both splits
        advice = f"Take --block_size={longest} or less, or more text" if longest > 0 else "Prepare it with more text"
        raise UserError(
            f"block_size {block_size} is longer than the {split} split of {folder.name}, which has "
            f"{entry['tokens']:,} tokens. {advice}"
        )
    return Split(shards, [(entry["tokens"], 1.0)], meta)


def open_data(dataset: str, split: str, block_size: int | None = None, data_dir: str | Path = DATA) -> Split:
    """A split of data_dir/<dataset>, or of a mixture such as 'a:0.7,b:0.3', whose rows come by weight."""
    weights = parse_mixture(dataset)
    splits = [open_split(Path(data_dir) / name, split, block_size) for name in weights]
    first = next(iter(weights))
    for name, part in zip(weights, splits, strict=True):
        if part.meta["tokenizer"] != splits[0].meta["tokenizer"]:
            raise UserError(
                f"{name} has another tokenizer than {first}, so they do not mix. Prepare it with "
                f"`python prepare/text.py --input=... --tokenizer={Path(data_dir) / first}`"
            )
    fingerprints = "".join(part.fingerprint for part in splits)
    return Split(
        [shard for part in splits for shard in part.shards],
        [(len(part), weight) for part, weight in zip(splits, weights.values(), strict=True)],
        splits[0].meta,
        fingerprints if len(splits) == 1 else hashlib.sha256(fingerprints.encode()).hexdigest()[:16],
    )


def _read_verified(folder: Path) -> dict[str, list[int]]:
    """Size and time stamp of the shards whose checksum was correct once."""
    try:
        verified = json.loads((folder / "verified.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return verified if isinstance(verified, dict) else {}


# ---------------------------------------------------------------------------------------------- order


def window_starts(n_tokens: int, block_size: int, seed: int, rows: np.ndarray) -> np.ndarray:
    """First tokens of the windows of these rows of the run: (B,) -> (B,) int64, a pure function.

    An epoch has W = n_tokens // block_size - 1 rows (at least one). It draws an offset below block_size, cuts the
    tokens after it into W windows, and takes them in its own random order. Every start + block_size is a token too.
    An epoch leaves out fewer than two windows' tokens.
    """
    if n_tokens < block_size + 1:
        raise UserError(f"block_size {block_size} needs {block_size + 1} tokens, and there are {n_tokens}")
    n_windows = max(1, n_tokens // block_size - 1)
    epochs, positions = np.divmod(np.asarray(rows, np.int64), n_windows)
    starts = np.empty(len(epochs), np.int64)
    for epoch in np.unique(epochs).tolist():
        offset, order = _epoch(n_tokens, block_size, n_windows, seed & 0xFFFFFFFF, epoch)
        chosen = epochs == epoch
        starts[chosen] = offset + order[positions[chosen]] * block_size
    return starts


@functools.lru_cache(maxsize=4)
def _epoch(n_tokens: int, block_size: int, n_windows: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    random = np.random.default_rng([seed, epoch])
    offset = random.integers(min(block_size, n_tokens - n_windows * block_size))
    return int(offset), random.permutation(n_windows)


def eval_starts(n_tokens: int, block_size: int, n_windows: int) -> np.ndarray:
    """Starts of n_windows windows spread evenly over the tokens, always the same: (n,) int64, n <= n_windows.

    They do not overlap, and after each there is one more token, the last target.
    """
    fit = (n_tokens - 1) // block_size
    n = min(n_windows, fit)
    return np.arange(n, dtype=np.int64) * fit // max(n, 1) * block_size


# ---------------------------------------------------------------------------------------------- mixtures


def parse_mixture(dataset: str) -> dict[str, float]:
    """'a:0.7,b:0.3' -> {'a': 0.7, 'b': 0.3}; 'a' -> {'a': 1.0}. Weights need not sum to one."""
    weights: dict[str, float] = {}
    for part in dataset.split(","):
        match = regex.fullmatch(rf"\s*({NAME})(?::([0-9]+\.?[0-9]*|\.[0-9]+))?\s*", part)
        if not match or match[1] in weights or float(match[2] or 1) <= 0:
            raise UserError(f"--dataset={dataset!r}: {part!r} is not NAME or NAME:WEIGHT, or is there twice")
        weights[match[1]] = float(match[2] or 1)
    for name, rows in zip(weights, _rows_per_pattern(list(weights.values())).tolist(), strict=True):
        if rows == 0:
            share = weights[name] / sum(weights.values())
            raise UserError(
                f"--dataset={dataset!r}: the weight of {name} is {share:.2g} of the sum, and less than "
                f"{1 / MIXTURE_ROWS} is never drawn. Give it more weight, or leave it out"
            )
    return weights


def mixture_rows(weights: Sequence[float], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The dataset that each row of the run reads, and its row of that dataset: (B,) int64 twice.

    Every MIXTURE_ROWS rows repeat one pattern, in which each dataset has its share (to 1/1000), spread evenly. So the
    rows that a dataset had before any row of the run follow from a division.
    """
    shares = _rows_per_pattern(weights)
    positions = [(np.arange(share) + 0.5) / share for share in shares]
    pattern = np.repeat(np.arange(len(shares)), shares)[np.argsort(np.concatenate(positions), kind="stable")]
    before = np.stack([np.cumsum(pattern == i) - (pattern == i) for i in range(len(shares))])  # (datasets, 1000)
    cycles, places = np.divmod(np.asarray(rows, np.int64), MIXTURE_ROWS)
    dataset = pattern[places]
    return dataset, cycles * shares[dataset] + before[dataset, places]


def _rows_per_pattern(weights: Sequence[float]) -> np.ndarray:
    """Each dataset's number of rows in the pattern: (datasets,) int64, whose sum is MIXTURE_ROWS."""
    ends = np.round(MIXTURE_ROWS * np.cumsum(weights) / np.sum(weights))
    return np.diff(ends, prepend=0).astype(np.int64)
