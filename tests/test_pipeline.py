"""The prepare scripts, run as a user runs them; corpora of every form; kills, bad text and bad networks."""

import hashlib
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from minutegpt.data import download, pipeline, sources
from minutegpt.data.dataset import open_split
from minutegpt.data.download import TextMissing, download_bytes, find_text
from minutegpt.data.shards import open_dataset
from minutegpt.data.sources import CUT, PIECE, is_utf8, read_pieces
from minutegpt.data.tokenizer import END, from_json, train_bpe
from minutegpt.errors import ROOT, UserError

WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps\nwell; naïve café 🙂 12 345\n\nso it is"


def some_text(n_words, seed=0):
    return " ".join(random.Random(seed).choices(WORDS.split(" "), k=n_words))


def run(script, *options, cwd=None, **environment):
    """python prepare/<script>.py, with no network to wait for."""
    command = [sys.executable, str(ROOT / "prepare" / f"{script}.py"), *map(str, options)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, cwd=cwd)


def decoded(folder, split):
    ids = open_split(folder, split)
    return from_json(ids.meta["tokenizer"]).decode(ids.tokens(0, len(ids)).tolist())


# ---------------------------------------------------------------------------------------------- the scripts


SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="Tiny Shakespeare is not on this machine")
def test_shakespeare_char_is_as_nanogpt_cuts_it(tmp_path):
    done = run("shakespeare_char", f"--data_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    meta = open_dataset(tmp_path / "shakespeare_char")
    assert [meta["splits"][s]["tokens"] for s in ("train", "val")] == [1_003_854, 111_540]
    assert meta["tokenizer"]["vocab_size"] == 65
    whole = SHAKESPEARE.read_bytes().decode()
    assert decoded(tmp_path / "shakespeare_char", "train") == whole[:1_003_854]
    assert decoded(tmp_path / "shakespeare_char", "val") == whole[1_003_854:]
    assert "1,003,854 tokens" in done.stdout and "65 ids, 100.0%" in done.stdout


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="Tiny Shakespeare is not on this machine")
def test_shakespeare_bpe_is_trained_on_its_training_part(tmp_path):
    done = run("shakespeare_bpe", f"--data_dir={tmp_path}", "--vocab_size=300")
    assert done.returncode == 0, done.stderr
    whole = SHAKESPEARE.read_bytes().decode()
    folder = tmp_path / "shakespeare_bpe"
    assert open_dataset(folder)["tokenizer"] == train_bpe([whole[:1_003_854]], 300).to_json()
    assert decoded(folder, "train") + decoded(folder, "val") == whole
    assert open_dataset(folder)["splits"]["train"]["bytes"] == 1_003_854


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "prepare").glob("*.py")))
def test_help_and_mistakes(script):
    done = run(script, "--help")
    assert done.returncode == 0 and "data_dir" in done.stdout
    done = run(script, "--data_dri=x")
    assert done.returncode == 2 and "data_dir" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_python_code_is_the_interpreters_own(tmp_path):
    done = run("python_code", f"--data_dir={tmp_path}", "--vocab_size=300")
    assert done.returncode == 0, done.stderr
    meta = open_dataset(tmp_path / "python_code")
    assert meta["splits"]["train"]["bytes"] > 5_000_000
    train, val = (set(decoded(tmp_path / "python_code", split).split(END)) - {""} for split in ("train", "val"))
    assert not {code for code in train & val if len(code) > 2000}  # no file in both
    assert any("class ArgumentParser" in code for code in train | val)


