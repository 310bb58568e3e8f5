"""The trial run: a step, an evaluation and a checkpoint before the long wait.

It finds out-of-memory and compiler errors now and not in an hour, and measures how long each part takes. Weights,
optimizers and scaler are restored afterwards.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minutegpt import checkpoint
from minutegpt.device import Machine, synchronize
from minutegpt.distributed import sync, worst_of_all_ranks
from minutegpt.errors import UserError
from minutegpt.safe_load import plain

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
    """Puts weights, optimizers and scaler back to what they were before the block.

    The copies are in the CPU's memory: a GPU may not hold a second model with its optimizer state.
    """
    state = {"model": model.state_dict(), "optimizer": [optimizer.state_dict() for optimizer in optimizers]}
    saved = plain(state | {"scaler": scaler.state_dict()}, lambda tensor: tensor.to("cpu", copy=True))
    try:
        yield
    finally:
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizer"], strict=True):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(saved["scaler"])


def measure(
    machine: Machine, trained: tuple[Any, ...], step: Callable[[], float], evaluate: Callable[[], Any],
    evaluations: float, run_state: Callable[[], dict[str, Any]], out_dir: str, batch: str,
) -> Timing:  # fmt: skip
    """Runs each part once or a few times; all ranks must call it.

    trained: model, optimizers and scaler. step: one training step, which returns its loss. evaluate: a short
    evaluation. evaluations: how many of those a full one is. batch: a micro-batch in words, for the message.
    Raises CompileError where the compiled step fails, UserError where memory or the disk does not suffice.
    """
    with _memory_errors_explained(batch), restored(*trained):
        first_loss = _first_step(machine, step)
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
    """Turns compilation off, also for what is compiled already. Raises UserError where it was asked for by name."""
    if compile.lower() != "auto":
        raise UserError(f"--compile={compile}: torch.compile fails here ({error}). Type --compile=false") from error
    machine.disable_compile(str(error))


def compile_on_all(machine: Machine, train_model: Any, batch: tuple[Tensor, Tensor]) -> None:
    """Several processes: compiles the step on each, before the first collective. One process: does nothing.

    Where the compiler fails on one of them, all raise CompileError. Otherwise the others would wait for it.
    """
    if not (machine.compile and machine.ddp):
        return
    failure = ""
    try:
        with train_model.no_sync():
            with machine.training():
                _, loss = train_model(*batch)
            loss.backward()
    except Exception as error:
        failure = _reason(error)
    train_model.zero_grad(set_to_none=True)
    if worst_of_all_ranks([float(failure != "")])[0]:
        raise CompileError(failure or "on another process")


def _first_step(machine: Machine, step: Callable[[], float]) -> float:
    """The loss of the first step. torch.compile can fail in many ways: no compiler, an old one, no headers."""
    try:
        return step()
    except Exception as error:
        if machine.compile and not _is_out_of_memory(error):
            raise CompileError(_reason(error)) from error
        raise


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def _is_out_of_memory(error: Exception) -> bool:
    reason = _reason(error)
    return isinstance(error, MemoryError) or ("memory" in reason and "illegal" not in reason)


@contextlib.contextmanager
def _memory_errors_explained(batch: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"{batch} take more memory than there is ({_reason(error)}). Type half the --batch_size and twice the "
            "--gradient_accumulation_steps: it is the same run"
        ) from error


def _seconds(machine: Machine, part: Callable[[], Any]) -> float:
    began = time.perf_counter()
    part()
    synchronize(machine.device)
    return time.perf_counter() - began
