"""Corpora as streams of pieces: a file, a folder, rows of JSON, CSV and Parquet, the Hugging Face hub, nanoGPT's ids.

A source is a function that reads a corpus: source(state) yields batches (pieces, state). Each state is where reading
continues after its batch, or None for a corpus that is always read from its start.
"""

import hashlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex

from minutegpt.data.dataset import NAME
from minutegpt.data.download import TextMissing
from minutegpt.data.parallel import batches
from minutegpt.data.readers import (
    COMPRESSED,
    HEAD,
    KINDS,
    base_name,
    is_utf8_start,
    kind_of,
    read_bytes,
    read_pieces,
    read_rows,
    read_text,
)
from minutegpt.data.shards import MAGIC
from minutegpt.data.tokenizer import END, cut_pieces
from minutegpt.errors import UserError

BATCH = 1 << 20  # characters per batch, which one process encodes
HEADERS = {
    MAGIC: "our shards",
    (20240520).to_bytes(4, "little"): "llm.c's shards", (20240801).to_bytes(4, "little"): "llm.c's shards",
    b"PAR1": "Parquet", b"\x93NUMPY": "NumPy", b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstandard",
}  # fmt: skip
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # as \ud83d in JSON, without its other half
FEW = 100  # rows; the split of so few documents depends on their sizes
# files that describe a dataset, next to its data. Spark and Hadoop begin such names with _
COMPANION = re.compile(
    r"(readme|licen[cs]e|copying|notice|authors|citation|changelog|contributing|dataset_infos?|dataset_dict|state|"
    r"metadata)\b.*|_.*",
    re.IGNORECASE,
)


class Piece(NamedTuple):
    """A document or a part of one, as text, bytes or ids. split: train or val. last: whether the document ends here."""

    split: str
    text: str | bytes | np.ndarray
    last: bool = False


Source = Callable[[Any], Iterator[tuple[list[Piece], Any]]]


# ---------------------------------------------------------------------------------------------- texts


def one_text(path: Path, binary: bool = False) -> Source:
    """The first 90% of a file's characters for training, the rest for validation. binary: bytes, not characters."""
    size = _text_size(path, binary)
    if size < 2:
        raise UserError(f"{path} is empty. A text to train on has some thousand characters at least")
    return lambda state: in_batches(_nine_tenths(path, size, binary))


def many_texts(paths: list[Path], every: int = 10, binary: bool = False) -> Source:
    """Each file is a document. Every tenth one, from the first, validates: no file is in both splits.

    Where that would not be about a tenth of the bytes, the last tenth of each file validates.
    """
    whole_files = is_balanced([_bytes_of(path) for path in paths], every)
    end = b"" if binary else ""

    def pieces() -> Iterator[Piece]:
        for i, path in enumerate(paths):
            if whole_files:
                split = "train" if i % every else "val"
                yield from (Piece(split, text) for text in read_pieces(path, binary))
                yield Piece(split, end, last=True)
                continue
            parts = _nine_tenths(path, _text_size(path, binary), binary)
            for split, part in groupby(parts, key=lambda piece: piece.split):
                yield from part
                yield Piece(split, end, last=True)

    return lambda state: in_batches(pieces())


def is_balanced(sizes: list[int], every: int) -> bool:
    """Whether every `every`-th document, from the first, is about 1 / every of the whole, and at most a fifth."""
    return sum(sizes) / (2 * every) <= sum(sizes[::every]) <= sum(sizes) / 5


def _bytes_of(path: Path) -> int:
    compressed = path.suffix.lower() in COMPRESSED
    return _text_size(path, binary=True) if compressed else path.stat().st_size


def _text_size(path: Path, binary: bool) -> int:
    return sum(map(len, read_pieces(path, binary)))


