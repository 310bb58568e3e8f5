"""minutegpt/safe_load.py: no file, from any source, runs code, writes anything, or fills memory."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import harmless, linux

from minutegpt.checkpoint import Damaged, read_checkpoint


class Call:
    """Pickles as a call of function(*arguments)."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Storage:
    """Pickles as torch.save's reference to a storage: the key of its part in the zip, and how much it claims."""

    def __init__(self, key, numel):
        self.id = ("storage", torch.FloatStorage, key, "cpu", numel)


def tensor(key, claimed, offset, shape, stride):
    return Call(torch._utils._rebuild_tensor_v2, Storage(key, claimed), offset, shape, stride, False, OrderedDict())


def forge(path, state, storages=(b"\0" * 64, b"\0" * 2**20), protocol=2, compress=False, extra=(), pickled=None):
    """A checkpoint as a stranger could write it: any pickle, any parts."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol)
    pickler.persistent_id = lambda value: value.id if isinstance(value, Storage) else None
    pickler.dump(state)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled or buffer.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, data in enumerate(storages):
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
        for name, data in extra:
            archive.writestr(name, data)
    return path


def plain(**more):
    return {"format": "minutegpt", "version": 1, "model": {}, "model_config": {}, "step": 1, "config": {}} | more


def layers(depth, width):
    value = [0] * width
    for _ in range(depth):
        value = [value] * width
    return value


def endless():
    value = []
    value.append(value)
    return value


def test_the_forger_writes_what_is_read(tmp_path):
    state = read_checkpoint(forge(tmp_path / "a.pt", plain(model={"a": tensor("0", 16, 4, (3, 4), (4, 1))})))
    assert state["model"]["a"].shape == (3, 4)


HUGE = 10**12
HOSTILE: dict[str, Any] = {
    "runs a command": plain(x=Call(os.system, "touch HACKED")),
    "runs python": plain(x=Call(eval, "open('HACKED', 'w')")),
    "opens a file": plain(x=Call(open, "HACKED", "w")),
    "imports a module": plain(x=Call(__import__, "antigravity")),
    "getattr": plain(x=Call(getattr, "a", "upper")),
    "a terabyte of bytearray": plain(x=Call(bytearray, HUGE)),
    "bytes": plain(x=b"x"),
    "a set": plain(x={1}),
    "a complex number": plain(x=1j),
    "a torch function outside the list": plain(x=Call(torch.zeros, HUGE)),
    "a dtype": plain(x=torch.float32),
    "a Path": plain(x=Path("/etc/passwd")),
    "a storage that claims a terabyte": plain(model={"a": tensor("0", HUGE, 0, (HUGE,), (1,))}),
    "a storage of negative size": plain(model={"a": tensor("0", -1, 0, (4,), (1,))}),
    "a storage without a part": plain(model={"a": tensor("7", 4, 0, (4,), (1,))}),
    "a storage named by a path": plain(model={"a": tensor("../../../etc/passwd", 4, 0, (4,), (1,))}),
    "a tensor larger than its storage": plain(model={"a": tensor("0", 16, 0, (HUGE,), (1,))}),
    "a tensor just larger than its storage": plain(model={"a": tensor("0", 16, 0, (17,), (1,))}),
    "an offset after the storage": plain(model={"a": tensor("0", 16, 16, (1,), (1,))}),
    "a huge offset": plain(model={"a": tensor("0", 16, HUGE, (1,), (1,))}),
    "a negative offset": plain(model={"a": tensor("0", 16, -4, (1,), (1,))}),
    "a stride after the storage": plain(model={"a": tensor("0", 16, 0, (2,), (HUGE,))}),
    "a negative stride": plain(model={"a": tensor("0", 16, 8, (4,), (-1,))}),
    "a giant view of stride 0": plain(model={"a": tensor("0", 16, 0, (HUGE,), (0,))}),
    "a giant view in two dimensions": plain(model={"a": tensor("0", 16, 0, (10**6, 10**6), (0, 0))}),
    "more elements than 64 bits count": plain(model={"a": tensor("0", 16, 0, (2**62, 16), (0, 0))}),
    "an overwritten giant": plain(x=[("a", tensor("0", 16, 0, (HUGE,), (1,)))]),
    "many views of one storage": plain(model={str(i): tensor("1", 2**18, 0, (2**18,), (1,)) for i in range(999)}),
    "a billion laughs": plain(x=layers(9, 10)),
    "a thousand long texts": plain(x=["x" * 10**6] * 1000),
    "a list within itself": plain(x=endless()),
    "a deep nest": plain(x=layers(50, 1)),
    "an integer of many digits": plain(x=10**600),
    "an integer of 65 bits": plain(x=2**64),
    "a list": [1, 2],
    "a tensor": tensor("0", 16, 0, (4,), (1,)),
    "keys that are tuples": plain(x={(1, 2): 3}),
    "a model that is a list": plain(model=[1]),
    "weights that are numbers": plain(model={"a": 1.0}),
    "no model": {k: v for k, v in plain().items() if k != "model"},
    "a step that is text": plain(step="../../x"),
    "a version that is text": plain(version="1"),
    "no format": {k: v for k, v in plain().items() if k != "format"},
    "a nanoGPT checkpoint without a model": {"model": 3, "model_args": {}, "iter_num": 1},
    "a nanoGPT checkpoint with a list for a step": {"model": {}, "model_args": {}, "iter_num": [1]},
    "a nanoGPT checkpoint with a vector for a loss": {
        "model": {}, "model_args": {}, "iter_num": 1, "best_val_loss": tensor("0", 16, 0, (4,), (1,)),
    },
}  # fmt: skip


@linux
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_before_it_does_harm(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for protocol in (2, 4):
        forge("a.pt", HOSTILE[name], protocol=protocol)
        assert harmless("a.pt")
        assert os.listdir() == ["a.pt"]  # nothing ran, nothing was written


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch HACKED\x85R.",
        b"(S'touch HACKED'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nX\x0c\x00\x00\x00touch HACKEDo.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch HACKED\x85R.",  # STACK_GLOBAL
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02}X\xff\xff\xff\xffa.",  # a text that claims 4 GB
        b"\x80\x02r\xff\xff\xff\xff}r\xff\xff\xff\xff.",  # a memo of 4 billion places
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # LONG4
        b"\x80\x02(" * 1000,
        b"",
        b".",
        b"\x80\x02",
        b"\xff\xff",
    ],
)
def test_a_hostile_pickle_by_hand(tmp_path, monkeypatch, pickled):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Damaged):
        read_checkpoint(forge("a.pt", None, pickled=pickled or b"\0"))
    assert os.listdir() == ["a.pt"]


def repacked(data, change):
    """The zip in data, its central directory rewritten by change(list of records) -> bytes."""
    end = data.rindex(b"PK\5\6")
    size, start = struct.unpack("<LL", data[end + 12 : end + 20])
    directory = change(data[start : start + size])
    return data[:start] + directory + data[end : end + 12] + struct.pack("<L", len(directory)) + data[end + 16 :]


def test_a_hostile_zip_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = Path(forge("good.pt", plain(), storages=[bytes(64)])).read_bytes()
    bomb = Path(forge("bomb.pt", plain(), storages=[b"\0" * 50_000_000], compress=True)).read_bytes()
    one = b"PK\1\2" + good.split(b"PK\1\2")[1]  # the record of data.pkl
    hostile = {
        "empty": b"",
        "text": b"not a checkpoint\n",
        "an end alone": b"PK\5\6" + bytes(18),
        "a zip bomb": bomb,
        "a comment after the end": good[:-2] + b"\1\0x",
        "a part twice": repacked(good, lambda records: records + one),
        "a size that claims a terabyte": good.replace(struct.pack("<LL", 64, 64), struct.pack("<LL", 2**32 - 2, 64)),
    }
    for name in ("../../HACKED", "/tmp/HACKED", "archive/../HACKED", "archive/code/a.py", "archive/constants.pkl"):
        hostile[name] = Path(forge("a.pt", plain(), extra=[(name, b"x")])).read_bytes()
    hostile["another root"] = Path(forge("a.pt", plain(), extra=[("other/data.pkl", b".")])).read_bytes()
    for name, data in hostile.items():
        Path("a.pt").write_bytes(data)
        with pytest.raises(Damaged):
            read_checkpoint("a.pt")
        assert sorted(os.listdir()) == ["a.pt", "bomb.pt", "good.pt"], name
    read_checkpoint("good.pt")
