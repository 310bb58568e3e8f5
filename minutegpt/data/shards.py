"""The shard format: files of token ids with a checked header, and meta.json, which lists them.

data/<dataset>/ holds train_NNNNNN.bin, val_NNNNNN.bin and meta.json, which is written last and names the shards
that count: a preparation that was killed leaves what stood before as it was. A shard is a header of 64 bytes
(magic, version, bytes an id, number of ids, highest id, CRC-32 of the ids and of all that), then the ids.
"""

import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minutegpt.errors import ROOT, UserError
from minutegpt.files import atomic_write, replace

HEADER = struct.Struct("<8sIIQQI28x")
CHECKED = struct.Struct("<8sIIQQ")  # the part of the header that the checksum covers
MAGIC = b"minutGPT"
VERSION = 1
SHARD_TOKENS = 100_000_000
SHARD_NAME = re.compile(r"(train|val)_[0-9]{6}\.bin")
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


def open_shard(path: Path, about: dict[str, Any], dtype: np.dtype, meta: dict[str, Any],
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
