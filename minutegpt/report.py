"""What a run tells: the card before it, the lines during it, the log beside it, the summary after it."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from minutegpt.files import atomic_write
from minutegpt.start import UserError

LOG_KEYS = ("step", "tokens", "seconds", "lr", "grad_norm", "train_loss", "val_loss", "eval_train_loss")


def say(text: str = "") -> None:
    """A line on standard output that leaves a progress bar on the terminal whole."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # whoever read along has gone (`| head`): no reason to lose a run
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def card(rows: list[tuple[str, str]]) -> None:
    """Aligned label and value, one pair a line."""
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        say(f"  {label:<{width}}  {value}")


def amount(n: float, unit: str = "") -> str:
    """Three digits and a letter.

    >>> amount(10_745_088), amount(16384), amount(12.5), amount(85_000_000, "B")
    ('10.7M', '16.4k', '12.5', '85MB')
    """
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= 0.9995 * size:  # what rounds to it is written with it
            return f"{n / size:.3g}{letter}{unit}"
    return f"{n:.3g}{unit}"


def duration(seconds: float) -> str:
    """
    >>> duration(7.3), duration(95), duration(3 * 3600 + 120)
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
    line += f"  {amount(tokens_per_second):>6} tok/s"
    if mfu:
        line += f"  mfu {100 * mfu:4.1f}%"
    return line + f"  eta {duration(eta)}"


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


def nonfinite(
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