def _nine_tenths(path: Path, size: int, binary: bool) -> Iterator[Piece]:
    """Pieces of the first 90% of a text for training, then of the rest for validation, each cut as a text by itself."""
    chunks: Iterator[Any] = read_pieces(path, True) if binary else read_text(path)
    left = int(size * 0.9)
    crossing: list[Any] = []  # the chunk that belongs to both

    def first() -> Iterator[Any]:
        nonlocal left
        while left > 0 and (chunk := next(chunks, "")):
            yield chunk[:left]
            crossing[:] = [chunk[left:]]
            left -= len(chunk)

    for split, part in (("train", first()), ("val", chain(crossing, chunks))):
        yield from (Piece(split, text) for text in (part if binary else cut_pieces(part)) if text)


def in_batches(pieces: Iterator[Piece]) -> Iterator[tuple[list[Piece], None]]:
    return ((batch, None) for batch in batches(pieces, BATCH, lambda piece: len(piece.text)))


def raw_ids(place: Path, dtype: str) -> Source:
    """Token ids without a header, as nanoGPT's prepare.py writes them; val.bin next to train.bin validates.

    place: a file of ids, or a folder with train.bin.
    """
    if dtype not in ("uint16", "uint32"):
        raise UserError(f"--raw={dtype} is neither uint16 nor uint32. nanoGPT writes uint16")
    path = place / "train.bin" if place.is_dir() else place
    if not path.is_file():
        raise UserError(f"--input={place}: there is no file {path}. Name a file of ids, or a folder with train.bin")

    def ids_of(file: Path) -> np.ndarray:
        with open(file, "rb") as opened:
            head = opened.read(1024)
        for start, name in HEADERS.items():
            if head.startswith(start):
                raise UserError(f"{file} begins with the header of {name}, and --raw reads ids without a header")
        if head and b"\0" not in head and is_utf8_start(head):
            raise UserError(f"{file} holds a text, not ids. Leave out --raw, or name a file such as train.bin")
        if not head or file.stat().st_size % np.dtype(dtype).itemsize:
            raise UserError(f"{file} has {file.stat().st_size} bytes, so it is not a file of {dtype} ids")
        return np.asarray(np.memmap(file, np.dtype(dtype).newbyteorder("<"), "r"))

    train, val_file = ids_of(path), path.with_name("val.bin")
    if path.name == "train.bin" and val_file.exists():
        parts = {"train": train, "val": ids_of(val_file)}
    else:
        cut = int(len(train) * 0.9)
        parts = {"train": train[:cut], "val": train[cut:]}

    def pieces() -> Iterator[Piece]:
        for split, ids in parts.items():
            for at in range(0, len(ids), BATCH):
                yield Piece(split, ids[at : at + BATCH])

    return lambda state: in_batches(pieces())


# ---------------------------------------------------------------------------------------------- rows


