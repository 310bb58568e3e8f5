"""No run is lost: killed at any moment and resumed, it ends in the bits of the run that never was. With real kills."""

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, TINY_RUN, Run, losses, ranks, resume, run, start, start_ranks, tiny, train

from minutegpt.checkpoint import read_checkpoint, save_checkpoint_file
from minutegpt.log import read_log

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has the same files and no SIGKILL")


def end_state(folder: Path) -> dict:
    """All that a run comes to, but for the clock."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    state: dict[str, Any] = {"log": [{key: value for key, value in row.items() if key != "seconds"} for row in log]}
    for name in ("ckpt.pt", "ckpt-best.pt"):
        state[name] = read_checkpoint(folder / name)
        for key in ("seconds", "environment"):
            state[name].pop(key)
        for key in ("out_dir", "init_from", "overwrite", "n_kv_head"):  # of the call; and 0 is written out as n_head
            state[name]["config"].pop(key)
    return state


def assert_same(a, b, where="") -> None:
    """Equal in every bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{where}: {(a.double() - b.double()).abs().max()}"
    else:
        assert a == b, f"{where}: {a} and {b}"


def kill(run: Run, folder: Path, rng: random.Random) -> bool:
    """SIGKILL while it starts, some steps on, or inside a save, as chance has it. Did it hit a live run?"""
    moment = rng.choice(["start", "step", "step", "save", "save"])
    steps, end = rng.randint(1, 12), time.monotonic() + 300
    if moment == "start":
        time.sleep(rng.uniform(0, 1))
    while moment != "start" and run.output.count("tok/s") < steps and run.alive() and time.monotonic() < end:
        time.sleep(0.001)
    while moment == "save" and not any(folder.glob("ckpt*.tmp")) and run.alive() and time.monotonic() < end:
        pass  # a save of this tiny model takes 5 ms
    time.sleep(rng.uniform(0, 0.004 if moment == "save" else 0.03))
    run.send(signal.SIGKILL)
    return run.wait() == -signal.SIGKILL and (folder / "ckpt.pt").exists()  # before it there is nothing to lose


