"""Several processes, started by torchrun: start, agree, divide the batch, leave."""

import math
import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist

from minutegpt.errors import UserError


def split_batch(batch_size: int, accumulation: int, world_size: int) -> tuple[int, int]:
    """Forward passes a step on each rank, and the rows of each: batch_size * accumulation rows at any world size.

    Raises UserError where the rows do not divide.
    """
    share = math.gcd(accumulation, world_size)
    if batch_size * share % world_size:
        raise UserError(
            f"a global batch of {batch_size} x {accumulation} rows does not divide among {world_size} processes: make "
            "batch_size or gradient_accumulation_steps a multiple of their number"
        )
    return accumulation // share, batch_size * share // world_size


def exit_all(status: int = 0) -> NoReturn:
    """Ends the process like sys.exit; as one of several, past Python's own clean-up.

    A thread of gloo may still hold the last collective's tensor, and to free that while Python ends aborts the process
    (pytorch PR 179291). destroy_process_group does not stop those threads.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def sync(value: float) -> float:
    """Rank 0's value, on every rank: what follows the clock or a signal must be decided by one."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return shared.item()
