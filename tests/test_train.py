"""train.py as a user runs it: what it writes, says and refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from harness import ROOT, posix, refused, run, small_text, start, tiny

from minutegpt import checkpoint
from minutegpt.data.dataset import open_split
from model import GPT, GPTConfig

# one forward pass per step, and an evaluation, a checkpoint and a warmup where train.py has them
SETTINGS = tiny(gradient_accumulation_steps=1, dropout=0.0, eval_interval=250, warmup_iters=100, max_iters=5000)


def train(data, out, *args, **how):
    return run("train.py", *SETTINGS, f"--out_dir={out}", *args, data=data, **how)


def begin(data, out, *args):
    """The same as a script that goes on, to be interrupted."""
    return start("train.py", *SETTINGS, f"--out_dir={out}", *args, data=data)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of 20 steps, and what it said."""
    out = tmp_path_factory.mktemp("out") / "run"
    argv = ["--max_iters=20", "--eval_interval=10", "--dropout=0.1", "--learning_rate=5e-3"]
    result = train(data, out, *argv, fork=False)  # with nothing imported before
    assert result.status == 0, result.err
    return out, result.out


def copy_of(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def test_a_run_leaves_what_the_design_lists(finished):
    out, _ = finished
    assert {p.name for p in out.iterdir()} >= {
        "ckpt.pt", "ckpt-prev.pt", "ckpt-best.pt", "log.jsonl", "loss.png", "config.json", "samples.jsonl", "run.html",
    }  # fmt: skip
    assert not list(out.glob("*tmp"))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "config.json").read_text())["max_iters"] == 20