# ---------------------------------------------------------------------------------------------- text.py


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_file_of_ones_own(tmp_path, kind):
    book = tmp_path / "my book.v2.txt"
    book.write_bytes(b"\xef\xbb\xbf" * (kind != "byte") + some_text(3000).encode())
    done = run("text", f"--input={book}", f"--tokenizer={kind}", "--vocab_size=300", f"--data_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "my_book.v2"
    whole = decoded(folder, "train") + decoded(folder, "val")
    assert whole == some_text(3000)
    assert sum(split["bytes"] for split in open_dataset(folder)["splits"].values()) == len(whole.encode())


def test_any_file_at_all_by_byte(tmp_path):
    raw = bytes(range(256)) * 50
    (tmp_path / "data.dat").write_bytes(raw)
    done = run("text", "--input=data.dat", "--tokenizer=byte", "--dataset=raw", f"--data_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    parts = [open_split(tmp_path / "raw", split) for split in ("train", "val")]
    assert b"".join(bytes(part.tokens(0, len(part)).tolist()) for part in parts) == raw


def documents(n=200):
    return [some_text(1 + i % 50, seed=i) for i in range(n)]


def write_documents(folder, form, documents):
    """The same documents in every form that is read: the expected training and validation texts do not change."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == "folder":
        for i, document in enumerate(documents):
            (folder / f"{i:05}.txt").write_bytes(document.encode())
        return folder
    half = len(documents) // 2
    for name, part in (("a", documents[:half]), ("b", documents[half:])):  # two files: order and joins matter
        if form == "jsonl":
            lines = (json.dumps({"n": 1, "text": document}) for document in part)
            (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        else:
            pa = pytest.importorskip("pyarrow")
            import pyarrow.parquet

            table = pa.table({"n": [1] * len(part), "text": part})
            pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=30)
    return folder


@pytest.mark.parametrize("form", ["folder", "jsonl", "parquet"])
def test_documents_of_ones_own(tmp_path, form):
    folder = write_documents(tmp_path / "mine", form, documents())
    done = run("text", f"--input={folder}", "--tokenizer=bpe", "--vocab_size=300", f"--data_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    for split, kept in (("val", lambda i: i % 10 == 0), ("train", lambda i: i % 10)):
        ids = open_split(tmp_path / "mine", split)
        wanted = [document for i, document in enumerate(documents()) if kept(i)]
        assert decoded(tmp_path / "mine", split) == "".join(document + END for document in wanted)
        assert (ids.tokens(0, len(ids)) == 299).sum() == len(wanted)  # an end token each
        about = ids.meta["splits"][split]
        assert about["bytes"] == sum(len(document.encode()) for document in wanted)
        assert about["characters"] == sum(map(len, wanted))
        sizes = from_json(ids.meta["tokenizer"]).token_bytes()
        assert sizes[ids.tokens(0, len(ids))].sum() == about["bytes"]


@pytest.mark.parametrize(("script", "form"), [
    ("openwebtext", "jsonl"), ("fineweb_edu", "parquet"), ("tinystories", "jsonl"),
])  # fmt: skip
def test_streamed_corpora_from_local_files(tmp_path, script, form):
    folder = write_documents(tmp_path / "mine", form, documents())
    done = run(script, f"--input={folder}", "--tokenizer=byte", f"--data_dir={tmp_path}", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert decoded(tmp_path / script, "val") == documents()[0] + "\n"
    assert decoded(tmp_path / script, "train") == "\n".join(documents()[1:]) + "\n"


def test_a_tokenizer_from_a_folder(tmp_path):
    """The tokenizer of another dataset, or GPT-2's from its files, whose loading test_tokenizer.py looks at."""
    (tmp_path / "t.txt").write_text(some_text(3000), encoding="utf-8")
    source = sources.one_text(tmp_path / "t.txt")
    a = pipeline.write_dataset("a", source, "bpe", 300, data_dir=str(tmp_path))
    b = pipeline.write_dataset("b", source, str(a), data_dir=str(tmp_path))
    assert open_dataset(a)["tokenizer"] == open_dataset(b)["tokenizer"]
    (tmp_path / "merges.txt").write_text("no merges")
    with pytest.raises(UserError, match=r"has no vocab\.json and merges\.txt|not GPT-2's|not on this machine"):
        pipeline.write_dataset("c", source, str(tmp_path), data_dir=str(tmp_path))


def test_max_tokens_stops_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH", 1000)
    folder = write_documents(tmp_path / "mine", "jsonl", documents())
    stream = sources.streamed(lambda: sources.open_files(sources.files_in(folder), "text"), "text", every=10)
    made = pipeline.write_dataset("d", stream, "byte", data_dir=str(tmp_path), max_tokens=5000, workers=1)
    assert 5000 <= len(open_split(made, "train")) < 7000
    assert ("\n".join(documents()[1:10])) in decoded(made, "train")


def test_two_streams_one_after_the_other(tmp_path, monkeypatch):
    """As TinyStories has its validation part apart; walked from any state on, nothing is lost or comes twice."""
    monkeypatch.setattr(sources, "BATCH", 300)
    folder = write_documents(tmp_path / "mine", "jsonl", documents())
    val, train = (
        sources.streamed(lambda file=file: sources.open_files([file], "text"), "text", every)
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
    assert done.returncode == 0, done.stderr
    assert decoded(tmp_path / "old", "train") + decoded(tmp_path / "old", "val") == words
    assert open_dataset(tmp_path / "old")["splits"]["train"]["tokens"] == 500
    assert sum(split["bytes"] for split in open_dataset(tmp_path / "old")["splits"].values()) == len(words.encode())
    done = run("text", *options, "--raw=uint16")
    assert done.returncode == 2 and "--tokenizer=gpt2" in done.stderr
    done = run("text", *options, "--raw=int8", f"--tokenizer={tmp_path / 'words'}")
    assert done.returncode == 2 and "uint16" in done.stderr
    np.array([5, 300], np.uint16).tofile(tmp_path / "nano" / "train.bin")
    done = run("text", *options, "--raw=uint16", f"--tokenizer={tmp_path / 'words'}")
    assert done.returncode == 2 and "id 300 is outside a vocabulary of 300" in done.stderr
    assert decoded(tmp_path / "old", "train") + decoded(tmp_path / "old", "val") == words  # still there


@pytest.mark.parametrize(("content", "options", "said"), [
    (b"", (), "is empty"),
    (b"x", (), "is empty"),
    (b"good\nbad \xff here", (), "is not UTF-8: byte 9 is 0xff"),
    ("é".encode() * 1000 + b"\xc3", (), "is not UTF-8: byte 2000 is 0xc3"),
    (b"text " * 100, ("--tokenizer=word",), "--tokenizer=word is none of char, byte, bpe, gpt2"),
    (b"text " * 100, ("--tokenizer=bpe", "--vocab_size=100"), "--vocab_size=100"),
    (b"text " * 100, ("--input=nothing.txt",), "--input=nothing.txt: there is no such file or folder"),
    (b"text " * 100, ("--input=",), "--input=FILE_OR_FOLDER"),
])  # fmt: skip
def test_bad_text_is_told_and_nothing_is_written(tmp_path, content, options, said):
    (tmp_path / "book.txt").write_bytes(b"what was good before " * 20)
    assert run("text", "--input=book.txt", f"--data_dir={tmp_path}", cwd=tmp_path).returncode == 0
    before = decoded(tmp_path / "book", "train")
    (tmp_path / "book.txt").write_bytes(content)
    done = run("text", "--input=book.txt", f"--data_dir={tmp_path}", *options, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert decoded(tmp_path / "book", "train") == before


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.jsonl", '{"body": "x"}\n{"body": "y"}\n', "no text 'text', it has body: --column=NAME"),
    ("a.jsonl", '{"text": 5}\n', "no text 'text'"),
    ("a.jsonl", '{"text": "x"\n', "cannot be read"),
    ("a.jsonl", "", "cannot be read"),
    ("a.jsonl", '{"text": "a"}\n{"text": "b \\ud800 c"}\n', "lone surrogate|cannot be read"),
    ("a.parquet", "no parquet", "cannot be read"),
    ("a.jsonl", '{"text": "only one"}\n', "nothing was left for its train split"),
])  # fmt: skip
def test_bad_documents_are_told(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    source = sources.any_source(tmp_path / name, "text", "", binary=False)
    with pytest.raises(UserError, match=said):
        pipeline.write_dataset("d", source, "byte", data_dir=str(tmp_path), workers=1)
    assert not (tmp_path / "d" / "meta.json").exists() and not (tmp_path / "d" / "progress.json").exists()


def test_too_large_a_vocabulary_is_warned_of(tmp_path):
    (tmp_path / "book.txt").write_text(some_text(2000), encoding="utf-8")
    options = ("--input=book.txt", "--tokenizer=bpe", "--vocab_size=5000", f"--data_dir={tmp_path}")
    done = run("text", *options, cwd=tmp_path)
    assert re.search(r"the text has pairs for \d+ ids only, not 5000", done.stdout), done.stdout
    assert "warning: the vocabulary is large for this text" in done.stdout
    report = open_dataset(tmp_path / "book")["report"]
    assert 0 < report["coverage"] < 1 and report["bigrams"] < 5000 and report["embedding_share"] < 0.1


def test_the_report_counts_what_is_there(tmp_path):
    (tmp_path / "ab.txt").write_text("ab" * 500 + "b" * 10)
    run("text", "--input=ab.txt", f"--data_dir={tmp_path}", cwd=tmp_path)
    report = open_dataset(tmp_path / "ab")["report"]  # the first 909 characters: abab...
    assert report["bigrams"] == 2 and report["bigrams_share"] == 0.5 and report["coverage"] == 1
    assert report["bigram_mean_count"] == 454 and report["bytes_per_token"] == 1


def test_the_reports_default_model_is_the_default():
    from model import GPTConfig

    config = GPTConfig(vocab_size=65)
    assert {"n_layer": config.n_layer, "n_embd": config.n_embd} == pipeline.DEFAULT_MODEL


# ---------------------------------------------------------------------------------------------- pieces


def test_pieces_are_the_text_and_cut_where_no_token_is(tmp_path):
    whole = some_text(600_000)
    (tmp_path / "t").write_bytes(whole.encode())
    pieces = list(read_pieces(tmp_path / "t"))
    assert "".join(pieces) == whole and len(pieces) > 1 and max(map(len, pieces)) < 2.1 * PIECE
    assert all(CUT.search(before[-2:] + after[:2], pos=2) for before, after in pairwise(pieces))
    bpe = train_bpe([whole[:50_000]], 400)
    assert [i for piece in pieces for i in bpe.encode(piece)] == bpe.encode(whole)


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


# ---------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("every", [3, 5, 8])
def test_stopped_at_any_batch_and_resumed_gives_the_same_bytes(tmp_path, monkeypatch, every):
    """A corpus that fails after each few batches, as a network does, until it is through."""
    monkeypatch.setattr(pipeline, "SYNC_SECONDS", 0.0)
    pieces = [sources.Piece("train" if i % 10 else "val", text, True) for i, text in enumerate(documents())]

    def source(failing):
        def walk(state):
            for n, i in enumerate(range(state or 0, len(pieces), 10)):
                if failing and n == every:
                    raise ConnectionError
                yield pieces[i : i + 10], i + 10

        return walk

    def write(out, failing):
        pipeline.write_dataset("d", source(failing), "byte", data_dir=str(out), workers=1, shard_tokens=1000)
        return {path.name: path.read_bytes() for path in sorted((out / "d").glob("*.bin"))}

    fails = 0
    while True:
        try:
            stopped = write(tmp_path / "stopped", True)
            break
        except ConnectionError:
            fails += 1
            assert not (tmp_path / "stopped" / "d" / "meta.json").exists()
    assert fails == -(-20 // every) - 1
    assert stopped == write(tmp_path / "straight", False) and len(stopped) > 10


KILLABLE = """
import sys
sys.path.insert(0, {root!r})
from functools import partial
from pathlib import Path
from minutegpt.data import pipeline, sources

if __name__ == "__main__":
    pipeline.SYNC_SECONDS, sources.BATCH = 0.0, 8000
    stream = partial(sources.open_files, sources.files_in(Path({folder!r})), "text")
    source = sources.streamed(stream, "text", 10)
    pipeline.write_dataset("d", source, "bpe", 300, {out!r}, workers={workers}, shard_tokens=3000)
"""


def killed_and_resumed(tmp_path, form, workers, kills):
    """The shards of a preparation that was killed again and again, and of one that was not; how often it was."""
    folder = write_documents(tmp_path / "mine", form, documents(4000))
    shards = []
    for out, kill in ((tmp_path / "straight", False), (tmp_path / "killed", True)):
        script = tmp_path / f"{out.name}.py"
        script.write_text(KILLABLE.format(root=str(ROOT), folder=str(folder), out=str(out), workers=workers))
        progress, rng, done = out / "d" / "progress.json", random.Random(workers), 0
        while kill and done < kills:
            process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
            before = progress.read_bytes() if progress.exists() else None
            while process.poll() is None and (not progress.exists() or progress.read_bytes() == before):
                time.sleep(0.001)
            time.sleep(rng.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if (out / "d" / "meta.json").exists():  # too late
                break
            done += 1
        finished = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        assert not progress.exists()
        shards.append([path.read_bytes() for path in sorted((out / "d").glob("*.bin"))])
    return *shards, done


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize(("form", "workers"), [("jsonl", 1), ("parquet", 2)])
@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bytes(tmp_path, form, workers):
    straight, killed, done = killed_and_resumed(tmp_path, form, workers, kills=4)
    assert straight == killed and len(straight) > 10 and done >= 2


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    folder = write_documents(tmp_path / "mine", "jsonl", documents(20_000))
    script = tmp_path / "unique_name_of_a_script.py"
    script.write_text(KILLABLE.format(root=str(ROOT), folder=str(folder), out=str(tmp_path), workers=2))
    process = subprocess.Popen([sys.executable, str(script)])

    def children():
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, parent = path.parent.name, path.read_text().rpartition(")")[2].split()[1]
                found += [pid] * (parent == str(process.pid))
            except OSError:
                continue
        return found

    deadline = time.monotonic() + 30
    while len(kids := children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    kids = children()
    process.kill()
    process.wait()
    assert len(kids) >= 2
    while any(Path(f"/proc/{kid}").exists() for kid in kids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{kid}").exists() for kid in kids)


def test_fingerprint_follows_the_files(tmp_path):
    folder = write_documents(tmp_path / "mine", "folder", ["a", "b"])
    before = sources.fingerprint(folder)
    assert sources.fingerprint(folder) == before
    (folder / "00001.txt").write_text("longer")
    assert sources.fingerprint(folder) != before
    with pytest.raises(UserError, match="no such file or folder"):
        sources.fingerprint(tmp_path / "nothing")


def test_a_stopped_preparation_with_other_settings(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "progress.json").write_text('{"settings": {"tokenizer": "bpe"}}')
    (tmp_path / "t.txt").write_text(some_text(100), encoding="utf-8")
    for content, said in (('{"settings": {"tokenizer": "bpe"}}', "other settings"), ("{", "damaged")):
        (folder / "progress.json").write_text(content)
        with pytest.raises(UserError, match=said):
            pipeline.write_dataset("d", sources.one_text(tmp_path / "t.txt"), "char", data_dir=str(tmp_path))


# ---------------------------------------------------------------------------------------------- finding, downloading

CONTENT = b"the text itself\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.path)
        times = self.asked.count(self.path)
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/broken" or (self.path == "/once-broken" and times == 1):
            return self.send_error(503)
        if self.path == "/silent":
            threading.Event().wait(1)
            return None
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/cut" or (self.path == "/once-cut" and times == 1):
            self.wfile.write(CONTENT[:100])
        elif self.path == "/other":
            self.wfile.write(CONTENT[::-1])
        else:
            self.wfile.write(CONTENT)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def no_wait(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("path", ["/good", "/once-broken", "/once-cut"])
def test_download(server, no_wait, path):
    assert download_bytes(server + path, SHA256, timeout=5) == CONTENT


@pytest.mark.parametrize(("path", "said", "times"), [
    ("/missing", "answered 404", 1), ("/broken", "answered 503", 3), ("/cut", "IncompleteRead", 3),
    ("/other", "another sha256", 3), ("/silent", "timed out", 3),
])  # fmt: skip
def test_download_that_fails(server, no_wait, path, said, times):
    with pytest.raises(OSError, match=said):
        download_bytes(server + path, SHA256, timeout=0.2)
    assert Server.asked.count(path) == times


def test_find_text(tmp_path, server, no_wait, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("MINUTEGPT_CACHE", str(cache))
    for wrong in ("/other", "/cut", "/missing"):
        with pytest.raises(TextMissing) as told:
            find_text("t.txt", server + wrong, SHA256)
        for way in (str(cache / "t.txt"), "--input=FILE", "python train.py config/python_code.py"):
            assert way in str(told.value)
        assert not list(tmp_path.rglob("*.*"))  # nothing half is left
    path = find_text("t.txt", server + "/good", SHA256)
    assert path == cache / "t.txt" and path.read_bytes() == CONTENT
    assert find_text("t.txt", server + "/missing", SHA256) == path  # found, not asked for again
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="sha256 differs"):
        find_text("t.txt", server + "/good", SHA256)
    mine = tmp_path / "mine.txt"
    mine.write_text("my own")
    assert find_text("t.txt", server + "/missing", SHA256, given=str(mine)) == mine
    with pytest.raises(UserError, match="no such file"):
        find_text("t.txt", server + "/good", SHA256, given=str(tmp_path / "nothing"))


def test_no_copy_and_no_network_exits_with_3(tmp_path):
    """What train.py falls back on: a proxy where nobody answers stands for a machine without a network."""
    nobody = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = run("shakespeare_char", f"--data_dir={tmp_path}", MINUTEGPT_CACHE=str(tmp_path / "none"), **nobody)
    assert done.returncode == 3 and "config/python_code.py" in done.stderr and "Traceback" not in done.stderr
    done = run("openwebtext", f"--data_dir={tmp_path}", "--tokenizer=byte", **nobody)
    assert done.returncode == 3 and "cannot be reached" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_large_downloads_are_asked_for(tmp_path):
    done = run("fineweb_edu", "--max_tokens=0", "--tokenizer=byte", f"--data_dir={tmp_path}")
    assert done.returncode == 2 and "27 GB" in done.stderr and "--download" in done.stderr
    sources.ask_before(27, False, 100_000_000)  # 0.3 GB
    sources.ask_before(27, True, 0)
    with pytest.raises(UserError, match="about 2 GB"):
        sources.ask_before(27, False, 500_000_000)
