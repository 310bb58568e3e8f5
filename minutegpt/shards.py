"""The token ids of a dataset on disk, and the windows of them that a training step reads.

data/<dataset>/ holds train_NNNNNN.bin, val_NNNNNN.bin and meta.json, which is written last and names the shards
that count: a preparation that was killed leaves what stood before as it was. A shard is a header of 64 bytes
(magic, version, bytes an id, number of ids, highest id, CRC-32 of the ids and of all that), then the ids.

    train = open_data("shakespeare_char", "train", block_size=256)
    rows = np.arange(step * batch_size, (step + 1) * batch_size)  # (B,)
    tokens = train.windows(train.starts(256, seed, rows), 257)  # (B, T+1)
    x, y = tokens[:, :-1], tokens[:, 1:]  # (B, T) each
"""

import functools
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from minutegpt.files import atomic_write, replace
from minutegpt.start import ROOT, UserError

if TYPE_CHECKING:
    import torch  # imported where it is needed: the processes that prepare data do without its memory

DATA = Path(os.environ.get("MINUTEGPT_DATA") or ROOT / "data")  # where datasets stand
HEADER = struct.Struct("<8sIIQQI28x")
CHECKED = struct.Struct("<8sIIQQ")  # the part of the header that the checksum covers
MAGIC = b"minutGPT"
VERSION = 1
SHARD_TOKENS = 100_000_000
SHARD_NAME = re.compile(r"(train|val)_[0-9]{6}\.bin")
ALWAYS_VERIFIED = 1_000_000_000  # bytes of a split; above, a shard is verified once per size and time stamp
META_LIMIT = 64 << 20  # bytes: the largest tokenizer takes a few


# ---------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Appends ids to the shards of one split; each shard gets its name when it is full and on disk.

    state: what sync() gave in a process that was killed since: all that was written after it is cut away.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS,
                 state: dict[str, Any] | None = None) -> None:  # fmt: skip
        self.folder, self.split, self.vocab_size, self.shard_tokens = folder, split, vocab_size, shard_tokens
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        state = state or {"shards": [], "open": 0, "next": _next_number(folder, split)}
        self.shards: list[dict[str, Any]] = list(state["shards"])
        self.number: int = state["next"]
        self.file: BinaryIO | None = None
        self.count = self.highest = self.crc = 0
        if state["open"]:
            self._resume(state["open"])

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards) + self.count

    def write(self, ids: np.ndarray) -> None:
        """ids: (N,) of any integer dtype. Raises UserError for an id outside the vocabulary and a full disk."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise UserError(f"id {ids.max()} does not fit a vocabulary of {self.vocab_size}: wrong tokenizer?")
        ids = np.ascontiguousarray(ids, self.dtype)
        while len(ids):
            head, ids = np.split(ids, [self.shard_tokens - self.count])
            with _told(self.folder):
                if self.file is None:
                    self.file = open(self._temporary(), "w+b")
                    self.file.write(bytes(HEADER.size))  # zeros: not a shard until close() says so
                self.file.write(head.data)
            self._add(head)
            if self.count == self.shard_tokens:
                self._finish()

    def sync(self) -> dict[str, Any]:
        """Everything written so far is on disk when this returns; the value continues from here."""
        if self.file:
            with _told(self.folder):
                self.file.flush()
                os.fsync(self.file.fileno())
        return {"shards": list(self.shards), "open": self.count, "next": self.number}

    def close(self) -> list[dict[str, Any]]:
        """The shards of this split as meta.json lists them: file, tokens, crc32."""
        if self.file:
            self._finish()
        return self.shards

    def _temporary(self) -> Path:
        return self.folder / f"{self.split}_{self.number:06d}.bin.part"

    def _add(self, ids: np.ndarray) -> None:
        self.count += len(ids)
        self.highest = max(self.highest, int(ids.max()))
        self.crc = zlib.crc32(ids.data, self.crc)

    def _resume(self, count: int) -> None:
        final = self._temporary().with_suffix("")
        if final.exists():  # it was finished after the sync: open it again
            os.replace(final, self._temporary())
        self.file = open(self._temporary(), "r+b")
        self.file.truncate(HEADER.size + count * self.dtype.itemsize)
        self.file.seek(HEADER.size)
        while chunk := self.file.read(1 << 24):
            self._add(np.frombuffer(chunk, self.dtype))
        if self.count != count:
            raise UserError(f"{self._temporary()} is shorter than it was: delete {self.folder} and prepare again")

    def _finish(self) -> None:
        assert self.file
        fields = (MAGIC, VERSION, self.dtype.itemsize, self.count, self.highest)
        # the ids come first in the checksum: the fields are known only now
        crc = zlib.crc32(CHECKED.pack(*fields), self.crc)
        name = f"{self.split}_{self.number:06d}.bin"
        with _told(self.folder):
            self.file.seek(0)
            self.file.write(HEADER.pack(*fields, crc))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            replace(self._temporary(), self.folder / name)
        self.shards.append({"file": name, "tokens": self.count, "crc32": crc})
        self.file, self.number = None, self.number + 1
        self.count = self.highest = self.crc = 0


def publish(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, from which moment the new shards are the dataset, and delete what it does not name.

    meta: dataset, tokenizer, splits (and anything else plain, such as the report).
    """
    meta = {"format": "minutegpt", "version": VERSION, **meta}
    meta["crc32"] = _meta_checksum(meta)
    with atomic_write(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())
    named = {shard["file"] for split in meta["splits"].values() for shard in split["shards"]}
    for path in folder.iterdir():
        if SHARD_NAME.fullmatch(path.name.removesuffix(".part")) and path.name not in named:
            with suppress(OSError):  # Windows: a training run still reads the old ones
                path.unlink()


