"""Dangerous things, done in a copy of this process."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minutegpt.checkpoint import read_checkpoint
from minutegpt.errors import UserError

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def in_a_fork(body: Callable[[], int | None]) -> int:
    """What body returns in a copy of this process; 2 for a UserError, 8 for any other, 9 where it was told to die."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the parent's threads are not in a fork, and new ones would take address space
        status = 8
        try:
            status = body() or 0
        except UserError:
            status = 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def virtual_memory() -> int:
    """Bytes of address space this process ever had at once: also what was allocated and never touched."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak"))


def harmless(
    path: Any, reader: Callable[[Any], Any] = read_checkpoint, seconds: int = 20, memory: float = 400e6
) -> bool:
    """Whether a hostile file is refused with a UserError, in little time and memory."""

    def body() -> int:
        before = virtual_memory()
        signal.alarm(seconds)
        try:
            reader(path)
        except UserError as error:
            return 2 if str(error) and virtual_memory() - before < memory else 3
        return 4

    return in_a_fork(body) == 2
