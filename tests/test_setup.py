"""minutegpt/setup.py: what a run starts from, and what its folder may hold."""

import re

import pytest
from harness import ROOT, run, tiny

from minutegpt import setup
from minutegpt.checkpoint import read_checkpoint
from minutegpt.config import Settings
from minutegpt.errors import UserError
from minutegpt.log import read_log
from minutegpt.setup import Start


def start(state=None, **values):
    return Start(Settings(values, set(), set(), "", set()), state)


THEIRS = {"config.json": "{}", "log.jsonl": "mine", "loss.png": "a plot", "thesis.tmp": "a year of work"}


def test_a_folder_with_other_files_is_refused_and_nothing_in_it_changes(house):
    folder = house / "theirs"
    folder.mkdir()
    for name, text in THEIRS.items():
        (folder / name).write_text(text, encoding="utf-8")
    for argv in ([], ["--overwrite"], ["--n_head=3"]):
        done = run("train.py", *tiny(max_iters=1), "--out_dir=theirs", *argv, cwd=house)
        assert done.status == 2, done.output
    message = run("train.py", *tiny(max_iters=1), "--out_dir=theirs", cwd=house)
    assert "theirs contains log.jsonl, loss.png, config.json, which no run wrote" in message.err
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == THEIRS


@pytest.mark.parametrize(("files", "strangers"), [
    ({"config.json": '{"out_dir": "x", "init_from": "scratch"}', "loss.png": "a plot"}, []),  # a run killed early
    ({"config.json": '{"architectures": []}', ".lock": "process 7 on host\n"}, ["config.json"]),
    ({"log.jsonl": "mine", ".lock": ""}, ["log.jsonl"]),  # a command that failed had made the lock
    ({".lock": "a lock of another program"}, [".lock"]),
    ({"ckpt.pt": "a run", "log.jsonl": "its log"}, []),
    ({"thesis.txt": "mine"}, []),
])  # fmt: skip
def test_a_folder_is_a_runs_by_what_it_holds_and_not_by_a_lock(tmp_path, files, strangers):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert setup.foreign_files(tmp_path) == strangers


def test_a_temporary_file_of_somebody_else_stays(house):
    folder = house / "mixed"
    folder.mkdir()
    (folder / "thesis.tmp").write_text("a year of work", encoding="utf-8")
    (folder / "ckpt.pt.99.minutegpt.tmp").write_text("half a checkpoint", encoding="utf-8")
    done = run("train.py", *tiny(max_iters=1), "--out_dir=mixed", cwd=house)
    assert done.status == 0, done.output
    assert [path.name for path in folder.glob("*.tmp")] == ["thesis.tmp"]


def test_iterations_on_the_command_line_replace_the_minutes_of_a_config(house):
    (house / "minutes.py").write_text("max_minutes = 5.0\n", encoding="utf-8")
    done = run("train.py", "minutes.py", *tiny(max_iters=3), "--out_dir=minutes", cwd=house)
    assert done.status == 0 and "max_minutes 5 -> 0, because of --max_iters" in done.out
    assert read_checkpoint(house / "minutes" / "ckpt.pt")["step"] == 3


def test_a_few_steps_of_a_small_model_are_not_compiled_and_many_are():
    small = {"max_minutes": 0.0, "batch_size": 6, "gradient_accumulation_steps": 1, "block_size": 256}
    small |= {"n_layer": 3, "n_embd": 96}
    assert setup.expected_minutes(small | {"max_iters": 100}) == pytest.approx(0.102, abs=0.001)  # 17 s were measured
    assert setup.expected_minutes(small | {"max_iters": 0}) == 0
    assert setup.expected_minutes(small | {"max_iters": 5000, "gradient_accumulation_steps": 2}) > 5
    assert setup.expected_minutes(small | {"max_iters": 100, "max_minutes": 8.0}) == 8


def test_a_config_edited_before_a_resume_is_told(house):
    (house / "edited.py").write_text("learning_rate = 1e-3\n", encoding="utf-8")
    assert run("train.py", "edited.py", *tiny(max_iters=2), "--out_dir=edited", cwd=house).status == 0
    (house / "edited.py").write_text("learning_rate = 5e-4\n", encoding="utf-8")
    done = run("train.py", "edited.py", "--init_from=resume", "--out_dir=edited", "--max_iters=4", cwd=house)
    assert "not taken from the config file: learning_rate=0.0005" in done.out
    done = run("train.py", "edited.py", "--init_from=resume", "--out_dir=edited", cwd=house)
    assert "is finished: 4 steps" in done.out and "not taken from the config file: learning_rate=0.0005" in done.out


