"""Corpora as streams of pieces: every form has the same documents, from any state on."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from corpora import decoded, documents, run, some_text, write_documents

from minutegpt.data import pipeline, sources
from minutegpt.data.dataset import parse_mixture
from minutegpt.data.shards import open_dataset
from minutegpt.data.tokenizer import from_json
from minutegpt.errors import UserError


def test_two_streams_one_after_the_other(tmp_path, monkeypatch):
    """As TinyStories has its validation part apart; walked from any state on, nothing is lost or comes twice."""
    monkeypatch.setattr(sources, "BATCH", 300)
    folder = write_documents(tmp_path / "mine", "jsonl", documents())
    val, train = (
        sources.streamed(lambda file=file: sources.FileRows([file], "json", "text"), "text", every)
        for file, every in ((folder / "a.jsonl", 1), (folder / "b.jsonl", 0))
    )
    walk = list(sources.concat(val, train)(None))
    pieces = [piece for batch, _ in walk for piece in batch]
    assert [(piece.split, piece.text) for piece in pieces] == [
        ("val" if i < 100 else "train", document) for i, document in enumerate(documents())
    ]
    for i, (_, state) in enumerate(walk[::5]):
        rest = list(sources.concat(val, train)(json.loads(json.dumps(state))))
        assert [batch for batch, _ in rest] == [batch for batch, _ in walk[5 * i + 1 :]]


def test_nanogpts_ids_without_a_header(tmp_path):
    words = some_text(2000)
    (tmp_path / "words.txt").write_text(words, encoding="utf-8")
    run("text", f"--input={tmp_path / 'words.txt'}", "--tokenizer=bpe", "--vocab_size=300", f"--data_dir={tmp_path}")
    ids = np.array(from_json(open_dataset(tmp_path / "words")["tokenizer"]).encode(words), np.uint16)
    (tmp_path / "nano").mkdir()
    ids[:500].tofile(tmp_path / "nano" / "train.bin")
    ids[500:].tofile(tmp_path / "nano" / "val.bin")
    options = (f"--input={tmp_path / 'nano' / 'train.bin'}", "--dataset=old", f"--data_dir={tmp_path}")
    done = run("text", *options, "--raw=uint16", f"--tokenizer={tmp_path / 'words'}")
    assert done.status == 0, done.err
    assert decoded(tmp_path / "old", "train") + decoded(tmp_path / "old", "val") == words
    assert open_dataset(tmp_path / "old")["splits"]["train"]["tokens"] == 500
    assert sum(split["bytes"] for split in open_dataset(tmp_path / "old")["splits"].values()) == len(words.encode())
    done = run("text", *options, "--raw=uint16")
    assert done.status == 2 and "--tokenizer=gpt2" in done.err
    done = run("text", *options, "--raw=int8", f"--tokenizer={tmp_path / 'words'}")
    assert done.status == 2 and "uint16" in done.err
    np.array([5, 300], np.uint16).tofile(tmp_path / "nano" / "train.bin")
    done = run("text", *options, "--raw=uint16", f"--tokenizer={tmp_path / 'words'}")
    assert done.status == 2 and "id 300 is outside a vocabulary of 300" in done.err
    assert decoded(tmp_path / "old", "train") + decoded(tmp_path / "old", "val") == words  # still there


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.jsonl", '{"body": "x"}\n{"body": "y"}\n', "no text 'text', it has body.*--column=NAME"),
    ("a.jsonl", '{"text": 5}\n', "row 1 of a.jsonl has no text 'text': its 'text' is int, not a text"),
    ("a.jsonl", '{"text": "x"}\n{"text": ["y"]}\n', "row 2 of a.jsonl .*'text' is list, not a text"),
    ("a.jsonl", "5\n", "row 1 of a.jsonl is int, not an object"),
    ("a.jsonl", '{"text": null}\n{"text": ""}\n' * 3, "the texts of all rows up to row 6 of a.jsonl are null or empty"),
    ("a.json", "[]", "there are no rows, so no text"),
    ("a.csv", "id,text\n", "there are no rows, so no text"),
    ("a.jsonl", '{"text": "x"\n', "cannot be read: row 1 is not JSON"),
    ("a.jsonl", '{"text": "x"}\n{"text": "y"\n{"text": "z"}\n' + "\n" * 99, "cannot be read: row 2 is not JSON"),
    ("a.jsonl", "", "is empty"),
    ("a.json", '[{"text": "x"}, {"text": "y"}', "cannot be read: its array has no end after row 2"),
    ("a.jsonl", '{"text": "a"}\n{"text": "b \\ud800 c"}\n', r"row 2 of a.jsonl has half a character, '\\ud800'"),
    ("a.jsonl", '{"text": "x"}\n{"text": "y', "row 2 is not JSON .*Correct or delete that row; .*--kind=text"),
    ("a.txt", '{"word"} is the first one\n', "row 1 is not JSON .*train on the file as it is: --kind=text"),
    ("a.jsonl", '{"text": ' + "[" * 99_999 + "\n", "row 1 is not JSON"),
    ("a.parquet", "no parquet", "cannot be read"),
    ("a.csv", "id,body\n1,x\n", r"a.csv has no column 'text', it has id, body\. .* Name the column .*--column=NAME"),
    ("a.csv", "just words\n", "a.csv has no column 'text', it has just words"),
    ("a.jsonl", '{"text": "x"}\n', "nothing was left for its train split"),
])  # fmt: skip
def test_bad_documents_are_refused_by_name(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as refused:
        source = sources.from_input(tmp_path / name)
        pipeline.write_dataset("d", source, "byte", data_dir=str(tmp_path), workers=1)
    assert "network" not in str(refused.value)
    assert not (tmp_path / "d" / "meta.json").exists() and not (tmp_path / "d" / "progress.json").exists()


def test_fingerprint_follows_the_files(tmp_path):
    folder = write_documents(tmp_path / "mine", "folder", ["a", "b"])
    before = sources.fingerprint(folder)
    assert sources.fingerprint(folder) == before
    (folder / "00001.txt").write_text("longer")
    assert sources.fingerprint(folder) != before
    with pytest.raises(UserError, match="no such file or folder"):
        sources.fingerprint(tmp_path / "nothing")


def test_large_downloads_are_asked_for(tmp_path):
    done = run("fineweb_edu", "--max_tokens=0", "--tokenizer=byte", f"--data_dir={tmp_path}")
    assert done.status == 2 and "27 GB" in done.err and "--download" in done.err
    sources.ask_before(27, False, 100_000_000)  # 0.3 GB
    sources.ask_before(27, True, 0)
    with pytest.raises(UserError, match="about 2 GB"):
        sources.ask_before(27, False, 500_000_000)


# ---------------------------------------------------------------------------------------------- what is read


def texts_of(source):
    """{"train": [text of each document], "val": ...} of a source."""
    found = {"train": [""], "val": [""]}
    for batch, _ in source(None):
        for piece in batch:
            found[piece.split][-1] += piece.text
            if piece.last:
                found[piece.split].append("")
    return {split: texts[:-1] if not texts[-1] else texts for split, texts in found.items()}


def write_tree(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


ROWS = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(["one " * 20] * 20))
PARQUET_FOLDER = {"_SUCCESS": "", "_metadata": "PAR1....PAR1", ".part-0.crc": "crc", "README.md": "# about " * 99}


@pytest.mark.parametrize(("files", "kind", "taken", "said"), [
    ({"data.jsonl": ROWS, "README.md": "# about\n" * 999, "LICENSE": "all rights\n"}, "json", ["data.jsonl"],
     "1 json file, 0.00 MB; left out: 2 about the data (LICENSE, README.md)"),
    ({"part-0.jsonl": ROWS, "_SUCCESS": "", ".part-0.crc": "x"}, "json", ["part-0.jsonl"],
     "left out: 1 hidden (.part-0.crc), 1 empty (_SUCCESS)"),
    ({"a.jsonl": ROWS, "b.NDJSON": ROWS, "dataset_infos.json": '{"text": 5}'}, "json", ["a.jsonl", "b.NDJSON"],
     "left out: 1 about the data (dataset_infos.json)"),
    ({"book.txt": "text", "README.md": "# about", ".git/config": "token", ".ipynb_checkpoints/book.txt": "text",
      "sub/.DS_Store": "x", "sub/deep/b": "text", "__pycache__/x.pyc": "x"},
     "text", ["README.md", "book.txt", "sub/deep/b"],
     "3 text files, 0.00 MB; left out: 4 hidden (.git, .ipynb_checkpoints, __pycache__, ...)"),
    ({"a.txt": "text", "b.png": b"\x89PNG\r\n", "c.bin": b"ab\0\1", "d.zip": b"PK\x03\x04", "e.txt": ""},
     "text", ["a.txt"],
     "left out: 1 a ZIP archive or an Office document (d.zip), 1 a binary file (c.bin), 1 a picture (b.png), "
     "1 empty (e.txt)"),
    ({"a.txt": "text", "metadata.csv": "id,text\n1,x\n"}, "text", ["a.txt"], "1 about the data (metadata.csv)"),
    ({"README.md": "# only this"}, "text", ["README.md"], "reading 1 text file"),
    ({"a.txt": "text", "a.txt~": "older", "#a.txt#": "newer", "sub/b": "text"}, "text", ["a.txt", "sub/b"],
     "left out: 2 backups (#a.txt#, a.txt~)"),
])  # fmt: skip
def test_the_files_that_are_read_and_those_left_out(tmp_path, capsys, files, kind, taken, said):
    folder = write_tree(tmp_path / "mine", files)
    found, paths = sources.choose_files(folder)
    assert (found, [path.relative_to(folder).as_posix() for path in paths]) == (kind, taken)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("files", "kind", "said"), [
    ({"a.jsonl": ROWS, "b.txt": "text"}, "auto", r"several kinds: 1 json \(a.jsonl\), 1 text \(b.txt\)"),
    ({"a.jsonl": ROWS, "b.csv": "text\nx\n"}, "auto", r"several kinds: .* Type --kind=json or --kind=csv"),
    ({"a.py": "x", "package.json": '{"name": "x"}'}, "auto", r"several kinds: .*--kind=text"),
    ({"a.zip": b"PK\x03\x04", ".hidden": "x"}, "auto", r"no text to read. Left out: 1 hidden .*, 1 a ZIP archive"),
    ({"README.md": "x", "data-0.arrow": b"\xff\xff\xff\xff", "state.json": '{"a": 1}'}, "auto",
     r"no text to read. Left out: 1 an Arrow file .*, 2 about the data|1 about the data"),
    ({"a.txt": "text"}, "csv", r"no text to read. Left out: 1 of kind text \(a.txt\)"),
    ({"a.txt": "text"}, "excel", "--kind=excel is none of auto, text, json, csv, parquet"),
])  # fmt: skip
def test_a_folder_that_is_unclear_is_refused(tmp_path, files, kind, said):
    with pytest.raises(UserError, match=said):
        sources.from_input(write_tree(tmp_path / "mine", files), kind=kind)


def test_a_kind_chosen_in_a_folder_of_several(tmp_path, capsys):
    folder = write_tree(tmp_path / "mine", {"a.jsonl": ROWS, "b.txt": "text", "c.txt": "more"})
    assert [path.name for path in sources.choose_files(folder, "text")[1]] == ["b.txt", "c.txt"]
    assert "left out: 1 of kind json (a.jsonl)" in capsys.readouterr().out
    assert [path.name for path in sources.choose_files(folder, "json")[1]] == ["a.jsonl"]


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.zip", b"PK\x03\x04...", "is a ZIP archive or an Office document, which cannot be read. Unpack it first"),
    ("a.pdf", b"%PDF-1.7", "is a PDF, which cannot be read. Save it as plain text first"),
    ("a.rtf", rb"{\rtf1\ansi", "is an RTF document"),
    ("a.tar", b"x" * 257 + b"ustar", "is a tar archive.*Unpack it"),
    ("a.model", bytes(range(1, 256)) + b"\0", r"is a binary file \(byte 255 is a NUL\)"),
    ("train.bin", "like words".encode("utf-16-le") * 9, "is a binary file.*If it has token ids, type --raw=uint16"),
    ("train_000000.bin", b"minutGPT\1\0", "is a shard of a dataset, which cannot be read"),
    ("a.pkl", b"\x80\x04\x95abc", "is a pickle"),
    ("a.arrow", b"\xff\xff\xff\xff\x10\0", "is an Arrow file"),
    ("a.txt", b"", "is empty"),
])  # fmt: skip
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_file_that_holds_no_text_is_refused_by_name(tmp_path, name, content, said, compress):
    (tmp_path / name).write_bytes(compress(content))
    with pytest.raises(UserError, match=said):
        sources.from_input(tmp_path / name)


@pytest.mark.parametrize("ending", [".br", ".Z", ".lz", ".snappy"])
def test_bytes_compressed_in_an_unknown_way_are_not_text(tmp_path, ending):
    (tmp_path / f"a.txt{ending}").write_bytes(bytes(range(255, 0, -1)))
    for binary in (False, True):
        with pytest.raises(
            UserError, match=rf"is a file compressed as \{ending}, which cannot be read. Unpack it first"
        ):
            sources.from_input(tmp_path / f"a.txt{ending}", binary=binary)
    (tmp_path / f"b{ending}").write_text("plain text " * 9)
    assert sources.choose_files(tmp_path / f"b{ending}")[0] == "text"


def test_json_is_never_read_as_plain_text_unless_that_is_asked_for(tmp_path):
    (tmp_path / "notes.txt").write_text(ROWS)
    assert texts_of(sources.from_input(tmp_path / "notes.txt"))["train"][0] == "one " * 20
    assert "".join(texts_of(sources.from_input(tmp_path / "notes.txt", kind="text"))["train"]).startswith('{"text')


def test_linked_folders_are_read_once(tmp_path):
    folder = write_tree(tmp_path / "mine", {"a/x.txt": "text", "b/y.txt": "text"})
    outside = write_tree(tmp_path / "outside", {"z.txt": "text"})
    (folder / "c").symlink_to(outside)
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "d").symlink_to(folder / "a")
    (folder / "e.txt").symlink_to(tmp_path / "nowhere")
    (folder / "a" / "w.txt").symlink_to(folder / "b" / "y.txt")  # sorted before its target
    (folder / "f.txt").symlink_to(tmp_path / "alone.txt")
    (folder / "g.txt").symlink_to(tmp_path / "alone.txt")
    (tmp_path / "alone.txt").write_text("text")
    files, left_out = sources.find_files(folder)
    assert [path.relative_to(folder).as_posix() for path in files] == [
        "a/x.txt", "b/y.txt", "c/z.txt", "f.txt",
    ]  # fmt: skip
    assert {reason: [path.name for path in paths] for reason, paths in left_out.items()} == {
        "linked twice": ["loop", "d", "w.txt", "g.txt"], "broken links": ["e.txt"],
    }  # fmt: skip


@pytest.mark.parametrize(("name", "dataset"), [
    ("book.txt", "book"), ("my book.v2.txt", "my_book.v2"), ("stories.jsonl.gz", "stories"), ("-x.txt", "_x"),
    ("हिन्दी.txt", "हिन्दी"), ("cafe\u0301.txt", "cafe\u0301"), ("می\u200cخواهم.csv", "می\u200cخواهم"),
    ("日本語", "日本語"),
])  # fmt: skip
def test_a_dataset_keeps_its_files_name_in_any_script(name, dataset):
    assert sources.dataset_name(Path(name)) == dataset
    assert parse_mixture(f"{dataset}:1,other:1") == {dataset: 1.0, "other": 1.0}
    assert sources.dataset_name(Path("x.txt"), dataset) == dataset


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", "a b", "-x", "a:1", "a,b"])
def test_a_name_that_train_py_would_not_take_is_refused(name):
    with pytest.raises(UserError, match=r"--dataset='.*' is not a name"):
        sources.dataset_name(Path("x.txt"), name)


# ---------------------------------------------------------------------------------------------- validation by size


@pytest.mark.parametrize("sizes", [[1_000, 50_000], [50_000, 300], [5_000, 5_000, 5_000], [20, 50_000, 7, 9_000]])
@pytest.mark.parametrize("form", ["folder", "jsonl"])
def test_few_documents_are_split_by_size(tmp_path, sizes, form):
    texts = ["".join(random.Random(i).choices("abcdefgh", k=size)) for i, size in enumerate(sizes)]
    folder = write_documents(tmp_path / "mine", form, texts)
    parts = texts_of(sources.from_input(folder))
    assert [train + val for train, val in zip(parts["train"], parts["val"], strict=True)] == texts
    share = sum(map(len, parts["val"])) / sum(sizes)
    assert 0.09 < share < 0.11


def test_many_documents_keep_every_tenth(tmp_path):
    for form in ("folder", "jsonl"):
        parts = texts_of(sources.from_input(write_documents(tmp_path / form, form, documents())))
        assert parts["val"] == documents()[::10] and len(parts["train"]) == 180


# ---------------------------------------------------------------------------------------------- rows


def test_other_columns_may_vary_and_rows_without_a_text_are_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH", 500)
    texts = documents()
    rows = [
        {"text": text, "maybe": None if i < 99 else "s", "n": [1, "x", None][i % 3]} for i, text in enumerate(texts)
    ]
    rows[150] |= {"late": {"a": [1]}}
    rows[7:7] = [{"text": None}, {"other": 1}, {"text": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    source = sources.from_input(tmp_path / "a.jsonl")
    parts, states = texts_of(source), [state for _, state in source(None)]
    assert parts["val"] == texts[::10] and len(parts["train"]) == 180
    assert sources.skipped_rows(states[-1]) == 3 and states[-1]["rows"] == 203
    resumed = list(source(json.loads(json.dumps(states[3]))))
    assert [batch for batch, _ in resumed] == [batch for batch, _ in list(source(None))[4:]]


def test_raw_ids_of_a_folder_are_its_train_bin_and_never_a_text(tmp_path):
    folder = write_tree(tmp_path / "nano", {"input.txt": "the text " * 99, "meta.pkl": b"\x80\x04"})
    with pytest.raises(UserError, match=r"there is no file .*train\.bin"):
        sources.raw_ids(folder, "uint16")
    for name in ("train.bin", "val.bin"):
        np.arange(40, dtype=np.uint16).tofile(folder / name)
    pieces = [piece for batch, _ in sources.raw_ids(folder, "uint16")(None) for piece in batch]
    assert [(piece.split, len(piece.text)) for piece in pieces] == [("train", 40), ("val", 40)]
    for name, content in (("a.txt", "the text " * 99), ("b.txt", "мир и труд " * 99)):
        with pytest.raises(UserError, match=r"holds a text, not ids\. Leave out --raw"):
            sources.raw_ids(write_tree(folder, {name: content}) / name, "uint16")
    with pytest.raises(UserError, match=r"begins with the header of llm\.c's shards"):
        np.array([20240520, 1, 4, 0], np.int32).tofile(folder / "train.bin")
        sources.raw_ids(folder, "uint16")
