"""Shards: what was written is what is read, and nothing else is ever read as data."""

import json
import random
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from corpora import ids_of, write_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from minutegpt.data import shards
from minutegpt.data.dataset import open_split
from minutegpt.data.shards import ShardWriter, open_dataset, publish
from minutegpt.data.tokenizer import byte_tokenizer, char_tokenizer
from minutegpt.errors import ROOT, UserError


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(1, 50), st.lists(st.integers(0, 60), max_size=8))
def test_any_cut_into_shards_and_writes_reads_back(tmp_path_factory, n, shard_tokens, cuts):
    folder, ids = tmp_path_factory.mktemp("d"), ids_of(n)
    writer = ShardWriter(folder, "train", 256, shard_tokens)
    for part in np.split(ids, sorted(min(cut, n) for cut in cuts)):
        writer.write(part)
    splits = {"train": {"tokens": n, "bytes": n, "shards": writer.close()}}
    writer = ShardWriter(folder, "val", 256)
    writer.write(ids[:1])
    splits["val"] = {"tokens": 1, "bytes": 1, "shards": writer.close()}
    publish(folder, {"dataset": "d", "tokenizer": byte_tokenizer().to_json(), "splits": splits})
    split = open_split(folder, "train")
    assert len(split) == n and len(split.shards) == -(-n // shard_tokens)
    assert (split.tokens(0, n) == ids).all()
    for start in range(0, n, 7):
        for stop in (start, start + 1, min(n, start + 13), n):
            assert (split.tokens(start, stop) == ids[start:stop]).all()


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65_536, 2), (65_537, 4), (100_000, 4)])
def test_dtype_is_what_the_vocabulary_needs(tmp_path, vocab_size, itemsize):
    tokenizer = char_tokenizer("".join(chr(c) for c in range(0x1000, 0x1000 + 110_000) if not 0xD800 <= c < 0xE000))
    tokenizer = char_tokenizer("".join(tokenizer.tokens[:vocab_size]))
    ids = np.array([0, vocab_size - 1, 5])
    folder = write_ids(tmp_path / "d", ids, ids, tokenizer)
    assert (folder / "train_000000.bin").stat().st_size == shards.HEADER.size + 3 * itemsize
    assert open_split(folder, "train").tokens(0, 3).tolist() == ids.tolist()
    with pytest.raises(UserError, match="does not fit a vocabulary"):
        ShardWriter(tmp_path, "train", vocab_size).write(np.array([0, vocab_size]))
    with pytest.raises(UserError, match="does not fit a vocabulary"):
        ShardWriter(tmp_path, "train", vocab_size).write(np.array([-1]))


def test_the_file_is_the_documented_header_and_ids(tmp_path):
    raw = (write_ids(tmp_path / "d", [1, 2, 300 % 256], [0]) / "train_000000.bin").read_bytes()
    magic, version, itemsize, count, highest, crc = struct.unpack("<8sIIQQI28x", raw[:64])
    assert (magic, version, itemsize, count, highest) == (b"minutGPT", 1, 2, 3, 44)
    assert raw[64:] == struct.pack("<3H", 1, 2, 44)
    assert crc == zlib.crc32(raw[64:] + raw[:32])


# ---------------------------------------------------------------------------------------------- what is not data


def read_all(folder):
    return [open_split(folder, split).tokens(0, n) for split, n in (("train", 2500), ("val", 300))]


def test_a_thousand_corruptions_none_read_as_data(tmp_path):
    """Bytes flipped, cut, added, zeroed and swapped in every file: each is refused, or changed nothing that is read."""
    good = write_ids(tmp_path / "good", ids_of(2500), ids_of(300, 1))
    want, rng = read_all(good), random.Random(0)
    files = sorted(path.name for path in good.iterdir())
    originals = {name: (good / name).read_bytes() for name in files}
    refused = 0
    for i in range(1000):
        name = rng.choice(files)
        raw = bytearray(originals[name])
        at = rng.randrange(min(len(raw), 64) if rng.random() < 0.3 else len(raw))  # often in the header
        kind = i % 6
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at] = rng.randrange(256)
        elif kind == 2:
            del raw[at:]
        elif kind == 3:
            raw[at:at] = rng.randbytes(rng.randrange(1, 200))
        elif kind == 4:
            end = min(len(raw), at + rng.randrange(1, 500))
            raw[at:end] = bytes(end - at)
        else:
            raw = bytearray(originals[rng.choice(files)])
        (good / name).write_bytes(raw)
        try:
            got = read_all(good)
        except UserError as error:
            refused += 1
            assert "Prepare it with" in str(error) or "cannot read" in str(error), error
        else:  # a byte became what it was, or white space in meta.json changed
            assert all((a == b).all() for a, b in zip(got, want, strict=True)), (name, kind, at)
            assert open_dataset(good) == json.loads(originals["meta.json"])
        (good / name).write_bytes(originals[name])
    assert refused > 850


