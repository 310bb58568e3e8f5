"""Files that hold texts: plain text, JSON, CSV and Parquet, each compressed or not.

    kind_of(Path("stories.jsonl.gz"))  # "json"
    read_rows(Path("stories.jsonl.gz"), "json", "text")  # {"text": "Once upon a time ...", ...}, ...
    read_pieces(Path("book.txt"))  # "Call me Ishmael. ...", ...

Every reader takes linear time, and holds one row or about a million characters in memory.
"""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
import shlex
import tempfile
import time
import zlib
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from minutegpt.data.tokenizer import END, PIECE, cut_pieces
from minutegpt.errors import UserError

KINDS = ("text", "json", "csv", "parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4")
COMPRESSED_OTHERWISE = (".br", ".z", ".lz", ".lzo", ".snappy", ".sz")  # brotli, compress, lzip ...: not read
KIND_OF_SUFFIX = {
    ".jsonl": "json", ".ndjson": "json", ".jsonlines": "json", ".json": "json",
    ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
FOREIGN = {  # the first bytes of files that hold no plain text
    b"PK\x03\x04": "a ZIP archive or an Office document", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive",
    b"minutGPT": "a shard of a dataset", b"%PDF": "a PDF",
    b"{\\rtf": "an RTF document", b"\xd0\xcf\x11\xe0": "an Office document",
    b"SQLite format 3": "an SQLite database", b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow file", b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"GIF8": "a picture",
}  # fmt: skip
JSON_START = re.compile(rb'\s*(\[\s*)?\{\s*"')  # an object, or an array of them
LINE_END = re.compile(r"\r\n?|\n")
HEAD = 4096  # bytes that decide what a file is
ROW_LIMIT = 1 << 28  # characters of one row; a longer one is a damaged file

csv.field_size_limit(ROW_LIMIT)


def kind_of(path: Path) -> str:
    """One of KINDS, "empty", or what else the file is, such as "a PDF". Decided by its first bytes, then its name."""
    head = next(read_bytes(path, HEAD), b"").removeprefix(codecs.BOM_UTF8)
    if not head:
        return "empty"
    if head.startswith(b"PAR1"):
        return "parquet"
    for start, name in FOREIGN.items():
        if head.startswith(start):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "a pickle"
    if path.suffix.lower() in COMPRESSED_OTHERWISE and not is_utf8_start(head):
        return f"a file compressed as {path.suffix}"
    kind = KIND_OF_SUFFIX.get(base_name(path)[1], "")
    if kind:
        return kind
    if JSON_START.match(head):
        return "json"
    if b"\0" in head and (path.suffix.lower() == ".bin" or not _wide_encoding(head)):  # ids can look like UTF-16
        return "a binary file"
    return "text"


def base_name(path: Path) -> tuple[str, str]:
    """The file's name without its endings, and the ending of its kind in lower case: a.JSONL.gz -> ("a", ".jsonl")."""
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    return path.stem, path.suffix.lower()


# ---------------------------------------------------------------------------------------------- bytes and text


def _open_binary(path: Path) -> IO[bytes]:
    """A file's bytes, decompressed where it begins as gzip, bzip2, xz, zstandard or LZ4 files do."""
    with open(path, "rb") as file:
        head = file.read(10)
    if head.startswith(b"\x1f\x8b\x08"):
        return gzip.open(path)  # type: ignore[return-value]
    if re.fullmatch(rb"BZh[1-9]1AY&SY", head):
        return bz2.open(path)
    if head.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        return lzma.open(path)
    for start, codec in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x04\x22\x4d\x18", "lz4")):
        if head.startswith(start):
            import pyarrow

            return pyarrow.input_stream(str(path), compression=codec)
    return open(path, "rb")


def read_bytes(path: Path, size: int = PIECE) -> Iterator[bytes]:
    """The bytes of a file, decompressed, in chunks of `size`. Raises UserError where it cannot be read to its end."""
    try:
        with _open_binary(path) as file:
            while chunk := file.read(size):
                yield chunk
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} cannot be decompressed ({error}). Get the file again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def read_text(path: Path) -> Iterator[str]:
    """The characters of a UTF-8 file in chunks of up to PIECE bytes, without a byte order mark at its start.

    Raises UserError, with the position, for the first byte that is not UTF-8 and for a NUL.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    head, position = b"", 0  # position: bytes before this chunk
    for chunk in chain(read_bytes(path), [b""]):
        if not head:
            head = chunk[:HEAD]
            if chunk.startswith(codecs.BOM_UTF8):
                chunk, position = chunk[3:], 3
        waiting = len(decoder.getstate()[0])  # bytes of half a character from the chunk before
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            what = f"byte {position - waiting + error.start} is 0x{error.object[error.start]:02x} ({error.reason})"
            raise _not_utf8(path, head, f"is not UTF-8: {what}") from None
        if "\0" in text:
            raise _not_utf8(path, head, f"is not plain text: byte {position + chunk.index(0)} is a NUL")
        position += len(chunk)
        if text:
            yield text


def _not_utf8(path: Path, head: bytes, problem: str) -> UserError:
    encoding = _wide_encoding(head)
    if encoding:
        return UserError(
            f"{path} is {encoding}, not UTF-8. Save it as UTF-8: iconv -f {encoding} -t UTF-8 "
            f"{shlex.quote(str(path))} > NEW_FILE"
        )
    return UserError(
        f"{path} {problem}. Convert it to UTF-8: iconv -f ENCODING -t UTF-8 {shlex.quote(str(path))} > NEW_FILE; or "
        "train on its bytes: --kind=text --tokenizer=byte"
    )


def _wide_encoding(head: bytes) -> str:
    """UTF-16LE, UTF-32BE ... where a file that begins with these bytes is that, with a byte order mark or not."""
    for name in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):  # the longer marks first
        if head.startswith("\ufeff".encode(name)):
            return name.upper().replace("-LE", "LE").replace("-BE", "BE")
    if b"\0" not in head:
        return ""
    best, most = "", 0
    for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        text = head[: len(head) // 4 * 4].decode(name, "replace")
        readable = sum((c.isprintable() or c.isspace()) and c != "\ufffd" for c in text)
        ascii_letters = sum(c.isascii() for c in text)  # with the bytes swapped, there would be none
        if readable > 0.95 * len(text) and ascii_letters > most:
            best, most = name, ascii_letters
    return best


def read_pieces(path: Path, binary: bool = False) -> Iterator[str] | Iterator[bytes]:
    """A UTF-8 text in pieces of up to PIECE characters, whose ids are the ids of the whole (tokenizer.cut_pieces).

    binary: the bytes of any file, as they are, in pieces of PIECE bytes.
    """
    return read_bytes(path) if binary else cut_pieces(read_text(path))


def is_utf8_start(head: bytes) -> bool:
    """Whether a UTF-8 text can begin with these bytes; the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return True
    except UnicodeDecodeError:
        return False