def _next_number(folder: Path, split: str) -> int:
    """New shards never take the name of one that stands: until meta.json changes, the old dataset is good."""
    return max((int(path.stem[-6:]) + 1 for path in folder.glob(f"{split}_{'[0-9]' * 6}.bin")), default=0)


def _meta_checksum(meta: dict[str, Any]) -> int:
    rest = {key: value for key, value in meta.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """A failed write, such as a full disk, told as a user's error."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}. The dataset that stood there, if any, is untouched: make "
            "room, then type the same command again"
        ) from error


# ---------------------------------------------------------------------------------------------- reading


def open_dataset(folder: str | Path) -> dict[str, Any]:
    """meta.json of a prepared dataset, checked: format, version, dataset, tokenizer, splits, report, crc32.

    Raises UserError where there is none, or it is damaged, foreign, or names anything outside the folder.
    """
    path = Path(folder) / "meta.json"
    again = _again(path.parent.name)

    def expect(condition: object, why: str) -> None:
        if not condition:
            raise UserError(f"{path} cannot be used ({why}): {again}")

    try:
        expect(path.stat().st_size <= META_LIMIT, "it is far too large")
        meta = json.loads(path.read_bytes())
        expect(meta["format"] == "minutegpt", "it is not from this project")
        expect(meta["version"] == VERSION, f"its version is {meta['version']!r}, this code reads {VERSION}")
        expect(meta["crc32"] == _meta_checksum(meta), "it is damaged: its checksum differs")
        expect(isinstance(meta["dataset"], str) and _is_count(meta["tokenizer"]["vocab_size"]), "a field is wrong")
        expect(set(meta["splits"]) == {"train", "val"}, "its splits are not train and val")
        for split in meta["splits"].values():
            for shard in split["shards"]:
                expect(SHARD_NAME.fullmatch(shard["file"]), f"{shard['file']!r} is no shard's name")
                expect(_is_count(shard["tokens"]) and type(shard["crc32"]) is int, "a size is wrong")
            expect(_is_count(split["tokens"]) and type(split["bytes"]) is int, "a size is wrong")
            expect(split["tokens"] == sum(shard["tokens"] for shard in split["shards"]), "its sizes do not add up")
    except FileNotFoundError:
        raise UserError(f"no dataset at {path.parent}: {again}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged, or not from this project: {again}") from None
    return meta


def _again(dataset: str) -> str:
    own = "text.py --input=FILE_OR_FOLDER --dataset="
    known = (ROOT / "prepare" / f"{dataset}.py").exists()
    return f"prepare it with `python prepare/{f'{dataset}.py' if known else own + dataset}`"


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 53


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
    shards = [_open_shard(folder / shard["file"], shard, dtype, meta, seen) for shard in about["shards"]]
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


def _open_shard(path: Path, about: dict[str, Any], dtype: np.dtype, meta: dict[str, Any],
                seen: dict[str, list[int]] | None) -> np.ndarray:  # fmt: skip
    """The ids of a shard, memory-mapped. Sizes are checked against the file before anything is allocated."""
    again = _again(meta["dataset"])
    vocab_size = meta["tokenizer"]["vocab_size"]
    try:
        status = path.stat()
        with open(path, "rb") as file:
            raw = file.read(HEADER.size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: {again}") from None
    if len(raw) < HEADER.size or raw[:8] != MAGIC:
        raise UserError(f"{path} is not one of our shards, or was not finished: {again}")
    fields = HEADER.unpack(raw)
    _, version, itemsize, count, highest, crc = fields
    if version != VERSION:
        raise UserError(f"{path} has format version {version}, this code reads {VERSION}: {again}")
    if (itemsize, count, crc) != (dtype.itemsize, about["tokens"], about["crc32"]) or HEADER.pack(*fields) != raw:
        raise UserError(f"{path} is not the shard that meta.json names: {again}")
    if status.st_size != HEADER.size + count * itemsize:
        raise UserError(f"{path} has {status.st_size:,} bytes, its header says "
                        f"{HEADER.size + count * itemsize:,}: {again}")  # fmt: skip
    if highest >= vocab_size:
        raise UserError(f"{path} holds id {highest}, the vocabulary has {vocab_size}: {again}")
    ids = np.asarray(np.memmap(path, dtype, "r", HEADER.size))  # a plain view of the map: slices cost less
    stamp = [status.st_size, status.st_mtime_ns]
    if seen is None or seen.get(path.name) != stamp:
        found = top = 0
        with open(path, "rb") as file:  # read, not mapped: mapped pages would count as this process's memory
            file.seek(HEADER.size)
            while chunk := file.read(1 << 24):
                found, top = zlib.crc32(chunk, found), max(top, int(np.frombuffer(chunk, dtype).max()))
        if (zlib.crc32(CHECKED.pack(*fields[:5]), found), top) != (crc, highest):
            raise UserError(f"{path} is damaged (its checksum differs): {again}")
        if seen is not None:
            seen[path.name] = stamp
    return ids


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
