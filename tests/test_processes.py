"""torchrun: two nodes, one voice, and a process that dies. Each launcher is a real one, with a bound on its time."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from harness import ROOT, Run, free_port, losses, run, start, tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc"),
]
BOUND = 120  # seconds from a process's death to the launcher's end: 1 where the machine is idle
# train.py, with something in it changed
CHANGED = f"""
import os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = {str(ROOT / "train.py")!r}
import minutegpt.errors, minutegpt.device, minutegpt.optim
real = minutegpt.optim.set_lr
{{}}
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
# process 1 is the slower one in the trial, and both write down their learning rates
UNEQUAL = """
def set_lr(optimizers, fraction):
    with open("rates-" + os.environ["RANK"], "a") as file:
        file.write(repr(fraction) + "\\n")
    real(optimizers, fraction)
if os.environ["RANK"] == "1":
    minutegpt.device.synchronize = lambda device: time.sleep(0.3)
"""


def torchrun(house: Path, script: str | Path, *argv: str) -> Run:
    return start(script, *argv, cwd=house, torchrun=["--standalone", "--nproc_per_node=2"])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_nodes_train_as_one_process_and_only_the_first_speaks(house):
    settings = tiny(dropout=0.0, max_iters=6)
    assert run("train.py", *settings, "--out_dir=alone", cwd=house).status == 0
    where = ["--nnodes=2", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    nodes = [
        start("train.py", *settings, "--out_dir=nodes", cwd=house, torchrun=[*where, f"--node_rank={i}"])
        for i in range(2)
    ]  # fmt: skip
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].output + nodes[1].output
    assert losses(house / "nodes") == pytest.approx(losses(house / "alone"), abs=1e-5)
    lines = [line for line in nodes[0].output.splitlines() if line.strip()]
    assert "gloo: 4 processes share each step" in nodes[0].output
    assert len([line for line in lines if "tok/s" in line]) == 6
    assert len(lines) == len(set(lines))  # no line twice
    assert "step" not in nodes[1].output and "warning" not in nodes[1].output.lower()


def test_a_mistake_that_all_make_is_told_once(house):
    launcher = torchrun(house, "train.py", "--n_lair=2")
    assert launcher.wait() != 0
    assert launcher.output.count("unknown setting 'n_lair'") == 1


def test_a_killed_process_ends_the_run(house):
    launcher = torchrun(house, "train.py", *tiny(max_iters=10**6), "--out_dir=killed", "--overwrite")
    launcher.await_output("tok/s")
    ranks = children(launcher.pid)
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(BOUND) != 0
    output = launcher.output
    assert re.search(rf"exitcode  : -9 \(pid: {ranks[1]}\)", output.split("Root Cause")[1])
    assert "[rank0]" not in output, output  # the survivor's traceback would only say that the other one is gone
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.parametrize("kind, told", [("RuntimeError", "[rank1]: RuntimeError: "),
                                        ("minutegpt.errors.UserError", "error: ")])  # fmt: skip
def test_a_process_that_fails_ends_the_run_with_its_own_message(house, kind, told):
    script = house / "faulty.py"
    script.write_text(CHANGED.format(FAULTY.replace("KIND", kind)), encoding="utf-8")
    launcher = torchrun(house, script, *tiny(max_iters=10**6), "--out_dir=faulty", "--overwrite")
    launcher.await_output("tok/s")
    assert launcher.wait(BOUND) != 0
    output = launcher.output
    assert output.count(f"{told}a fault of process 1") == 1
    assert "[rank0]" not in output and "rank      : 1" in output.split("Root Cause")[1]


def test_processes_of_unequal_speed_agree_on_the_learning_rates_that_the_clock_sets(house):
    script = house / "unequal.py"
    script.write_text(CHANGED.format(UNEQUAL), encoding="utf-8")
    launcher = torchrun(house, script, *tiny(max_minutes=0.4, warmup_iters=10**6), "--out_dir=unequal")
    assert launcher.wait(BOUND) == 0, launcher.output
    rates = [[float(rate) for rate in (house / f"rates-{rank}").read_text().split()] for rank in range(2)]
    assert rates[0] == rates[1] and 0 < max(rates[0]) < 1  # half the steps were warmup
