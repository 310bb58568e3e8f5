"""The prepare scripts, run as a user runs them: what they write, the report, limits, bad text and kills."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import KILLABLE, decoded, documents, run, some_text, write_documents, write_rows

from minutegpt.data import pipeline, sources
from minutegpt.data.dataset import open_split
from minutegpt.data.shards import ShardWriter, open_dataset
from minutegpt.data.tokenizer import END, from_json, train_bpe
from minutegpt.errors import ROOT, UserError

# ---------------------------------------------------------------------------------------------- the scripts


SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="Tiny Shakespeare is not on this machine")
def test_shakespeare_char_is_as_nanogpt_cuts_it(tmp_path):
    done = run("shakespeare_char", f"--data_dir={tmp_path}")
    assert done.status == 0, done.err
    meta = open_dataset(tmp_path / "shakespeare_char")
    assert [meta["splits"][s]["tokens"] for s in ("train", "val")] == [1_003_854, 111_540]
    assert meta["tokenizer"]["vocab_size"] == 65
    whole = SHAKESPEARE.read_bytes().decode()
    assert decoded(tmp_path / "shakespeare_char", "train") == whole[:1_003_854]
    assert decoded(tmp_path / "shakespeare_char", "val") == whole[1_003_854:]
    assert "1,003,854 tokens" in done.out and "65 ids, 100.0%" in done.out


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="Tiny Shakespeare is not on this machine")
def test_shakespeare_bpe_is_trained_on_its_training_part(tmp_path):
    done = run("shakespeare_bpe", f"--data_dir={tmp_path}", "--vocab_size=300")
    assert done.status == 0, done.err
    whole = SHAKESPEARE.read_bytes().decode()
    folder = tmp_path / "shakespeare_bpe"
    assert open_dataset(folder)["tokenizer"] == train_bpe([whole[:1_003_854]], 300).to_json()
    assert decoded(folder, "train") + decoded(folder, "val") == whole
    assert open_dataset(folder)["splits"]["train"]["bytes"] == 1_003_854


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "prepare").glob("*.py")))
def test_help_and_mistakes(script):
    done = run(script, "--help")
    assert done.status == 0 and "data_dir" in done.out
    done = run(script, "--data_dri=x")
    assert done.status == 2 and "data_dir" in done.err and "Traceback" not in done.err


@pytest.mark.slow
def test_python_code_is_the_interpreters_own(tmp_path):
    done = run("python_code", f"--data_dir={tmp_path}", "--vocab_size=300")
    assert done.status == 0, done.err
    meta = open_dataset(tmp_path / "python_code")
    assert meta["splits"]["train"]["bytes"] > 5_000_000
    train, val = (set(decoded(tmp_path / "python_code", split).split(END)) - {""} for split in ("train", "val"))
    assert not {code for code in train & val if len(code) > 2000}  # no file in both
    assert any("class ArgumentParser" in code for code in train | val)


@pytest.mark.parametrize(("script", "form"), [
    ("openwebtext", "jsonl"), ("fineweb_edu", "parquet"), ("tinystories", "jsonl"),
])  # fmt: skip
def test_streamed_corpora_from_local_files(tmp_path, script, form):
    folder = write_documents(tmp_path / "mine", form, documents())
    done = run(script, f"--input={folder}", "--tokenizer=byte", f"--data_dir={tmp_path}", "--workers=1")
    assert done.status == 0, done.err
    assert decoded(tmp_path / script, "val") == documents()[0] + "\n"
    assert decoded(tmp_path / script, "train") == "\n".join(documents()[1:]) + "\n"


# ---------------------------------------------------------------------------------------------- text.py


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_file_of_ones_own(tmp_path, kind):
    book = tmp_path / "my book.v2.txt"
    book.write_bytes(b"\xef\xbb\xbf" * (kind != "byte") + some_text(3000).encode())
    done = run("text", f"--input={book}", f"--tokenizer={kind}", "--vocab_size=300", f"--data_dir={tmp_path}")
    assert done.status == 0, done.err
    folder = tmp_path / "my_book.v2"
    whole = decoded(folder, "train") + decoded(folder, "val")
    assert whole == some_text(3000)
    assert sum(split["bytes"] for split in open_dataset(folder)["splits"].values()) == len(whole.encode())


def test_any_file_at_all_by_byte(tmp_path):
    raw = bytes(range(256)) * 50
    (tmp_path / "data.dat").write_bytes(raw)
    done = run("text", "--input=data.dat", "--tokenizer=byte", "--dataset=raw", f"--data_dir={tmp_path}", cwd=tmp_path)
    assert done.status == 0, done.err
    parts = [open_split(tmp_path / "raw", split) for split in ("train", "val")]
    assert b"".join(bytes(part.tokens(0, len(part)).tolist()) for part in parts) == raw


@pytest.mark.parametrize("form", ["folder", "jsonl", "parquet"])
def test_documents_of_ones_own(tmp_path, form):
    folder = write_documents(tmp_path / "mine", form, documents())
    done = run("text", f"--input={folder}", "--tokenizer=bpe", "--vocab_size=300", f"--data_dir={tmp_path}")
    assert done.status == 0, done.err
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
    made = pipeline.write_dataset(
        "d", sources.from_input(folder), "byte", data_dir=str(tmp_path), max_tokens=5000, workers=1
    )  # fmt: skip
    assert len(open_split(made, "train")) == 5000
    assert ("\n".join(documents()[1:10])) in decoded(made, "train")


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
@pytest.mark.parametrize("form", ["text", "folder", "jsonl"])
def test_max_tokens_is_exact_within_a_batch(tmp_path, tokenizer, form):
    if form == "text":
        (tmp_path / "mine").write_text(some_text(9000), encoding="utf-8")
    else:
        write_documents(tmp_path / "mine", form, documents())
    source = sources.from_input(tmp_path / "mine")
    made = pipeline.write_dataset("d", source, tokenizer, 300, str(tmp_path), max_tokens=1003, workers=1)
    train, val = (open_split(made, split) for split in ("train", "val"))
    assert len(train) == 1003 and 20 <= len(val) <= 112
    full = pipeline.write_dataset("e", source, str(made), 300, str(tmp_path), workers=1)
    for split in (train, val):
        name = "train" if split is train else "val"
        ids = split.tokens(0, len(split))
        assert (ids == open_split(full, name).tokens(0, len(split))).all()
        saved = from_json(split.meta["tokenizer"])
        text = saved.decode_bytes(ids[ids != saved.end_token] if saved.end_token is not None else ids)
        assert split.meta["splits"][name]["bytes"] == len(text)
        assert split.meta["splits"][name]["characters"] == len(text.decode(errors="replace"))


def test_the_dataset_that_is_replaced_is_named(tmp_path):
    for name, seed in (("projA", 1), ("projB", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "input.txt").write_text(some_text(500, seed), encoding="utf-8")
    a, b = (f"--input={Path(name) / 'input.txt'}" for name in ("projA", "projB"))
    fingerprints = []
    for option, said in (
        (a, ""),
        (a, ""),
        (b, f"replaces the dataset made from {Path('projA') / 'input.txt'}"),
        (b, ""),
    ):
        done = run("text", option, f"--data_dir={tmp_path / 'data'}", cwd=tmp_path)
        assert done.status == 0, done.err
        assert ("replaces" in done.out) == bool(said) and said in done.out
        fingerprints.append(open_dataset(tmp_path / "data" / "input")["fingerprint"])
    assert fingerprints[0] == fingerprints[1] != fingerprints[2] == fingerprints[3]


@pytest.mark.parametrize(("typed", "shown"), [
    ("projA/input.txt", "projA/input.txt"), ("book.txt", "book.txt"), ("{home}/book.txt", "book.txt"),
    ("{home}/projA/input.txt", "projA/input.txt"), ("{home}/../somebody/book.txt", "book.txt"),
])  # fmt: skip
def test_no_home_folder_is_written_down(tmp_path, monkeypatch, typed, shown):
    home = tmp_path / "home" / "alice"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    assert pipeline.shown_input(Path(typed.format(home=home))) == shown


def test_a_meta_json_and_shards_of_another_program_stay(tmp_path):
    (tmp_path / "book.txt").write_text(some_text(500), encoding="utf-8")
    (tmp_path / "book").mkdir()
    theirs = {"meta.json": b'{"title": "mine"}', "train_000000.bin": b"ids of llm.c", "val_000007.bin": b""}
    for name, content in theirs.items():
        (tmp_path / "book" / name).write_bytes(content)
    options = ("--input=book.txt", f"--data_dir={tmp_path}")
    done = run("text", *options, cwd=tmp_path)
    assert done.status == 2 and "meta.json is not from this project, and would be replaced" in done.err
    (tmp_path / "book" / "meta.json").unlink()
    for _ in range(2):
        assert run("text", *options, cwd=tmp_path).status == 0
    assert (tmp_path / "book" / "train_000000.bin").read_bytes() == theirs["train_000000.bin"]
    assert (tmp_path / "book" / "val_000007.bin").exists() and len(list((tmp_path / "book").glob("train*"))) == 2
    meta = tmp_path / "book" / "meta.json"
    meta.write_bytes(meta.read_bytes()[:-10])  # ours, damaged: the advice is to prepare it again
    assert run("text", *options, cwd=tmp_path).status == 0


def test_letters_that_join_documents_are_seen_and_split_at_when_asked(tmp_path):
    write_rows(tmp_path / "tales.txt", documents())
    done = run("text", "--input=tales.txt", f"--data_dir={tmp_path}", cwd=tmp_path)
    assert "warning: the text holds the letters <|endoftext|>, 1" in done.out and "--split_documents" in done.out
    done = run("text", "--input=tales.txt", "--tokenizer=byte", f"--data_dir={tmp_path}", cwd=tmp_path)
    assert "warning: the text holds the letters <|endoftext|>, 1" in done.out
    options = ("--split_documents", "--tokenizer=bpe", "--vocab_size=300")
    done = run("text", "--input=tales.txt", *options, f"--data_dir={tmp_path}", cwd=tmp_path)
    assert done.status == 0 and "text holds the letters" not in done.out, done.out
    for split, kept in (("val", lambda i: i % 10 == 0), ("train", lambda i: i % 10)):
        wanted = [document.strip() for i, document in enumerate(documents()) if kept(i)]
        assert decoded(tmp_path / "tales", split) == "".join(document + END for document in wanted)
        ids = open_split(tmp_path / "tales", split)
        assert (ids.tokens(0, len(ids)) == 299).sum() == len(wanted)


def test_a_forgotten_input_is_not_run_as_a_config_file(tmp_path):
    (tmp_path / "notes.py").write_text("open('HACKED', 'w')")
    done = run("text", "notes.py", cwd=tmp_path)
    assert done.status == 2 and "Did you mean --input=notes.py?" in done.err
    assert not (tmp_path / "HACKED").exists()


def test_the_command_that_trains_on_it_is_printed(tmp_path):
    (tmp_path / "book.txt").write_text(some_text(500), encoding="utf-8")
    done = run("text", "--input=book.txt", f"--data_dir={tmp_path / 'my data'}", cwd=tmp_path)
    assert f"MINUTEGPT_DATA='{tmp_path / 'my data'}' python train.py --dataset=book" in done.out
    done = run("text", "--input=book.txt", cwd=tmp_path, MINUTEGPT_DATA=str(tmp_path / "elsewhere"))
    assert "Train on it: python train.py --dataset=book" in done.out
    assert (tmp_path / "elsewhere" / "book" / "meta.json").exists()


def test_the_docstring_by_hand_makes_the_same_ids(tmp_path):
    """The ten lines of pipeline.py's docstring, run on a text that begins as Tiny Shakespeare does."""
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 40
    (tmp_path / "tinyshakespeare.txt").write_text(text, encoding="utf-8", newline="\n")
    code = re.sub(r"^    ", "", "\n".join(re.findall(r"^    .*$", pipeline.__doc__, re.M)), flags=re.M)
    names = {"Path": lambda name: tmp_path / name, "np": np}
    exec(code, names)
    made = pipeline.write_dataset(
        "d", sources.one_text(tmp_path / "tinyshakespeare.txt"), "char", data_dir=str(tmp_path)
    )
    for split in ("train", "val"):
        ids = open_split(made, split)
        assert (ids.tokens(0, len(ids)) == names[split]).all()