def kill_and_resume(house: Path, name: str, kills: int, **settings: object) -> None:
    """Compares runs that are killed again and again with one that is not.

    Until so many kills hit a live run, and a fifth of them a save. A slow machine may need up to 3 times as many.
    """
    straight = train(house, f"{name}-straight", **settings)
    assert straight.wait(600) == 0, straight.output
    wanted = end_state(house / f"{name}-straight")
    steps = [row["step"] for row in wanted["log"] if row["train_loss"] is not None]
    assert steps == list(range(1, TINY_RUN["max_iters"] + 1))
    rng, hits, saves = random.Random(name), 0, 0

    def goes_on() -> bool:
        return hits < kills or (saves < kills // 5 and hits < 3 * kills)

    for chain in itertools.count():
        folder = house / f"{name}-{chain}"
        run = train(house, folder.name, **settings)
        while goes_on():
            if kill(run, folder, rng):
                hits += 1
                saves += any(folder.glob("ckpt*.tmp"))  # what a save leaves when it is killed
            if run.status == 0:
                break
            begun = (folder / "ckpt.pt").exists()
            run = resume(house, folder.name) if begun else train(house, folder.name, **settings)
        assert run.wait(600) == 0, run.output
        assert_same(end_state(folder), wanted)
        assert {path.name for path in folder.iterdir()} >= {"config.json", "loss.png"}
        assert not any(folder.glob("*.tmp"))  # what the killed left half-written is cleared
        if not goes_on():
            break
    assert saves >= kills // 5, f"only {saves} of {hits} kills were inside a save"
    print(f"{name}: {hits} kills hit a live run, {saves} of them inside a save, in {chain + 1} runs")


def test_a_killed_run_resumes_to_the_same_bits(house):
    kill_and_resume(house, "quick", 4, optimizer="muon")


@pytest.mark.slow
@pytest.mark.parametrize("dtype, optimizer, kills", [("float32", "adamw", 8), ("float32", "muon", 20),
                                                     ("bfloat16", "muon", 8)])  # fmt: skip
def test_kills_at_random_moments(house, dtype, optimizer, kills):
    kill_and_resume(house, f"{dtype}-{optimizer}", kills, dtype=dtype, optimizer=optimizer)


@pytest.mark.slow
def test_three_kills_of_a_compiled_run(house):
    kill_and_resume(house, "compiled", 3, compile="true")


# interrupts


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_saves_at_the_next_step_and_the_run_goes_on_in_the_same_bits(house, signum, status):
    name = signum.name
    straight = train(house, f"{name}-straight", max_iters=12)
    run = train(house, name, max_iters=12)
    run.await_output("step  3/12")
    run.send(signum)
    assert run.wait() == status
    assert f"stopped by {name} at step" in run.output and f"--init_from=resume --out_dir={name}" in run.output
    step = read_checkpoint(house / name / "ckpt.pt")["step"]
    assert 3 <= step < 12 and f"stopped by {name} at step {step}, and saved" in run.output
    assert resume(house, name).wait() == 0 and straight.wait() == 0
    assert_same(end_state(house / name), end_state(house / f"{name}-straight"))


def test_a_second_ctrl_c_leaves_at_once(house):
    run = train(house, "impatient", gradient_accumulation_steps=500, eval_iters=1)  # a step takes two seconds
    run.await_output("step 0:")
    time.sleep(0.3)
    run.send(signal.SIGINT)
    time.sleep(0.3)
    assert run.alive()  # it finishes the step that it is in
    started = time.monotonic()
    run.send(signal.SIGINT)
    assert run.wait() == 130 and time.monotonic() - started < 1
    assert read_checkpoint(house / "impatient" / "ckpt.pt")["step"] == 0


# going on


def test_resuming_a_finished_run_says_so(house):
    assert train(house, "finished", max_iters=2).wait() == 0
    before = end_state(house / "finished")
    run = resume(house, "finished")
    assert run.wait() == 0
    assert "the run in finished is finished: 2 steps" in run.output and "--max_iters=4" in run.output
    assert_same(end_state(house / "finished"), before)


@pytest.mark.slow
def test_a_run_by_minutes_is_finished_too(house):
    assert train(house, "minutes", max_iters=0, max_minutes=0.12).wait() == 0
    before = end_state(house / "minutes")
    run = resume(house, "minutes")
    assert run.wait() == 0 and "the run in minutes is finished: " in run.output and "--max_minutes=" in run.output
    assert_same(end_state(house / "minutes"), before)
    run = resume(house, "minutes", "--max_minutes=0.24")
    assert run.wait() == 0 and "is finished" not in run.output
    assert read_checkpoint(house / "minutes" / "ckpt.pt")["step"] > before["ckpt.pt"]["step"]


def test_what_the_command_line_changes_is_told_and_what_would_change_the_model_refused(house):
    assert train(house, "changed", max_iters=2).wait() == 0
    run = resume(house, "changed", "--max_iters=4", "--learning_rate=0.0005")
    assert run.wait() == 0
    assert "learning_rate 0.001 -> 0.0005" in run.output and "max_iters 2 -> 4" in run.output
    assert read_checkpoint(house / "changed" / "ckpt.pt")["step"] == 4
    before = end_state(house / "changed")
    run = resume(house, "changed", "--n_layer=3", "--pos=rope")
    assert run.wait() == 2
    assert "error: " in run.output and "n_layer 2 -> 3" in run.output and "pos learned -> rope" in run.output
    assert "Traceback" not in run.output
    assert_same(end_state(house / "changed"), before)


def test_a_damaged_latest_resumes_from_the_one_before_to_the_same_bits(house):
    straight = train(house, "mended-straight", max_iters=15)
    run = train(house, "mended", max_iters=15)
    run.await_output("step 12/15")
    run.send(signal.SIGKILL)
    run.wait()
    latest = house / "mended" / "ckpt.pt"
    step = read_checkpoint(latest)["step"]
    latest.write_bytes(latest.read_bytes()[:-1000])
    with open(house / "mended" / "log.jsonl", "ab") as log:
        log.write(b'{"step": 13, "tok')  # and a line that was torn
    run = resume(house, "mended")
    assert run.wait() == 0 and straight.wait() == 0
    assert "ckpt.pt is damaged" in run.output and "Taking ckpt-prev.pt instead" in run.output
    assert f"from step {step - 5}" in run.output
    assert_same(end_state(house / "mended"), end_state(house / "mended-straight"))


def test_a_torn_log_is_mended(house):
    straight = train(house, "torn-straight", max_iters=8)
    run = train(house, "torn", max_iters=8)
    run.await_output("step 4/8")
    run.send(signal.SIGTERM)
    assert run.wait() == 143
    with open(house / "torn" / "log.jsonl", "ab") as log:
        log.write(b'{"step": 9, "train_loss": 1.0}\n{"step": 1')
    assert resume(house, "torn").wait() == 0 and straight.wait() == 0
    assert_same(end_state(house / "torn"), end_state(house / "torn-straight"))


# any world size


@pytest.mark.slow
def test_every_world_size_sees_the_same_rows_and_a_run_may_change_it(house):
    settings = tiny(dropout=0.0, max_iters=8, lr_schedule="constant", warmup_iters=0)
    for n in (1, 2, 4):  # rows of 4 x 2: 8, 4 and 2 a process
        ranks(house, n, *settings, f"--out_dir=world-{n}")
    ranks(house, 4, *settings, "--out_dir=world-change", "--max_iters=3")
    change = ["--out_dir=world-change", "--init_from=resume", "--max_iters=8"]
    assert "world_size was 4 and is 2" in ranks(house, 2, *change)
    alone = losses(house / "world-1")
    assert len(alone) == 8 and alone[8] < alone[1]
    for name in ("world-2", "world-4", "world-change"):
        # other rows would differ in the second digit; the same ones differ by the order of the sums
        assert losses(house / name) == pytest.approx(alone, rel=1e-5)


def test_a_global_batch_that_does_not_divide_is_told(house):
    runs = start_ranks(house, 3, *tiny(), "--out_dir=thirds")
    assert runs[0].wait() == 2 and all(run.wait() for run in runs)
    assert "error: a global batch of 4 x 2 rows does not divide among 3 processes" in runs[0].output


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_torchrun_starts_killed_processes_again_and_the_run_goes_on(house):
    argv = [*tiny(max_iters=12, dropout=0.0, eval_interval=4), "--out_dir=torchrun"]
    options = ["--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    launcher = start("train.py", *argv, cwd=house, torchrun=options)
    launcher.await_output("step  6/12")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert launcher.wait() == 0, launcher.output
    assert "on from step" in launcher.output
    alone = train(house, "torchrun-alone", max_iters=12, dropout=0.0, eval_interval=4)
    assert alone.wait() == 0
    assert losses(house / "torchrun") == pytest.approx(losses(house / "torchrun-alone"), rel=1e-5)


# bad numbers


def test_weights_that_are_not_finite_do_not_replace_good_ones(house):
    code = [
        f"import sys, runpy; sys.argv = ['train.py', *sys.argv[1:]]; sys.path[0] = {str(ROOT)!r}",
        "from minutegpt.log import RunLog",
        "step = RunLog.step",
        "def damage(self, *values):",
        "    step(self, *values)",
        "    if self.progress.step == 4: self.model.lm_head.weight.data.fill_(float('nan'))",
        "RunLog.step = damage",
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')",
    ]
    (house / "damage.py").write_text("\n".join(code), encoding="utf-8")
    done = start(str(house / "damage.py"), *tiny(max_iters=9, eval_interval=2), "--out_dir=damaged", cwd=house)
    assert done.wait() == 1 and "error: at step 4 the loss is " in done.output, done.output
    state = read_checkpoint(house / "damaged" / "ckpt.pt")
    assert state["step"] == 2 and all(weight.isfinite().all() for weight in state["model"].values())


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_steps(house):
    run = train(house, "wild", learning_rate=1e30, warmup_iters=0, max_iters=20)
    assert run.wait() == 1
    folder = house / "wild"
    report = json.loads((folder / "nonfinite.json").read_text(encoding="utf-8"))
    assert f"error: at step {report['step']} the loss is " in run.output and "nonfinite.json" in run.output
    assert "Traceback" not in run.output
    assert len(report["window_starts"]) == 8 and "transformer.h.0.mlp.c_fc" in report["largest_activations"]
    state = read_checkpoint(folder / "ckpt.pt")
    assert state["step"] <= report["step"]
    assert all(weight.isfinite().all() for weight in state["model"].values())  # the good one was kept
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["step"] <= report["step"] for row in log)


def test_a_loss_that_jumps_is_warned_of(house):
    run = train(house, "jumps", "--grad_clip=0", learning_rate=10, warmup_iters=20, dropout=0.0, eval_interval=100)
    assert run.wait() == 0
    assert "warning: the loss jumped from about " in run.output
    calm = train(house, "calm", eval_interval=100)
    assert calm.wait() == 0 and "warning" not in calm.output


# one folder


def test_two_runs_in_one_folder(house):
    first = train(house, "shared", max_iters=10_000)
    first.await_output("step     1/10000")
    for second in (resume(house, "shared"), train(house, "shared", "--overwrite")):
        assert second.wait() == 2
        assert "error: another run is writing to shared" in second.output and f"process {first.pid}" in second.output
        assert "--out_dir=NAME" in second.output
    assert first.alive()
    first.send(signal.SIGKILL)
    first.wait()
    assert resume(house, "shared", "--max_iters=0").wait() == 0  # the lock died with its process


def test_a_new_run_does_not_take_the_place_of_another_unasked(house):
    assert train(house, "kept", max_iters=2).wait() == 0
    before = {path.name: path.read_bytes() for path in (house / "kept").iterdir()}
    run = train(house, "kept", max_iters=3)
    assert run.wait() == 2
    assert "error: kept already contains a run" in run.output
    assert "--init_from=resume --out_dir=kept" in run.output and "--overwrite" in run.output
    assert {path.name: path.read_bytes() for path in (house / "kept").iterdir()} == before
    assert train(house, "kept", "--overwrite", max_iters=3).wait() == 0
    assert read_checkpoint(house / "kept" / "ckpt.pt")["step"] == 3


@pytest.mark.parametrize(("file", "name"), [("checkpoint.py", "save"), ("log.py", "RunLog.evaluation")])
def test_a_run_that_is_to_be_replaced_stays_until_the_new_one_has_a_checkpoint(house, file, name):
    """Killed before its first save, and right after it."""
    out = f"old-{file}"
    assert train(house, out, max_iters=2).wait() == 0
    before = {path.name: path.read_bytes() for path in (house / out).iterdir()}
    module = file.removesuffix(".py")
    code = [
        f"import os, sys, runpy; sys.argv = ['train.py', *sys.argv[1:]]; sys.path[0] = {str(ROOT)!r}",
        f"from minutegpt import {module}",
        f"{module}.{name} = lambda *args, **options: os._exit(9)",
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')",
    ]
    (house / "killed.py").write_text("\n".join(code), encoding="utf-8")
    done = run(str(house / "killed.py"), *tiny(max_iters=3), f"--out_dir={out}", "--overwrite", cwd=house)
    assert done.status == 9, done.output
    if module == "checkpoint":
        kept = ("ckpt.pt", "ckpt-prev.pt", "ckpt-best.pt", "log.jsonl")
        assert {name: (house / out / name).read_bytes() for name in kept} == {name: before[name] for name in kept}
        assert resume(house, out, "--max_iters=3").wait() == 0
        assert [row["step"] for row in read_log(house / out / "log.jsonl")][:4] == [0, 1, 2, 2]
    else:
        assert read_checkpoint(house / out / "ckpt.pt")["step"] == 0
        assert not list((house / out).glob("ckpt-*"))
        assert resume(house, out).wait() == 0
    assert read_checkpoint(house / out / "ckpt.pt")["step"] == 3


# the world around a run


def test_a_closed_terminal_saves(house):
    run = train(house, "terminal", max_iters=10_000)
    run.await_output("step     3/10000")
    run.send(signal.SIGHUP)
    assert run.wait() == 129 and "stopped by SIGHUP at step" in run.output
    assert read_checkpoint(house / "terminal" / "ckpt.pt")["step"] >= 3


def test_who_reads_along_may_go(house):
    reader, writer = os.pipe()  # train.py | head -1
    run = start("train.py", "--out_dir=piped", *tiny(max_iters=3), cwd=house, stdout=writer, stderr=writer)
    os.close(writer)
    assert os.read(reader, 100)
    os.close(reader)
    assert run.wait() == 0
    assert read_checkpoint(house / "piped" / "ckpt.pt")["step"] == 3


def test_a_full_disk_keeps_the_old_checkpoint_and_tells_how_much_was_needed(house):
    run = start("train.py", "--out_dir=full", *tiny(max_iters=8), cwd=house, limits={"RLIMIT_FSIZE": 250_000})
    assert run.wait() == 2  # the first checkpoint has no moments yet, and fits
    assert "error: no space for full/ckpt-best.pt: it needs 0.33 MB and " in run.output and "MB are free" in run.output
    assert "Then go on: python train.py --init_from=resume --out_dir=full" in run.output
    assert "Traceback" not in run.output
    step = read_checkpoint(house / "full" / "ckpt.pt")["step"]
    assert resume(house, "full").wait() == 0 and step < 8
    assert read_checkpoint(house / "full" / "ckpt.pt")["step"] == 8


def test_a_folder_that_vanishes_is_told(house):
    run = train(house, "gone", max_iters=10_000)
    run.await_output("step     3/10000")
    os.rename(house / "gone", house / "moved")
    assert run.wait() == 2
    assert "error: cannot write gone/" in run.output and "--init_from=resume --out_dir=gone" in run.output
    assert "Traceback" not in run.output
    os.rename(house / "moved", house / "gone")
    assert resume(house, "gone", "--max_iters=0").wait() == 0


def test_another_machine_or_version_is_told_at_a_resume(house):
    assert train(house, "moved-on", max_iters=2).wait() == 0
    path = house / "moved-on" / "ckpt.pt"
    state = read_checkpoint(path)
    save_checkpoint_file(
        path, state | {"environment": state["environment"] | {"torch": "2.0.1", "device": "cuda", "threads": 64}}
    )
    run = resume(house, "moved-on", "--max_iters=3")
    assert run.wait() == 0
    for word in ("torch was 2.0.1 and is", "device was cuda and is cpu", "threads was 64 and is"):
        assert word in run.output
    assert "but not in the very same bits" in run.output


def test_a_run_of_a_version_with_more_settings_goes_on_where_they_did_nothing(house):
    for name in ("older", "newer"):
        assert train(house, name, max_iters=2).wait() == 0
    path = house / "older" / "ckpt.pt"
    state = read_checkpoint(path)

    def rewrite(**removed: Any) -> None:
        configs = {key: state[key] | removed for key in ("config", "model_config")}
        save_checkpoint_file(path, state | configs)

    rewrite(softcap=15.0, zero_init=True)
    before = path.read_bytes()
    run = resume(house, "older", "--max_iters=4")
    assert run.wait() == 2 and "Traceback" not in run.output
    assert "error: older/ckpt.pt was trained with softcap=15.0" in run.output and "git checkout" in run.output
    assert path.read_bytes() == before
    rewrite(softcap=0.0, zero_init=True)
    for name in ("older", "newer"):
        run = resume(house, name, "--max_iters=4")
        assert run.wait() == 0
    assert_same(end_state(house / "older"), end_state(house / "newer"))  # their configs too


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="macOS has no such limit")
def test_a_model_or_a_batch_that_memory_does_not_hold(house):
    how: Any = {"cwd": house, "limits": {"RLIMIT_AS": 8 * 2**30}}
    big = run("train.py", "--out_dir=big", *tiny(n_embd=40_000), **how)
    assert big.status == 2
    assert "error: n_layer=2 of n_embd=40000 take more memory than there is. Make them smaller" in big.output
    big = run("train.py", "--out_dir=big", *tiny(batch_size=100_000, n_embd=512), **how)
    assert big.status == 2
    assert "error: 100000 rows of 32 tokens take more memory than there is" in big.output
    assert "half the --batch_size and twice the --gradient_accumulation_steps" in big.output
    assert "Traceback" not in big.output
