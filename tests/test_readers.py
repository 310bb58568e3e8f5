"""Files of every kind, read in pieces or rows, and refused by name where they cannot be read."""

import gzip
import json
import random
import tracemalloc
from itertools import pairwise

import pytest
from corpora import COMPRESS, documents, some_text, write_rows

from minutegpt.data import readers
from minutegpt.data.readers import is_utf8, kind_of, read_pieces, read_rows, read_text
from minutegpt.data.tokenizer import CUT, PIECE, train_bpe
from minutegpt.errors import UserError


def test_pieces_are_the_text_and_cut_where_no_token_is(tmp_path):
    whole = some_text(600_000)
    (tmp_path / "t").write_bytes(whole.encode())
    pieces = list(read_pieces(tmp_path / "t"))
    assert "".join(pieces) == whole and len(pieces) > 1 and max(map(len, pieces)) <= PIECE
    for before, after in pairwise(pieces):
        assert 3 in {match.start() for match in CUT.finditer(before[-3:] + after[:3])}
    bpe = train_bpe([whole[:50_000]], 400)
    assert [i for piece in pieces for i in bpe.encode(piece)] == bpe.encode(whole)


@pytest.mark.parametrize("name", ["plain", "crlf", "blank lines", "single line", "one word"])
def test_every_text_is_read_in_linear_time_and_constant_memory(tmp_path, name):
    """Each character is looked at a few times at most, and no more than a few pieces are held."""
    line = "The quick brown fox jumps, 12 times.\n"
    ends = {"plain": line, "crlf": line[:-1] + "\r\n", "blank lines": line + "\n", "single line": line[:-1] + " "}
    text = ends.get(name, "ACGT") * (12_000_000 // len(ends.get(name, "ACGT")))
    (tmp_path / "t").write_text(text, newline="")
    tracemalloc.start()
    size = sum(map(len, read_pieces(tmp_path / "t")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == len(text) and peak < 8 * PIECE


def test_read_speed_measures_four_texts():
    speeds = readers.read_speed(0.5)
    assert set(speeds) == {"plain", "crlf", "blank lines", "single line"} and min(speeds.values()) > 1


def test_a_bad_byte_far_into_a_file_is_named(tmp_path):
    raw = bytearray(("é" * 10 + "\n").encode() * 200_000)
    raw[3_000_000] = 0xFF
    (tmp_path / "t").write_bytes(raw)
    with pytest.raises(UserError, match=r"byte (3000000 is 0xff|2999999 is 0xc3)"):
        list(read_pieces(tmp_path / "t"))


def test_is_utf8(tmp_path):
    for content, right in ((b"", True), ("é".encode(), True), (b"\xe9", False), (b"a\0", False)):
        (tmp_path / "t").write_bytes(content)
        assert is_utf8(tmp_path / "t") is right


# ---------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["some text\nof words\n" * 99, "немного слов\n" * 999, "a\n"])
def test_utf_16_and_32_are_refused_by_name(tmp_path, mark, encoding, text):
    (tmp_path / "t.txt").write_bytes((mark + text).encode(encoding))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(UserError, match=rf"t\.txt is {name}, not UTF-8\. Save it as UTF-8: iconv -f {name}"):
        list(read_text(tmp_path / "t.txt"))
    assert kind_of(tmp_path / "t.txt") == "text"


@pytest.mark.parametrize("before", ["", "é" * 2_000_000])
def test_a_nul_is_refused_with_its_position(tmp_path, before):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + before.encode() + b"words \0 and more words " * 9)
    with pytest.raises(UserError, match=rf"byte {3 + 2 * len(before) + 6} is a NUL\. .*--kind=text --tokenizer=byte"):
        list(read_text(tmp_path / "t.txt"))


def test_a_mark_is_dropped_and_line_ends_are_kept(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xef\xbb\xbf")
    assert "".join(read_text(tmp_path / "t.txt")) == "one\r\ntwo\rthree\n\ufeff"


# ---------------------------------------------------------------------------------------------- kinds and rows


NAMES = [f"a.{form}{ending}" for form in ("jsonl", "ndjson", "json", "csv", "tsv", "parquet") for ending in ("", ".gz")]
NAMES += ["a.jsonl.lz4", "a.jsonl.lzma", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.csv.zst", "a.parquet.xz"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_every_kind_and_compression(tmp_path, name):
    write_rows(tmp_path / name, documents())
    kind = kind_of(tmp_path / name)
    assert kind == {"ndjson": "json", "jsonl": "json", "tsv": "csv"}.get(name.split(".")[1], name.split(".")[1])
    assert [row["text"] for row in read_rows(tmp_path / name, kind, "text")] == documents()


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_compressed_text_is_read_whatever_its_name_and_a_damaged_one_refused(tmp_path, ending):
    raw = COMPRESS[ending](some_text(5000).encode())
    for name in (f"t.txt{ending}", "t.txt"):
        (tmp_path / name).write_bytes(raw)
        assert "".join(read_pieces(tmp_path / name)) == some_text(5000)
        assert b"".join(read_pieces(tmp_path / name, binary=True)) == some_text(5000).encode()
    for damaged in (raw[:-20], raw[: len(raw) // 2] + b"damaged!" + raw[len(raw) // 2 + 8 :]):
        (tmp_path / "t.txt").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot be decompressed|cannot read|is not UTF-8"):
            list(read_pieces(tmp_path / "t.txt"))


@pytest.mark.parametrize("content", [
    '{"text": "a"}\n{"text": "b"}\n\n', '[{"text": "a"},{"text": "b"}]', ' [\n {"text":"a"} ,\n{"text":"b"}\n]\n\n',
    '{"text": "a"}{"text": "b"}', '\ufeff{\n "text": "a"\n}\n{\n "text": "b"\n}', '{"text": "a"},\r\n{"text": "b"}\r\n',
])  # fmt: skip
def test_json_in_every_layout(tmp_path, content):
    for name in ("a.json", "a.jsonl", "a.txt", "a"):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        assert kind_of(tmp_path / name) == "json"
        assert list(read_rows(tmp_path / name, "json", "text")) == [{"text": "a"}, {"text": "b"}]


def test_json_rows_across_chunks(tmp_path, monkeypatch):
    """Chunks of every size cut strings, escapes, numbers and words in two."""
    rows = [
        {"text": 'é"\\ \n🙂' * (i % 5), "n": -1.5e-7 * i, "yes": True, "no": None, "list": [{}, [], ""]}
        for i in range(40)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    for name in ("a.jsonl", "a.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        for size in (1, 2, 3, 7, 50):
            cut = [text[at : at + size] for at in range(0, len(text), size)]
            monkeypatch.setattr(readers, "read_text", lambda path, cut=cut: iter(cut))
            assert list(read_rows(tmp_path / name, "json", "text")) == rows


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_csv_with_any_separator(tmp_path, mark):
    lines = ["id", "text"], ["1", f'"a{mark} ""quoted"",\nand\r\nlong"'], ["2", ""], ["3"], ["4", "b"]
    (tmp_path / "a.csv").write_text(
        "\ufeff" + "\r\n".join(mark.join(line) for line in lines), encoding="utf-8", newline=""
    )
    assert [row.get("text") for row in read_rows(tmp_path / "a.csv", "csv", "text")] == [
        f'a{mark} "quoted",\nand\r\nlong', None, None, "b",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "texts"), [
    ("a.csv", "id,text\r1,x\r2,y\r", ["x", "y"]),  # the line ends of old Macs
    ("a.csv", "sep=;\r\nid;text\r\n1;x, y\r\n", ["x, y"]),  # Excel's
    ("a.csv", '"the\nid", text \n1,x\n', ["x"]),
    ("a.csv", "text\nHello, world\n\n\"Hi\", she said\nyes\n", ["Hello, world", '"Hi", she said', "yes"]),
    ("a.csv", 'text\n"Hello, ""world"""\n"two\nlines"\n', ['Hello, "world"', "two\nlines"]),
    ("a.csv", "text,id,\nx,1,\ny,2,,\n", ["x", "y"]),
    ("a.tsv", 'id\ttext\n1\t"Hi," she said\n2\t5" wide\n3\t"open\n4\tlast\n',
     ['"Hi," she said', '5" wide', '"open', "last"]),
    ("a.tsv", 'id\ttext\n1\t"two\nlines"\n2\t"a ""b"""\n', ["two\nlines", 'a "b"']),
])  # fmt: skip
def test_csv_as_people_write_it(tmp_path, name, content, texts):
    (tmp_path / name).write_text(content, newline="")
    assert [row["text"] for row in read_rows(tmp_path / name, "csv", "text")] == texts


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.csv", "id,text\n1,x\n2,Hello, world\n", r"begins in line 3 is not CSV \(it has 3 fields, and the header has 2"),
    ("a.csv", "text;id\nHello; world;1\n", r"line 2 .*3 fields"),
    ("a.csv", 'id,text\n1,x\n2,"y\n3,z\n', r"line 3 is not CSV \(unexpected end of data\).* double the quotes"),
    ("a.csv", 'id,text\n1,"x\n2","y\n3,"z\n', r"line 2 is not CSV .*--kind=text"),
    ("a.tsv", 'id\ttext\n1\t"x\n2\ty\n3\tz\n4\tw"\n', "line 2 .*a quote opens there, and the next lines look"),
    ("a.tsv", 'id\ttext\n1\t"x\n2\ty\tmore\n', r"line 3 .*it has 3 fields"),
    ("a.tsv", 'id\ttext\n1\t"x" y\n2\n', r"line 3 .*it has 1 fields"),
    ("a.csv", "text,id,text\nx,1,y\n", r"a\.csv has 2 columns 'text'\. Rename one of them"),
])  # fmt: skip
def test_csv_that_would_lose_or_join_texts_is_refused_with_its_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content, newline="")
    with pytest.raises(UserError, match=said):
        list(read_rows(tmp_path / name, "csv", "text"))


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_lines_end_in_three_ways_in_chunks_of_any_size(tmp_path, monkeypatch, size):
    whole = 'id,text\r\n1,"a\r\nb\rc\nd"\r2,e\n'
    cut = [whole[at : at + size] for at in range(0, len(whole), size)]
    monkeypatch.setattr(readers, "read_text", lambda path: iter(cut))
    rows = read_rows(tmp_path / "a.csv", "csv", "text")
    assert [row["text"] for row in rows] == ["a\r\nb\rc\nd", "e"]


def test_a_parquet_text_that_is_not_utf_8_is_refused(tmp_path):
    import pyarrow.parquet

    texts = pyarrow.array([b"good", b"\xff bad"]).view(pyarrow.utf8())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read: .*utf-8"):
        list(read_rows(tmp_path / "a.parquet", "parquet", "text"))


def test_a_column_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    write_rows(tmp_path / "a.parquet", ["x"])
    write_rows(tmp_path / "a.csv", ["x"])
    for name, kind in (("a.parquet", "parquet"), ("a.csv", "csv")):
        with pytest.raises(UserError, match=rf"{name} has no column 'body', it has n, text\. .*--column=NAME"):
            list(read_rows(tmp_path / name, kind, "body"))


def test_documents_between_the_letters(tmp_path, monkeypatch):
    texts = [text for text in documents() if text.strip()]
    write_rows(tmp_path / "a.txt", [*texts, " \n "])
    whole = (tmp_path / "a.txt").read_text(encoding="utf-8")
    wanted = [text.strip() for text in texts]
    assert list(read_rows(tmp_path / "a.txt", "text", "")) == wanted
    for size in (1, 5, 12, 13, 14, 999):
        cut = [whole[at : at + size] for at in range(0, len(whole), size)]
        monkeypatch.setattr(readers, "read_text", lambda path, cut=cut: iter(cut))
        assert list(read_rows(tmp_path / "a.txt", "text", "")) == wanted


def test_any_head_has_a_kind(tmp_path):
    for i in range(300):
        raw = random.Random(i).randbytes(i)
        (tmp_path / "x").write_bytes(gzip.compress(raw) if i % 2 else raw)
        assert isinstance(kind_of(tmp_path / "x"), str)
