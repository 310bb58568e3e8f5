"""minutegpt/log.py: what a run prints, logs and sends. wandb and trackio are stubs here."""

import doctest
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import posix, ranks, resume, run, tiny, train
from tqdm import tqdm

from minutegpt import log
from minutegpt.checkpoint import read_checkpoint
from minutegpt.errors import UserError
from minutegpt.log import (  # fmt: skip
    LOG_KEYS,
    RunLog,
    Tracker,
    append_sample,
    check_installed,
    format_seconds,
    largest_activations,
    log_row,
    open_log,
    open_samples,
    print_line,
    print_table,
    read_log,
    report_nonfinite,
    si_number,
)
from minutegpt.log import step_line as line
from model import GPT, GPTConfig


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(log) == (0, 4)


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0"), (1, "1"), (999, "999"), (1000, "1k"), (1049, "1.05k"), (124_439_808, "124M"), (9.035e12, "9.04T"),
     (1e18, "1e+03P"), (0.0123, "0.0123"), (-2500, "-2.5k"), (999_949, "1M"), (999_400, "999k")],
)  # fmt: skip
def test_amounts(n, text):
    assert si_number(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599.6, "1h00m"), (86400, "24h00m"), (math.inf, "?"), (math.nan, "?")],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def test_lines_are_aligned_from_the_first_step_to_the_last():
    lines = [
        line(
            1, 5000, 0.0002, 4.1743, lr=1e-5, grad_norm=123.456, tokens_per_second=16384, mfu=0.314, seconds_left=7200
        ),
        line(250, 5000, 0.05, 2.5, lr=1e-3, grad_norm=1.5, tokens_per_second=999, mfu=0.05, seconds_left=600),
        line(5000, 5000, 1.0, 1.4697, lr=0.0, grad_norm=0.25, tokens_per_second=123_456, mfu=0.5, seconds_left=0),
    ]
    for word in ("%", "loss", "lr", "norm", "tok/s", "mfu"):
        assert len({text.index(word) for text in lines}) == 1, lines
    assert lines[0].startswith("step    1/5000   0.0%  loss 4.1743") and lines[2].endswith("  0 seconds left")
    assert lines[1].index("10 minutes left") == lines[0].index("2 hours left") == lines[2].index("0 seconds left")
    assert "mfu" not in line(
        1, 0, 0.5, 4.0, lr=0.1, grad_norm=1.0, tokens_per_second=10, mfu=0.0, seconds_left=60
    ) and "/0" not in line(1, 0, 0.5, 4, lr=0, grad_norm=1, tokens_per_second=10, mfu=0.0, seconds_left=60)


def test_a_card_is_aligned(capsys):
    print_table([("device", "cpu"), ("a longer label", "here"), ("x", "")])
    assert capsys.readouterr().out == "  device          cpu\n  a longer label  here\n  x               \n"


def test_a_line_leaves_a_progress_bar_whole(capsys):
    terminal = io.StringIO()
    with tqdm(total=10, file=terminal, ncols=60) as bar:
        bar.update(5)
        print_line("a line")
    assert capsys.readouterr().out == "a line\n"
    assert "a line" not in terminal.getvalue() and "10/10" not in terminal.getvalue()


# ---------------------------------------------------------------------------------------- the log


def test_a_row_has_every_key_and_null_where_nothing_was_measured(tmp_path):
    path, rows = tmp_path / "log.jsonl", []
    log_row(path, rows, step=1, tokens=64, seconds=0.5, train_loss=4.0, grad_norm=math.inf, lr=math.nan)
    log_row(path, rows, step=2, val_loss=3.5, experts=[1, 2])
    read = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert read == rows and path.read_bytes().endswith(b"}\n")
    assert [list(row)[: len(LOG_KEYS)] for row in rows] == [list(LOG_KEYS)] * 2
    assert rows[0]["grad_norm"] is rows[0]["lr"] is rows[0]["val_loss"] is None and rows[0]["train_loss"] == 4.0
    assert rows[1]["experts"] == [1, 2] and rows[1]["train_loss"] is None
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def written(path, n=5):
    rows = []
    for step in range(n):
        log_row(path, rows, step=step)
    return rows


@pytest.mark.parametrize("keep", [0, 3, 5, 100])
def test_rows_later_than_the_checkpoint_are_cut(tmp_path, keep):
    path = tmp_path / "log.jsonl"
    rows = written(path)
    assert open_log(path, keep) == rows[:keep]
    kept = path.read_text().splitlines()
    assert [json.loads(text) for text in kept] == rows[:keep]
    log_row(path, [], step=99)  # and the next row is on its own line
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 99


