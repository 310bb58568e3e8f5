"""minutegpt/setup.py: what a run starts from, and what its folder may hold."""

import pytest
from harness import ROOT, run, tiny

from minutegpt import setup
from minutegpt.checkpoint import read_checkpoint
from minutegpt.config import Settings
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


def test_a_config_edited_before_a_resume_is_told(house):
    (house / "edited.py").write_text("learning_rate = 1e-3\n", encoding="utf-8")
    assert run("train.py", "edited.py", *tiny(max_iters=2), "--out_dir=edited", cwd=house).status == 0
    (house / "edited.py").write_text("learning_rate = 5e-4\n", encoding="utf-8")
    done = run("train.py", "edited.py", "--init_from=resume", "--out_dir=edited", "--max_iters=4", cwd=house)
    assert "not taken from the config file: learning_rate=0.0005" in done.out


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
