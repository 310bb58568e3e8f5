"""minutegpt/timing.py: which functions run how often, and what they leave as it was."""

import pytest
import torch

from minutegpt import native, timing
from minutegpt.device import init_machine
from minutegpt.errors import UserError
from model import GPT, GPTConfig

MACHINE = init_machine("cpu", "float32", "false")
SHAPE = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16)


def test_the_functions_alternate_and_the_median_counts(monkeypatch):
    clock, calls = [0.0], []

    def work(name, seconds):
        calls.append(name)
        clock[0] += next(seconds)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    a, b = iter([1.0, 100.0, 2.0]), iter([5.0, 4.0, 6.0])
    medians = timing.median_seconds({"a": lambda: work("a", a), "b": lambda: work("b", b)}, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 3 and medians == {"a": 2.0, "b": 5.0}


def test_a_training_step_trains():
    torch.manual_seed(0)
    model = GPT(SHAPE)
    optimizers = timing.optimizers_of(model, "muon", MACHINE)
    x = torch.randint(11, (4, 8))
    losses = [model(x, x)[1].item()]
    for _ in range(20):
        seconds = timing.training_step(model, optimizers, lambda: (x, x), MACHINE)
        assert len(seconds) == len(timing.PARTS) and min(seconds) > 0
        losses.append(model(x, x)[1].item())
    assert losses[-1] < 0.9 * losses[0] and all(p.grad is None for p in model.parameters())


def test_each_way_to_decode_writes_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = GPT(SHAPE).eval()
    x = torch.randint(11, (2, 3))
    before = model(x)[0]
    names = []
    for name, seconds, generate in timing.decoders(model, 2, ["float32", "bfloat16", "int8"], MACHINE):
        names.append(name)
        assert (seconds == 0 or name.endswith("native")) and generate(x, 5).shape == (2, 8)
    by_c = ["native"] if native.build() else []
    # bfloat16 would be emulated
    assert names == [f"{format}_{way}" for format in ("float32", "int8") for way in ("eager", *by_c)]
    assert model(x)[0].equal(before)


def test_unknown_formats_are_refused():
    assert timing.decoding_formats("int8,float32") == ["int8", "float32"]
    with pytest.raises(UserError, match="--decode_formats=int5 is not one of float32, bfloat16, int8"):
        timing.decoding_formats("int8,int5")
