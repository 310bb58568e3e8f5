"""The token ids of a dataset, and the windows of them that a training step reads.

train = open_data("shakespeare_char", "train", block_size=256)
rows = np.arange(step * batch_size, (step + 1) * batch_size)  # (B,)
tokens = train.windows(train.starts(256, seed, rows), 257)  # (B, T+1)
x, y = tokens[:, :-1], tokens[:, 1:]  # (B, T) each
"""

import functools
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minutegpt.data.shards import open_dataset, open_shard
from minutegpt.errors import ROOT, UserError
from minutegpt.files import atomic_write

if TYPE_CHECKING:
    import torch  # imported where it is needed: the processes that prepare data do without its memory

DATA = Path(os.environ.get("MINUTEGPT_DATA") or ROOT / "data")  # where datasets stand
ALWAYS_VERIFIED = 1_000_000_000  # bytes of a split; above, a shard is verified once per size and time stamp


class Split:
    """The ids of one split, read where they lie: shard after shard, and dataset after dataset in a mixture.

    len(split) is its number of tokens. parts: (tokens, weight) of each dataset; meta: of the first one.
    """

    def __init__(self, shards: Sequence[np.ndarray], parts: Sequence[tuple[int, float]], meta: dict[str, Any]) -> None:
        self.shards, self.parts, self.meta = list(shards), list(parts), meta
        self.ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids start to stop, (stop - start,), uint16 or uint32; a view where they lie in one shard."""
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

        out = np.empty((len(starts), length), np.int64)
        for row, start in zip(out, starts.tolist(), strict=True):
            row[:] = self.tokens(start, start + length)
        return torch.from_numpy(out)

    def starts(self, block_size: int, seed: int, rows: np.ndarray) -> np.ndarray:
        """Where the windows of these rows of the run begin: rows (B,) -> (B,) int64, by weight in a mixture."""
        if len(self.parts) == 1:
            return window_starts(len(self), block_size, seed, rows)
        part, row = mixture_rows([weight for _, weight in self.parts], rows)
        starts, first = np.empty(len(rows), np.int64), 0
        for i, (n_tokens, _) in enumerate(self.parts):
            mine = part == i
            starts[mine] = first + window_starts(n_tokens, block_size, seed + i, row[mine])
            first += n_tokens
        return starts


def open_split(folder: str | Path, split: str, block_size: int | None = None) -> Split:
    """One split of one dataset. Raises UserError for any shard that is not exactly what meta.json says.

    block_size: the context length that the split must hold at least once, with the token after it.
    """
    folder = Path(folder)
    meta = open_dataset(folder)
    about = meta["splits"][split]
    dtype = np.dtype("<u2" if meta["tokenizer"]["vocab_size"] <= 1 << 16 else "<u4")
    seen = _verified(folder) if about["tokens"] * dtype.itemsize >= ALWAYS_VERIFIED else None
    shards = [open_shard(folder / shard["file"], shard, dtype, meta, seen) for shard in about["shards"]]
    if seen:
        with suppress(OSError, UserError), atomic_write(folder / "verified.json") as file:  # read-only: verify again
            file.write(json.dumps(seen).encode())
    if block_size is not None and about["tokens"] < block_size + 1:
        fits = min(each["tokens"] for each in meta["splits"].values()) - 1  # in every split: training needs them all
        raise UserError(
            f"block_size {block_size} is longer than the {split} split of {folder.name}, which has "
            f"{about['tokens']:,} tokens: take --block_size={fits} or less, or more text"
        )
    return Split(shards, [(about["tokens"], 1.0)], meta)


def open_data(dataset: str, split: str, block_size: int | None = None, data_dir: str | Path = DATA) -> Split:
    """A split of data_dir/<dataset>, or of a mixture such as 'a:0.7,b:0.3', whose rows come by weight."""
    names = parse_mixture(dataset)
    splits = [open_split(Path(data_dir) / name, split, block_size) for name in names]
    for name, other in zip(names, splits, strict=True):
        if other.meta["tokenizer"] != splits[0].meta["tokenizer"]:
            raise UserError(
                f"{name} has another tokenizer than {next(iter(names))}, so they do not mix: prepare it with "
                f"`python prepare/text.py --input=... --tokenizer={Path(data_dir) / next(iter(names))}`"
            )
    parts = [(len(part), weight) for part, weight in zip(splits, names.values(), strict=True)]
    return Split([shard for part in splits for shard in part.shards], parts, splits[0].meta)


def _verified(folder: Path) -> dict[str, list[int]]:
    """Size and time stamp of the shards whose checksum was right once."""
    try:
        seen = json.loads((folder / "verified.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return seen if isinstance(seen, dict) else {}


# ---------------------------------------------------------------------------------------------- order


def window_starts(n_tokens: int, block_size: int, seed: int, rows: np.ndarray) -> np.ndarray:
    """Where the windows of these rows of the run begin: (B,) -> (B,) int64, a pure function.

    An epoch is W = n_tokens // block_size - 1 rows (at least one): it draws an offset below block_size, cuts the
    tokens behind it into W windows and takes them in an order of its own. Every start + block_size is a token too,
    and an epoch misses fewer than two windows' tokens.
    """
    if n_tokens < block_size + 1:
        raise UserError(f"block_size {block_size} needs {block_size + 1} tokens, there are {n_tokens}")
    n_windows = max(1, n_tokens // block_size - 1)
    epochs, places = np.divmod(np.asarray(rows, np.int64), n_windows)
    starts = np.empty(len(epochs), np.int64)
    for epoch in np.unique(epochs).tolist():
        offset, order = _epoch(n_tokens, block_size, n_windows, seed & 0xFFFFFFFF, epoch)
        mine = epochs == epoch
        starts[mine] = offset + order[places[mine]] * block_size
    return starts


@functools.lru_cache(maxsize=4)
def _epoch(n_tokens: int, block_size: int, n_windows: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    random = np.random.default_rng([seed, epoch])
    offset = random.integers(min(block_size, n_tokens - n_windows * block_size))
    return int(offset), random.permutation(n_windows)


def eval_starts(n_tokens: int, block_size: int, n_windows: int) -> np.ndarray:
    """Starts of n_windows windows spread evenly over the tokens, always the same: (n,) int64, n <= n_windows.

    They do not overlap, and each leaves a token behind it as the last target.
    """
    fit = (n_tokens - 1) // block_size
    n = min(n_windows, fit)
    return np.arange(n, dtype=np.int64) * fit // max(n, 1) * block_size


def parse_mixture(dataset: str) -> dict[str, float]:
    """'a:0.7,b:0.3' -> {'a': 0.7, 'b': 0.3}; 'a' -> {'a': 1.0}. Weights need not sum to one."""
    parts: dict[str, float] = {}
    for part in dataset.split(","):
        match = re.fullmatch(r"\s*(\w[\w.-]*)(?::([0-9]+\.?[0-9]*|\.[0-9]+))?\s*", part)
        if not match or match[1] in parts or float(match[2] or 1) <= 0:
            raise UserError(f"--dataset={dataset!r}: {part!r} is not NAME or NAME:WEIGHT, or comes twice")
        parts[match[1]] = float(match[2] or 1)
    return parts


def mixture_rows(weights: Sequence[float], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which dataset each row of the run reads, and which row of that dataset it is: (B,) int64 twice.

    Every 1000 rows repeat one pattern, in which a dataset has its share (to one in a thousand), spread evenly; so
    the rows that a dataset gave before any row are counted without walking there.
    """
    shares = np.diff(np.round(1000 * np.cumsum(weights) / np.sum(weights)), prepend=0).astype(np.int64)
    places_of = [(np.arange(share) + 0.5) / share for share in shares]
    pattern = np.repeat(np.arange(len(shares)), shares)[np.argsort(np.concatenate(places_of), kind="stable")]
    before = np.stack([np.cumsum(pattern == i) - (pattern == i) for i in range(len(shares))])  # (datasets, 1000)
    cycles, places = np.divmod(np.asarray(rows, np.int64), 1000)
    part = pattern[places]
    return part, cycles * shares[part] + before[part, places]