HUGE = 10**15


def change(path, *keys, to):
    """A field of meta.json set by someone who knows the format: the checksum is right again."""
    meta = json.loads(path.read_text())
    at = meta
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = to
    meta["crc32"] = shards._meta_checksum(meta)
    path.write_text(json.dumps(meta))


SHARD = ("splits", "train", "shards", 0)


@pytest.mark.parametrize(("keys", "to"), [
    ((*SHARD, "file"), "../secret.bin"),
    ((*SHARD, "file"), "/etc/passwd"),
    ((*SHARD, "file"), "train_000000.bin/../../secret.bin"),
    ((*SHARD, "file"), "C:\\train_000000.bin"),
    ((*SHARD, "file"), "train_000000.bin\n"),
    ((*SHARD, "file"), 7),
    ((*SHARD, "file"), "train_000009.bin"),
    ((*SHARD, "tokens"), HUGE),
    ((*SHARD, "tokens"), 1e3),
    ((*SHARD, "tokens"), True),
    ((*SHARD, "crc32"), 1),
    (("splits", "train", "tokens"), HUGE),
    (("splits", "train", "bytes"), "x"),
    (("splits", "train", "shards"), []),
    (("splits", "train", "shards"), None),
    (("splits",), {}),
    (("splits", "test"), {}),
    (("tokenizer",), []),
    (("tokenizer", "vocab_size"), 10),
    (("tokenizer", "vocab_size"), HUGE),
    (("tokenizer", "vocab_size"), -1),
    (("version",), 2),
    (("format",), "other"),
    (("dataset",), None),
])  # fmt: skip
def test_hostile_meta(tmp_path, keys, to):
    folder = write_ids(tmp_path / "d", ids_of(2500), ids_of(300))
    shutil.copy(folder / "train_000000.bin", tmp_path / "secret.bin")
    change(folder / "meta.json", *keys, to=to)
    with pytest.raises(UserError):
        open_split(folder, "train")


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff", b"[" * 99_999, b'{"version": 1}', b"9" * 9999])
def test_meta_that_is_no_meta(tmp_path, content):
    folder = write_ids(tmp_path / "d", [1], [1])
    (folder / "meta.json").write_bytes(content)
    with pytest.raises(UserError, match="Prepare it with"):
        open_dataset(folder)


def test_claimed_sizes_allocate_nothing(tmp_path):
    """A shard and a meta.json that agree on a petabyte: refused by the size of the file."""
    folder = write_ids(tmp_path / "d", ids_of(1000), ids_of(300))
    path = folder / "train_000000.bin"
    fields = (shards.MAGIC, 1, 2, HUGE, 255)
    crc = zlib.crc32(shards.CHECKED.pack(*fields), zlib.crc32(path.read_bytes()[64:]))
    path.write_bytes(shards.HEADER.pack(*fields, crc) + path.read_bytes()[64:])
    change(folder / "meta.json", *SHARD, to={"file": path.name, "tokens": HUGE, "crc32": crc})
    change(folder / "meta.json", "splits", "train", "tokens", to=HUGE)
    with pytest.raises(UserError, match="has 2,064 bytes, its header says"):
        open_split(folder, "train")


def test_ids_above_what_the_header_says(tmp_path):
    """Right checksums, wrong highest id: the ids themselves are looked at."""
    folder = write_ids(tmp_path / "d", [5, 300 % 256, 7], [1], char_tokenizer("".join(map(chr, range(33, 100)))))
    path = folder / "train_000000.bin"
    raw = struct.pack("<3H", 5, 999, 7)
    fields = (shards.MAGIC, 1, 2, 3, 44)
    crc = zlib.crc32(shards.CHECKED.pack(*fields), zlib.crc32(raw))
    path.write_bytes(shards.HEADER.pack(*fields, crc) + raw)
    change(folder / "meta.json", *SHARD, "crc32", to=crc)
    with pytest.raises(UserError, match="damaged"):
        open_split(folder, "train")


def test_missing_and_unfinished(tmp_path):
    with pytest.raises(UserError, match=r"no dataset at .*text\.py --input=FILE_OR_FOLDER --dataset=nothing"):
        open_split(tmp_path / "nothing", "train")
    with pytest.raises(UserError, match=r"Prepare it with `python prepare/python_code\.py`"):
        open_split(tmp_path / "python_code", "train")
    folder = write_ids(tmp_path / "d", ids_of(1500), [1])
    (folder / "train_000001.bin").unlink()
    with pytest.raises(UserError, match=r"cannot read .*train_000001"):
        open_split(folder, "train")
    (folder / "train_000001.bin").write_bytes(bytes(64) + bytes(1000))  # as a writer that was killed leaves it
    with pytest.raises(UserError, match="not finished"):
        open_split(folder, "train")


# ---------------------------------------------------------------------------------------------- what was good stays


def test_the_old_dataset_stands_until_meta_is_written(tmp_path):
    old, new = ids_of(2500), ids_of(2500, 5)
    folder = write_ids(tmp_path / "d", old, [1])
    writer = ShardWriter(folder, "train", 256, 1000)
    for at in range(0, 2500, 100):
        writer.write(new[at : at + 100])
        assert (open_split(folder, "train").tokens(0, 2500) == old).all()
    writer.close()
    assert (open_split(folder, "train").tokens(0, 2500) == old).all()
    write_ids(folder, new, [1])
    assert (open_split(folder, "train").tokens(0, 2500) == new).all()
    assert len(list(folder.iterdir())) == 3 + 1 + 1  # nothing is left of the old one, nor of the one that was stopped


@pytest.mark.parametrize("stop_after", [0, 1, 999, 1000, 1001, 2000, 2400])
@pytest.mark.parametrize("lost", [0, 1, 50, 1100])
def test_a_writer_goes_on_from_its_sync(tmp_path, stop_after, lost):
    """What was written after the sync, a full shard included, is cut away and written again."""
    ids = ids_of(4000)
    writer = ShardWriter(tmp_path, "train", 256, 1000)
    writer.write(ids[:stop_after])
    state = json.loads(json.dumps(writer.sync()))
    writer.write(ids_of(lost, 9))
    del writer  # killed
    writer = ShardWriter(tmp_path, "train", 256, 1000, state)
    assert writer.tokens == stop_after
    writer.write(ids[stop_after:])
    splits = {"train": {"tokens": 4000, "bytes": 0, "shards": writer.close()}}
    val = ShardWriter(tmp_path, "val", 256)
    val.write(ids[:1])
    splits["val"] = {"tokens": 1, "bytes": 0, "shards": val.close()}
    publish(tmp_path, {"dataset": "d", "tokenizer": byte_tokenizer().to_json(), "splits": splits})
    assert (open_split(tmp_path, "train").tokens(0, 4000) == ids).all()
    assert len(list(tmp_path.iterdir())) == 4 + 1 + 1


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit to stand for a full disk")
def test_a_full_disk_is_told_and_the_old_dataset_stands(tmp_path):
    old = ids_of(2500)
    folder = write_ids(tmp_path / "d", old, [1])
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from pathlib import Path
from minutegpt.data.shards import ShardWriter
from minutegpt.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    writer = ShardWriter(Path({str(folder)!r}), "train", 256)
    writer.write(np.zeros(200_000, np.int64)); writer.sync()
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert "cannot write to" in done.stdout and "untouched" in done.stdout, done
    assert (open_split(folder, "train").tokens(0, 2500) == old).all()


def test_nothing_but_shards_is_deleted(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("train.bin", "notes.txt", "train_1.bin", "xtrain_000000.bin"):
        (folder / name).write_text("mine")
    write_ids(folder, [1], [1])
    assert {"train.bin", "notes.txt", "train_1.bin", "xtrain_000000.bin"} < {p.name for p in folder.iterdir()}
    assert Path(folder / "train_000000.bin").exists()


def test_a_dataset_of_an_older_version_has_a_fingerprint_too(tmp_path):
    folder = write_ids(tmp_path / "d", ids_of(2500), ids_of(300))
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    fingerprint = meta.pop("fingerprint")
    meta["crc32"] = shards._meta_checksum(meta)
    path.write_text(json.dumps(meta))
    assert open_dataset(folder)["fingerprint"] == fingerprint == open_split(folder, "val").fingerprint
    change(path, "fingerprint", to="0123456789abcdef")  # a stranger's claim is not taken
    assert open_dataset(folder)["fingerprint"] == fingerprint
    characters = char_tokenizer("".join(map(chr, range(256))))
    write_ids(tmp_path / "e", ids_of(2500), ids_of(300, 1))
    write_ids(tmp_path / "f", ids_of(2500), ids_of(300), characters)
    assert fingerprint not in {open_dataset(tmp_path / name)["fingerprint"] for name in ("e", "f")}
