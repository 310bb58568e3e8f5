"""minutegpt/log.py: what is sent. wandb and trackio by stubs that write down how they are called."""

import json
import math
import os

import pytest
from runs import House, ranks, tiny

from minutegpt.errors import UserError
from minutegpt.log import Tracker, check_installed

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks its runs")
STUB = """
import json, os
def _call(name, /, *args, **kwargs):
    with open("{name}.calls", "a") as file:
        file.write(json.dumps([name, args, kwargs]) + "\\n")
def init(**kwargs):
    if os.environ.get("NO_LOGIN"):
        raise RuntimeError("no login")
    _call("init", **kwargs)
def log(*args, **kwargs):
    if os.environ.get("NO_NETWORK"):
        raise OSError("no network")
    _call("log", *args, **kwargs)
def finish():
    _call("finish")
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with House(tmp_path_factory.mktemp("tracker")) as house:
        for name in ("wandb", "trackio"):
            (house.folder / f"{name}.py").write_text(STUB.replace("{name}", name), encoding="utf-8")
        yield house


def calls(house: House, name: str) -> list:
    """What the stub was called with since the last time."""
    path = house.folder / f"{name}.calls"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def sent(found: list) -> list[dict]:
    return [{"step": kwargs["step"], **args[0]} for name, args, kwargs in found if name == "log"]


def logged(house: House, out: str) -> list[dict]:
    """The rows of log.jsonl without their nulls."""
    rows = [json.loads(line) for line in (house.folder / out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_each_row_is_sent_and_a_resumed_run_goes_on(house, kind):
    knobs = tiny(max_iters=2, eval_interval=2)
    run = house.run("train.py", *knobs, f"--out_dir={kind}-run", f"--tracker={kind}")
    assert run.wait() == 0, run.output
    found = calls(house, kind)
    name, _, how = found[0]
    assert name == "init" and how["project"] == "minutegpt" and how["name"].startswith(f"{kind}-run-")
    assert how["config"]["max_iters"] == 2 and how["resume"] == "allow"
    assert sent(found) == logged(house, f"{kind}-run") and len(sent(found)) == 4
    assert found[-1][0] == "finish" and [call[0] for call in found].count("finish") == 1
    # the tracker is in the run's config, and its name in the run's folder
    assert house.resume("--max_iters=4", out=f"{kind}-run").wait() == 0
    again = calls(house, kind)
    assert again[0][2]["name"] == how["name"] and again[0][2].get("id") == how.get("id")
    assert sent(found) + sent(again) == logged(house, f"{kind}-run")
    # a new run in its place is another one
    assert house.run("train.py", *knobs, f"--out_dir={kind}-run", f"--tracker={kind}", "--overwrite").wait() == 0
    assert calls(house, kind)[0][2]["name"] != how["name"]


@pytest.mark.slow
def test_of_several_processes_one_tracks_and_finishes(house):
    ranks(house, 2, *tiny(max_iters=2, dropout=0.0), "--out_dir=two", "--tracker=wandb")
    found = calls(house, "wandb")
    assert [call[0] for call in found] == ["init", *["log"] * 4, "finish"]
    assert sent(found) == logged(house, "two")


def test_none_is_the_default_and_an_interrupted_or_failed_run_is_finished_too(house):
    assert house.train(out="none", max_iters=1).wait() == 0
    assert not calls(house, "wandb") and not calls(house, "trackio")
    run = house.train("--tracker=wandb", out="wild", learning_rate=1e30, warmup_iters=0)
    assert run.wait() == 1 and calls(house, "wandb")[-1][0] == "finish"


def test_a_tracker_that_is_not_installed_is_told_before_the_data_is_prepared(house):
    (house.folder / "tensorboard.py").write_text("raise ImportError('No module named tensorboard')\n")
    try:
        run = house.train("--tracker=tensorboard", "--dataset=not_there", out="missing")
        assert run.wait() == 2
    finally:
        (house.folder / "tensorboard.py").unlink()
    assert "error: --tracker=tensorboard: tensorboard is not installed" in run.output
    assert "uv sync --extra tensorboard" in run.output and "Traceback" not in run.output
    assert not (house.folder / "missing").exists()


def test_a_tracker_that_does_not_start_is_told_before_the_first_step(house):
    run = house.run("train.py", *tiny(max_iters=2), "--out_dir=login", "--tracker=wandb", env={"NO_LOGIN": "1"})
    assert run.wait() == 2 and "error: --tracker=wandb does not start: no login" in run.output
    assert "tok/s" not in run.output and "Traceback" not in run.output


def test_a_tracker_that_fails_later_does_not_end_the_run(house):
    run = house.run("train.py", *tiny(max_iters=2), "--out_dir=network", "--tracker=wandb", env={"NO_NETWORK": "1"})
    assert run.wait() == 0, run.output
    assert run.output.count("warning: wandb failed (no network): the run goes on without it") == 1
    assert len(logged(house, "network")) == 4


def test_nothing_is_imported_unasked():
    assert check_installed("none") is None
    Tracker("none", None, {}, None).log({"step": 1})  # type: ignore[arg-type]


def test_tensorboard_gets_the_rows_and_a_resumed_run_takes_the_place_of_what_comes_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Tracker("tensorboard", tmp_path, {"n_layer": 2}, None)
    for step in range(5):
        first.log({"step": step, "train_loss": 4.0 - step, "val_loss": None, "note": "text"})
    first.close()
    again = Tracker("tensorboard", tmp_path, {"n_layer": 2}, 2)  # its checkpoint was saved at step 2
    for step in (3, 4):
        again.log({"step": step, "train_loss": 10.0 + step})
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train_loss"]
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(0, 4), (1, 3), (2, 2), (3, 13), (4, 14)]
    assert math.isfinite(events.Scalars("train_loss")[0].wall_time)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match="--tracker=tensorboard does not start"):
        Tracker("tensorboard", tmp_path, {}, None)
