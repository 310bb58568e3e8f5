"""minutegpt/distributed.py alone: one process is rank 0 of 1. Several: test_processes.py and test_resume.py."""

import os
import signal
import subprocess
import sys

import pytest
from harness import ROOT

from minutegpt import distributed
from minutegpt.distributed import split_batch, sync, sync_object
from minutegpt.errors import UserError


def test_alone_a_value_is_its_own():
    assert sync(0.25, 3.0) == [0.25, 3.0] and sync_object({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "share"), [(12, 40, 8, (5, 12)), (64, 1, 4, (1, 16)), (12, 5, 1, (5, 12))]
)
def test_the_batch_is_divided(batch, accumulation, processes, share):
    assert split_batch(batch, accumulation, processes) == share
    assert share[0] * share[1] * processes == batch * accumulation


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="4 x 2 rows does not divide among 3 processes"):
        split_batch(4, 2, 3)


def test_torchrun_is_noticed_by_its_variables(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not distributed.under_torchrun()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.under_torchrun()


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
def test_an_interrupt_is_noted_and_a_second_ctrl_c_ends_the_process():
    code = (
        "import os, signal; from minutegpt.distributed import Interrupt; interrupt = Interrupt(True);"
        "os.kill(os.getpid(), signal.SIGINT); print(interrupt.signal, flush=True);"
        "os.kill(os.getpid(), signal.SIGINT); print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and str(int(signal.SIGINT)) in done.stdout and "never" not in done.stdout
    assert "Ctrl-C again" in done.stdout
