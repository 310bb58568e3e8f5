"""What a run prints and writes: the start card, step lines, log.jsonl, loss.png, trackers, the summary."""

import contextlib
import importlib
import json
import math
import os
import secrets
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minutegpt.baseline import baselines
from minutegpt.checkpoint import Progress
from minutegpt.clock import Clock
from minutegpt.data.dataset import Split
from minutegpt.device import Machine, environment, peak_flops, peak_memory
from minutegpt.errors import STARTED, UserError
from minutegpt.files import atomic_write
from minutegpt.verdict import FACTS, Facts, verdict
from model import GPT

if TYPE_CHECKING:
    from minutegpt.page.live import LivePage

LOG_KEYS = ("step", "tokens", "seconds", "lr", "grad_norm", "train_loss", "val_loss", "eval_train_loss")
BEST_KNOWN = {"shakespeare_char": ("nanoGPT's best", 1.4697)}  # validation loss of a published model, by dataset


def print_line(text: str = "") -> None:
    """A line on standard output that leaves a progress bar on the terminal whole."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # nobody reads any more (`| head`): no reason to lose a run
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


def in_words(seconds: float) -> str:
    """
    >>> in_words(1), in_words(95), in_words(718), in_words(9000), in_words(200_000)
    ('1 second', '95 seconds', '12 minutes', '2.5 hours', '2.3 days')
    """
    if not math.isfinite(seconds):
        return "an unknown time"
    for size, unit in ((86400, "day"), (3600, "hour")):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}s"
    return number(round(seconds / 60), "minute") if seconds >= 120 else number(round(seconds), "second")


def number(n: int, unit: str) -> str:
    """
    >>> number(1, "layer"), number(6, "layer")
    ('1 layer', '6 layers')
    """
    return f"{n} {unit}{'' if n == 1 else 's'}"


def step_line(
    step: int, total: int, done: float, loss: float, *, lr: float, grad_norm: float, tokens_per_second: float,
    mfu: float, seconds_left: float,
) -> str:  # fmt: skip
    """One line of the run. total 0: the clock ends the run, after an unknown number of steps. mfu 0: left out."""
    steps = f"{step:>{len(str(total))}}/{total}" if total else f"{step:>5}"
    line = f"step {steps} {100 * done:5.1f}%  loss {loss:.4f}  lr {lr:.2e}  norm {grad_norm:7.3f}"
    line += f"  {si_number(tokens_per_second):>6} tok/s"
    if mfu:
        line += f"  mfu {100 * mfu:4.1f}%"
    return line + f"  {in_words(seconds_left)} left"


def open_log(path: Path, keep: int) -> list[dict[str, Any]]:
    """The first `keep` rows of log.jsonl. Cuts what follows: a torn line, and rows later than the checkpoint."""
    return _cut(path, lambda rows, row: len(rows) < keep)


def open_samples(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of samples.jsonl up to the checkpoint's step, none earlier than the one before. Cuts what follows."""

    def wanted(rows: list[dict[str, Any]], row: dict[str, Any]) -> bool:
        last = rows[-1]["step"] if rows else -1
        return (
            isinstance(row.get("step"), int) and last <= row["step"] <= step
        )  # the same: evaluated again on another text

    return _cut(path, wanted)


def append_sample(path: Path, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Appends one object to samples.jsonl and to `rows`; the first one replaces the file of an earlier run."""
    if not rows:
        path.unlink(missing_ok=True)
    rows.append(row)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(row) + "\n")


def _cut(path: Path, wanted: Callable[[list[dict[str, Any]], dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The rows of a file up to the first that is torn, does not parse or is not wanted. Cuts that one and the rest.

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
                if not line.endswith(b"\n") or not isinstance(row, dict) or not wanted(rows, row):
                    break
                rows.append(row)
                good += len(line)
        with open(path, "rb+") as file:
            file.truncate(good)
    return rows


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl up to the first that does not parse. Changes nothing; [] where there is no file."""
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
            f"cannot write {path}: {error.strerror}. The last checkpoint is kept: make room (or the folder) "
            f"again, then type python train.py --init_from=resume --out_dir={shlex.quote(str(path.parent))}"
        ) from None


