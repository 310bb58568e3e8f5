"""decode.c, called by minutegpt/native.py, against the model itself."""

import copy
import ctypes
import shutil
from functools import partial

import pytest
import torch
from test_model import FAST, make, tokens

import model as model_file
from minutegpt import native
from minutegpt.data.tokenizer import char_tokenizer
from minutegpt.generate import hide_padding
from minutegpt.native import native_decoding, use_native_decoding
from minutegpt.quantize import fake_quantize, pack, quantize_model, unpack
from model import ACTIVATIONS, GPT, CausalSelfAttention, GPTConfig, KVCache, rotate

pytestmark = pytest.mark.skipif(not native.build(), reason="no C compiler")

VARIANTS = {
    "classic": {},
    "gpt2": {"bias": True, "activation": "gelu_tanh"},
    "relu, rmsnorm": {"activation": "relu", "norm": "rmsnorm"},
    "rope": {"pos": "rope", "qk_norm": True},
    "fast": FAST,
    "ngrams": {**FAST, "ngram": 4, "ngram_rows": 5000},  # all pairs and triples of 17 tokens; a hash of the fours
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


def logits(model: GPT, idx: torch.Tensor, prompt: int, reader: GPT | None = None) -> torch.Tensor:
    """The logits after each token of idx (1, T) from the prompt's last on, (T - prompt + 1, V).

    reader: the model that reads the prompt, if it is another one.
    """
    cache = KVCache(model.config, 1, idx.device, torch.float32)
    with torch.no_grad():
        pieces = [(reader or model).next_logits(idx[:, :prompt], cache)]
        pieces += [model.next_logits(idx[:, t : t + 1], cache) for t in range(prompt, idx.size(1))]
    return torch.cat(pieces)


@variants
@pytest.mark.parametrize("prompt", [1, 5])
def test_the_logits_are_the_uncached_ones(settings, prompt):
    model, idx = make(**settings), tokens(1, 12)
    with torch.no_grad():
        expected = model(idx)[0][0, prompt - 1 :]
    assert use_native_decoding(model) and expected.std() > 0.1
    torch.testing.assert_close(logits(model, idx, prompt), expected, atol=2e-5, rtol=1e-5)


@variants
@pytest.mark.parametrize("B, T, step", [(3, 12, 5), (20, 6, 1), (2, 40, 37)])  # chunks of texts, and of tokens
def test_several_texts_and_tokens(settings, B, T, step, monkeypatch):
    monkeypatch.setitem(native.MOST_TOKENS, "float32", 1000)
    model, idx = make(**settings | {"block_size": 40}), tokens(B, T)
    cache = KVCache(model.config, B, idx.device, torch.float32)
    assert use_native_decoding(model)
    monkeypatch.setattr(GPT, "next_logits", None)  # not the model's own
    with torch.no_grad():
        expected = model(idx)[0]  # (B, T, V)
        for end in (step, *range(step + 1, T + 1)):
            found = model.next_logits(idx[:, cache.length : end], cache)
            torch.testing.assert_close(found, expected[:, end - 1], atol=2e-5, rtol=1e-5)


@variants
def test_int8_weights_are_those_of_their_rounded_model(settings):
    """PyTorch's kernel would also round the inputs, to 8 bits of precision."""
    model, idx = make(n_embd=64, spread=0.1, **settings), tokens(1, 12)
    rounded = copy.deepcopy(model)
    rounded.load_state_dict(unpack(pack(model.state_dict(), "int8")))
    with torch.no_grad():
        expected = rounded(idx)[0][0]
        assert (model(idx)[0][0] - expected).abs().max() > 1e-3  # rounding matters
    quantize_model(model, "int8")
    assert use_native_decoding(model)
    found = logits(model, idx, 1, reader=rounded)  # whose keys and values are exact
    torch.testing.assert_close(found, expected, atol=3e-4 * float(expected.std()), rtol=0)


def test_int8_sums_do_not_overflow():
    """4096 products of the largest integers: 4096 * 32767 * 128 is eight times what 32 bits hold."""
    shape = {"n_layer": 1, "n_embd": 1024, "n_head": 2, "block_size": 4, "vocab_size": 8}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, tie=False, activation="relu")).eval()
    signs = torch.tensor([1.0, -1.0]).repeat(512)  # (C)
    block = model.transformer.h[0]
    with torch.no_grad():
        model.transformer.wte.weight.mul_(5).add_(signs)
        block.attn.c_proj.weight.zero_()
        block.mlp.c_fc.weight.copy_(signs.expand(4096, 1024))  # so each of the 4096 hidden values is about 1024
        block.mlp.c_proj.weight.copy_(signs[:, None].expand(1024, 4096))  # and a row is 127 or -128 throughout
    rounded = copy.deepcopy(model)
    rounded.load_state_dict(unpack(pack(model.state_dict(), "int8")))
    quantize_model(model, "int8")
    idx = torch.tensor([[3, 5, 1]])
    with torch.no_grad():
        expected = rounded(idx)[0][0]
    assert use_native_decoding(model)
    found = logits(model, idx, 1, reader=rounded)
    torch.testing.assert_close(found, expected, atol=3e-4 * float(expected.std()), rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_small_and_large_numbers(activation):
    """decode.c has its own e^x. Each hidden value is the bias here: from -100 to 100, and many near 0."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(n_layer=1, n_embd=512, n_head=2, block_size=4, vocab_size=64, bias=True, activation=activation)
    )
    mlp = model.eval().transformer.h[0].mlp
    with torch.no_grad():
        mlp.c_fc.weight.zero_()
        mlp.c_fc.bias.copy_(torch.cat((torch.linspace(-100, 100, 512), torch.linspace(-6, 6, 1536))))
        mlp.c_proj.weight.mul_(mlp.c_fc.bias.abs().clamp(1).pow(-2))  # so that no large one hides the small ones
        expected = model(torch.tensor([[3]]))[0][0]
    assert use_native_decoding(model)
    found = logits(model, torch.tensor([[3]]), 1)
    torch.testing.assert_close(found, expected, atol=2e-6 * float(expected.std()), rtol=0)


@variants
def test_the_most_likely_text_is_the_same_also_when_the_context_is_full(settings):
    model, prompts = make(**settings), [tokens(1, T) for T in (1, 5, 12, 15)]  # the context is 12
    before = [model.generate(idx, 40, temperature=0) for idx in prompts]
    assert use_native_decoding(model)
    assert all(a.equal(model.generate(idx, 40, temperature=0)) for a, idx in zip(before, prompts, strict=True))


def test_two_threads_write_the_same_bits_as_one():
    model, idx, found = make(**FAST), tokens(1, 12), []
    threads = torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        assert use_native_decoding(model)
        found.append(logits(model, idx, 1)[1:])
    torch.set_num_threads(threads)
    assert found[0].equal(found[1])


def test_a_text_in_between_changes_nothing():
    """Each cache is its own, and so is the model's own decoding of several rows."""
    model, idx = make(**FAST), tokens(1, 10)
    expected = logits(model, idx, 1)
    assert use_native_decoding(model)
    cache = KVCache(model.config, 1, idx.device, torch.float32)
    with torch.no_grad():
        found = [model.next_logits(idx[:, :1], cache)]
        for t in range(1, 10):
            logits(model, tokens(1, 7, seed=t), 3)
            model.generate(tokens(2, 3, seed=t), 3)
            found.append(model.next_logits(idx[:, t : t + 1], cache))
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-5, rtol=1e-5)