def test_the_log_has_every_step_and_evaluation(finished):
    rows = log(finished[0])
    keys = {"step", "tokens", "seconds", "lr", "grad_norm", "train_loss", "val_loss", "eval_train_loss"}
    scores = {
        f"{name}/{layer}.{head}" for name in ("previous_token", "induction") for layer in (0, 1) for head in (0, 1)
    }
    assert all(row.keys() in (keys, keys | scores if row["val_loss"] else keys) for row in rows)
    assert rows[0].keys() == rows[-1].keys() == keys | scores  # of the heads: at the first and the last evaluation
    assert [r["step"] for r in rows if r["train_loss"] is not None] == list(range(1, 21))
    assert [r["step"] for r in rows if r["val_loss"] is not None] == [0, 10, 20]
    assert all(row["tokens"] == row["step"] * 4 * 32 for row in rows)
    assert all((row["val_loss"] is None) == (row["eval_train_loss"] is None) for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_it_learns(finished):
    losses = [row["val_loss"] for row in log(finished[0]) if row["val_loss"] is not None]
    assert losses[-1] < losses[0] - 0.3


def test_the_output_tells_what_the_readme_says(finished):
    _, output = finished
    vocabulary = len(set(small_text()))
    card = ("device", "parameters", "tokens", "epochs", "per checkpoint", f"ln({vocabulary})")
    for words in (*card, "About ", "uniform guessing ", "bigrams "):
        assert words in output
    lines = [line for line in output.splitlines() if line.startswith("step ") and "tok/s" in line]
    assert len(lines) == 20
    for word in ("%", "loss", "lr", "norm", "mfu", "left"):
        assert all(word in line for line in lines)
    assert len({line.index("lr ") for line in lines}) == 1  # aligned
    assert output.count("perplexity") == 3
    for command in ("python sample.py", "python train.py --init_from=resume", "python evaluate.py"):
        assert command in output


def test_first_loss_is_that_of_knowing_nothing(finished):
    assert abs(log(finished[0])[0]["val_loss"] - math.log(len(set(small_text())))) < 0.1


def test_preflight_leaves_no_trace_in_the_weights(data, tmp_path):
    """The checkpoint before step 1 has the seed's weights, and fresh optimizers."""
    train(data, tmp_path / "run", "--max_iters=0", "--seed=7")
    state = checkpoint.load_run(tmp_path / "run", "latest")
    torch.manual_seed(7)
    for name, weight in GPT(GPTConfig(**state["model_config"])).state_dict().items():
        assert torch.equal(weight, state["model"][name]), name
    assert state["step"] == 0
    assert all(not each["state"] for each in state["optimizer"])


def test_resuming_a_finished_run_says_so_and_ends_well(finished, data):
    before = (finished[0] / "ckpt.pt").read_bytes()
    result = run("train.py", "--init_from=resume", f"--out_dir={finished[0]}", data=data)
    assert result.status == 0
    assert "finished" in result.out
    assert (finished[0] / "ckpt.pt").read_bytes() == before


def test_resume_goes_on_and_tells_what_changed(finished, data, tmp_path):
    out = copy_of(finished, tmp_path)
    result = run("train.py", "--init_from=resume", f"--out_dir={out}", "--max_iters=24", data=data)
    assert result.status == 0, result.err
    assert "max_iters 20 -> 24" in result.out
    assert [r["step"] for r in log(out) if r["train_loss"] is not None] == list(range(1, 25))


def test_resume_refuses_another_model(finished, data, tmp_path):
    out = copy_of(finished, tmp_path)
    refused(run("train.py", "--init_from=resume", f"--out_dir={out}", "--n_layer=3", data=data), "n_layer 2 -> 3")


def test_a_folder_with_a_run_is_not_overwritten(finished, data, tmp_path):
    out = copy_of(finished, tmp_path)
    before = (out / "ckpt.pt").read_bytes()
    refused(train(data, out, "--max_iters=1"), "--overwrite", "--init_from=resume")
    assert (out / "ckpt.pt").read_bytes() == before
    assert train(data, out, "--max_iters=1", "--overwrite").status == 0
    assert checkpoint.load_run(out, "latest")["step"] == 1
    assert [row["step"] for row in log(out)] == [0, 1, 1]


MISTAKES = {
    "unknown key": (["--learning_rat=1"], ["learning_rat", "learning_rate"]),
    "wrong type": (["--max_iters=many"], ["max_iters", "whole number"]),
    "several at once": (["--max_iters=many", "--n_lair=2"], ["max_iters", "n_lair", "n_layer"]),
    "no such config": (["config/shakespear_char.py"], ["config/shakespear_char.py", "config/shakespeare_char.py"]),
    "heads do not divide": (["--n_embd=32", "--n_head=3"], ["n_embd=32", "n_head=3"]),
    "block longer than a split": (["--block_size=5000"], ["block_size", "5000"]),
    "no such device": (["--device=cuda"], ["cuda", "cpu"]) if not torch.cuda.is_available() else (["--device=tpu"], []),
    "no such dtype": (["--dtype=float8"], ["float8", "bfloat16"]),
    "no such compile": (["--compile=maybe"], ["maybe"]),
    "no such activation": (["--activation=swish"], ["swish", "relu2"]),
    "no such dataset": (["--dataset=nothing_here"], ["nothing_here"]),
    "dataset outside": (["--dataset=../small"], ["../small"]),
    "nothing to resume": (["--init_from=resume"], ["no checkpoint"]),
    "no such init": (["--init_from=gpt9"], ["gpt9", "scratch"]),
    "negative batch": (["--batch_size=0", "--log_interval=0"], ["batch_size", "log_interval"]),
    "dropout of one": (["--dropout=1"], ["dropout"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_words(name, data, tmp_path):
    args, words = MISTAKES[name]
    refused(train(data, tmp_path / "run", *args), *words)
    assert not list((tmp_path / "run").glob("ckpt*"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(data, tmp_path):
    out = tmp_path / "run"
    result = train(data, out, "--learning_rate=1e30", "--grad_clip=0", "--warmup_iters=0", "--max_iters=50")
    refused(result, "not stepped", "--learning_rate", status=1)
    report = json.loads((out / "nonfinite.json").read_text())
    assert report["step"] >= 1 and len(report["window_starts"]) == 4 and report["largest_activations"]
    state = checkpoint.load_run(out, "latest")
    assert all(torch.isfinite(w).all() for w in state["model"].values())


@pytest.mark.slow
def test_max_minutes_keeps_its_time_and_ends_the_decay_at_zero(data, tmp_path):
    began = time.monotonic()
    result = train(data, tmp_path / "run", "--max_minutes=0.5", "--eval_interval=1000000", "--warmup_iters=0")
    took = time.monotonic() - began
    assert result.status == 0, result.err
    assert 25 < took < 34  # 30 s, and a python that ends
    rates = [row["lr"] for row in log(tmp_path / "run") if row["lr"] is not None]
    assert rates[0] > 9e-4 and rates[-1] < 2e-5 and rates == sorted(rates, reverse=True)
    assert log(tmp_path / "run")[-1]["val_loss"] is not None


def test_gradient_accumulation_gives_the_same_gradient(data, tmp_path):
    losses = []
    for name, args in (("a", ["--batch_size=8"]), ("b", ["--batch_size=2", "--gradient_accumulation_steps=4"])):
        result = train(data, tmp_path / name, *args, "--max_iters=5", "--eval_interval=100")
        assert result.status == 0, result.err
        losses.append([row["train_loss"] for row in log(tmp_path / name) if row["train_loss"] is not None])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_student_learns_from_the_text_and_from_its_teachers_in_equal_parts(data, finished, tmp_path):
    """The loss and the gradient of its first step are what the two losses give, written out token by token."""
    untrained, out = tmp_path / "untrained", tmp_path / "student"
    assert train(data, untrained, "--max_iters=0", "--seed=7").status == 0
    result = train(data, out, "--max_iters=1", f"--teachers={finished[0]},{untrained}")
    assert result.status == 0, result.err
    step = next(row for row in log(out) if row["step"] == 1 and row["train_loss"] is not None)

    state = checkpoint.load_run(out, "latest")
    torch.manual_seed(1337)
    student = GPT(GPTConfig(**state["model_config"]))
    teachers = [checkpoint.load_model(folder, "best", "cpu")[0] for folder in (finished[0], untrained)]
    split = open_split(data / "small", "train")
    tokens = split.windows(split.starts(32, 1337, np.arange(4)), 33)
    from_text = from_teachers = torch.zeros(())
    for row in tokens:
        told = student(row[None, :-1])[0][0].log_softmax(-1)
        believed = [teacher(row[None, :-1])[0][0].softmax(-1).detach() for teacher in teachers]
        for t in range(32):
            from_text = from_text - told[t, row[t + 1]] / 128
            for each in believed:
                from_teachers = from_teachers - (each[t] * told[t]).sum() / 128 / 2
    (from_text / 2 + from_teachers / 2).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in student.parameters()))
    assert step["train_loss"] == pytest.approx(from_text.item(), rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_student_goes_on_with_its_teachers(data, finished, tmp_path):
    settings = ("--learning_rate=5e-3", f"--teachers={finished[0]}", "--warmup_iters=0", "--lr_schedule=constant")
    assert train(data, tmp_path / "whole", "--max_iters=6", *settings).status == 0
    assert train(data, tmp_path / "halves", "--max_iters=3", *settings).status == 0
    result = run("train.py", "--init_from=resume", f"--out_dir={tmp_path / 'halves'}", "--max_iters=6", data=data)
    assert result.status == 0, result.err
    whole, halves = (checkpoint.load_run(tmp_path / name, "latest")["model"] for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_a_teacher_must_know_the_ids_and_the_positions(data, finished, tmp_path):
    out = tmp_path / "run"
    refused(train(data, out, "--teachers=out-nowhere"), "--teachers=out-nowhere", "gpt2")
    refused(train(data, out, f"--teachers={tmp_path}"), "no checkpoint")
    refused(train(data, out, f"--teachers={finished[0]}", "--block_size=64"), "32 tokens at most", "--block_size=32")
    (tmp_path / "other.txt").write_text("abc " * 500)
    assert run("prepare/text.py", f"--input={tmp_path / 'other.txt'}", data=data).status == 0
    refused(train(data, out, "--dataset=other", f"--teachers={finished[0]}"), "the 4 of other", "same tokenizer")
    assert not (out / "ckpt.pt").exists()


@posix
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_saves_and_tells(data, tmp_path, number, status):
    out = tmp_path / "run"
    process = begin(data, out, "--max_iters=1000000")
    process.await_output("tok/s")
    process.send(number)
    assert process.wait(60) == status, process.err
    assert "and saved" in process.out and "--init_from=resume" in process.out
    assert ("Ctrl-C again" in process.out) == (number == signal.SIGINT)
    assert checkpoint.load_run(out, "latest")["step"] >= 1
    assert not process.err


@pytest.mark.slow
@posix
def test_a_second_interrupt_ends_at_once(data, tmp_path):
    process = begin(data, tmp_path / "run", "--max_iters=1000000", "--gradient_accumulation_steps=2000")  # of seconds
    for told in ("step 0: ", "stopping"):
        process.await_output(told)
        process.send(signal.SIGINT)
    assert (process.wait(60), process.err) == (130, "") and "and saved" not in process.out


@posix
def test_an_interrupt_of_the_trial_leaves_an_old_run_as_it_was(data, finished, tmp_path):
    out = copy_of(finished, tmp_path)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"}
    process = begin(data, out, "--overwrite")
    process.await_output("  trial")
    process.send(signal.SIGINT)
    assert (process.wait(60), process.err) == (130, "") and process.out.splitlines()[-1].startswith("  trial")
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"} == before


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_step_and_the_loss_stays_the_same(data, tmp_path, processes):
    def losses(out, **how):
        result = train(data, out, "--batch_size=8", "--max_iters=50", "--eval_interval=25", **how)
        assert result.status == 0, result.err
        return [row["train_loss"] or row["val_loss"] for row in log(out)]

    alone = losses(tmp_path / "one")
    together = losses(tmp_path / "many", torchrun=["--standalone", f"--nproc_per_node={processes}"])
    assert len(alone) == 53
    assert together == pytest.approx(alone, abs=1e-5)


OVERFLOWS = """
import torch
if hasattr(torch, "amp"):
    class Scaler(torch.amp.GradScaler):  # float16's, on a CPU; gradients overflow after the trial's 4 steps
        cases = {5: (0, "inf"), 7: (1, "inf"), 9: (0, "nan"), 11: (1, "nan")}  # update: which optimizer, what
        updates, unscaled = 0, []

        def __init__(self, device, enabled):
            super().__init__("cpu", init_scale=1024.0, enabled=True)

        def unscale_(self, optimizer):
            place, value = self.cases.get(self.updates, (None, ""))
            if len(self.unscaled) == place:
                optimizer.param_groups[0]["params"][0].grad.flatten()[0] = float(value)
            super().unscale_(optimizer)
            self.unscaled.append(([p for g in optimizer.param_groups for p in g["params"]]))
            self.before = [[p.detach().clone() for p in params] for params in self.unscaled]

        def update(self):
            moved = [any(not torch.equal(p, q) for p, q in zip(a, b)) for a, b in zip(self.unscaled, self.before)]
            finite = all(p.isfinite().all() for params in self.unscaled for p in params)
            scale = self.get_scale()
            super().update()
            print("update", self.updates, *moved, bool(finite), self.get_scale() / scale)
            self.updates, self.unscaled[:] = self.updates + 1, []
    torch.amp.GradScaler = Scaler
"""


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_float16_overflow_in_one_optimizer_stops_the_step_of_all(grad_clip, data, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(OVERFLOWS)
    env = {"PYTHONPATH": str(tmp_path)}
    argv = ["--max_iters=9", "--optimizer=muon", f"--grad_clip={grad_clip}", "--warmup_iters=0"]
    done = train(data, tmp_path / "run", *argv, env=env, fork=False)
    assert done.status == 0, done.output
    told = [line.split()[2:] for line in done.out.splitlines() if line.startswith("update ")][4:]
    assert len(told) == 9
    for i, line in enumerate(told):
        assert line == (["False", "False", "True", "0.5"] if i in (1, 3, 5, 7) else ["True", "True", "True", "1.0"])


UNTIL_THE_FIRST_STEP = """
import json, os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
from minutegpt.log import RunLog
def step(*args):
    print(json.dumps(sorted(sys.modules)), flush=True)
    os._exit(0)
RunLog.step = step
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_nothing_slow_is_imported_before_the_first_step(data, tmp_path):
    """matplotlib takes a second, and all of torch.compile takes longer than torch."""
    argv = [str(ROOT / "train.py"), *SETTINGS, f"--out_dir={tmp_path / 'run'}", "--optimizer=muon", "--ngram=3"]
    env = os.environ | {"MINUTEGPT_DATA": str(data), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", UNTIL_THE_FIRST_STEP, *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"torch", "model", "minutegpt.optim"} <= modules
    slow = {"matplotlib", "PIL", "datasets", "transformers", "tiktoken", "pandas", "sympy", "scipy", "requests"}
    assert not modules & (slow | {"torch._dynamo", "torch._inductor", "torch.utils.tensorboard", "wandb", "trackio"})
