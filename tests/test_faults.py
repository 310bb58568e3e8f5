"""tests/FAULTS.md is true: its commands are run and its messages compared, and its tests are there."""

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from runs import TINY, House

from minutegpt.checkpoint import read_checkpoint, save_checkpoint_file

FAULTS = Path(__file__).with_name("FAULTS.md")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in FAULTS.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| What", "| ---"))
]
COMMANDS = [row for row in ROWS if row[1].startswith("`python ")]
TESTS = [row for row in ROWS if not row[1].startswith("`python ")]
HOSTILE = b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch HACKED\x85R."  # os.system("touch HACKED")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A house with a run, and with everything that can be wrong with what a command is given."""
    if os.name == "nt":
        pytest.skip("forks its runs")
    with House(tmp_path_factory.mktemp("faults")) as house:
        folder = house.folder
        assert house.train(out="run", max_iters=2).wait() == 0
        state = read_checkpoint(folder / "run" / "ckpt.pt")
        texts = {
            "mine.py": "n_layer = 2\n", "typo.py": "n_layers = 2\n", "raises.py": "n_layer = 2\n1 / 0\n",
            "syntax.py": "n_layer = = 2\n", "wrong.py": "n_layer = '2'\n",
        }  # fmt: skip
        (folder / "config").mkdir()
        for name, text in texts.items():
            (folder / "config" / name).write_text(text, encoding="utf-8")
        (folder / "latin1.txt").write_bytes("Zwölf Boxkämpfer".encode("latin-1") * 100)
        (folder / "empty.txt").write_bytes(b"")
        (folder / "tiny.txt").write_bytes(b"to be")
        (folder / "evil.py").write_text("open('HACKED', 'w')", encoding="utf-8")
        (folder / "wandb.py").write_text("raise ImportError('No module named wandb')", encoding="utf-8")  # wherever

        def checkpoint(name: str, **changes: object) -> Path:
            (folder / name).mkdir()
            save_checkpoint_file(folder / name / "ckpt.pt", state | changes)
            return folder / name / "ckpt.pt"

        checkpoint("later", version=2)
        checkpoint("outside", config=state["config"] | {"dataset": "../evil"})
        checkpoint("huge", model_config=state["model_config"] | {"n_layer": 10**9})
        checkpoint("greedy", config=state["config"] | {"batch_size": 10**12})
        torn = checkpoint("torn")
        torn.write_bytes(torn.read_bytes()[:-100])
        flipped = checkpoint("flipped")
        data = bytearray(flipped.read_bytes())
        data[len(data) // 2] ^= 1
        flipped.write_bytes(data)
        with zipfile.ZipFile(checkpoint("hostile"), "w") as archive:
            archive.writestr("archive/data.pkl", HOSTILE)
        (folder / "foreign").mkdir()
        torch.save({"weights": torch.zeros(3)}, folder / "foreign" / "ckpt.pt")
        (folder / "other.txt").write_text("the quick brown fox jumps over a lazy dog " * 200, encoding="utf-8")
        for argv in (["--input=other.txt"], ["--input=other.txt", "--dataset=badshard"],
                     ["--input=other.txt", "--dataset=badmeta"]):  # fmt: skip
            subprocess.run([sys.executable, "prepare/text.py", *argv], cwd=folder, check=True, capture_output=True)
        shard = next((folder / "data" / "badshard").glob("train*.bin"))
        shard.write_bytes(shard.read_bytes()[:-2])
        meta = folder / "data" / "badmeta" / "meta.json"
        meta.write_bytes(meta.read_bytes()[:-10])
        yield house


def matches(message: str, output: str) -> bool:
    """Whether the output holds the message; … in a message stands for anything."""
    parts = [re.escape(part) for part in re.sub(r"\s+", " ", message.replace("\\|", "|")).split("…")]
    return bool(re.search(".*".join(parts), re.sub(r"\s+", " ", output)))


@pytest.mark.parametrize("fault, command, message", COMMANDS, ids=[row[0] for row in COMMANDS])
def test_the_command_is_refused_with_the_message(house, fault, command, message):
    script, *argv = shlex.split(command.strip("`").removeprefix("python "))
    if script == "train.py":
        argv = [*(f"--{key}={value}" for key, value in TINY.items()), "--out_dir=new", *argv]
        if "--init_from=resume" in argv:
            argv = argv[len(TINY) + 1 :]
    before = {path: path.read_bytes() for path in house.folder.glob("*/ckpt*.pt")}
    run = house.run(script, *argv)
    assert run.wait() == 2, run.output
    assert run.output.count("error: ") == 1 and "Traceback" not in run.output, run.output
    assert matches(message, run.output), run.output
    assert {path: path.read_bytes() for path in house.folder.glob("*/ckpt*.pt")} == before
    assert not (house.folder / "HACKED").exists()


@pytest.mark.parametrize("fault, told, tests", TESTS, ids=[row[0] for row in TESTS])
def test_the_test_that_shows_it_is_there(fault, told, tests):
    shown = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
    assert shown, "the last cell names the test: `test_x.py::test_y`"
    for file, test in shown:
        assert f"\ndef {test}(" in FAULTS.with_name(file).read_text(encoding="utf-8"), f"there is no {file}::{test}"


def test_there_are_enough():
    assert len(ROWS) >= 40 and all(len(row) == 3 and all(row) for row in ROWS)
