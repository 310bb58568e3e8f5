"""tests/FAULTS.md is true: its commands are run and its messages compared, and its tests are there."""

import re
import shlex
import zipfile
from pathlib import Path

import pytest
import torch
from harness import copy_of_repo, run, tiny, train

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
def house(house):
    """A copy of the repository with a run, and with everything that can be wrong with what a command is given."""
    copy_of_repo(house)
    assert train(house, "run", max_iters=2).wait() == 0
    state = read_checkpoint(house / "run" / "ckpt.pt")
    texts = {
        "mine.py": "n_layer = 2\n", "typo.py": "n_layers = 2\n", "raises.py": "n_layer = 2\n1 / 0\n",
        "syntax.py": "n_layer = = 2\n", "wrong.py": "n_layer = '2'\n",
    }  # fmt: skip
    for name, text in texts.items():
        (house / "config" / name).write_text(text, encoding="utf-8")
    (house / "latin1.txt").write_bytes("Zwölf Boxkämpfer".encode("latin-1") * 100)
    (house / "empty.txt").write_bytes(b"")
    (house / "tiny.txt").write_bytes(b"to be")
    (house / "evil.py").write_text("open('HACKED', 'w')", encoding="utf-8")
    (house / "wandb.py").write_text("raise ImportError('No module named wandb')", encoding="utf-8")  # wherever

    def checkpoint(name: str, **changes: object) -> Path:
        (house / name).mkdir()
        save_checkpoint_file(house / name / "ckpt.pt", state | changes)
        return house / name / "ckpt.pt"

    checkpoint("later", version=2)
    checkpoint("nan", model={name: weight * float("nan") for name, weight in state["model"].items()})
    checkpoint("outside", config=state["config"] | {"dataset": "../evil"})
    checkpoint("huge", model_config=state["model_config"] | {"n_layer": 10**9})
    checkpoint("capped", model_config=state["model_config"] | {"softcap": 15.0})
    checkpoint("greedy", config=state["config"] | {"batch_size": 10**12})
    torn = checkpoint("torn")
    torn.write_bytes(torn.read_bytes()[:-100])
    flipped = checkpoint("flipped")
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    with zipfile.ZipFile(checkpoint("hostile"), "w") as archive:
        archive.writestr("archive/data.pkl", HOSTILE)
    (house / "foreign").mkdir()
    torch.save({"weights": torch.zeros(3)}, house / "foreign" / "ckpt.pt")
    (house / "other.txt").write_text("the quick brown fox jumps over a lazy dog " * 200, encoding="utf-8")
    for dataset in ("other", "badshard", "badmeta"):
        done = run(house / "prepare/text.py", "--input=other.txt", f"--dataset={dataset}", cwd=house)
        assert done.status == 0, done.output
    shard = next((house / "data" / "badshard").glob("train*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    meta = house / "data" / "badmeta" / "meta.json"
    meta.write_bytes(meta.read_bytes()[:-10])
    return house


def matches(message: str, output: str) -> bool:
    """Whether the output holds the message; … in a message matches anything."""
    parts = [re.escape(part) for part in re.sub(r"\s+", " ", message.replace("\\|", "|")).split("…")]
    return bool(re.search(".*".join(parts), re.sub(r"\s+", " ", output)))


@pytest.mark.parametrize("fault, command, message", COMMANDS, ids=[row[0] for row in COMMANDS])
def test_the_command_is_refused_with_the_message(house, fault, command, message):
    script, *argv = shlex.split(command.strip("`").removeprefix("python "))
    if script == "train.py":
        argv = argv if "--init_from=resume" in argv else [*tiny(), "--out_dir=new", *argv]
    before = {path: path.read_bytes() for path in house.glob("*/ckpt*.pt")}
    done = run(house / script, *argv, cwd=house)
    assert done.status == 2, done.output
    assert done.output.count("error: ") == 1 and "Traceback" not in done.output, done.output
    assert matches(message, done.output), done.output
    assert {path: path.read_bytes() for path in house.glob("*/ckpt*.pt")} == before
    assert not (house / "HACKED").exists()


@pytest.mark.parametrize("fault, told, tests", TESTS, ids=[row[0] for row in TESTS])
def test_the_test_that_shows_it_is_there(fault, told, tests):
    shown = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
    assert shown, "the last cell names the test: `test_x.py::test_y`"
    for file, test in shown:
        assert f"\ndef {test}(" in FAULTS.with_name(file).read_text(encoding="utf-8"), f"there is no {file}::{test}"


def test_there_are_enough():
    assert len(ROWS) >= 40 and all(len(row) == 3 and all(row) for row in ROWS)
