"""Corpora as streams of pieces: a file, a folder, .jsonl and .parquet, the Hugging Face hub, nanoGPT's raw ids.

A source is a function that walks over a corpus: source(state) yields batches (pieces, state), each state being where
the walk goes on after its batch, or None for a corpus that is always walked from its start.
"""

import codecs
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex

from minutegpt.data.download import TextMissing
from minutegpt.data.parallel import batches
from minutegpt.errors import UserError

PIECE = 1 << 20  # characters that are read, and encoded, at a time
BATCH = 1 << 20  # characters that go to a process at a time
# between two lines no tokenizer of ours looks across, so that a text cut there gives the same ids as the whole
CUT = regex.compile(r"(?<=\S\n)(?=\S)")


class Piece(NamedTuple):
    """A document or a part of one, as text, bytes or ready ids: split is train or val, last says that it ends here."""

    split: str
    text: str | bytes | np.ndarray
    last: bool = False


Source = Callable[[Any], Iterator[tuple[list[Piece], Any]]]


def one_text(path: Path, binary: bool = False) -> Source:
    """The first 90% of a file's characters (bytes, where binary) to train on, the rest to validate."""
    size = sum(len(piece) for piece in read_pieces(path, binary))
    if size < 2:
        raise UserError(f"{path} is empty: a text to train on has some thousand characters at least")
    cut = int(size * 0.9)

    def pieces() -> Iterator[Piece]:
        at = 0
        for text in read_pieces(path, binary):
            here = max(0, cut - at)
            yield from (Piece(*part) for part in (("train", text[:here]), ("val", text[here:])) if part[1])
            at += len(text)

    return lambda state: in_batches(pieces())


def many_texts(paths: list[Path], every: int = 10, binary: bool = False) -> Source:
    """Each file a document, every tenth one, from the first, to validate: no file is in both splits."""

    def pieces() -> Iterator[Piece]:
        for i, path in enumerate(paths):
            split = "train" if i % every else "val"
            for text in read_pieces(path, binary):
                yield Piece(split, text)
            yield Piece(split, b"" if binary else "", last=True)

    return lambda state: in_batches(pieces())


def in_batches(pieces: Iterator[Piece]) -> Iterator[tuple[list[Piece], None]]:
    return ((batch, None) for batch in batches(pieces, BATCH, lambda piece: len(piece.text)))


def raw_ids(path: Path, dtype: str) -> Source:
    """Token ids as nanoGPT's prepare.py wrote them, with no header; val.bin beside a train.bin is its validation."""
    if dtype not in ("uint16", "uint32"):
        raise UserError(f"--raw={dtype} is neither uint16 nor uint32: nanoGPT writes uint16")

    def ids_of(file: Path) -> np.ndarray:
        if file.stat().st_size == 0 or file.stat().st_size % np.dtype(dtype).itemsize:
            raise UserError(f"{file} has {file.stat().st_size} bytes: that is no file of {dtype} ids")
        return np.asarray(np.memmap(file, np.dtype(dtype).newbyteorder("<"), "r"))

    train, beside = ids_of(path), path.with_name("val.bin")
    if path.name == "train.bin" and beside.exists():
        parts = {"train": train, "val": ids_of(beside)}
    else:
        cut = int(len(train) * 0.9)
        parts = {"train": train[:cut], "val": train[cut:]}

    def pieces() -> Iterator[Piece]:
        for split, ids in parts.items():
            for at in range(0, len(ids), BATCH):
                yield Piece(split, ids[at : at + BATCH])

    return lambda state: in_batches(pieces())


def streamed(open_stream: Callable[[], Any], column: str, every: int) -> Source:
    """A Hugging Face IterableDataset: each row a document, every `every`-th one, from the first, to validate.

    every: 1 for validation only, 0 for training only.
    """

    def walk(state: Any) -> Iterator[tuple[list[Piece], Any]]:
        batch, size, number = [], 0, 0
        try:
            stream = open_stream()
            if state:
                number = state["number"]
                stream.load_state_dict(state["stream"])
            for row in stream:
                text = row.get(column)
                if not isinstance(text, str):
                    raise UserError(f"row {number} has no text {column!r}, it has {', '.join(row)}: --column=NAME")
                batch.append(Piece("val" if every and number % every == 0 else "train", text, last=True))
                size += len(text)
                number += 1
                if size >= BATCH:
                    yield batch, {"number": number, "stream": stream.state_dict()}
                    batch, size = [], 0
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # whatever a reader of files, or the network, comes up with
            raise UserError(
                f"the corpus cannot be read after document {number}: {type(error).__name__}: {str(error)[:300]}. Where "
                "the network failed, type the same command again: it goes on from there"
            ) from error
        if batch:
            yield batch, {"number": number, "stream": stream.state_dict()}

    return walk


