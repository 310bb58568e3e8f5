"""minutegpt/scaling.py: its arithmetic against the formulas of docs/scaling.md, whose table it makes."""

import json
import re

import pytest
from harness import ROOT, run

from minutegpt.device import PEAKS
from minutegpt.errors import UserError
from minutegpt.scaling import GIGABYTES, GPT2, model_config, plan, table
from model import GPT, GPTConfig

PAGE = ROOT / "docs" / "scaling.md"


def test_a_plan_follows_the_formulas_of_the_page():
    N, L, C, V, T = 124_439_808, 12, 768, 50257, 1024  # OpenAI's GPT-2
    found = plan(model_config("gpt2", {}), "A100", rows=8, tokens_per_step=64 * 8 * T)
    flops = 6 * (N - T * C) + 12 * L * C * T
    assert found.n_params == N and found.state == 18 * N and found.sent == 7 * N
    assert found.activations == 8 * T * (38 * L * C + 2 * V)
    assert found.flops_per_step == pytest.approx(flops * 64 * 8 * T)
    slow, fast = found.tokens_per_second
    assert slow == pytest.approx(312e12 * 0.30 / flops) and fast == pytest.approx(312e12 * 0.45 / flops)
    assert found.step_seconds == pytest.approx((64 * 8 * T / fast, 64 * 8 * T / slow))
    assert found.state + found.most_rows * found.activations / 8 <= 0.9 * 40e9
    assert found.state + (found.most_rows + 1) * found.activations / 8 > 0.9 * 40e9


def test_a_small_model_waits_for_its_launches():
    small = plan(GPTConfig(n_layer=6, n_embd=48, n_head=6), "H100", rows=4, tokens_per_step=1024)
    assert small.tokens_per_second[0] == small.tokens_per_second[1] == pytest.approx(4 * 256 / (6 * 33 * 5e-6))


def test_a_model_that_does_not_fit_has_no_rows():
    assert plan(model_config("gpt2-xl", {}), "RTX 4090", 1, 1024).most_rows == 0
    assert plan(model_config("gpt2-xl", {}), "H100", 1, 1024).most_rows > 8


def test_every_card_has_its_peak():
    assert set(GIGABYTES) <= set(PEAKS)
    with pytest.raises(UserError, match="--card=H1 is not one of H200, H100"):
        plan(GPTConfig(), "H1", 1, 1024)


def test_the_table_of_the_page_is_what_its_command_prints():
    page = PAGE.read_text(encoding="utf-8")
    command = re.search(r"^    python (bench.py --needs=\S+ .*)$", page, re.M)[1].split()
    done = run(*command, "--device=cpu")
    assert done.status == 0, done.output
    written = re.search(r"<!-- that command: begin -->\n(.*)<!-- that command: end -->", page, re.S)[1]
    assert written == done.out, f"put this into docs/scaling.md:\n{done.out}"


def test_the_plan_of_the_settings():
    settings = ["--vocab_size=65", "--n_layer=2", "--n_embd=64", "--n_head=2", "--block_size=32", "--batch_size=4"]
    done = run("bench.py", "--needs=settings", "--json", "--device=cpu", *settings)
    found = json.loads(done.out)["settings"]
    model = GPT(GPTConfig(vocab_size=65, n_layer=2, n_embd=64, n_head=2, block_size=32))
    assert found["n_params"] == model.n_params()
    assert found["flops_per_step"] == pytest.approx(4 * 32 * model.flops_per_token())
    config = {"n_embd": 64, "vocab_size": 65, "n_head": 5}
    for name, words in (("gpt9", "--needs=gpt9 is not one of settings, gpt2"), ("settings", "Type --vocab_size=50257")):
        with pytest.raises(UserError, match=words):
            model_config(name, config | {"vocab_size": 0})
    assert set(GPT2) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
    assert table({"a": plan(GPTConfig(), "T4", 2, 512)}, 2).count("\n") == 2