def report_nonfinite(
    out: Path, step: int, loss: float, norm: float, lr: float, starts: list[int], activations: dict[str, float]
) -> str:
    """Writes nonfinite.json, for finding where training diverged, and returns the message for the user.

    starts: where the step's windows begin in the training split; activations: the `largest_activations` of its first
    forward pass.
    """
    found: dict[str, Any] = {"step": step, "loss": str(loss), "grad_norm": str(norm), "lr": lr, "window_starts": starts}
    found["largest_activations"] = {name: str(value) for name, value in activations.items()}
    with atomic_write(out / "nonfinite.json") as file:
        file.write(json.dumps(found, indent=2).encode())
    return (
        f"at step {step} the loss is {loss} and the gradient norm {norm}: training diverged, and the optimizer was not "
        f"stepped. The last good checkpoint is in {out}, and nonfinite.json there shows where it began. "
        "A lower --learning_rate, a longer --warmup_iters or --dtype=float32 often help: "
        f"python train.py --init_from=resume --out_dir={shlex.quote(str(out))} --learning_rate={lr / 3:.1g}"
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


# ---------------------------------------------------------------------------------------------- a run

OURS = (
    "ckpt.pt", "ckpt-prev.pt", "ckpt-best.pt", "log.jsonl", "samples.jsonl", "run.html", "loss.png", "config.json",
    FACTS, "nonfinite.json",
)  # fmt: skip


class RunLog:
    """Prints and records a run, on rank 0 alone: on the other ranks every method returns at once."""

    def __init__(self, out_dir: str, machine: Machine, model: GPT, progress: Progress, tokens_per_step: int) -> None:
        self.out, self.enabled = Path(out_dir), machine.rank == 0
        self.machine, self.model, self.progress, self.tokens_per_step = machine, model, progress, tokens_per_step
        self.first_step = progress.step
        self.recent: list[float] = []  # losses, to see a spike by
        self.card: list[tuple[str, str]] = []
        self.page: LivePage | None = None
        self.unsent: list[dict[str, Any]] = []  # rows that the tracker has not got yet
        self.verdict = ""  # one sentence on how the run goes; "" where there is nothing to say
        self.causes: set[str] = set()  # of the verdicts that were printed

    def announce(self, dataset: str, notes: list[str], saved_environment: dict[str, Any], resuming: bool) -> None:
        if not self.enabled:
            return
        print_line(f"minuteGPT: {dataset} -> {self.out}" + (f", on from step {self.first_step}" if resuming else ""))
        for note in notes:
            print_line(f"  {note}" if note.startswith("not taken") else f"  changed: {note}")
        for key, value in environment(self.machine).items():
            if saved_environment.get(key, value) != value:
                change = f"{key} was {saved_environment[key]} and is {value}"
                print_line(f"  {change}: the run goes on, but not in the very same bits")
        print_line("  trial    testing one step, one evaluation and one checkpoint first (Ctrl-C changes nothing)")

    def start(
        self, config: dict[str, Any], clock: Clock, section: str, resuming: bool, data: tuple[Split, Split],
        teachers: Sequence[GPT],
    ) -> None:  # fmt: skip
        """Prints the card, starts the tracker and the page, and clears the folder of the run that this one replaces.

        section: one line on the config's section for this device, or "". data: the train and the val split.
        config["forecast"]: the expected validation loss and its margin, where the planner chose the run.
        """
        if not self.enabled:
            return
        self.clock, self.learning_rate = clock, config["learning_rate"]
        flops = self.model.flops_per_token() + sum(t.flops_per_token(config["block_size"]) for t in teachers) / 3
        self.flops_per_step = flops * self.tokens_per_step  # a teacher only runs forward: a third
        self.peak, source = peak_flops(self.machine)
        self.peak *= self.machine.world_size
        muon_lr = config["muon_lr"] if config["optimizer"] == "muon" else 0.0
        self.facts = Facts(
            len(data[0]), self.model.n_params(), **baselines(*data), forecast=config.get("forecast"),
            muon_lr=muon_lr, done=0.0,
        )  # fmt: skip
        self._print_card(config, section, resuming, (len(data[0]), len(data[1])), source)
        self.tracker = Tracker(config["tracker"], self.out, config, self.first_step if resuming else None)
        if not resuming:  # of a run that is replaced, the checkpoints and the log stay until this one has its own
            for name in {*OURS} - {"ckpt.pt", "ckpt-prev.pt", "ckpt-best.pt", "log.jsonl", "samples.jsonl"}:
                with contextlib.suppress(PermissionError):  # Windows: open in a viewer. It is replaced later
                    (self.out / name).unlink(missing_ok=True)
        with atomic_write(self.out / "config.json") as file:
            file.write(json.dumps(config, indent=2).encode())
        self.rows = open_log(self.out / "log.jsonl", self.progress.log_rows) if resuming else []
        self.progress.log_rows = len(self.rows)
        self.bar = tqdm(
            total=clock.total_steps, initial=self.first_step, disable=not sys.stderr.isatty(), leave=False,
            bar_format="{percentage:3.0f}%|{bar}| step {n_fmt} of {total_fmt}{postfix}",
        )  # fmt: skip
        with self.decoration("page run.html"):
            from minutegpt.page.live import LivePage  # imports this file

            self.page = LivePage(self, config, data[1])
            self.page.write()

    def _print_card(
        self, config: dict[str, Any], section: str, resuming: bool, n_tokens: tuple[int, int], source: str
    ) -> None:
        model, clock, timing = self.model.config, self.clock, self.clock.timing
        size = f"{si_number(self.model.n_params())} parameters"
        if model.n_expert:
            size += f", {si_number(self.model.n_params(active=True))} of them active per token"
        layers, rows_per_step = number(model.n_layer, "layer"), self.tokens_per_step // model.block_size
        step = f"{si_number(self.tokens_per_step)} tokens ({number(rows_per_step, 'row')} of "
        step += f"{model.block_size}), {timing.step:.3g} s"
        if mfu := self._mfu(timing.step):
            step += f", {mfu:.0%} of the peak ({source})"
        run = f"about {clock.total_steps} steps" if clock.max_minutes else f"{clock.total_steps} steps"
        run += f", {clock.total_steps * self.tokens_per_step / n_tokens[0]:.3g} epochs, warmup {clock.warmup}"
        if clock.warmup < config["warmup_iters"]:
            run += f" (not {config['warmup_iters']}: at most half of the run)"
        print_line(f"  {self._outlook(config['dataset'], clock.seconds_left())}")
        rows = [
            ("model", f"{size}: {layers}, {number(model.n_head, 'head')}, {model.n_embd} channels"),
            ("data", f"{si_number(n_tokens[0])} tokens to train on, {si_number(n_tokens[1])} to validate on"),
            ("run", run),
            ("step", step),
        ]  # fmt: skip
        if section:
            rows.append(("config", section))
        rows += self.machine.reasons.items()
        rows.append(
            ("disk", f"{si_number(timing.checkpoint_bytes, 'B')} per checkpoint, three are kept; "
             f"{si_number(shutil.disk_usage(self.out).free, 'B')} free")
        )  # fmt: skip
        if not resuming:
            V = model.vocab_size
            rows.append(("first loss", f"{timing.first_loss:.3f} (uniform guessing: ln({V}) = {math.log(V):.3f})"))
        rows.append(("page", f"open {self.out / 'run.html'} in a browser, now or later"))
        print_table(rows)
        self.card = rows

    def _outlook(self, dataset: str, seconds: float) -> str:
        """How long the run takes, and the losses to compare with."""
        levels = [self._levels()]
        if dataset in BEST_KNOWN:
            levels.append("{} {:.2f}".format(*BEST_KNOWN[dataset]))
        if self.facts.forecast is None:
            return f"About {in_words(seconds)}. Validation losses to compare with: {', '.join(levels)}."
        loss, margin = self.facts.forecast
        return f"About {in_words(seconds)}. Expected validation loss {loss:.2f} ± {margin:.2f} ({', '.join(levels)})."

    def _levels(self) -> str:
        """The losses of uniform guessing and of counting, in nats per token."""
        return f"uniform guessing {self.facts.uniform:.2f}, {self.facts.baseline_name} {self.facts.bigram:.2f}"

    def _mfu(self, step_seconds: float) -> float:
        """The share of the peak FLOP/s that a step uses; 0 where the measured peak cannot be right."""
        mfu = self.flops_per_step / step_seconds / self.peak
        return mfu if mfu <= 1 else 0.0

    def record(self, **values: Any) -> None:
        """Appends a row to log.jsonl. send() sends it to the tracker."""
        step = self.progress.step
        if not self.rows:  # the log of a run that this one replaces
            (self.out / "log.jsonl").unlink(missing_ok=True)
        log_row(self.out / "log.jsonl", self.rows, step=step, tokens=step * self.tokens_per_step, **values)
        self.progress.log_rows = len(self.rows)
        self.unsent.append(self.rows[-1])

    def send(self) -> None:
        """Sends the new rows to the tracker; after an evaluation's save, because a tracker may fail or hang."""
        while self.unsent:
            self.tracker.log(self.unsent.pop(0))

    def step(self, loss: float, grad_norm: float, scale: float, router: dict[str, Tensor], log_interval: int) -> None:
        """After each step: moves the bar, warns of a spike, and prints a line every log_interval steps."""
        if not self.enabled:
            return
        if not self.bar.disable:
            left = in_words(self.clock.seconds_left())
            self.bar.set_postfix_str(f"loss {loss:.2f} ({self._levels()}), {left} left", refresh=False)
        self.bar.update()
        usual = statistics.median(self.recent) if len(self.recent) == 20 else math.inf
        if loss > usual + 1:
            print_line(
                f"warning: the loss jumped from about {usual:.3f} to {loss:.3f} at step {self.progress.step - 1}"
            )
        self.recent = [*self.recent[-19:], loss]
        if self.progress.step % log_interval:
            return
        clock, lr = self.clock, self.learning_rate * scale
        step_seconds = clock.step_seconds()
        routing = {key: value.item() for key, value in router.items()}
        self.record(seconds=clock.seconds(), lr=lr, grad_norm=grad_norm, train_loss=loss, **routing)
        self.send()
        total = 0 if clock.max_minutes else clock.max_iters
        done = clock.now.done if clock.max_minutes else self.progress.step / clock.max_iters
        print_line(step_line(
            self.progress.step, total, done, loss, lr=lr, grad_norm=grad_norm,
            tokens_per_second=self.tokens_per_step / step_seconds, mfu=self._mfu(step_seconds),
            seconds_left=clock.seconds_left(),
        ))  # fmt: skip
        if self.page:
            with self.decoration("page run.html"):
                self.page.refresh()

    def evaluation(self, train_loss: float, val_loss: float, best: bool) -> None:
        if not self.enabled:
            return
        perplexity = math.exp(min(val_loss, 700))
        print_line(
            f"step {self.progress.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, perplexity "
            f"{perplexity:.2f}" + (", the best so far" if best else "") + f" ({self._levels()})"
        )
        self.val_loss, self.text, scores = val_loss, "", dict[str, float]()
        if self.page:
            with self.decoration("look at the heads"):
                scores = self.page.look()
        self.record(seconds=self.clock.seconds(), val_loss=val_loss, eval_train_loss=train_loss, **scores)
        if self.page:
            for line in self.page.news():
                print_line(line)
        with self.decoration("verdict"):
            self._judge(1.0 if self.clock.now.finished else self.clock.now.done)

    def _judge(self, done: float) -> None:
        """Updates the verdict and facts.json. Prints a verdict whose cause is new; the last one is in the summary."""
        self.facts = self.facts._replace(done=done)
        with atomic_write(self.out / FACTS) as file:
            file.write(json.dumps(self.facts._asdict()).encode())
        self.verdict = verdict(self.rows, self.facts)
        cause = self.verdict.partition(":")[0].split(" since ")[0]
        if self.verdict and cause not in self.causes and done < 1:
            print_line(f"verdict: {self.verdict}")
        self.causes.add(cause)

    def sample(self, text: str) -> None:
        self.text = text
        if self.enabled:
            print_line(f"  {text!r}")

    def write_page(self) -> None:
        """After an evaluation and its sample: appends a row to samples.jsonl and writes run.html."""
        if self.page:
            self.page.record(self.val_loss, self.text)

    def close_page(self, state: str, rows: Sequence[tuple[str, str]] = ()) -> None:
        """Writes the last run.html. state: how the run ended. rows: of the summary."""
        if self.page:
            with self.decoration("page run.html"):
                self.page.close(state, rows)

    @contextlib.contextmanager
    def decoration(self, what: str) -> Iterator[None]:
        """Around what only decorates an evaluation, after its save: a failure is a warning and never ends the run."""
        try:
            yield
        except (Exception, SystemExit) as error:
            if self.enabled:
                print_line(f"warning: the {what} failed ({str(error).strip() or type(error).__name__})")

    def draw(self) -> None:
        """Redraws loss.png. Before the first step there is no curve, and importing matplotlib would take a second."""
        if self.enabled and self.progress.step:
            from minutegpt.plot import loss_picture

            loss_picture(self.rows, self.out / "loss.png")

    def nonfinite(self, loss: float, grad_norm: float, scale: float, batch: Tensor, starts: list[int]) -> None:
        """Reports a loss or gradient that is not finite. batch (B, T): inputs of the step; starts: of its windows."""
        if not self.enabled:
            return
        activations = largest_activations(self.model, batch)
        self.bar.close()
        lr = self.learning_rate * scale
        message = report_nonfinite(self.out, self.progress.step, loss, grad_norm, lr, starts, activations)
        print(f"error: {message}", file=sys.stderr)
        self.close_page("stopped: the loss was not finite")
        self.tracker.close()

    def summary(self, stop_signal: int) -> None:
        if not self.enabled:
            return
        self.bar.close()
        self.tracker.close()
        progress, clock, out = self.progress, self.clock, shlex.quote(str(self.out))
        if stop_signal:
            print_line(f"stopped by {signal.Signals(stop_signal).name} at step {progress.step}, and saved")
        best = "not yet measured"
        if progress.best_val_loss < math.inf:
            best = f"{progress.best_val_loss:.4f} at step {progress.best_step} ({self._levels()})"
        if self.verdict:
            print_line(f"verdict: {self.verdict}")
        speed = (progress.step - self.first_step) * self.tokens_per_step / (time.perf_counter() - clock.loop_start)
        total = format_seconds(time.perf_counter() - STARTED)
        resume = f"python train.py --init_from=resume --out_dir={out}"
        if not stop_signal:
            resume += " " + more_training(progress.step, progress.seconds, clock.max_minutes)
        rows = [
            ("best validation loss", best),
            ("sample", f"python sample.py --out_dir={out}"),
            ("evaluate", f"python evaluate.py --out_dir={out}"),
            ("resume", resume),
            ("time", f"{total}; {format_seconds(progress.seconds)} of training in all"),
            ("speed", f"{si_number(speed)} tokens/s, evaluations included"),
            ("peak memory", si_number(peak_memory(self.machine.device), "B")),
        ]  # fmt: skip
        print_table(rows)
        self.close_page(f"stopped by {signal.Signals(stop_signal).name}" if stop_signal else "finished", rows)


def more_training(step: int, seconds: float, max_minutes: float) -> str:
    """The setting that makes a finished run go on for as long again."""
    if max_minutes:
        return f"--max_minutes={2 * max(max_minutes, math.ceil(seconds / 6) / 10):g}"
    return f"--max_iters={2 * max(1, step)}"


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
        except (Exception, SystemExit) as error:  # no login, no network, no room: whatever it is, it is better told now
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
        except (Exception, SystemExit) as error:
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
        except (Exception, SystemExit) as error:
            print_line(f"warning: {self.kind} failed ({error}): log.jsonl has every row")


def _name(out: Path, new: bool) -> str:
    """The run's name at the tracker, kept in its folder: a resumed run has the same, a new one in its place another."""
    path = out / "tracker.txt"
    if new or not path.exists():
        path.write_text(f"{out.resolve().name}-{secrets.token_hex(4)}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
