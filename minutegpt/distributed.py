"""Several processes, started by torchrun: start them, decide things once, divide the batch, stop, exit.

Alone, everything here works too: the process is rank 0 of 1.
"""

import math
import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from minutegpt.errors import UserError


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_processes(backend: str) -> tuple[int, int, int]:
    """Connects this process with the others of torchrun; returns rank, local rank and world size."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # torchrun's store outlives the processes that it restarts, and returns the addresses of dead ones (PyTorch issue
    # 135712). On one machine the count of restarts separates them. On several machines that count may differ
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"
    store = dist.PrefixStore(f"restart {restarts}", next(dist.rendezvous("env://"))[0])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return rank, int(os.environ.get("LOCAL_RANK", 0)), world_size


def sync(*values: float) -> list[float]:
    """Returns rank 0's values on all ranks. Needed wherever a decision depends on the clock or on a signal."""
    if not dist.is_initialized():
        return list(values)
    box = torch.tensor(values, dtype=torch.float64, device=_collective_device())
    dist.broadcast(box, src=0)
    return box.tolist()


def reduce_loss(loss: Tensor, control: Tensor) -> Tensor:
    """The loss averaged over all processes, then rank 0's control values (n,) -> (1 + n,). One collective for both."""
    box = torch.cat((loss.view(1), control if dist.get_rank() == 0 else torch.zeros_like(control)))
    dist.all_reduce(box)
    box[0] /= dist.get_world_size()
    return box


def sync_object(value: Any) -> Any:
    """The same for any plain value. The other ranks wait here for rank 0."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def worst_of_all_ranks(values: list[float]) -> list[float]:
    """The largest of each value over all ranks, on all of them."""
    if not dist.is_initialized():
        return values
    box = torch.tensor(values, dtype=torch.float64, device=_collective_device())
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return box.tolist()


def _collective_device() -> torch.device:
    """Where the backend wants its tensors: gloo on the CPU, others on the GPU."""
    gpu = None if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    return gpu or torch.device("cpu")


def split_batch(batch_size: int, accumulation: int, world_size: int) -> tuple[int, int]:
    """Micro-batches per step on each rank, and the rows of each. The global batch is batch_size * accumulation rows.

    Raises UserError where the rows do not divide among the processes.
    """
    share = math.gcd(accumulation, world_size)
    if batch_size * share % world_size:
        raise UserError(
            f"a global batch of {batch_size} x {accumulation} rows does not divide among {world_size} processes. Make "
            "batch_size or gradient_accumulation_steps a multiple of their number"
        )
    return accumulation // share, batch_size * share // world_size


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP: finish the step, save, stop. A second Ctrl-C ends the process at once.

    `signal` is the number of the signal that came, or 0.
    """

    def __init__(self, main_process: bool) -> None:
        self.signal = 0
        self.main_process = main_process
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # SIGHUP: the terminal was closed. Windows has none
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            os._exit(130)
        self.signal = number
        if number == signal.SIGINT and self.main_process:
            with suppress(OSError):  # nobody reads any more. os.write, because print() may be what was interrupted
                os.write(1, b"\nstopping and saving after this step or evaluation. Ctrl-C again: at once, unsaved\n")


def exit_all(status: int = 0) -> NoReturn:
    """Ends the process like sys.exit; one of several processes skips Python's own clean-up.

    A thread of gloo may still hold the last collective's tensor, and freeing that while Python exits aborts the
    process (PyTorch PR 179291). destroy_process_group does not stop those threads.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
