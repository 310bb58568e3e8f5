"""How much of a run is done: in steps (max_iters) or in wall-clock time (max_minutes).

clock = Clock(progress, timing, max_iters=2000, max_minutes=0, ...)
now = clock.at(step)  # .done, .decay, .finished, .evaluate, .save, .signal

Several processes decide alike: `at` gets the readings of rank 0, which the step has sent to all of them.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from minutegpt.checkpoint import Progress
from minutegpt.distributed import sync
from minutegpt.errors import STARTED
from minutegpt.preflight import Timing

FIRST_EVALUATION = 0.01  # of the run: evaluations by time come after 1, 2, 4, 8, ... percent of it
LAST_EVALUATION = 0.8  # of the run: after it the one at the end is near
EVALUATION_SHARE = 0.05  # of the time since the last evaluation: what one by time may cost at most
EVALUATION_SECONDS = 5.0  # between evaluations by time, at least
EVALUATION_BUDGET = 0.05  # of max_minutes: what one evaluation may take, so that a short run has time to train


class Moment(NamedTuple):
    """done: share of the run, 0 to 1. decay: share of the learning rate's decay. finished: this was the last step.

    evaluate: an evaluation (and so a checkpoint) is due. save: a checkpoint is due. signal: the number of the signal
    that came, or 0.
    """

    done: float
    decay: float
    finished: bool
    evaluate: bool
    save: bool
    signal: int = 0


class Clock:
    """timing: measured by the trial run, and updated during the run.

    checkpoint_minutes: a checkpoint is never older than this, and an evaluation never older than twice this. 0: both
    come every eval_interval steps only.
    """

    def __init__(
        self, progress: Progress, timing: Timing, *, max_iters: int, max_minutes: float, warmup_iters: int,
        eval_interval: int, checkpoint_minutes: float,
    ) -> None:  # fmt: skip
        self.progress, self.timing = progress, timing
        self.max_iters, self.max_minutes = max_iters, max_minutes
        self.eval_interval, self.checkpoint_seconds = eval_interval, 60 * checkpoint_minutes
        self.first_step, self.seconds_before = progress.step, progress.seconds
        self.eval_share = 1.0  # of the evaluation that the settings ask for
        if max_minutes:
            [self.eval_share] = sync(min(1.0, EVALUATION_BUDGET * 60 * max_minutes / max(timing.eval, 1e-9)))
            timing.eval *= self.eval_share
        [steps] = sync((self._budget_left() - timing.eval) / timing.step)
        self.total_steps = progress.step + max(1, round(steps)) if max_minutes else max_iters
        self.warmup = min(warmup_iters, self.total_steps // 2)
        self.loop_start = self.last_eval = self.last_save = self.window_start = time.perf_counter()
        self.step_start = self.loop_start
        self.window_step = progress.step
        self.next_evaluation = FIRST_EVALUATION  # share of the run
        self.now = Moment(0.0, 0.0, False, False, False)

    def readings(self, signal: int = 0, ahead: bool = False) -> list[float]:
        """What `at` decides by, as this process sees it. ahead: at the end of the step that is under way."""
        now = time.perf_counter()
        rest = max(0.0, self.step_start + self.timing.step - now) if ahead else 0.0  # seconds until then
        now += rest
        return [
            signal, self.seconds() + rest, self.seconds_left() - rest, now - self.last_eval, now - self.last_save,
            self.timing.step, self.timing.eval,
        ]  # fmt: skip

    def at(self, step: int, readings: Sequence[float] = ()) -> Moment:
        """What is due before this step. readings: rank 0's; by default this process's own, as of now."""
        self.progress.step, self.progress.seconds = step, self.seconds()
        readings = readings or self.readings()
        signal, trained, left, since_eval, since_save, step_seconds, pause = readings
        self.step_start = time.perf_counter()
        evaluate = step % self.eval_interval == 0
        if self.max_minutes:
            done = decay = trained / (trained + max(0.0, left) + 1e-9)
            finished = left < step_seconds / 2
            self.progress.finished_minutes = float(self.max_minutes) if finished else 0.0
            # an evaluation now must not make the last one late, nor may one of the untrained model shorten a short run
            evaluate = evaluate and left > pause * (1 if step else 20)
        else:
            done = step / max(1, self.max_iters)
            decay = max(0, step - self.warmup) / max(1, self.total_steps - self.warmup)
            finished = step >= self.max_iters
        save = False
        if step == self.first_step:  # a resumed run has had its first evaluations
            self._count_evaluations(done)
        elif self.checkpoint_seconds:
            early = self.next_evaluation <= done < LAST_EVALUATION
            early = early and since_eval > max(EVALUATION_SECONDS, pause / EVALUATION_SHARE)
            late = since_eval > 2 * self.checkpoint_seconds
            evaluate = evaluate or ((early or late) and left > pause)
            save = since_save > self.checkpoint_seconds
        self.now = Moment(done, decay, finished, evaluate, save, int(signal))
        return self.now

    def seconds(self) -> float:
        """Of training in all, evaluations included, by this process and by earlier ones of the run."""
        return self.seconds_before + time.perf_counter() - self.loop_start

    def seconds_left(self) -> float:
        """Of training: an estimate. With max_minutes, the last evaluation is left out."""
        if self.max_minutes:
            return max(0.0, self._budget_left() - self.timing.eval)
        steps = self.max_iters - self.progress.step
        return steps * (self.timing.step + self.timing.eval / self.eval_interval)

    def _budget_left(self) -> float:
        """Seconds of max_minutes that are left: earlier processes of the run count, and so does the start-up."""
        return 60 * self.max_minutes - self.seconds_before - (time.perf_counter() - STARTED)

    def step_seconds(self) -> float:
        """Seconds per step since the last call, without evaluations and saves."""
        now, step = time.perf_counter(), self.progress.step
        self.timing.step = (now - self.window_start) / (step - self.window_step)
        self.window_start, self.window_step = now, step
        return self.timing.step

    @contextlib.contextmanager
    def paused(self, evaluation: bool = False) -> Iterator[None]:
        """Around a save, or an evaluation with its save: keeps it out of the seconds per step."""
        began = time.perf_counter()
        yield
        now = self.last_save = self.step_start = time.perf_counter()
        self.window_start += now - began
        if evaluation:
            if self.progress.step:  # that of the untrained model is a short one
                self.timing.eval = now - began
            self.last_eval = now
            self._count_evaluations(self.now.done)

    def _count_evaluations(self, done: float) -> None:
        while self.next_evaluation <= done:
            self.next_evaluation *= 2
