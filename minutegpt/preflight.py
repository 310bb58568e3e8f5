"""The trial run: a step, an evaluation and a checkpoint before the long wait.

It finds out-of-memory and compiler errors now and not in an hour, and measures how long each part takes. Weights,
optimizers and scaler are restored afterwards.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minutegpt import checkpoint
from minutegpt.device import Machine, synchronize
from minutegpt.distributed import sync
from minutegpt.errors import UserError

ENOUGH_SECONDS = 0.25  # of timed steps: on a slow machine one is enough


class CompileError(Exception):
    """torch.compile fails on this machine. Its message is the reason, in one line."""


@dataclass
class Timing:
    """Seconds per step, and per evaluation with its save; bytes of a checkpoint; the first loss, in nats per token."""

    step: float
    eval: float
    checkpoint_bytes: int = 0
    first_loss: float = float("nan")


@contextlib.contextmanager
def restored(model: nn.Module, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> Iterator[None]:
    """Puts weights, optimizers and scaler back to what they were before the block."""
    saved = copy.deepcopy((model.state_dict(), [opt.state_dict() for opt in optimizers], scaler.state_dict()))
    yield
    model.load_state_dict(saved[0])
    for optimizer, state in zip(optimizers, saved[1], strict=True):
        optimizer.load_state_dict(state)
    scaler.load_state_dict(saved[2])


def measure(
    machine: Machine, trained: tuple[Any, ...], step: Callable[[], float], evaluate: Callable[[], Any],
    evaluations: float, run_state: Callable[[], dict[str, Any]], out_dir: str, batch: str,
) -> Timing:  # fmt: skip
    """Runs each part once or a few times; all ranks must call it.

    trained: model, optimizers and scaler. step: one training step, which returns its loss. evaluate: a short
    evaluation. evaluations: how many of those a full one is. batch: a micro-batch in words, for the message.
    Raises CompileError where the compiled step fails, UserError where memory or the disk does not suffice.
    """
    with restored(*trained):
        first_loss = _first_step(machine, step, batch)
        steps: list[float] = []
        while len(steps) < 3 and sync(sum(steps))[0] < ENOUGH_SECONDS:
            steps.append(_seconds(machine, step))
        eval_seconds = _seconds(machine, evaluate) * max(1.0, evaluations)
    began, size = time.perf_counter(), 0
    state = run_state()
    if machine.rank == 0:
        path = Path(out_dir) / checkpoint.TRIAL
        checkpoint.save_checkpoint_file(path, state)
        size = path.stat().st_size
        path.unlink()
    return Timing(min(steps), eval_seconds + time.perf_counter() - began, size, first_loss)


def fall_back_to_eager(machine: Machine, compile: str, error: CompileError) -> None:
    """Turns compilation off. Raises UserError where it was asked for by name, or the model is sharded already."""
    if compile.lower() != "auto" or machine.fsdp:
        raise UserError(f"--compile={compile}: torch.compile fails here ({error}). Type --compile=false") from error
    machine.disable_compile(str(error))


def _first_step(machine: Machine, step: Callable[[], float], batch: str) -> float:
    """The loss of the first step. torch.compile can fail in many ways: no compiler, an old one, no headers."""
    try:
        return step()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        if isinstance(error, MemoryError) or "memory" in reason:
            raise UserError(
                f"{batch} take more memory than there is ({reason}). Type half the --batch_size and twice the "
                "--gradient_accumulation_steps: it is the same run"
            ) from error
        if machine.compile:
            raise CompileError(reason) from error
        raise


def _seconds(machine: Machine, part: Callable[[], Any]) -> float:
    began = time.perf_counter()
    part()
    synchronize(machine.device)
    return time.perf_counter() - began
