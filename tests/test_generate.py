"""The compiled decoding step against the one as it is."""

import copy

import pytest
import torch
from test_model import FAST, make, tokens

from minutegpt.data.tokenizer import char_tokenizer
from minutegpt.generate import compile_decode, hide_padding
from minutegpt.quantize import quantize_model
from model import GPT, GPTConfig, KVCache

pytestmark = pytest.mark.slow  # the compiler takes its time
VARIANTS = {
    "classic": ({}, 1),
    "classic, several rows": ({}, 3),
    "fast": (FAST, 1),
    "fast, several rows, fewer key heads": (FAST | {"n_kv_head": 2}, 3),
    "transformer": ({"norm_position": "post", "activation": "relu", "bias": True}, 1),
}


@pytest.fixture(autouse=True)
def fresh():
    from torch._inductor import config

    torch._dynamo.reset()
    settings = ("freezing", "max_autotune", "max_autotune_gemm_backends")
    with config.patch({name: getattr(config, name) for name in settings}):  # put back afterwards
        yield
    torch.compiler.config.dynamic_sources = ""


@pytest.mark.parametrize(("knobs", "B"), VARIANTS.values(), ids=VARIANTS.keys())
def test_the_likeliest_text_is_the_same_and_one_compilation_does(knobs, B):
    model, prompts = make(**knobs), [tokens(B, T) for T in (1, 5, 12, 15)]  # 15 is beyond the context
    told = [model.generate(idx, 40, temperature=0) for idx in prompts]  # 40: the cache is filled anew, again and again
    assert compile_decode(model, B) > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        again = [model.generate(idx, 40, temperature=0) for idx in prompts]
    assert all(torch.equal(a, b) for a, b in zip(told, again, strict=True))


def test_the_logits_are_the_uncached_ones():
    model, idx = make(**FAST), tokens(3, 12)
    with torch.no_grad():
        whole = model(idx)[0]
        compile_decode(model, 3)
        for prompt in (1, 4, 11):
            cache = KVCache(model.config, 3, idx.device, torch.float32)
            pieces = [model.prefill(idx[:, :prompt], cache)]
            pieces += [model.decode(idx[:, t : t + 1], cache) for t in range(prompt, 12)]
            torch.testing.assert_close(torch.stack(pieces, 1), whole[:, prompt - 1 :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("B", [1, 2])
def test_two_models_in_one_process_keep_their_own_weights(B):
    """Of one shape, so that no guard on a tensor's size could tell them apart; and one of them rounded."""
    one, other = make(seed=1), make(seed=2)
    quantize_model(rounded := copy.deepcopy(one), "int8")
    idx = tokens(B, 6)
    with torch.no_grad():
        for model in (one, other, rounded):
            expected = model(idx)[0][:, -1]
            compile_decode(model, B)
            for _ in range(2):
                cache = KVCache(model.config, B, idx.device, torch.float32)
                model.prefill(idx[:, :5], cache)
                torch.testing.assert_close(model.decode(idx[:, 5:], cache), expected, atol=0.02, rtol=0.01)
        assert (one(idx)[0] - other(idx)[0]).abs().max() > 0.1  # so they could have been told apart


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_rounded_model_compiles_with_its_kernels(format):
    model, idx = make(n_embd=64), tokens(1, 6)
    quantize_model(model, format)
    with torch.no_grad():
        expected = model(idx)[0][:, -1]
        assert model.lm_head.has_kernel()
        compile_decode(model, 1)
        cache = KVCache(model.config, 1, idx.device, torch.float32)
        model.prefill(idx[:, :5], cache)
        torch.testing.assert_close(model.decode(idx[:, 5:], cache), expected, atol=0.02, rtol=0.01)


def test_in_bfloat16_the_logits_are_near():
    model, idx = make(spread=0.1), tokens(1, 12)
    with torch.no_grad():
        whole = model(idx)[0]
        compile_decode(model, 1, torch.bfloat16)
        cache = KVCache(model.config, 1, idx.device, torch.float32)
        pieces = [model.prefill(idx[:, :4], cache)]
        pieces += [model.decode(idx[:, t : t + 1], cache) for t in range(4, 12)]
    assert cache.k[0].dtype == torch.float32
    torch.testing.assert_close(torch.stack(pieces, 1), whole[:, 3:], atol=0.02, rtol=0.02)


def test_padding_is_hidden_and_comes_back():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=12, n_layer=1, n_head=1, n_embd=8)).eval()
    with torch.no_grad():
        model.lm_head.weight[5:] += 9 * torch.randn(7, 8)  # so that they would be drawn
    idx = torch.zeros(4, 1, dtype=torch.int64)
    with hide_padding(model, char_tokenizer("abcde")):
        assert model(idx)[0].shape == (4, 1, 5) and model.generate(idx, 30).max() < 5
    assert model(idx)[0].shape == (4, 1, 12) and model.generate(idx, 30).max() >= 5