def test_preparing_needs_no_torch():
    modules = " ".join(f"minutegpt.data.{path.stem}," for path in (ROOT / "minutegpt" / "data").glob("*.py")).strip(",")
    code = f"import sys, {modules}; assert not {{'torch', 'datasets', 'pyarrow'}} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


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
    assert run("text", "--input=book.txt", f"--data_dir={tmp_path}", cwd=tmp_path).status == 0
    before = decoded(tmp_path / "book", "train")
    (tmp_path / "book.txt").write_bytes(content)
    done = run("text", "--input=book.txt", f"--data_dir={tmp_path}", *options, cwd=tmp_path)
    assert done.status == 2 and said in done.err and "Traceback" not in done.err, done.err
    assert decoded(tmp_path / "book", "train") == before


# ---------------------------------------------------------------------------------------------- the report


def test_too_large_a_vocabulary_is_warned_of(tmp_path):
    (tmp_path / "book.txt").write_text(some_text(2000), encoding="utf-8")
    options = ("--input=book.txt", "--tokenizer=bpe", "--vocab_size=5000", f"--data_dir={tmp_path}")
    done = run("text", *options, cwd=tmp_path)
    assert re.search(r"the text is too small for a vocabulary of 5,000 ids: using \d+", done.out), done.out
    assert "warning: the vocabulary is large for this text" in done.out
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="such names do not exist there")
def test_a_name_that_is_not_utf8_is_printed(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(some_text(2000), encoding="utf-8")
    Path(os.fsdecode(os.fsencode(folder) + b"/.f\xfcr")).write_text("hidden")
    command = [sys.executable, str(ROOT / "prepare" / "text.py"), f"--input={folder}", f"--data_dir={tmp_path / 'out'}"]
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as a locale other than C and C.UTF-8
    done = subprocess.run(command, capture_output=True, env=env)
    assert done.returncode == 0 and b"left out: 1 hidden (.f?r)" in done.stdout, done


@pytest.mark.parametrize("left", [None, 0, 40])
def test_a_shard_that_is_shorter_than_it_was_is_refused(tmp_path, left):
    """Zeros instead of the tokens would be text, with a right checksum."""
    writer = ShardWriter(tmp_path, "train", 65)
    writer.write(np.arange(60, dtype=np.uint16))
    progress = writer.sync()
    assert writer.file
    writer.file.close()  # Windows removes no open file
    [part] = tmp_path.glob("*.part")
    part.unlink() if left is None else os.truncate(part, left)
    with pytest.raises(UserError, match="is shorter than it was"):
        ShardWriter(tmp_path, "train", 65, state=progress)


def test_a_stopped_preparation_with_other_settings(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "progress.json").write_text('{"settings": {"tokenizer": "bpe"}}')
    (tmp_path / "t.txt").write_text(some_text(100), encoding="utf-8")
    for content, said in (('{"settings": {"tokenizer": "bpe"}}', "other settings"), ("{", "damaged")):
        (folder / "progress.json").write_text(content)
        with pytest.raises(UserError, match=said):
            pipeline.write_dataset("d", sources.one_text(tmp_path / "t.txt"), "char", data_dir=str(tmp_path))