COSINE = {
    "max_iters": 100, "max_minutes": 0.0, "warmup_iters": 10, "learning_rate": 1e-3, "min_lr": 0.0,
    "lr_schedule": "cosine", "decay_fraction": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(("step", "changes", "note"), [
    (100, {"max_iters": 200}, r"learning rate 3e-07 -> 0\.00055 at step 100, because .*--learning_rate=0\.0001$"),
    (50, {"max_iters": 60}, ""),  # it ends earlier
    (50, {"max_iters": 400}, r"learning rate 0\.0006 -> 0\.00098 at step 50, .*--learning_rate=0\.0006$"),
    (50, {"max_iters": 105}, ""),
    (5, {"max_iters": 400}, ""),  # in the warmup, which is the same
    (0, {"max_iters": 400}, ""),
    (100, {"lr_schedule": "constant", "max_iters": 200}, "learning rate .* -> 0.001"),
    (100, {"max_iters": 100}, ""),
])  # fmt: skip
def test_a_learning_rate_that_jumps_at_a_resume_is_told(step, changes, note):
    begun = start({"step": step, "seconds": 60.0, "config": COSINE})
    found = setup.rate_note(begun, COSINE | changes)
    assert re.search(note, found) if note else found == ""
    timed = start({"step": step, "seconds": 60.0, "config": COSINE | {"max_minutes": 1.0}})
    assert bool(setup.rate_note(timed, COSINE | {"max_minutes": 2.0})) == bool(step)
    hostile = start({"step": 9, "config": {"decay_fraction": 0.0, "max_iters": "many"}})
    assert setup.rate_note(hostile, COSINE) == ""


def test_the_scheduled_rate_is_the_one_of_the_log(house):
    schedule = {"max_iters": 6, "warmup_iters": 2, "learning_rate": 1e-3, "lr_schedule": "cosine"}
    assert run("train.py", *tiny(**schedule), "--out_dir=rates", cwd=house).status == 0
    logged = [row["lr"] for row in read_log(house / "rates" / "log.jsonl") if row["lr"] is not None]
    assert len(logged) == 6
    assert logged == pytest.approx([setup.scheduled_rate(COSINE | schedule, step, 0.0) for step in range(6)])
    done = run("train.py", "--init_from=resume", "--out_dir=rates", "--max_iters=12", cwd=house)
    assert "changed: learning rate 0.00015 -> 0.00" in done.out, done.output


def test_a_section_of_a_config_is_used_on_its_device_and_told(house):
    (house / "two.py").write_text("n_layer = 2\ncpu = dict(n_layer=1)\ncuda = dict(n_layer=3)\n", encoding="utf-8")
    argv = [word for word in tiny(max_iters=1) if not word.startswith("--n_layer")]
    done = run("train.py", "two.py", *argv, "--out_dir=two", cwd=house)
    assert done.status == 0 and "its section for cpu is used, as the run is on cpu" in done.out
    assert read_checkpoint(house / "two" / "ckpt.pt")["model_config"]["n_layer"] == 1
    done = run("train.py", "two.py", *argv, "--out_dir=rest", "--section=none", cwd=house)
    assert done.status == 0 and "no section is used on cpu; it has one for cpu, cuda" in done.out
    assert read_checkpoint(house / "rest" / "ckpt.pt")["model_config"]["n_layer"] == 2


@pytest.mark.parametrize(
    ("state", "dataset", "fingerprint", "new"),
    [
        ({"data_fingerprint": "a", "config": {"dataset": "x"}}, "x", "a", False),
        ({"data_fingerprint": "a", "config": {"dataset": "x"}}, "x", "b", True),
        ({"data_fingerprint": "a", "config": {"dataset": "x"}}, "y", "b", True),
        ({"config": {"dataset": "x"}}, "x", "a", False),  # a checkpoint of an earlier version
        ({"config": {"dataset": "x"}}, "y", "a", True),
    ],
)
def test_another_text_starts_its_best_loss_again(state, dataset, fingerprint, new):
    begun = start(state | {"best_val_loss": 1.0, "best_step": 5, "evaluated": 9})
    setup.compare_data(begun, {"dataset": dataset}, fingerprint)
    assert (begun.state["best_val_loss"] == float("inf")) == new
    assert bool(begun.notes) == (new and dataset == "x")
    setup.compare_data(start(), {"dataset": dataset}, fingerprint)  # a new run has nothing to compare


@pytest.mark.parametrize(("before", "after", "new"), [
    ({"dataset": "a:0.7,b:0.3"}, {"dataset": "a:0.7,b:0.3"}, False),
    ({"dataset": "a:0.7,b:0.3"}, {"dataset": "a:0.1,b:0.9"}, True),  # measured in these shares too
    ({"dataset": "a", "qat": ""}, {"dataset": "a", "qat": "int4"}, True),  # the loss of rounded weights
    ({"dataset": "a", "qat": "int4"}, {"dataset": "a", "qat": "int4"}, False),
])  # fmt: skip
def test_a_best_loss_of_something_else_is_not_kept(before, after, new):
    found = {"config": before, "data_fingerprint": "f", "best_val_loss": 1.0, "best_step": 5, "evaluated": 9}
    begun = start(found)
    setup.compare_data(begun, after, "f")
    assert (begun.state["best_val_loss"] == float("inf")) == new and not begun.notes


def test_a_launch_is_known_again(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x1")
    run, host, process = setup.launch().split(" ")
    assert run == "x1" and setup.is_of_this_launch(setup.launch())
    assert setup.is_of_this_launch("x1 another-machine 1"), "rank 0 is there, and saves"
    for other in ("", f"x1 {host} {process}1", f"x2 {host} {process}", f"x {host} {process}", "x11 another-machine 1"):
        assert not setup.is_of_this_launch(other), other


def test_a_restart_does_not_touch_the_run_of_another_call(house):
    """torchrun starts what was refused again."""
    assert run("train.py", *tiny(max_iters=2), "--out_dir=taken", cwd=house).status == 0
    before = (house / "taken" / "ckpt.pt").read_bytes()
    env = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "x1"}
    done = run("train.py", *tiny(max_iters=4), "--out_dir=taken", cwd=house, env=env)
    assert done.status == 2 and "taken already contains a run" in done.err, done.output
    assert (house / "taken" / "ckpt.pt").read_bytes() == before


def test_machines_with_different_checkpoints_are_refused(monkeypatch):
    monkeypatch.setattr(setup, "worst_of_all_ranks", lambda values: [max(values[0], 8.0), values[1]])
    with pytest.raises(UserError, match="not all machines have the same checkpoint in out"):
        setup.check_same_checkpoint("out", start())


def test_a_text_without_a_new_line_trains(house):
    (house / "dna.txt").write_text("ACGT" * 1000, encoding="utf-8")
    assert run("prepare/text.py", "--input=dna.txt", cwd=house).status == 0
    done = run("train.py", *tiny(max_iters=2, dataset="dna"), "--out_dir=dna", cwd=house)
    assert done.status == 0 and "step 2: train loss" in done.out, done.output


def test_a_sample_that_fails_does_not_end_the_run(house):
    code = [
        f"import sys, runpy; sys.argv = ['train.py', *sys.argv[1:]]; sys.path[0] = {str(ROOT)!r}",
        "import model",
        "model.GPT.generate = lambda *args, **options: 1 / 0",
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')",
    ]
    (house / "broken.py").write_text("\n".join(code), encoding="utf-8")
    done = run(str(house / "broken.py"), *tiny(max_iters=2), "--out_dir=broken", cwd=house)
    assert done.status == 0 and "warning: the sample failed (division by zero)" in done.out, done.output
    assert read_checkpoint(house / "broken" / "ckpt.pt")["step"] == 2


def test_a_path_with_a_blank_is_quoted_in_the_advised_command():
    state = {"step": 9, "seconds": 700.0, "evaluated": 9, "best_val_loss": 1.5, "config": {}}
    message = setup.finished({"max_minutes": 0.0, "max_iters": 9, "out_dir": "my run"}, start(state))
    assert "--out_dir='my run' --max_iters=18" in message


def test_a_run_with_nothing_left_to_do_says_what_would_go_on():
    state = {"step": 9, "seconds": 700.0, "evaluated": 9, "best_val_loss": 1.5, "config": {}}
    message = setup.finished({"max_minutes": 5.0, "max_iters": 9, "out_dir": "x"}, start(state))
    assert "--max_minutes=" in message
    minutes = float(message.rsplit("=", 1)[1])
    assert 60 * minutes > state["seconds"]  # what is advised is not finished too
    assert setup.finished({"max_minutes": 0.0, "max_iters": 10, "out_dir": "x"}, start(state)) == ""