class FileRows:
    """The rows of files of one kind, one file after another, with the interface of Hugging Face's IterableDataset."""

    def __init__(self, files: list[Path], kind: str, column: str) -> None:
        self.files, self.kind, self.column = files, kind, column
        self.file = self.row = 0  # the rows that were read: all of the files before, and these of this file

    def __iter__(self) -> Iterator[Any]:
        for path in self.files[self.file :]:
            for value in islice(read_rows(path, self.kind, self.column), self.row, None):
                self.row += 1
                yield value
            self.file, self.row = self.file + 1, 0

    def place(self) -> str:
        return f"row {self.row} of {self.files[self.file].name}"

    def state_dict(self) -> dict[str, int]:
        return {"file": self.file, "row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.file, self.row = state["file"], state["row"]


def documents(files: list[Path], kind: str, column: str, every: int, split_documents: bool = False) -> Source:
    """Each row of these files is a document; every `every`-th one, from the first, validates.

    Of fewer than FEW rows of unequal sizes, the last tenth of each validates. split_documents: a row is cut into
    documents at the letters <|endoftext|>.
    """
    open_stream = partial(FileRows, files, kind, column)
    stream = open_stream()
    first = [_texts_of(row, column, stream.place(), split_documents) for row in islice(stream, FEW)]
    sizes = [len(text) for texts in first for text in texts or []]
    by_size = len(first) < FEW and not is_balanced(sizes, every)
    return streamed(open_stream, column, every, split_documents, by_size)


def streamed(
    open_stream: Callable[[], Any], column: str, every: int, split_documents: bool = False, by_size: bool = False
) -> Source:
    """The rows of a stream, each a document; every `every`-th one, from the first, validates.

    A row without a text is skipped and counted in the state. every: 1 for validation only, 0 for training only.
    by_size: the last tenth of each document validates. split_documents: see documents().
    """

    def walk(state: Any) -> Iterator[tuple[list[Piece], Any]]:
        batch: list[Piece] = []
        size, number, rows, skipped = 0, 0, 0, 0
        try:
            stream = open_stream()
            if state:
                number, rows, skipped = state["number"], state.get("rows", state["number"]), state.get("skipped", 0)
                stream.load_state_dict(state["stream"])
            for row in stream:
                rows += 1
                place = stream.place() if isinstance(stream, FileRows) else f"row {rows}"
                texts = _texts_of(row, column, place, split_documents)
                if texts is None:
                    skipped += 1
                    if skipped == rows == 1000:  # before a large corpus is read to its end
                        raise _no_text(row, column, place)
                for text in texts or []:
                    split = "val" if every and number % every == 0 else "train"
                    batch += _cut_document(text) if by_size else [Piece(split, text, last=True)]
                    size += len(text)
                    number += 1
                if size >= BATCH:
                    yield batch, {"number": number, "rows": rows, "skipped": skipped, "stream": stream.state_dict()}
                    batch, size = [], 0
            if not rows:
                raise UserError("there are no rows, so no text. Add some, or name another --input")
            if skipped == rows:
                raise _no_text(row, column, place)
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # the network, or a file format, fails with exceptions of its own
            raise UserError(
                f"the corpus cannot be read after document {number}: {type(error).__name__}: {str(error)[:300]}. If "
                "the network failed, type the same command again: it continues from there"
            ) from error
        if batch or skipped:
            yield batch, {"number": number, "rows": rows, "skipped": skipped, "stream": stream.state_dict()}

    return walk


def _texts_of(row: Any, column: str, place: str, split_documents: bool) -> list[str] | None:
    """The documents of a row; None where its text is null, empty or missing. Raises UserError for any other value."""
    value = row.get(column) if isinstance(row, dict) else row
    if value is None or value == "":
        return None
    if isinstance(value, str):
        if half := not value.isascii() and HALF_CHARACTER.search(value):
            raise UserError(
                f"{place} has half a character, {half[0]!r}, at position {half.start()} of its text. Correct or delete "
                "that row"
            )
        if not split_documents or END not in value:
            return [value]
        return [part.strip() for part in value.split(END) if part.strip()]
    if isinstance(row, dict):
        raise UserError(
            f"{place} has no text {column!r}: its {column!r} is {type(value).__name__}, not a text. It has "
            f"{_listed(row)}. Name the column of the text: --column=NAME"
        )
    raise UserError(f"{place} is {type(row).__name__}, not an object with a text. Write one object per row")


def _no_text(row: Any, column: str, place: str) -> UserError:
    if not isinstance(row, dict) or column in row:
        return UserError(f"the texts of all rows up to {place} are null or empty. Add some text")
    return UserError(
        f"{place} has no text {column!r}, it has {_listed(row)}. Name the column of the text: --column=NAME"
    )


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(str(name)[:40] for name in list(row)[:20]) or "none"


def _cut_document(text: str) -> list[Piece]:
    cut = int(len(text) * 0.9)
    return [Piece(*part, last=True) for part in (("train", text[:cut]), ("val", text[cut:])) if part[1]]


def skipped_rows(state: Any) -> int:
    """The rows without a text that a source has skipped up to this state."""
    while isinstance(state, dict) and "state" in state:  # concat()'s
        state = state["state"]
    return state.get("skipped", 0) if isinstance(state, dict) else 0


def concat(*sources: Source) -> Source:
    """One source after another."""

    def walk(state: Any) -> Iterator[tuple[list[Piece], Any]]:
        first = state["source"] if state else 0
        for i, source in enumerate(sources[first:], first):
            for pieces, inner in source(state["state"] if state and i == first else None):
                yield pieces, {"source": i, "state": inner}

    return walk


def open_hub(path: str, column: str, **options: str) -> Any:
    """A dataset of Parquet files on the Hugging Face hub, streamed. Raises TextMissing where it cannot be reached."""
    try:
        return _datasets().load_dataset(path, streaming=True, columns=[column], batch_size=1000, **options)
    except Exception as error:  # no network, an outage, a dataset that moved: each has exceptions of its own
        raise TextMissing(
            f"{path} cannot be reached ({type(error).__name__}: {str(error)[:200]}). If you have its files, name them "
            "with --input=FOLDER. A dataset that needs no network: python prepare/python_code.py"
        ) from None


def _datasets() -> Any:
    """Hugging Face's library, without importing torch, which would take seconds and 300 MB."""
    os.environ["USE_TORCH"], before = "0", os.environ.get("USE_TORCH", "AUTO")
    import datasets

    os.environ["USE_TORCH"] = before
    return datasets


# ---------------------------------------------------------------------------------------------- any input


def from_input(
    place: Path,
    column: str = "text",
    every: int = 10,
    kind: str = "auto",
    split_documents: bool = False,
    binary: bool = False,
) -> Source:
    """The text, or the documents, of a file or folder of any kind that is read. Prints which files that are.

    kind: one of KINDS, instead of what the files look like; of a folder, the files of this kind. split_documents: cut
    texts into documents at the letters <|endoftext|>. binary: the bytes of files, where they are plain text or unknown.
    """
    if kind not in ("auto", *KINDS):
        raise UserError(f"--kind={kind} is none of auto, {', '.join(KINDS)}")
    kind, files = choose_files(place, kind, binary)
    if kind != "text" or split_documents:
        return documents(files, kind, column, every, split_documents)
    if len(files) == 1:
        return one_text(files[0], binary)
    return many_texts(files, every, binary)


def choose_files(place: Path, kind: str = "auto", binary: bool = False) -> tuple[str, list[Path]]:
    """The files that hold the texts in a file or folder, in order, and their kind. Prints what is left out, and why.

    Raises UserError where there are none, or files of several kinds.
    """
    files, left_out = find_files(place)
    groups: dict[str, list[Path]] = defaultdict(list)  # kind -> files
    for path in files:
        found = kind if place.is_file() and kind != "auto" else kind_of(path)
        groups["text" if binary and found == "a binary file" else found].append(path)
    if place.is_file() and (found := next(iter(groups))) not in KINDS:
        raise UserError(_cannot_read(place, found))
    data = {name: paths for name, paths in groups.items() if name in (KINDS if kind == "auto" else (kind,))}
    for name in sorted(groups.keys() - data.keys()):
        left_out[f"of kind {name}" if name in KINDS else name] = groups[name]
    named = {name for name, paths in data.items() if not all(COMPANION.fullmatch(path.name) for path in paths)}
    unread = groups.keys() - {*KINDS, "empty"}
    for name, paths in list(data.items()):
        companions = [path for path in paths if COMPANION.fullmatch(path.name)]
        if companions and (named | {name} != {"text"} if named else unread):
            left_out["about the data"] = left_out.get("about the data", []) + companions
            data[name] = [path for path in paths if path not in companions]
    data = {name: paths for name, paths in data.items() if paths}
    if not data:
        raise UserError(f"--input={place} has no text to read. Left out: {_counted(left_out, place) or 'nothing'}")
    if len(data) > 1:
        choice = " or ".join(f"--kind={name}" for name in data)
        raise UserError(f"--input={place} has files of several kinds: {_counted(data, place)}. Type {choice}")
    ((name, chosen),) = data.items()
    size = sum(path.stat().st_size for path in chosen) / 1e6
    files_read = f"{len(chosen):,} {name} file{'s' * (len(chosen) != 1)}, {size:,.2f} MB"
    print(f"reading {files_read}" + (f"; left out: {_counted(left_out, place)}" if left_out else ""), flush=True)
    return name, chosen


def _cannot_read(path: Path, kind: str) -> str:
    if kind == "empty":
        return f"{path} is empty. A text to train on has some thousand characters at least"
    if kind == "a binary file":
        kind += f" (byte {next(read_bytes(path, HEAD)).index(0)} is a NUL)"
    if path.suffix.lower() == ".bin" and kind.startswith("a binary file"):
        return f"{path} is {kind}. If it has token ids, type --raw=uint16 --tokenizer=NAME, with what made them"
    advice = "Unpack it first" if "archive" in kind or "compressed" in kind else "Save it as plain text first"
    return f"{path} is {kind}, which cannot be read. {advice}, or train on its bytes: --kind=text --tokenizer=byte"


def _counted(groups: dict[str, list[Path]], place: Path) -> str:
    """{"hidden": [a, b, c, d]} -> "4 hidden (a, b, c, ...)"."""
    counted = []
    for reason, paths in groups.items():
        names = [path.relative_to(place).as_posix() for path in paths[:3]] + ["..."] * (len(paths) > 3)
        counted.append(f"{len(paths):,} {reason} ({', '.join(names)})")
    return ", ".join(counted)


def find_files(place: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """The file `place`, or the files in that folder and those below it, in order; and what is left out, by reason.

    Hidden files and folders, and editors' backups, are left out. Links are followed: each folder and file once.
    """
    if place.is_file():
        return [place], {}
    if not place.exists():
        raise UserError(f"--input={place}: there is no such file or folder")
    if not place.is_dir():
        raise UserError(f"--input={place} is neither a file nor a folder")
    files: list[Path] = []
    left_out: dict[str, list[Path]] = {}
    visited: set[str] = set()

    def leave_out(reason: str, path: Path) -> None:
        left_out.setdefault(reason, []).append(path)

    def stop(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    for root, folders, names in os.walk(place, followlinks=True, onerror=stop):
        if os.path.realpath(root) in visited:
            leave_out("linked twice", Path(root))
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        folders.sort()
        for name in [*folders, *names]:
            path = Path(root) / name
            if name.startswith(".") or name == "__pycache__":
                leave_out("hidden", path)
                if name in folders:
                    folders.remove(name)
            elif name in folders:
                continue
            elif name.endswith("~") or (name.startswith("#") and name.endswith("#")):
                leave_out("backups", path)
            elif path.is_file():
                files.append(path)
            else:
                leave_out("broken links" if path.is_symlink() else "not files", path)
    own_files = {path.resolve() for path in files if not path.is_symlink()}
    files.sort(key=Path.as_posix)
    for path in [path for path in files if path.is_symlink()]:
        if path.resolve() in own_files:
            files.remove(path)
            leave_out("linked twice", path)
        own_files.add(path.resolve())
    return files, left_out


def dataset_name(place: Path, name: str = "") -> str:
    """The name if there is one, or else the input's without its endings, with _ for what a name cannot have.

    A name has letters of any script with their marks, digits, and - _ . inside. Raises UserError for another one.
    """
    if name:
        if not regex.fullmatch(NAME, name):
            raise UserError(f"--dataset={name!r} is not a name: letters, digits, and - _ . after the first of them")
        return name
    stem = place.name if place.is_dir() else base_name(place)[0]
    return regex.sub(r"[^\w\p{M}\u200c\u200d.-]|^[.-]", "_", stem)


def fingerprint(place: Path) -> str:
    """Changes when a file there changes, so that a stopped preparation does not continue with other files."""
    entries = [(path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in find_files(place)[0]]
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def ask_before(gigabytes: float, download: bool, max_tokens: int) -> None:
    """Raises UserError before a download of more than 1 GB without --download. gigabytes: of the whole corpus."""
    size = min(gigabytes, max_tokens * 3e-9) if max_tokens else gigabytes  # compressed text has about 3 bytes per token
    if size > 1 and not download:
        raise UserError(
            f"this would download about {size:.0f} GB. To do so, type: python {' '.join(sys.argv)} --download\n"
            "Or take fewer --max_tokens, or name files that you have with --input=FOLDER"
        )
