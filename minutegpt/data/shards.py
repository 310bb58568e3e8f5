"""The shard format: files of token ids with a checked header, and meta.json, which lists them.

data/<dataset>/ holds train_NNNNNN.bin, val_NNNNNN.bin and meta.json. meta.json is written last and names the valid
shards, so that a killed preparation leaves the old dataset as it was. A shard is a header of 64 bytes, then the ids.
The header: magic, version, bytes per id, number of ids, highest id, CRC-32 of the ids and of these fields.
"""

import hashlib
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
META_LIMIT = 64 << 20  # bytes; the largest tokenizer takes a few million


# ---------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Appends ids to the shards of one split. A shard gets its final name when it is complete and on disk.

    state: what sync() returned in a process that was killed. Everything written after that sync() is removed.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        vocab_size: int,
        shard_tokens: int = SHARD_TOKENS,
        state: dict[str, Any] | None = None,
    ) -> None:
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
        """ids: (N,) of any integer dtype. Raises UserError for an id outside the vocabulary and for a full disk."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise UserError(
                f"id {ids.max()} does not fit a vocabulary of {self.vocab_size}. Name the tokenizer that made it: "
                "--tokenizer=NAME"
            )
        ids = np.ascontiguousarray(ids, self.dtype)
        while len(ids):
            head, ids = np.split(ids, [self.shard_tokens - self.count])
            with _disk_errors(self.folder):
                if self.file is None:
                    self.file = open(self._temporary(), "w+b")
                    self.file.write(bytes(HEADER.size))  # zeros: not a valid shard until _finish()
                self.file.write(head.data)
            self._add(head)
            if self.count == self.shard_tokens:
                self._finish()

    def sync(self) -> dict[str, Any]:
        """Flushes everything to disk. Returns the state that a new ShardWriter continues from."""
        if self.file:
            with _disk_errors(self.folder):
                self.file.flush()
                os.fsync(self.file.fileno())
        return {"shards": list(self.shards), "open": self.count, "next": self.number}

    def close(self) -> list[dict[str, Any]]:
        """Finishes the last shard. Returns the shards of this split as meta.json lists them: file, tokens, crc32."""
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
        if final.exists():  # it was finished after the sync
            os.replace(final, self._temporary())
        size = HEADER.size + count * self.dtype.itemsize
        if not self._temporary().exists() or self._temporary().stat().st_size < size:
            raise UserError(f"{self._temporary()} is shorter than it was. Delete {self.folder} and prepare it again")
        self.file = open(self._temporary(), "r+b")
        self.file.truncate(size)
        self.file.seek(HEADER.size)
        while chunk := self.file.read(1 << 24):
            self._add(np.frombuffer(chunk, self.dtype))

    def _finish(self) -> None:
        assert self.file
        fields = (MAGIC, VERSION, self.dtype.itemsize, self.count, self.highest)
        # the fields come last in the checksum, because they are known only now
        crc = zlib.crc32(CHECKED.pack(*fields), self.crc)
        name = f"{self.split}_{self.number:06d}.bin"
        with _disk_errors(self.folder):
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
    """Writes meta.json, which makes the new shards the dataset, and deletes our shards that it does not name.

    meta: dataset, tokenizer, splits, and other plain values, such as the report.
    """
    meta = {"format": "minutegpt", "version": VERSION, **meta, "fingerprint": dataset_fingerprint(meta)}
    meta["crc32"] = _meta_checksum(meta)
    with atomic_write(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())
    named = {shard["file"] for split in meta["splits"].values() for shard in split["shards"]}
    for path in folder.iterdir():
        if SHARD_NAME.fullmatch(path.name.removesuffix(".part")) and path.name not in named:
            with suppress(OSError):  # Windows: a training run still reads the old ones
                if path.suffix == ".part" or _begins_as_ours(path):
                    path.unlink()


def _begins_as_ours(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def dataset_fingerprint(meta: dict[str, Any]) -> str:
    """16 hex digits that depend on the ids of all splits and on the tokenizer, and on nothing else."""
    shards = {name: [(s["tokens"], s["crc32"]) for s in split["shards"]] for name, split in meta["splits"].items()}
    content = json.dumps([meta["tokenizer"], shards], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _next_number(folder: Path, split: str) -> int:
    """New shards never take the name of an existing one: the old dataset is valid until meta.json changes."""
    return max((int(path.stem[-6:]) + 1 for path in folder.glob(f"{split}_{'[0-9]' * 6}.bin")), default=0)


def _meta_checksum(meta: dict[str, Any]) -> int:
    rest = {key: value for key, value in meta.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns a failed write, as on a full disk, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}. An older dataset there is untouched. Make room, then type "
            "the same command again"
        ) from error


# ---------------------------------------------------------------------------------------------- reading


def open_dataset(folder: str | Path) -> dict[str, Any]:
    """meta.json of a dataset, checked: format, version, dataset, tokenizer, splits, report, fingerprint, crc32.

    The fingerprint is computed where an older version wrote none. Raises UserError where there is no meta.json, or it
    is damaged, foreign, or names a file outside the folder.
    """
    path = Path(folder) / "meta.json"
    advice = _how_to_prepare(path.parent.name)

    def expect(condition: object, why: str) -> None:
        if not condition:
            raise UserError(f"{path} cannot be used ({why}). {advice}")

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
                expect(SHARD_NAME.fullmatch(shard["file"]), f"{shard['file']!r} is not the name of a shard")
                expect(_is_count(shard["tokens"]) and type(shard["crc32"]) is int, "a size is wrong")
            expect(_is_count(split["tokens"]) and type(split["bytes"]) is int, "a size is wrong")
            expect(split["tokens"] == sum(shard["tokens"] for shard in split["shards"]), "its sizes do not add up")
    except FileNotFoundError:
        raise UserError(f"there is no dataset at {path.parent}. {advice}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. {advice}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged, or not from this project. {advice}") from None
    return meta | {"fingerprint": dataset_fingerprint(meta)}


def _how_to_prepare(dataset: str) -> str:
    known = (ROOT / "prepare" / f"{dataset}.py").exists()
    script = f"{dataset}.py" if known else f"text.py --input=FILE_OR_FOLDER --dataset={dataset}"
    return f"Prepare it with `python prepare/{script}`"


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 53


def open_shard(
    path: Path,
    entry: dict[str, Any],
    dtype: np.dtype,
    meta: dict[str, Any],
    verified: dict[str, list[int]] | None = None,
) -> np.ndarray:
    """The ids of a shard, memory-mapped. Sizes are compared with the file before anything is allocated.

    entry: the shard's entry in meta.json. verified: file -> size and time stamp of shards whose checksum was correct;
    the checksum of such a shard is not computed again, and new ones are added.
    """
    advice = _how_to_prepare(meta["dataset"])
    vocab_size = meta["tokenizer"]["vocab_size"]
    try:
        status = path.stat()
        with open(path, "rb") as file:
            raw = file.read(HEADER.size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. {advice}") from None
    if len(raw) < HEADER.size or raw[:8] != MAGIC:
        raise UserError(f"{path} is not one of our shards, or was not finished. {advice}")
    fields = HEADER.unpack(raw)
    _, version, itemsize, count, highest, crc = fields
    if version != VERSION:
        raise UserError(f"{path} has format version {version}, and this code reads {VERSION}. {advice}")
    if (itemsize, count, crc) != (dtype.itemsize, entry["tokens"], entry["crc32"]) or HEADER.pack(*fields) != raw:
        raise UserError(f"{path} is not the shard that meta.json names. {advice}")
    claimed = HEADER.size + count * itemsize
    if status.st_size != claimed:
        raise UserError(f"{path} has {status.st_size:,} bytes, its header says {claimed:,}. {advice}")
    if highest >= vocab_size:
        raise UserError(f"{path} holds id {highest}, and the vocabulary has {vocab_size} ids. {advice}")
    ids = np.asarray(np.memmap(path, dtype, "r", HEADER.size))  # a plain view of the map, which is faster to slice
    stamp = [status.st_size, status.st_mtime_ns]
    if verified is None or verified.get(path.name) != stamp:
        found_crc = found_highest = 0
        with open(path, "rb") as file:  # read, because mapped pages would count as memory of this process
            file.seek(HEADER.size)
            while chunk := file.read(1 << 24):
                found_crc = zlib.crc32(chunk, found_crc)
                found_highest = max(found_highest, int(np.frombuffer(chunk, dtype).max()))
        if (zlib.crc32(CHECKED.pack(*fields[:5]), found_crc), found_highest) != (crc, highest):
            raise UserError(f"{path} is damaged (its checksum differs). {advice}")
        if verified is not None:
            verified[path.name] = stamp
    return ids