def test_it_sees_later_weights_draws_nothing_and_can_be_undone():
    model, idx = make(), tokens(1, 8)
    random = torch.get_rng_state()
    assert use_native_decoding(model) and torch.get_rng_state().equal(random)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
        expected = model(idx)[0][0]
    torch.testing.assert_close(logits(model, idx, 1), expected, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(float("nan"))
    assert logits(model, idx, 7)[1:].isnan().all()
    del model.next_logits
    assert model.next_logits.__func__ is GPT.next_logits


def test_a_padded_vocabulary_is_cut():
    model = make()  # 17 ids
    hide_padding(model, char_tokenizer("abcdefgh"))
    assert use_native_decoding(model) and logits(model, tokens(1, 6, V=8), 2).shape == (5, 8)


@pytest.mark.parametrize("settings", [
    {"n_kv_head": 2}, {"norm_position": "post"}, {"n_expert": 4}, {"block_size": 2}, {"n_head": 16},
])  # fmt: skip
def test_other_models_decode_as_before(settings):
    model = make(**settings)
    before = model.generate(tokens(1, 2), 5, temperature=0)
    assert not use_native_decoding(model) and model.next_logits.__func__ is GPT.next_logits
    assert before.equal(model.generate(tokens(1, 2), 5, temperature=0))


def test_other_weights_decode_as_before():
    assert not use_native_decoding(make().bfloat16())
    for format in ("int4", "int4-tensor"):
        quantize_model(model := make(n_embd=64), format)
        assert not use_native_decoding(model)


def test_training_for_rounded_weights_decodes_as_before():
    """A parametrized weight is another tensor at each reading."""
    fake_quantize(model := make(n_embd=64), "int8")
    assert not use_native_decoding(model)


def test_a_with_block_leaves_the_model_as_it_was():
    for model in (make(), make(n_kv_head=2)):
        with native_decoding(model):
            assert ("next_logits" in vars(model)) == (model.config.n_kv_head == model.config.n_head)
            model.generate(tokens(1, 3), 3)
        assert "next_logits" not in vars(model)


@pytest.mark.parametrize("pos", ["learned", "rope"])
def test_more_tokens_than_the_context_are_an_error(pos):
    model, idx = make(pos=pos), tokens(1, 13)  # the context is 12
    assert use_native_decoding(model)
    for prompt in (12, 10):
        cache = KVCache(model.config, 1, idx.device, torch.float32)
        model.next_logits(idx[:, :prompt], cache)
        with pytest.raises(ValueError, match="13 positions do not fit in block_size=12"):
            model.next_logits(idx[:, prompt:], cache)


def test_many_texts_decode_as_before():
    for format, most in native.MOST_TOKENS.items():
        model = make(n_embd=64)
        if format == "int8":
            quantize_model(model, "int8")
        assert not use_native_decoding(model, most + 1) and model.next_logits.__func__ is GPT.next_logits
        assert use_native_decoding(model, most)


def test_autocast_decodes_as_before(monkeypatch):
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert not use_native_decoding(model)
    assert use_native_decoding(model)
    monkeypatch.setattr(native.NativeDecoder, "next_logits", None)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(tokens(1, 3), 3)
    with pytest.raises(TypeError):
        model.generate(tokens(1, 3), 3)


def test_a_function_that_computes_wrong_is_not_used(monkeypatch):
    right = native.build()

    def scaled(factor, *arguments):
        right(*arguments)
        ctypes.cast(arguments[-1], ctypes.POINTER(ctypes.c_float))[0] *= factor  # the first logit

    for factor, used in ((1.0, True), (1.5, False), (float("nan"), False)):
        monkeypatch.setattr(native, "build", lambda factor=factor: partial(scaled, factor))
        assert use_native_decoding(make()) == used


ATTEND = CausalSelfAttention.attend
EMBED = GPT.embed
EDITS = {  # of model.py, which decode.c does not know
    "window": (CausalSelfAttention, "attend", staticmethod(lambda q, k, v: ATTEND(q, k[:, :, -16:], v[:, :, -16:]))),
    "scale": (CausalSelfAttention, "attend", staticmethod(lambda q, k, v: ATTEND(1.5 * q, k, v))),
    "embedding": (GPT, "embed", lambda self, idx, cache=None: 3 * EMBED(self, idx, cache)),
    "rotation": (model_file, "rotate", lambda x, cos, sin: rotate(x, cos, -sin)),
}


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("pos", ["learned", "rope"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_model_is_not_decoded_by_c(monkeypatch, edit, pos, weights):
    if edit == "rotation" and pos == "learned":
        pytest.skip("learned positions are not rotated")
    model = make(n_embd=64, block_size=32, pos=pos, qk_norm=pos == "rope", ngram=3, ngram_rows=1000)
    if weights == "int8":
        quantize_model(model, "int8")
    assert use_native_decoding(model)
    del model.next_logits
    monkeypatch.setattr(*EDITS[edit])
    assert not use_native_decoding(model)


def test_without_a_compiler_or_with_a_broken_one_it_decodes_as_before(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    for path in ("", str(tmp_path)):
        native.build.cache_clear()
        monkeypatch.setenv("PATH", path)
        monkeypatch.delenv("CC", raising=False)
        assert not use_native_decoding(make())
    monkeypatch.undo()
    native.build.cache_clear()


def test_it_is_built_once_for_later_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("MINUTEGPT_CACHE", str(tmp_path / "cache"))
    native.build.cache_clear()
    assert use_native_decoding(make())
    (file,) = (tmp_path / "cache").iterdir()
    built = file.stat().st_mtime_ns
    native.build.cache_clear()
    assert native.build() and file.stat().st_mtime_ns == built
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder would be")
    native.build.cache_clear()
    assert not native.build()
    native.build.cache_clear()