def is_utf8(path: Path) -> bool:
    """Whether a file that fits in memory is plain text."""
    try:
        return "\0" not in path.read_bytes().decode()
    except UnicodeDecodeError:
        return False


# ---------------------------------------------------------------------------------------------- rows


def read_rows(path: Path, kind: str, column: str) -> Iterator[Any]:
    """The rows of a file of this kind, as dicts that hold `column` and perhaps others.

    text: the documents between the letters <|endoftext|>, as strings. A JSON value may be a string too.
    Raises UserError for a damaged file, and where a CSV or Parquet file has no such column.
    """
    if kind == "json":
        return _json_values(path)
    if kind == "csv":
        return _csv_rows(path, column)
    if kind == "parquet":
        return _parquet_rows(path, column)
    return _documents(path)


def _json_values(path: Path) -> Iterator[Any]:
    """The elements of an array, or the values that follow each other, one per line or not."""
    decode = json.JSONDecoder().raw_decode
    chunks = read_text(path)
    buffer, at, row, more, in_array = "", 0, 0, True, False
    separators = re.compile(r"[\s,]*")
    while True:
        at = separators.match(buffer, at).end()  # type: ignore[union-attr]
        if at < len(buffer):
            if row == 0 and not in_array and buffer[at] == "[":
                at, in_array = at + 1, True
                continue
            if in_array and buffer[at] == "]":
                at, in_array = at + 1, False
                continue
            try:
                value, at = decode(buffer, at)
                row += 1
                yield value
                continue
            except (ValueError, RecursionError) as error:
                position = getattr(error, "pos", 0)
                cut_off = position > len(buffer) - 16 or "Unterminated string" in str(error)
                if not (more and cut_off):
                    why = getattr(error, "msg", "") or str(error)
                    raise UserError(
                        f"{path} cannot be read: row {row + 1} is not JSON ({why}). Correct or delete that row; or "
                        "train on the file as it is: --kind=text"
                    ) from None
        if not more:
            break
        rest = buffer[at:]
        if len(rest) > ROW_LIMIT:
            raise UserError(f"{path} cannot be read: row {row + 1} has more than {ROW_LIMIT:,} characters. Cut it")
        added = "".join(islice(chunks, 1 + len(rest) // PIECE))  # twice as much each time, so that it stays linear
        buffer, at, more = rest + added, 0, bool(added)
    if in_array:
        raise UserError(f"{path} cannot be read: its array has no end after row {row}. Get the file again, or add ]")


def _csv_rows(path: Path, column: str) -> Iterator[dict[str, str]]:
    """The rows of a file whose first line names the columns, separated by a comma, semicolon, tab or bar.

    Raises UserError, with the line, for quotes that do not match and for more fields than the header has.
    """
    lines = _lines(read_text(path))
    header = next(lines, "")
    if re.fullmatch(r"sep=.\s*", header):  # Excel's own first line
        header = next(lines, "")
    while header.count('"') % 2 and (line := next(lines, "")):  # a name has a line end
        header += line
    names = {mark: [name.strip() for name in next(csv.reader([header], delimiter=mark), [])] for mark in ",;\t|"}
    separator = next((mark for mark in names if column in names[mark]), "")
    if not separator:
        raise _no_column(path.name, column, max(names.values(), key=len), "Its first line must name the columns. ")
    columns = names[separator]
    if columns.count(column) > 1:
        raise UserError(f"{path.name} has {columns.count(column)} columns {column!r}. Rename one of them")
    if len(columns) == 1:
        separator = "\x1f"  # a line is one field, with its commas
    index, began = columns.index(column), 1 + header.count("\n")
    plain = separator in "\t\x1f" and not _is_quoted(path, separator, len(columns))
    reader = csv.reader(lines, delimiter=separator, strict=True, quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL)
    try:
        for fields in reader:
            if (plain and 0 < len(fields) < len(columns)) or any(fields[len(columns) :]):
                raise csv.Error(f"it has {len(fields)} fields, and the header has {len(columns)}")
            if separator == "\t" and any(_holds_rows(field, len(columns)) for field in fields):
                raise csv.Error("a quote opens there, and the next lines look like rows")
            if fields:  # a blank line has none
                yield {column: fields[index]} if index < len(fields) and fields[index] else {}
            began = 1 + header.count("\n") + reader.line_num
    except csv.Error as error:
        raise UserError(
            f"{path} cannot be read: the row that begins in line {began} is not CSV ({error}). Enclose each text in "
            "quotes and double the quotes inside it; or train on the file as it is: --kind=text"
        ) from None


def _is_quoted(path: Path, separator: str, n_columns: int) -> bool:
    """Whether quotes enclose fields. In many files of one column, or separated by tabs, they are characters."""
    try:
        rows = csv.reader(_lines(read_text(path)), delimiter=separator, strict=True)
        return all(len(fields) <= n_columns for fields in rows)
    except csv.Error:
        return False


def _holds_rows(field: str, n_columns: int) -> bool:
    """Whether a field of several lines looks like rows that a lone quote has joined."""
    further = field.split("\n")[1:]
    return len(further) > 1 and n_columns > 1 and all(line.count("\t") == n_columns - 1 for line in further[:-1])


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    """The lines of a text, with their ends: \\n, \\r\\n or \\r. A line of any length takes linear time."""
    parts: list[str] = []
    for chunk in chunks:
        end = 0
        for match in LINE_END.finditer(chunk):
            yield "".join([*parts, chunk[end : match.end()]])
            parts, end = [], match.end()
        parts.append(chunk[end:])
    if any(parts):
        yield "".join(parts)


def _parquet_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with tempfile.TemporaryFile() as plain, open(path, "rb") as file:
        compressed = file.read(4) != b"PAR1"
        if compressed:  # Parquet is read from its end
            for chunk in read_bytes(path):
                plain.write(chunk)
        try:
            table = pyarrow.parquet.ParquetFile(plain if compressed else file, pre_buffer=False)
            if column not in table.schema_arrow.names:
                raise _no_column(path.name, column, table.schema_arrow.names)
            for batch in table.iter_batches(1000, columns=[column]):  # the default is a whole row group
                yield from ({column: value} for value in batch.column(0).to_pylist())
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}. Get the file again, or write it again") from None


def _no_column(place: str, column: str, names: list[str], hint: str = "") -> UserError:
    listed = ", ".join(name[:40] for name in names[:20]) or "none"
    return UserError(
        f"{place} has no column {column!r}, it has {listed}. {hint}Name the column of the text: --column=NAME"
    )


def _documents(path: Path) -> Iterator[str]:
    """The documents between the letters <|endoftext|>, without the white space around them."""
    parts: list[str] = []
    tail = ""  # may be the beginning of END
    for chunk in read_text(path):
        *complete, rest = (tail + chunk).split(END)
        for document in complete:
            yield from _stripped("".join(parts) + document)
            parts = []
        cut = max(0, len(rest) - len(END) + 1)
        parts.append(rest[:cut])
        tail = rest[cut:]
        if sum(map(len, parts)) > ROW_LIMIT:
            raise UserError(f"{path} has no {END} in {ROW_LIMIT:,} characters. Leave out --split_documents")
    yield from _stripped("".join(parts) + tail)


def _stripped(document: str) -> list[str]:
    return [document.strip()] if document.strip() else []


# ---------------------------------------------------------------------------------------------- speed


def read_speed(megabytes: float = 50) -> dict[str, float]:
    """MB/s of read_pieces() for four texts of this size: plain lines, CRLF, blank lines, and one single line."""
    line = "The quick brown fox jumps over the lazy dog, and then it sleeps well until noon.\n"
    kinds = {"plain": line, "crlf": line[:-1] + "\r\n", "blank lines": line + "\n", "single line": line[:-1] + " "}
    speeds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        for name, text in kinds.items():
            path.write_bytes(text.encode() * int(megabytes * 1e6 / len(text)))
            for _ in range(3):  # the best of three, because a stall of the machine lasts as long as a pass
                start = time.perf_counter()
                characters = sum(map(len, read_pieces(path)))
                speed = characters / 1e6 / (time.perf_counter() - start)
                speeds[name] = max(speed, speeds.get(name, 0.0))
    return speeds
