"""What a run tells: the card before it, the lines during it, the log beside it, the summary after it."""

import importlib
import json
import math
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from minutegpt.errors import UserError
from minutegpt.files import atomic_write

LOG_KEYS = ("step", "tokens", "seconds", "lr", "grad_norm", "train_loss", "val_loss", "eval_train_loss")


def print_line(text: str = "") -> None:
    """A line on standard output that leaves a progress bar on the terminal whole."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # whoever read along has gone (`| head`): no reason to lose a run
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def print_table(rows: list[tuple[str, str]]) -> None:
    """Aligned label and value, one pair a line."""
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print_line(f"  {label:<{width}}  {value}")


def si_number(n: float, unit: str = "") -> str:
    """Three digits and a letter.

    >>> si_number(10_745_088), si_number(16384), si_number(12.5), si_number(85_000_000, "B")
    ('10.7M', '16.4k', '12.5', '85MB')
    """
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= 0.9995 * size:  # what rounds to it is written with it
            return f"{n / size:.3g}{letter}{unit}"
    return f"{n:.3g}{unit}"


def format_seconds(seconds: float) -> str:
    """
    >>> format_seconds(7.3), format_seconds(95), format_seconds(3 * 3600 + 120)
    ('7s', '1m35s', '3h02m')
    """
    if not math.isfinite(seconds):
        return "?"
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


def step_line(
    step: int,
    total: int,
    done: float,
    loss: float,
    lr: float,
    grad_norm: float,
    tokens_per_second: float,
    mfu: float,
    eta: float,
) -> str:
    """total 0: the run is bounded by the clock, and nobody knows its steps; mfu 0: the peak is not known."""
    of = f"{step:>{len(str(total))}}/{total}" if total else f"{step:>5}"
    line = f"step {of} {100 * done:5.1f}%  loss {loss:.4f}  lr {lr:.2e}  norm {grad_norm:7.3f}"
    line += f"  {si_number(tokens_per_second):>6} tok/s"
    if mfu:
        line += f"  mfu {100 * mfu:4.1f}%"
    return line + f"  eta {format_seconds(eta)}"


def open_log(path: Path, keep: int) -> list[dict[str, Any]]:
    """The first `keep` rows of log.jsonl, which is cut behind them: a torn line, and rows later than the checkpoint.

    A row that does not parse ends what is kept: what follows it cannot be trusted.
    """
    rows: list[dict[str, Any]] = []
    good = 0  # bytes
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    break
                if len(rows) == keep or not line.endswith(b"\n") or not isinstance(row, dict):
                    break
                rows.append(row)
                good += len(line)
        with open(path, "rb+") as file:
            file.truncate(good)
    return rows


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl up to the first that does not parse, for whoever only looks; none where there is none."""
    rows: list[dict[str, Any]] = []
    try:
        for line in path.read_bytes().splitlines():
            rows.append(dict(json.loads(line)))
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    return rows


def log_row(path: Path, rows: list[dict[str, Any]], **values: Any) -> None:
    """Appends one object to log.jsonl and to `rows`; keys not given, and numbers that JSON lacks, are null."""
    row = {key: values.pop(key, None) for key in LOG_KEYS} | values
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    rows.append(row)
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. The run stands as it was last saved: make room (or the folder) "
            f"again, then type python train.py --init_from=resume --out_dir={path.parent}"
        ) from None


def report_nonfinite(
    out: Path, step: int, loss: float, norm: float, lr: float, starts: list[int], activations: dict[str, float]
) -> str:
    """Writes nonfinite.json, to find out with where the numbers ran away; gives the message for the user.

    starts: where the step's windows begin in the training split; activations: the `largest_activations` of its first
    forward pass.
    """
    found: dict[str, Any] = {"step": step, "loss": str(loss), "grad_norm": str(norm), "lr": lr, "window_starts": starts}
    found["largest_activations"] = {name: str(value) for name, value in activations.items()}
    with atomic_write(out / "nonfinite.json") as file:
        file.write(json.dumps(found, indent=2).encode())
    return (
        f"at step {step} the loss is {loss} and the gradient norm {norm}: the numbers have run away, and the optimizer "
        f"was not stepped. The last good checkpoint stands in {out}, and nonfinite.json there tells where it began. "
        "A lower --learning_rate, a longer --warmup_iters or --dtype=float32 often help: "
        f"python train.py --init_from=resume --out_dir={out} --learning_rate={lr / 3:.1g}"
    )


def largest_activations(model: nn.Module, idx: torch.Tensor) -> dict[str, float]:
    """The largest absolute output of each module in a forward pass over idx (B, T): where numbers went bad."""
    found: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found[name] = float(output.detach().abs().max())

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return found


# ---------------------------------------------------------------------------------------------- trackers

MODULES = {"none": "", "tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_installed(kind: str) -> Any:
    """The tracker's module; None for "none". Raises UserError where it is not installed, before any work is done."""
    try:
        return importlib.import_module(MODULES[kind]) if kind != "none" else None
    except ImportError as error:
        raise UserError(
            f"--tracker={kind}: {kind} is not installed ({error}). Type uv sync --extra {kind}, or leave --tracker "
            "out: log.jsonl has every row"
        ) from error


class Tracker:
    """One run at one of them; with "none" nothing happens. Once it fails, the run goes on without it."""

    def __init__(self, kind: str, out: Path, config: dict[str, Any], step: int | None) -> None:
        """step: the one that a resumed run goes on from; None for a new run."""
        self.kind, self.module = kind, check_installed(kind)
        self.writer: Any = None  # TensorBoard's
        try:
            if kind == "tensorboard":  # what an older run, or steps to come again, wrote there is hidden
                first = 0 if step is None else step + 1
                self.writer = self.module.SummaryWriter(str(out / "tensorboard"), purge_step=first)
                self.writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", first)
            elif kind == "wandb":
                name = _name(out, step is None)
                self.module.init(project="minutegpt", id=name, name=name, resume="allow", dir=str(out), config=config)
            elif kind == "trackio":
                self.module.init(project="minutegpt", name=_name(out, step is None), resume="allow", config=config)
        except Exception as error:  # no login, no network, no room: whatever it is, it is better told now
            raise UserError(
                f"--tracker={kind} does not start: {error}. Mend that, or leave --tracker out: log.jsonl has every row"
            ) from error

    def log(self, row: dict[str, Any]) -> None:
        """A row of log.jsonl: its numbers, at its step."""
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        try:
            if self.kind == "tensorboard":
                for key, value in numbers.items():
                    self.writer.add_scalar(key, value, row["step"])
            elif self.kind != "none":
                self.module.log(numbers, step=row["step"])
        except Exception as error:
            print_line(
                f"warning: {self.kind} failed ({error}): the run goes on without it, and log.jsonl has every row"
            )
            self.kind = "none"

    def close(self) -> None:
        """Sends what is still on its way: several processes leave past the clean-up that would."""
        try:
            if self.kind == "tensorboard":
                self.writer.close()
            elif self.kind != "none":
                self.module.finish()
        except Exception as error:
            print_line(f"warning: {self.kind} failed ({error}): log.jsonl has every row")


def _name(out: Path, new: bool) -> str:
    """The run's name at the tracker, kept in its folder: a resumed run has the same, a new one in its place another."""
    path = out / "tracker.txt"
    if new or not path.exists():
        path.write_text(f"{out.resolve().name}-{secrets.token_hex(4)}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
