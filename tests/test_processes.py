"""torchrun: two nodes, one voice, and a process that dies. Each launcher is a real one, with a bound on its time."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import House, free_port, losses, tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc"),
]
BOUND = 120  # seconds from a process's death to the launcher's end: 1 where the machine is idle
# train.py, with something in it changed
CHANGED = """
import os, runpy, sys, time
sys.path.insert(0, os.getcwd())
sys.argv[0] = os.path.abspath("train.py")
import minutegpt.errors, minutegpt.device, minutegpt.optim
real = minutegpt.optim.set_lr
{}
minutegpt.optim.set_lr = set_lr
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# process 1 has a fault of its own at its ninth update
FAULTY = """
calls = []
def set_lr(*args):
    calls.append(0)
    if len(calls) == 9 and os.environ["RANK"] == "1":
        raise KIND("a fault of process 1")
    real(*args)
"""
# process 1 is the slower one in the trial, and both leave their learning rates behind
UNEQUAL = """
def set_lr(optimizers, fraction):
    with open("rates-" + os.environ["RANK"], "a") as file:
        file.write(repr(fraction) + "\\n")
    real(optimizers, fraction)
if os.environ["RANK"] == "1":
    minutegpt.device.synchronize = lambda device: time.sleep(0.3)
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with House(tmp_path_factory.mktemp("processes")) as house:
        yield house


def torchrun(house: House, *argv: str, log: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *argv]
    with open(house.folder / log, "w", encoding="utf-8") as file:
        return subprocess.Popen(
            command, cwd=house.folder, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def read(house: House, log: str) -> str:
    return (house.folder / log).read_text(encoding="utf-8")


def await_step(house: House, log: str, launcher: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while "tok/s" not in read(house, log):
        assert launcher.poll() is None and time.monotonic() < end, read(house, log)
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_nodes_train_as_one_process_and_only_the_first_speaks(house):
    knobs = tiny(dropout=0.0, max_iters=6)
    assert house.run("train.py", *knobs, "--out_dir=alone").wait() == 0
    where = ["--nnodes=2", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    nodes = [
        torchrun(house, *where, f"--node_rank={i}", "train.py", *knobs, "--out_dir=nodes", log=f"node-{i}.txt")
        for i in range(2)
    ]
    assert [node.wait(300) for node in nodes] == [0, 0], read(house, "node-0.txt") + read(house, "node-1.txt")
    assert losses(house.folder / "nodes") == pytest.approx(losses(house.folder / "alone"), abs=1e-5)
    lines = [line for line in read(house, "node-0.txt").splitlines() if line.strip()]
    assert "gloo: 4 processes share each step" in read(house, "node-0.txt")
    assert len([line for line in lines if "tok/s" in line]) == 6
    assert len(lines) == len(set(lines))  # no line twice
    assert "step" not in read(house, "node-1.txt") and "warning" not in read(house, "node-1.txt").lower()


def test_a_mistake_that_all_make_is_told_once(house):
    launcher = torchrun(house, "--standalone", "--nproc_per_node=2", "train.py", "--n_lair=2", log="mistake.txt")
    assert launcher.wait(300) != 0
    assert read(house, "mistake.txt").count("unknown setting 'n_lair'") == 1


@pytest.mark.parametrize("shard", ["--shard=false", "--shard"])
def test_a_killed_process_ends_the_run(house, shard):
    log = f"killed{shard}.txt"
    launcher = torchrun(house, "--standalone", "--nproc_per_node=2", "train.py", *tiny(max_iters=10**6), shard,
                        "--out_dir=killed", "--overwrite", log=log)  # fmt: skip
    await_step(house, log, launcher)
    ranks = children(launcher.pid)
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(BOUND) != 0
    output = read(house, log)
    assert re.search(rf"exitcode  : -9 \(pid: {ranks[1]}\)", output.split("Root Cause")[1])
    assert "[rank0]" not in output, output  # the survivor's traceback would only say that the other one is gone
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.parametrize("kind, told", [("RuntimeError", "[rank1]: RuntimeError: "),
                                        ("minutegpt.errors.UserError", "error: ")])  # fmt: skip
def test_a_process_that_fails_ends_the_run_with_its_own_message(house, kind, told):
    (house.folder / "faulty.py").write_text(CHANGED.format(FAULTY.replace("KIND", kind)), encoding="utf-8")
    launcher = torchrun(house, "--standalone", "--nproc_per_node=2", "faulty.py", *tiny(max_iters=10**6),
                        "--out_dir=faulty", "--overwrite", log="faulty.txt")  # fmt: skip
    await_step(house, "faulty.txt", launcher)
    assert launcher.wait(BOUND) != 0
    output = read(house, "faulty.txt")
    assert output.count(f"{told}a fault of process 1") == 1
    assert "[rank0]" not in output and "rank      : 1" in output.split("Root Cause")[1]


def test_processes_of_unequal_speed_agree_on_the_learning_rates_that_the_clock_sets(house):
    (house.folder / "unequal.py").write_text(CHANGED.format(UNEQUAL), encoding="utf-8")
    launcher = torchrun(house, "--standalone", "--nproc_per_node=2", "unequal.py",
                        *tiny(max_minutes=0.4, warmup_iters=10**6), "--out_dir=unequal", log="unequal.txt")  # fmt: skip
    assert launcher.wait(BOUND) == 0, read(house, "unequal.txt")
    rates = [[float(rate) for rate in read(house, f"rates-{rank}").split()] for rank in range(2)]
    assert rates[0] == rates[1] and 0 < max(rates[0]) < 1  # half the steps were warmup
