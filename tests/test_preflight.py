"""minutegpt/preflight.py: what the trial run finds, and that it leaves no trace."""

import copy
import math

import pytest
import torch

from minutegpt import checkpoint, preflight
from minutegpt.device import Machine
from minutegpt.errors import UserError


def machine(**changes):
    return Machine(torch.device("cpu"), torch.float32, **{"compile": False} | changes)


def measure(tmp_path, step, machine=None, run_state=None):
    layer = torch.nn.Linear(2, 2)
    trained = (layer, [torch.optim.AdamW(layer.parameters())], torch.amp.GradScaler("cpu", enabled=False))
    state = {"model": layer.state_dict(), "model_config": {}, "step": 0, "config": {}}
    run_state = run_state or (lambda: state)
    batch = "4 rows of 8 tokens"
    return trained, preflight.measure(
        machine or globals()["machine"](),
        trained,
        lambda: step(*trained),
        lambda: None,
        3.0,
        run_state,
        str(tmp_path),
        batch,
    )


def a_step(layer, optimizers, scaler):
    loss = layer(torch.ones(1, 2)).square().sum()
    loss.backward()
    optimizers[0].step()
    optimizers[0].zero_grad(set_to_none=True)
    return loss.item()


def test_weights_and_optimizers_are_restored(tmp_path):
    before = []

    def step(layer, optimizers, scaler):
        before.append(copy.deepcopy(layer.state_dict()))
        return a_step(layer, optimizers, scaler)

    (layer, [optimizer], _), timing = measure(tmp_path, step)
    assert len(before) == 4  # the first one, and three that are timed
    assert not torch.equal(before[0]["weight"], before[1]["weight"])
    assert torch.equal(layer.weight, before[0]["weight"]) and not optimizer.state
    assert timing.step > 0 and timing.eval > 0 and math.isfinite(timing.first_loss)
    assert timing.checkpoint_bytes > 0 and not list(tmp_path.iterdir())


def test_too_little_memory_is_a_users_error(tmp_path):
    def step(*trained):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 PB")

    with pytest.raises(UserError, match=r"4 rows of 8 tokens take more memory .* half the --batch_size"):
        measure(tmp_path, step, machine(compile=True))


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2 GiB", "not enough memory: 1 PB"])
@pytest.mark.parametrize("when", [2, 3])  # after the first step: AdamW's moments and an evaluation need memory too
def test_too_little_memory_after_the_first_step_is_explained_too(tmp_path, message, when):
    calls = []

    def step(*trained):
        calls.append(trained)
        if len(calls) == when:
            raise RuntimeError(message)
        return a_step(*trained)

    with pytest.raises(UserError, match=r"4 rows of 8 tokens take more memory .* half the --batch_size"):
        measure(tmp_path, step)


def test_an_illegal_access_is_not_too_little_memory(tmp_path):
    def step(*trained):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        measure(tmp_path, step)


def test_a_trial_that_fails_leaves_no_trace():
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1.0)
    before = copy.deepcopy(layer.state_dict())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(RuntimeError), preflight.restored(layer, [optimizer], scaler):
        a_step(layer, [optimizer], scaler)
        assert not torch.equal(layer.weight, before["weight"]) and optimizer.state
        raise RuntimeError
    assert torch.equal(layer.weight, before["weight"]) and not optimizer.state


def test_one_process_has_nobody_to_agree_with():
    def broken(*args):
        raise AssertionError("not called")

    preflight.compile_on_all(machine(compile=True), broken, (torch.zeros(1), torch.zeros(1)))


def test_a_compiler_that_fails_is_told_from_a_bug(tmp_path):
    def step(*trained):
        raise RuntimeError("no g++\nlong log")

    with pytest.raises(preflight.CompileError, match=r"^no g\+\+$"):
        measure(tmp_path, step, machine(compile=True))
    with pytest.raises(RuntimeError, match="no g"):
        measure(tmp_path, step)


def test_a_failed_compiler_is_fallen_back_from_unless_it_was_asked_for():
    error = preflight.CompileError("no g++")
    one = machine(compile=True)
    broken = torch.compile(torch.sin, backend=lambda *args: 1 / 0)
    try:
        preflight.fall_back_to_eager(one, "auto", error)
        assert broken(torch.zeros(3)).sum() == 0  # what is compiled already runs uncompiled
    finally:
        torch.compiler.set_stance("default")
    assert not one.compile and "it fails here (no g++)" in one.reasons["compile"]
    with pytest.raises(UserError, match="Type --compile=false"):
        preflight.fall_back_to_eager(machine(compile=True), "true", error)


def test_a_full_disk_is_found_before_the_run(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        measure(tmp_path / "gone", a_step)
    assert checkpoint.TRIAL.endswith(".minutegpt.tmp")