def test_a_torn_line_is_cut_at_any_byte(tmp_path):
    path = tmp_path / "log.jsonl"
    rows, whole = written(path, 3), (tmp_path / "log.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = sum(end <= size for end in ends)
        assert open_log(path, 100) == rows[:complete]
        assert path.read_bytes() == whole[: ([0, *ends])[complete]]


@pytest.mark.parametrize(
    "junk", [b"\x00" * 50 + b"\n", b"[1]\n", b"3\n", b"\xff\xfe\n", b"{}{}\n", b"[" * 100_000 + b"\n"]
)
def test_what_follows_a_line_that_is_no_object_is_not_trusted(tmp_path, junk):
    path = tmp_path / "log.jsonl"
    rows = written(path, 2)
    good = path.read_bytes()
    path.write_bytes(good + junk + good)
    assert open_log(path, 100) == rows and path.read_bytes() == good


@pytest.mark.parametrize("step", [-1, 0, 15, 20, 99])
def test_samples_later_than_the_checkpoint_are_cut(tmp_path, step):
    path, rows = tmp_path / "samples.jsonl", []
    for at in (0, 10, 20, 30):
        append_sample(path, rows, {"step": at, "text": "é\n\u2028"})
    expected = [row for row in rows if row["step"] <= step]
    assert open_samples(path, step) == expected
    assert [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] == expected
    append_sample(path, rows, {"step": 100, "text": ""})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 101')  # torn
    assert open_samples(path, 200) == [*expected, {"step": 100, "text": ""}]
    append_sample(path, [], {"step": 3})  # the first of a new run
    assert open_samples(path, 200) == [{"step": 3}]


@pytest.mark.parametrize("junk", ['{"text": "no step"}', '{"step": "5"}', '{"step": -1}', "3", "{}", "\x00"])
def test_a_sample_that_is_out_of_order_or_no_sample_ends_what_is_kept(tmp_path, junk):
    path = tmp_path / "samples.jsonl"
    append_sample(path, [], {"step": 0, "text": "a"})
    good = path.read_bytes()
    path.write_bytes(good + junk.encode() + b"\n" + good)
    assert open_samples(path, 50) == [{"step": 0, "text": "a"}] and path.read_bytes() == good
    assert open_samples(tmp_path / "none.jsonl", 50) == []


def test_an_evaluation_of_the_same_step_on_another_text_is_kept(tmp_path):
    path, rows = tmp_path / "samples.jsonl", []
    for step, passage in ((0, "a"), (50, "a"), (50, "b"), (100, "b")):
        append_sample(path, rows, {"step": step, "passage": passage})
    assert open_samples(path, 100) == rows and open_samples(path, 50) == rows[:3]


def test_no_log_is_no_rows(tmp_path):
    assert open_log(tmp_path / "log.jsonl", 5) == [] and not (tmp_path / "log.jsonl").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told():
    with pytest.raises(UserError, match=r"cannot write /dev/full: No space left.*--init_from=resume"):
        log_row(Path("/dev/full"), [], step=1)


# ---------------------------------------------------------------------------------------- numbers that ran away


def test_the_largest_activations_tell_where_numbers_went_bad(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=3, n_head=2, n_embd=16))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.fill_(math.inf)
    idx = torch.arange(8)[None]
    found = largest_activations(model, idx)
    assert all(math.isfinite(v) for k, v in found.items() if "h.0" in k) and len(found) > 20
    assert not math.isfinite(found["transformer.h.1.mlp.c_fc"]) and math.isfinite(found["transformer.h.1.ln_2"])
    expected = model.transformer.wte(idx).abs().max().item()
    assert found["transformer.wte"] == pytest.approx(expected)
    assert not any(module._forward_hooks for module in model.modules())  # no trace is left

    message = report_nonfinite(tmp_path, 7, math.nan, math.inf, 1e-3, [0, 8], found)
    saved = json.loads((tmp_path / "nonfinite.json").read_text(), parse_constant=lambda name: sys.exit(name))
    assert saved["step"] == 7 and saved["window_starts"] == [0, 8] and saved["loss"] == "nan"
    assert len(saved["largest_activations"]) == len(found)
    assert "at step 7 the loss is nan" in message and f"--init_from=resume --out_dir={tmp_path}" in message
    assert re.search(r"--learning_rate=0\.0003$", message)


