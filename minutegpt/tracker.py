"""Where a run is watched besides log.jsonl: TensorBoard, Weights & Biases, or trackio, imported only when asked for.

    tracker = Tracker("tensorboard", Path("out"), config, None)
    tracker.log({"step": 10, "train_loss": 3.2, "val_loss": None})
    tracker.close()

A row goes out as it stands in log.jsonl, without its nulls. A resumed run goes on where it was: the rows behind its
checkpoint, which come again, take the place of the old ones in TensorBoard; wandb keeps the old ones, trackio both.
"""

import importlib
import json
import secrets
from pathlib import Path
from typing import Any

from minutegpt.report import say
from minutegpt.start import UserError

MODULES = {"none": "", "tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def find(kind: str) -> Any:
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
        self.kind, self.module = kind, find(kind)
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
            say(f"warning: {self.kind} failed ({error}): the run goes on without it, and log.jsonl has every row")
            self.kind = "none"

    def close(self) -> None:
        """Sends what is still on its way: several processes leave past the clean-up that would."""
        try:
            if self.kind == "tensorboard":
                self.writer.close()
            elif self.kind != "none":
                self.module.finish()
        except Exception as error:
            say(f"warning: {self.kind} failed ({error}): log.jsonl has every row")


def _name(out: Path, new: bool) -> str:
    """The run's name at the tracker, kept in its folder: a resumed run has the same, a new one in its place another."""
    path = out / "tracker.txt"
    if new or not path.exists():
        path.write_text(f"{out.resolve().name}-{secrets.token_hex(4)}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
