"""minutegpt/fsdp.py: a sharded run is the run that is not, and so is its checkpoint. Real processes, over gloo."""

import json
import os
from pathlib import Path

import pytest
import torch
from harness import losses, ranks, resume, run, start_ranks, tiny

from minutegpt.checkpoint import read_checkpoint
from minutegpt.fsdp import full_state, on_full_matrices, ready_to_generate
from minutegpt.optim import orthogonalize

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs gloo and FSDP2")
RUN = {"dropout": 0.0, "max_iters": 8, "eval_interval": 4}


def assert_close(a, b, where="") -> None:
    """The same keys and shapes, and numbers that differ by the order of sums alone."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=where)
    else:
        assert a == (pytest.approx(b, abs=1e-5) if isinstance(b, float) else b), where


def same_run(house: Path, name: str, other: str) -> None:
    """Losses to 1e-5, and the checkpoints close, in one format."""
    folders = [house / name, house / other]
    assert len(losses(folders[0])) == 8
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), abs=1e-5)
    a, b = (read_checkpoint(folder / "ckpt.pt") for folder in folders)
    for key in ("model", "optimizer", "step", "best_val_loss", "best_step", "log_rows", "tokenizer", "model_config"):
        assert_close(a[key], b[key], key)
    sizes = [(folder / "ckpt.pt").stat().st_size for folder in folders]
    assert abs(sizes[0] - sizes[1]) < 4096  # the tied embedding is in it once


def test_a_sharded_run_is_the_run_that_is_not(house):
    assert run("train.py", *tiny(**RUN), "--out_dir=alone", cwd=house).status == 0
    output = ranks(house, 2, *tiny(**RUN), "--out_dir=sharded", "--fsdp")
    assert "in 2 parts (FSDP2)" in output
    same_run(house, "sharded", "alone")
    samples = [line for line in output.splitlines() if line.startswith("  '")]
    assert len(samples) == 3 and all(len(line) > 50 for line in samples)
    # its checkpoint is anybody's
    found = run("evaluate.py", "--out_dir=sharded", "--json", "--device=cpu", "--dtype=float32", cwd=house)
    assert found.status == 0, found.output
    loss = json.loads(found.out)["loss"]
    assert loss == pytest.approx(read_checkpoint(house / "sharded" / "ckpt.pt")["best_val_loss"], abs=0.1)
    assert run("sample.py", "--out_dir=sharded", "--max_new_tokens=5", "--device=cpu", cwd=house).status == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, settings",
    [
        ("muon", {"optimizer": "muon"}),
        ("odd", {"optimizer": "muon", "n_embd": 36, "n_layer": 3, "bias": "true", "tie": "false"}),
        ("four", {"optimizer": "muon", "n_embd": 36, "pos": "rope", "norm": "rmsnorm", "n_kv_head": 1}),
        ("qat", {"qat": "int8"}),
    ],
)
def test_a_sharded_run_is_the_run_that_is_not_with_every_block(house, name, settings):
    assert run("train.py", *tiny(**RUN | settings), f"--out_dir={name}", cwd=house).status == 0
    ranks(house, 4 if name == "four" else 2, *tiny(**RUN | settings), f"--out_dir={name}-sharded", "--fsdp")
    same_run(house, name, f"{name}-sharded")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_may_change_between_sharded_and_not(house, optimizer):
    """At any world size: one process, two sharded, four sharded, two with the whole model each, one."""
    settings = tiny(**RUN, optimizer=optimizer, lr_schedule="constant", warmup_iters=0)
    assert run("train.py", *settings, f"--out_dir={optimizer}-straight", cwd=house).status == 0
    out = f"--out_dir={optimizer}-changing"
    first = run("train.py", *settings, out, "--max_iters=2", cwd=house)
    assert first.status == 0, first.output
    go_on = ["--init_from=resume", out]
    assert "on from step 2" in ranks(house, 2, *go_on, "--max_iters=3", "--fsdp")
    assert "in 4 parts" in ranks(house, 4, *go_on, "--max_iters=5")  # a resumed run keeps the setting
    assert "parts" not in ranks(house, 2, *go_on, "--max_iters=6", "--fsdp=false")
    last = resume(house, f"{optimizer}-changing", "--max_iters=8")
    assert last.wait() == 0, last.output
    straight, changing = (losses(house / f"{optimizer}-{name}") for name in ("straight", "changing"))
    assert straight == pytest.approx(changing, abs=1e-5)


@pytest.mark.slow
def test_bfloat16_sharded_is_near_bfloat16_in_one_process(house):
    settings = tiny(**RUN | {"dtype": "bfloat16"})
    assert run("train.py", *settings, "--out_dir=half", cwd=house).status == 0
    ranks(house, 2, *settings, "--out_dir=half-sharded", "--fsdp")
    assert losses(house / "half") == pytest.approx(losses(house / "half-sharded"), abs=2e-3)


@pytest.mark.slow
def test_a_compiled_run_shards(house):
    ranks(house, 2, *tiny(**RUN | {"compile": "true"}), "--out_dir=compiled", "--fsdp")
    assert run("train.py", *tiny(**RUN), "--out_dir=uncompiled", cwd=house).status == 0
    assert losses(house / "compiled") == pytest.approx(losses(house / "uncompiled"), abs=1e-4)


@pytest.mark.slow
def test_numbers_that_run_away_end_a_sharded_run_with_its_message(house):
    runs = start_ranks(house, 2, *tiny(learning_rate=1e30, warmup_iters=0), "--out_dir=wild", "--fsdp")
    assert [each.wait() for each in runs] == [1, 1]
    assert "error: at step" in runs[0].output and "nonfinite.json" in runs[0].output and not runs[1].output
    assert json.loads((house / "wild" / "nonfinite.json").read_text())["largest_activations"]


def test_a_config_that_shards_runs_in_one_process_too(house):
    """A checkpoint of many GPUs goes on on one, whose user typed nothing wrong."""
    (house / "sharded.py").write_text("fsdp = True\n", encoding="utf-8")
    done = run("train.py", *tiny(max_iters=1), "sharded.py", "--out_dir=one", cwd=house)
    assert done.status == 0 and "parts" not in done.output


def test_without_sharding_nothing_is_done():
    x = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(on_full_matrices(orthogonalize, x), orthogonalize(x))
    state = {"a": [x, 1, "text"], "b": (None, {"c": torch.nn.Parameter(x)})}
    found = full_state(state)
    assert found["a"][1:] == [1, "text"] and found["b"][0] is None
    assert type(found["b"][1]["c"]) is torch.Tensor and found["b"][1]["c"].data_ptr() == x.data_ptr()
    with ready_to_generate(torch.nn.Linear(2, 2)):
        pass