def concat(*sources: Source) -> Source:
    def walk(state: Any) -> Iterator[tuple[list[Piece], Any]]:
        first = state["source"] if state else 0
        for i, source in enumerate(sources[first:], first):
            for pieces, inner in source(state["state"] if state and i == first else None):
                yield pieces, {"source": i, "state": inner}

    return walk


def open_files(files: list[Path], column: str) -> Any:
    """.jsonl and .parquet files as a Hugging Face IterableDataset, read as they are needed."""
    datasets, names = _datasets(), [str(file) for file in files]
    if all(file.suffix == ".parquet" for file in files):
        options = {"columns": [column], "batch_size": 1000}  # else it takes a row group at a time, of any size
        return datasets.load_dataset("parquet", data_files=names, split="train", streaming=True, **options)
    return datasets.load_dataset("json", data_files=names, split="train", streaming=True)


def open_hub(path: str, column: str, **options: str) -> Any:
    """A dataset of parquet files on the Hugging Face hub, streamed. Raises TextMissing where it cannot be reached."""
    try:
        return _datasets().load_dataset(path, streaming=True, columns=[column], batch_size=1000, **options)
    except Exception as error:  # no network, an outage, a dataset that moved: each has exceptions of its own
        raise TextMissing(
            f"{path} cannot be reached ({type(error).__name__}: {str(error)[:200]}). Where its files are on this "
            "machine, name them with --input=FOLDER; a dataset that needs no network: python prepare/python_code.py"
        ) from None


def _datasets() -> Any:
    """Hugging Face's library, without the torch that it would import: seconds and 300 MB, for tensors unasked for."""
    os.environ["USE_TORCH"], before = "0", os.environ.get("USE_TORCH", "AUTO")
    import datasets

    os.environ["USE_TORCH"] = before
    return datasets


def any_source(place: Path, column: str, raw: str, binary: bool) -> Source:
    """What prepare/text.py takes: a text, a folder of texts, documents in .jsonl or .parquet, or raw ids."""
    files = files_in(place)
    if raw:
        return raw_ids(files[0], raw)
    if all(file.suffix in (".jsonl", ".parquet") for file in files):
        return streamed(lambda: open_files(files, column), column, every=10)
    if len(files) == 1:
        return one_text(files[0], binary)
    return many_texts(files, 10, binary)


def files_in(place: Path, suffixes: tuple[str, ...] = ()) -> list[Path]:
    """The file `place`, or all files in that folder with one of the suffixes (any, where none is given), in order."""
    if not place.exists():
        raise UserError(f"--input={place}: there is no such file or folder")
    if place.is_file():
        return [place]
    found = (p for p in place.rglob("*") if p.is_file() and not p.name.startswith("."))
    files = sorted((p for p in found if not suffixes or p.suffix in suffixes), key=Path.as_posix)
    if not files:
        raise UserError(f"--input={place} has no file {' or '.join(suffixes) or 'at all'} in it")
    return files


def fingerprint(place: Path) -> str:
    """Changes when a file does that is read from there: a stopped preparation must not go on in other files."""
    about = [(path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files_in(place)]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def ask_before(gigabytes: float, download: bool, max_tokens: int) -> None:
    """Stop before a download of more than 1 GB that was not asked for. gigabytes: that of the whole corpus."""
    size = min(gigabytes, max_tokens * 3e-9) if max_tokens else gigabytes  # compressed text has some 3 bytes a token
    if size > 1 and not download:
        raise UserError(
            f"this would download about {size:.0f} GB. If that is meant, type: python {' '.join(sys.argv)} --download\n"
            "Else take fewer --max_tokens, or name files that you have with --input=FOLDER"
        )


def read_pieces(path: Path, binary: bool = False) -> Iterator[str | bytes]:
    """A UTF-8 file in pieces of about PIECE characters, cut only where no token crosses, in constant memory.

    A byte order mark is dropped. Raises UserError that names the first byte that is not UTF-8. binary: any file, as
    it is, in pieces of PIECE bytes.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, offset = "", 0
    try:
        with open(path, "rb") as file:
            while binary and (raw := file.read(PIECE)):
                yield raw
            if file.read(3) != codecs.BOM_UTF8:
                file.seek(0)
            while not binary:
                offset = file.tell() - len(decoder.getstate()[0])  # bytes of half a character wait in the decoder
                raw = file.read(PIECE)
                rest += decoder.decode(raw, final=not raw)
                if not raw:
                    break
                cut = max((match.start() for match in CUT.finditer(rest, len(rest) // 2)), default=0)
                if cut and len(rest) >= PIECE:
                    yield rest[:cut]
                    rest = rest[cut:]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte {offset + error.start} is 0x{error.object[error.start]:02x} ({error.reason}). "
            "Convert it, or keep its bytes as they are with --tokenizer=byte"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if rest:
        yield rest


def is_utf8(path: Path) -> bool:
    """Whether a file of source code or the like, which fits in memory, is text at all."""
    try:
        return "\0" not in path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