def test_reading_a_log_leaves_it_as_it_is(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == []
    for torn in ('{"step": 2', "3", "[1]", "\xff\x00", "[" * 99_999):
        path.write_text('{"step": 0}\n{"step": 1}\n' + torn, encoding="latin-1")
        before = path.read_bytes()
        assert read_log(path) == [{"step": 0}, {"step": 1}] and path.read_bytes() == before


# ---------------------------------------------------------------------------------------- trackers


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
        raise {"exit": SystemExit}.get(os.environ["NO_NETWORK"], OSError)("no network")
    if os.environ.get("HANGS"):
        os._exit(9)
    _call("log", *args, **kwargs)
def finish():
    _call("finish")
"""


@pytest.fixture(scope="module")
def house(house):
    """Its wandb and trackio write down how they are called."""
    for name in ("wandb", "trackio"):
        (house / f"{name}.py").write_text(STUB.replace("{name}", name), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(house))
        yield house


def calls(house: Path, name: str) -> list:
    """What the stub was called with since the last time."""
    path = house / f"{name}.calls"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def sent(found: list) -> list[dict]:
    return [{"step": kwargs["step"], **args[0]} for name, args, kwargs in found if name == "log"]


def logged(house: Path, out: str) -> list[dict]:
    """The rows of log.jsonl without their nulls."""
    rows = [json.loads(line) for line in (house / out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_each_row_is_sent_and_a_resumed_run_goes_on(house, kind):
    argv = [*tiny(max_iters=2, eval_interval=2), f"--out_dir={kind}-run", f"--tracker={kind}"]
    done = run("train.py", *argv, cwd=house)
    assert done.status == 0, done.output
    found = calls(house, kind)
    name, _, how = found[0]
    assert name == "init" and how["project"] == "minutegpt" and how["name"].startswith(f"{kind}-run-")
    assert how["config"]["max_iters"] == 2 and how["resume"] == "allow"
    assert sent(found) == logged(house, f"{kind}-run") and len(sent(found)) == 4
    assert found[-1][0] == "finish" and [call[0] for call in found].count("finish") == 1
    # the tracker is in the run's config, and its name in the run's folder
    assert resume(house, f"{kind}-run", "--max_iters=4").wait() == 0
    again = calls(house, kind)
    assert again[0][2]["name"] == how["name"] and again[0][2].get("id") == how.get("id")
    assert sent(found) + sent(again) == logged(house, f"{kind}-run")
    # a new run in its place is another one
    assert run("train.py", *argv, "--overwrite", cwd=house).status == 0
    assert calls(house, kind)[0][2]["name"] != how["name"]


@posix
@pytest.mark.slow
def test_of_several_processes_one_tracks_and_finishes(house):
    ranks(house, 2, *tiny(max_iters=2, dropout=0.0), "--out_dir=two", "--tracker=wandb")
    found = calls(house, "wandb")
    assert [call[0] for call in found] == ["init", *["log"] * 4, "finish"]
    assert sent(found) == logged(house, "two")


def test_none_is_the_default_and_an_interrupted_or_failed_run_is_finished_too(house):
    assert train(house, "none", max_iters=1).wait() == 0
    assert not calls(house, "wandb") and not calls(house, "trackio")
    wild = train(house, "wild", "--tracker=wandb", learning_rate=1e30, warmup_iters=0)
    assert wild.wait() == 1 and calls(house, "wandb")[-1][0] == "finish"


def test_a_tracker_that_is_not_installed_is_told_before_the_data_is_prepared(house):
    (house / "tensorboard.py").write_text("raise ImportError('No module named tensorboard')\n")
    try:
        done = run("train.py", *tiny(dataset="not_there"), "--out_dir=missing", "--tracker=tensorboard", cwd=house)
        assert done.status == 2
    finally:
        (house / "tensorboard.py").unlink()
    assert "error: --tracker=tensorboard: tensorboard is not installed" in done.output
    assert "uv sync --extra tensorboard" in done.output and "Traceback" not in done.output
    assert not (house / "missing").exists()


def test_a_tracker_that_does_not_start_is_told_before_the_first_step(house):
    argv = [*tiny(max_iters=2), "--out_dir=login", "--tracker=wandb"]
    done = run("train.py", *argv, cwd=house, env={"NO_LOGIN": "1"})
    assert done.status == 2 and "error: --tracker=wandb does not start: no login" in done.output
    assert "tok/s" not in done.output and "Traceback" not in done.output


@pytest.mark.parametrize("how", ["error", "exit"])
def test_a_tracker_that_fails_later_does_not_end_the_run(house, how):
    argv = [*tiny(max_iters=2), f"--out_dir=network-{how}", "--tracker=wandb"]
    done = run("train.py", *argv, cwd=house, env={"NO_NETWORK": how})
    assert done.status == 0, done.output
    assert done.output.count("warning: wandb failed (no network): the run goes on without it") == 1
    assert len(logged(house, f"network-{how}")) == 4


def test_an_evaluation_is_saved_before_the_tracker_gets_it(house):
    argv = [*tiny(max_iters=2, log_interval=9), "--out_dir=hangs", "--tracker=wandb"]
    done = run("train.py", *argv, cwd=house, env={"HANGS": "1"})
    assert done.status == 9 and "step 0: train loss" in done.out
    state = read_checkpoint(house / "hangs" / "ckpt.pt")
    assert state["evaluated"] == 0 and state["log_rows"] == 1


def test_a_decoration_that_exits_does_not_end_the_run(capsys):
    for error in (SystemExit(3), OSError("no space"), MemoryError()):
        with RunLog.decoration(SimpleNamespace(enabled=True), "sample"):  # type: ignore[arg-type]
            raise error
    assert capsys.readouterr().out.split("\n")[:2] == [
        "warning: the sample failed (3)", "warning: the sample failed (no space)",
    ]  # fmt: skip


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
