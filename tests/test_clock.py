"""minutegpt/clock.py: when a run evaluates, saves and ends, in steps and in wall-clock time."""

from itertools import pairwise

import pytest

from minutegpt import clock as clock_module
from minutegpt.checkpoint import Progress
from minutegpt.clock import Clock
from minutegpt.preflight import Timing


class Time:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    fake = Time()
    monkeypatch.setattr(clock_module, "time", fake)
    monkeypatch.setattr(clock_module, "STARTED", 95.0)  # five seconds of start-up
    return fake


def make(progress=None, timing=None, **changes):
    settings = {"max_iters": 100, "max_minutes": 0.0, "warmup_iters": 10, "eval_interval": 1000}
    settings |= {"checkpoint_minutes": 0.0} | changes
    return Clock(progress or Progress(), timing or Timing(step=1.0, eval=2.0), **settings)


def walk(clock, time, steps, step_seconds=1.0, evaluation_seconds=2.0):
    """The loop of train.py, with steps and evaluations that only take time; what happened, and when."""
    events = []
    while True:
        step = clock.progress.step
        now = clock.at(step)
        if (now.evaluate or now.finished) and clock.progress.evaluated != step:
            events.append(("evaluate", step, time.now))
            with clock.paused(evaluation=True):
                time.now += evaluation_seconds
            clock.progress.evaluated = step
        elif now.save:
            events.append(("save", step, time.now))
            with clock.paused():
                time.now += 0.5
        if now.finished or step >= steps:
            return events
        time.now += step_seconds
        clock.progress.step += 1


def test_steps_decide_where_there_are_no_minutes(time):
    clock = make(max_iters=20, eval_interval=8)
    assert clock.total_steps == 20 and clock.warmup == 10
    assert [event[:2] for event in walk(clock, time, 100)] == [("evaluate", step) for step in (0, 8, 16, 20)]
    assert clock.at(10).decay == 0 and clock.at(15).decay == pytest.approx(0.5) and clock.at(15).done == 0.75


def test_the_clock_decides_where_there_are(time):
    """One minute: five seconds of start-up, the last evaluation, and steps of a second between."""
    clock = make(max_minutes=1.0, max_iters=5)
    assert clock.total_steps == 53 and clock.warmup == 10  # 60 - 5 - 2 seconds
    events = walk(clock, time, 10_000)
    assert events[-1][0] == "evaluate" and abs(events[-1][2] + 2.0 - (95.0 + 60.0)) <= 0.5
    assert clock.now.done == pytest.approx(1, abs=0.02) and clock.now.decay == clock.now.done


def test_an_untrained_model_is_not_evaluated_in_a_short_run(time):
    assert walk(make(max_minutes=0.5), time, 3) == []
    assert walk(make(max_minutes=30.0), time, 3)[0][:2] == ("evaluate", 0)


def test_a_checkpoint_is_never_older_than_asked(time):
    """Slow steps, and no evaluation by steps: a save every five minutes, an evaluation every ten."""
    clock = make(max_iters=10_000, eval_interval=10_000, checkpoint_minutes=5.0)
    events = walk(clock, time, 400, step_seconds=11.0, evaluation_seconds=60.0)
    moments = [100.0, *(moment for _, _, moment in events), time.now]
    assert max(b - a for a, b in pairwise(moments)) <= 300 + 11 + 60
    evaluations = [moment for kind, _, moment in events if kind == "evaluate"]
    assert max(b - a for a, b in pairwise(evaluations)) <= 600 + 11 + 60


def test_early_evaluations_come_at_doubling_shares_and_cost_little(time):
    clock = make(max_iters=1000, eval_interval=10_000, checkpoint_minutes=5.0, timing=Timing(step=1.0, eval=0.4))
    events = walk(clock, time, 1000, evaluation_seconds=0.4)
    assert [step for kind, step, _ in events if kind == "evaluate"] == [0, 10, 20, 40, 80, 160, 320, 640, 1000]
    time.now = 100.0
    clock = make(max_iters=1000, eval_interval=10_000, checkpoint_minutes=5.0, timing=Timing(step=1.0, eval=8.0))
    events = walk(clock, time, 1000, evaluation_seconds=8.0)  # 8 seconds are too many after 10, 20, 40 or 80
    assert [step for kind, step, _ in events if kind == "evaluate"][1] >= 160


def test_the_short_evaluation_of_the_untrained_model_says_nothing_of_a_full_one(time):
    clock = make(timing=Timing(step=1.0, eval=8.0))
    for step, seconds, expected in ((0, 0.1, 8.0), (5, 3.0, 3.0)):
        clock.progress.step = step
        with clock.paused(evaluation=True):
            time.now += seconds
        assert clock.timing.eval == pytest.approx(expected)


def test_a_resumed_run_does_not_repeat_its_early_evaluations(time):
    clock = make(progress=Progress(step=500, evaluated=500), max_iters=1000, checkpoint_minutes=5.0)
    events = walk(clock, time, 1000, evaluation_seconds=0.1)
    assert [step for kind, step, _ in events if kind == "evaluate"] == [640, 1000]


def test_seconds_per_step_leave_out_evaluations_and_saves(time):
    clock = make()
    time.now += 10.0
    clock.progress.step = 5
    with clock.paused(evaluation=True):
        time.now += 100.0
    assert clock.step_seconds() == pytest.approx(2.0)
    assert clock.timing.eval == pytest.approx(100.0)


def test_time_left_is_never_negative(time):
    time.now += 1000.0
    assert make(max_minutes=0.1).seconds_left() == 0.0


def test_an_evaluation_takes_a_twentieth_of_a_short_run_at_most(time):
    clock = make(max_minutes=0.25, timing=Timing(step=0.1, eval=3.0))  # 15 seconds
    assert clock.eval_share == pytest.approx(0.25) and clock.timing.eval == pytest.approx(0.75)
    assert make(max_minutes=5.0, timing=Timing(step=0.1, eval=3.0)).eval_share == 1
    assert make(timing=Timing(step=0.1, eval=3000.0)).eval_share == 1  # a run by steps evaluates as its settings say
