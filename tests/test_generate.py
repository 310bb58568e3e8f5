"""The compiled decoding step against the eager one."""

import copy

import pytest
import torch
from test_model import FAST, make, tokens

from minutegpt.data.tokenizer import char_tokenizer
from minutegpt.generate import compile_decode, decode_attention, hide_padding
from minutegpt.quantize import quantize_model
from model import GPT, CausalSelfAttention, GPTConfig, KVCache, attention_by_hand, causal_attention

VARIANTS = {
    "classic": ({}, 1),
    "classic, several rows": ({}, 3),
    "fast": (FAST, 1),
    "fast, several rows, fewer key heads": (FAST | {"n_kv_head": 2}, 3),
    "transformer": ({"norm_position": "post", "activation": "relu", "bias": True}, 1),
}


def compiles(test):
    """Marks a test that waits for the compiler."""
    return pytest.mark.slow(pytest.mark.usefixtures("fresh_compiler")(test))


@pytest.fixture
def fresh_compiler():
    from torch._inductor import config

    torch._dynamo.reset()
    settings = ("freezing", "max_autotune", "max_autotune_gemm_backends")
    with config.patch({name: getattr(config, name) for name in settings}):  # put back afterwards
        yield
    torch.compiler.config.dynamic_sources = ""


@pytest.mark.parametrize("K", [1, 2, 4])
def test_decode_attention_is_the_last_row_of_attention_by_hand(K):
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, K, 7, 8), torch.randn(2, K, 7, 8)
    whole = attention_by_hand(q, *(a.repeat_interleave(4 // K, dim=1) for a in (k, v)))
    torch.testing.assert_close(decode_attention(q[:, :, -1:], k, v), whole[:, :, -1:], atol=1e-5, rtol=0)


@compiles
@pytest.mark.parametrize(("settings", "B"), VARIANTS.values(), ids=VARIANTS.keys())
def test_the_most_likely_text_is_the_same_and_it_compiles_once(settings, B):
    model, prompts = make(**settings), [tokens(B, T) for T in (1, 5, 12, 15)]  # 15 is longer than the context
    eager = [model.generate(idx, 40, temperature=0) for idx in prompts]  # 40: the cache is refilled several times
    assert compile_decode(model, B) > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = [model.generate(idx, 40, temperature=0) for idx in prompts]
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@compiles
def test_only_the_compiled_step_uses_decode_attention(monkeypatch):
    """The model's own modules keep their attention and their weights; deleting next_logits undoes the compilation."""
    model, idx = make(), tokens(2, 12)
    targets, weights = tokens(2, 12, seed=1), {id(p) for p in model.parameters()}
    before = model(idx, targets)[1]
    random = torch.get_rng_state()
    compile_decode(model, 2)
    assert torch.equal(torch.get_rng_state(), random)  # a seed set before draws the same text
    layers = [module for module in model.modules() if isinstance(module, CausalSelfAttention)]
    assert len(layers) == 2 and all(layer.attend is causal_attention for layer in layers)
    assert {id(p) for p in model.parameters()} == weights
    assert torch.equal(model.train()(idx, targets)[1], before)
    monkeypatch.setattr("minutegpt.generate.decode_attention", None)
    model.eval().generate(idx, 3)  # compiled: the function is not called again
    del model.next_logits
    assert model.next_logits.__func__ is type(model).next_logits


@compiles
def test_the_logits_are_the_uncached_ones():
    model, idx = make(**FAST), tokens(3, 12)
    with torch.no_grad():
        whole = model(idx)[0]
        compile_decode(model, 3)
        for prompt in (1, 4, 11):
            cache = KVCache(model.config, 3, idx.device, torch.float32)
            pieces = [model.next_logits(idx[:, :prompt], cache)]
            pieces += [model.next_logits(idx[:, t : t + 1], cache) for t in range(prompt, 12)]
            torch.testing.assert_close(torch.stack(pieces, 1), whole[:, prompt - 1 :], atol=1e-4, rtol=0)


@compiles
@pytest.mark.parametrize("B", [1, 2])
def test_two_models_in_one_process_keep_their_own_weights(B):
    """They have the same shape, so that no guard on a size can separate them. A third one is quantized."""
    one, other = make(seed=1), make(seed=2)
    quantize_model(quantized := copy.deepcopy(one), "int8")
    idx = tokens(B, 6)
    with torch.no_grad():
        for model in (one, other, quantized):
            expected = model(idx)[0][:, -1]
            compile_decode(model, B)
            for _ in range(2):
                cache = KVCache(model.config, B, idx.device, torch.float32)
                model.next_logits(idx[:, :5], cache)
                torch.testing.assert_close(model.next_logits(idx[:, 5:], cache), expected, atol=0.02, rtol=0.01)
        assert (one(idx)[0] - other(idx)[0]).abs().max() > 0.1  # a mixture would be noticed


@compiles
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_quantized_model_compiles_with_its_kernels(format):
    model, idx = make(n_embd=64), tokens(1, 6)
    quantize_model(model, format)
    with torch.no_grad():
        expected = model(idx)[0][:, -1]
        assert model.lm_head.has_kernel()
        compile_decode(model, 1)
        cache = KVCache(model.config, 1, idx.device, torch.float32)
        model.next_logits(idx[:, :5], cache)
        torch.testing.assert_close(model.next_logits(idx[:, 5:], cache), expected, atol=0.02, rtol=0.01)


@compiles
def test_logits_in_bfloat16_are_close():
    model, idx = make(spread=0.1), tokens(1, 12)
    with torch.no_grad():
        whole = model(idx)[0]
        compile_decode(model, 1, torch.bfloat16)
        cache = KVCache(model.config, 1, idx.device, torch.float32)
        pieces = [model.next_logits(idx[:, :4], cache)]
        pieces += [model.next_logits(idx[:, t : t + 1], cache) for t in range(4, 12)]
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
