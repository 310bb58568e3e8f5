"""model.py against the mathematics: an independent implementation in numpy, transformers' GPT-2, counts by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from harness import TINY
from torch.nn import functional as F

import model as model_file
from model import GPT, GPTConfig, KVCache, attention_by_hand, causal_attention, rotary, rotate, sample

FAST = {"pos": "rope", "norm": "rmsnorm", "activation": "relu2", "qk_norm": True, "tie": False}
VARIANTS = {
    "classic": {},
    "gpt2": {"bias": True, "activation": "gelu_tanh"},
    "rope": {"pos": "rope"},
    "rmsnorm": {"norm": "rmsnorm"},
    "transformer": {"norm_position": "post", "activation": "relu", "bias": True},
    "post-rmsnorm": {"norm_position": "post", "norm": "rmsnorm", "pos": "rope"},
    "relu2": {"activation": "relu2"},
    "qk_norm": {"qk_norm": True},
    "untied": {"tie": False},
    "gqa": {"n_kv_head": 2},
    "mqa-rope": {"n_kv_head": 1, "pos": "rope", "qk_norm": True},
    "fast": FAST,
    "ngrams": {**FAST, "ngram": 3, "ngram_rows": 500},  # all 17^2 pairs, and 500 rows for 17^3 triples
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


def make(seed: int = 0, spread: float = 0.3, **settings) -> GPT:
    """A tiny model whose every weight is random and large enough to matter, biases and norms too."""
    torch.manual_seed(seed)
    model = GPT(replace(TINY, **{"n_kv_head": 0, **settings})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=1.0 if ".ln" in name and name.endswith("weight") else 0.0, std=spread)
    return model


def tokens(B: int, T: int, seed: int = 0, V: int = TINY.vocab_size) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


# -- an independent implementation


def naive_norm(config, x, weight=None, bias=None):
    if config.norm == "rmsnorm":
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * weight + (0 if bias is None else bias)


def naive_logits(model: GPT, ids) -> np.ndarray:
    """One sequence ids (T,) -> logits (T, V) in float64: one head and one position after another."""
    c = model.config
    w = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
    D, group = c.n_embd // c.n_head, c.n_head // c.n_kv_head

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def norm(x, name):
        return naive_norm(c, x, w.get(name + ".weight"), w.get(name + ".bias"))

    def rotated(x, t):  # as complex numbers: pair i at position t is multiplied by e^(-i t 10000^(-2i/D))
        z = x[: D // 2] + 1j * x[D // 2 :]
        z = z * np.exp(-1j * t * 10000.0 ** (-2 * np.arange(D // 2) / D))
        return np.concatenate((z.real, z.imag))

    def attention(x, name):
        q, k, v = np.split(linear(x, name + ".c_attn"), [c.n_embd, c.n_embd + c.n_kv_head * D], axis=-1)
        out = np.zeros_like(x)
        for h in range(c.n_head):
            query, shared = slice(h * D, h * D + D), slice(h // group * D, h // group * D + D)
            qs, ks, vs = q[:, query], k[:, shared], v[:, shared]
            if c.qk_norm:
                qs, ks = (a / np.sqrt((a * a).mean(-1, keepdims=True) + 1e-6) for a in (qs, ks))
            if c.pos == "rope":
                qs, ks = (np.stack([rotated(a, t) for t, a in enumerate(b)]) for b in (qs, ks))
            for t in range(len(x)):
                scores = np.array([qs[t] @ ks[s] / math.sqrt(D) for s in range(t + 1)])
                weights = np.exp(scores - scores.max())
                out[t, query] = weights / weights.sum() @ vs[: t + 1]
        return linear(out, name + ".c_proj")

    def mlp(x, name):
        x = linear(x, name + ".c_fc")
        x = {
            "gelu": lambda: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
            "gelu_tanh": lambda: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
            "relu": lambda: np.maximum(x, 0),
            "relu2": lambda: np.maximum(x, 0) ** 2,
        }[c.activation]()
        return linear(x, name + ".c_proj")

    x = w["transformer.wte.weight"][np.asarray(ids)]
    if c.pos == "learned":
        x = x + w["transformer.wpe.weight"][: len(x)]
    for n in range(2, c.ngram + 1):  # the tokens before the start count as token 0
        table, known = w[f"transformer.ngrams.tables.{n - 2}.weight"], [0] * (n - 1) + [int(i) for i in ids]
        for t in range(len(x)):
            key = sum(token * c.vocab_size ** (n - 1 - i) for i, token in enumerate(known[t : t + n]))
            hashed = key % (2**31 - 1) * 40503 % (2**31 - 1) % len(table)
            x[t] += table[key if len(table) == c.vocab_size**n else hashed]
    if c.norm == "rmsnorm":
        x = naive_norm(c, x)
    for i in range(c.n_layer):
        h = f"transformer.h.{i}"
        if c.norm_position == "pre":
            x = x + attention(norm(x, h + ".ln_1"), h + ".attn")
            x = x + mlp(norm(x, h + ".ln_2"), h + ".mlp")
        else:
            x = norm(x + attention(x, h + ".attn"), h + ".ln_1")
            x = norm(x + mlp(x, h + ".mlp"), h + ".ln_2")
    if c.norm_position == "pre":
        x = norm(x, "transformer.ln_f")
    return x @ w["transformer.wte.weight" if c.tie else "lm_head.weight"].T


@variants
def test_the_model_computes_its_formula(settings):
    model, idx = make(**settings), tokens(2, 12)
    logits, loss = model(idx, targets := tokens(2, 12, seed=1))
    naive = np.stack([naive_logits(model, row) for row in idx])
    assert logits.shape == (2, 12, 17) and np.abs(naive).max() > 0.4
    np.testing.assert_allclose(logits.detach().numpy(), naive, atol=1e-5 * np.abs(naive).max())
    picked = np.take_along_axis(naive, targets.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss.item(), (np.log(np.exp(naive).sum(-1)) - picked).mean(), rtol=1e-5)


def test_the_model_is_gpt2():
    """Random weights, loaded into transformers' GPT-2, whose Conv1D stores its matrices transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = make(bias=True, activation="gelu_tanh")
    c = model.config
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                   n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ).eval()  # fmt: skip
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    gpt2.load_state_dict({k: v.T if k.endswith(transposed) else v for k, v in model.state_dict().items()})
    idx = tokens(3, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], gpt2(idx).logits, atol=1e-5, rtol=1e-5)


def test_attention_by_hand_is_the_fused_kernel():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attention_by_hand(q, k, v), fused)
    torch.testing.assert_close(attention_by_hand(q, k, v)[:, :, 0], v[:, :, 0])  # the first position sees only itself


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 2, 6, 7])
def test_causal_attention_of_the_last_positions_is_the_end_of_the_one_by_hand(T, K):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, K, 7, 8), torch.randn(2, K, 7, 8)
    whole = attention_by_hand(q, *(a.repeat_interleave(4 // K, dim=1) for a in (k, v)))
    torch.testing.assert_close(causal_attention(q[:, :, -T:], k, v), whole[:, :, -T:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rope", [False, True])
def test_the_attention_layer_computes_attention_by_hand(rope):
    model = make(pos="rope" if rope else "learned", bias=True)
    block, x = model.transformer.h[0].attn, torch.randn(2, 9, 16)
    q, k, v = (a.view(2, 9, 4, 4).transpose(1, 2) for a in block.c_attn(x).chunk(3, dim=2))
    rotation = rotary(0, 9, 4, x.device) if rope else None
    if rotation is not None:
        q, k = rotate(q, *rotation), rotate(k, *rotation)
    y = attention_by_hand(q, k, v).transpose(1, 2).reshape(2, 9, 16)
    torch.testing.assert_close(block(x, rotation, None), block.c_proj(y))


# -- which positions see which


@variants
def test_no_position_sees_a_later_one(settings):
    model, idx = make(**settings), tokens(1, 12)
    before = model(idx)[0]
    for t in range(1, 12):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1 + tokens(1, 12 - t, seed=t, V=16)) % 17  # every later token is different
        after = model(changed)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-4  # and a position does see itself


@variants
def test_gradients_come_from_every_earlier_position_and_no_later_one(settings):
    model, idx = make(**settings), tokens(1, 12)
    table = model.transformer.wte.weight.detach()[idx].requires_grad_()  # (1, T, C), what each position reads
    model.transformer.wte.forward = lambda _: table
    logits = model(idx)[0]
    for t in (0, 5, 11):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), table, retain_graph=True)
        size = gradient[0].abs().sum(-1)  # (T,)
        assert (size[t + 1 :] == 0).all() and (size[: t + 1] > 0).all()


def test_rows_of_a_batch_do_not_see_each_other():
    model, idx = make(), tokens(3, 12)
    alone = torch.cat([model(row[None])[0] for row in idx])
    torch.testing.assert_close(model(idx)[0], alone, atol=1e-5, rtol=0)


# -- learning


@pytest.mark.parametrize("name", ["classic", "transformer", "fast"])
def test_it_can_memorise_one_batch(name):
    torch.manual_seed(0)
    model = GPT(replace(TINY, n_kv_head=0, n_embd=32, **VARIANTS[name]))
    idx = tokens(4, 13, V=17)
    idx[:, 0] = torch.arange(4)  # each row has its own first token, so that they differ
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 200)
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
    assert torch.equal(model.generate(idx[:, :1], 12, temperature=0), idx)


@variants
def test_gradients_are_the_slopes_of_the_loss(settings):
    model = make(**settings).double()
    idx, targets = tokens(2, 12), tokens(2, 12, seed=1)

    def loss():
        logits = model.lm_head(model.hidden(idx)).double()  # model.unembed rounds to float32
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    loss().backward()
    random = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=random, dtype=p.dtype)
        with torch.no_grad():
            h = 1e-6
            p += h * direction
            above = loss()
            p -= 2 * h * direction
            slope = (above - loss()) / (2 * h)
            p += h * direction
        torch.testing.assert_close(slope, (p.grad * direction).sum(), rtol=1e-5, atol=1e-8, msg=name)


def test_the_first_loss_is_that_of_uniform_guessing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_embd=96, n_head=6, block_size=64))
    loss = model(tokens(8, 64, V=65), tokens(8, 64, seed=1, V=65))[1]
    assert abs(loss.item() - math.log(65)) < 0.1


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_embd=192, bias=True, tie=False))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.05), name
        elif p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05) and abs(p.mean().item()) < 1e-3, name
        else:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name  # layer norms and biases


def test_ngrams_start_at_zero_and_long_ones_of_many_tokens_do_not_overflow():
    model = GPT(replace(TINY, vocab_size=50257, ngram=8, ngram_rows=1000))
    assert all((p == 0).all() for name, p in model.named_parameters() if "ngrams" in name)
    seen = []
    for table in model.transformer.ngrams.tables:
        table.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.full((1, 12), 50256)
    model.transformer.ngrams(ids)
    for n, keys in enumerate(seen, start=2):
        key = sum(50256 * 50257**i for i in range(n))
        assert keys[0, -1] == key % (2**31 - 1) * 40503 % (2**31 - 1) % 1000


def test_a_tied_output_layer_is_the_embedding():
    model = make()
    assert model.lm_head.weight is model.transformer.wte.weight
    model(tokens(1, 12), tokens(1, 12, seed=1))[1].backward()
    assert "lm_head.weight" not in dict(model.named_parameters())
    untied = make(tie=False)
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert untied.n_params() - model.n_params() == 17 * 16
    copy = GPT(model.config)
    copy.load_state_dict(model.state_dict())
    assert copy.lm_head.weight is copy.transformer.wte.weight  # still one tensor, not two equal ones


# -- the loss


def test_a_target_of_minus_one_is_ignored():
    model, idx, targets = make(), tokens(2, 12), tokens(2, 12, seed=1)
    logits, _ = model(idx)
    targets[0, 3:] = targets[1, :2] = -1
    expected = F.cross_entropy(logits[targets >= 0], targets[targets >= 0])
    torch.testing.assert_close(model(idx, targets)[1], expected)
    assert model(idx)[1] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_in_float32_under_autocast(dtype):
    model, idx, targets = make(), tokens(2, 12), tokens(2, 12, seed=1)
    with torch.autocast("cpu", dtype):
        logits, loss = model(idx, targets)
    assert logits.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    exact = model(idx, targets)[1]
    assert 0 < abs(loss - exact) < 0.05  # the blocks did compute in the other dtype
    assert model.to(dtype)(idx)[0].dtype == torch.float32


# -- dropout


def test_dropout_is_off_in_eval_and_never_inside_attention():
    model, same, idx = make(dropout=0.5), make(dropout=0.0), tokens(2, 12)
    assert torch.equal(model(idx)[0], same(idx)[0])
    assert torch.equal(model.generate(idx, 5, temperature=0), same.generate(idx, 5, temperature=0))
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    for module in model.modules():  # all dropout is in separate modules, on the residual branches
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.5
            module.p = 0.0
    assert torch.equal(model(idx)[0], same(idx)[0])


def test_dropout_is_on_the_embedding_and_both_residual_branches():
    model, x = make(dropout=0.5).train(), torch.randn(2, 12, 16)
    block = model.transformer.h[0]
    for y in (block.attn(x, None, None), block.mlp(x)):
        assert 0.35 < (y == 0).float().mean().item() < 0.65
    seen = []
    block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(tokens(2, 12))
    assert 0.35 < (seen[0] == 0).float().mean().item() < 0.65


# -- rotary positions


def test_rotary_depends_on_the_distance_only():
    torch.manual_seed(0)
    D = 16
    q, k = torch.randn(2, 1, 1, 1, D).double()
    device = torch.device("cpu")

    def score(t, s):
        return (rotate(q, *rotary(t, 1, D, device)) * rotate(k, *rotary(s, 1, D, device))).sum().item()

    for distance in (0, 1, 7, 50):
        scores = [score(start + distance, start) for start in (0, 3, 100)]
        assert max(scores) - min(scores) < 1e-4
    assert abs(score(0, 0) - (q * k).sum().item()) < 1e-9
    assert abs(score(5, 0) - score(0, 5)) > 1e-2  # and on its sign
    assert abs(score(5, 0) - score(0, 0)) > 1e-2


def test_rotary_is_a_product_of_complex_numbers():
    D, T, start = 8, 6, 5
    x = torch.randn(1, 2, T, D, dtype=torch.float64)
    angle = torch.outer(torch.arange(start, start + T).double(), 10000 ** (-torch.arange(0, D, 2).double() / D))
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones_like(angle), -angle)
    turned = rotate(x, *rotary(start, T, D, x.device))
    torch.testing.assert_close(turned, torch.cat((z.real, z.imag), -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-6, rtol=0)


def test_rotary_evaluates_beyond_the_training_context():
    model, idx = make(pos="rope"), tokens(1, 30)
    np.testing.assert_allclose(model(idx)[0][0].detach().numpy(), naive_logits(model, idx[0]), atol=1e-4)
    with pytest.raises(ValueError, match="30 positions do not fit in block_size=12"):
        make()(idx)


# -- the cache


@variants
def test_cached_logits_are_the_uncached_ones_at_every_position(settings):
    model, idx = make(**settings), tokens(3, 12)
    with torch.no_grad():
        whole = model(idx)[0]
        for prompt in range(1, 13):
            cache = KVCache(model.config, 3, idx.device, torch.float32)
            pieces = [model.unembed(model.hidden(idx[:, :prompt], cache))]
            for t in range(prompt, 12):
                assert cache.length == t
                pieces.append(model.unembed(model.hidden(idx[:, t : t + 1], cache)))
            torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=0)


@variants
def test_a_prompt_in_pieces_is_the_prompt(settings):
    model, idx = make(**settings), tokens(2, 12)
    with torch.no_grad():
        whole = model(idx)[0]
        for sizes in ((5, 7), (1, 11), (11, 1), (4, 4, 4), (2, 1, 6, 3)):
            cache, pieces = KVCache(model.config, 2, idx.device, torch.float32), []
            for piece in idx.split(sizes, dim=1):
                pieces.append(model.unembed(model.hidden(piece, cache)))
            torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=0)


def test_a_full_cache_raises_an_error():
    model, cache = make(pos="rope"), KVCache(TINY, 1, torch.device("cpu"), torch.float32)
    model.hidden(tokens(1, 12), cache)
    with pytest.raises(ValueError, match="13 positions do not fit in block_size=12"):
        model.hidden(tokens(1, 1), cache)


def test_fewer_key_value_heads_are_the_same_as_repeated_ones_in_less_memory():
    grouped = make(n_kv_head=2)
    full = GPT(replace(TINY, n_kv_head=4)).eval()
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith("c_attn.weight")]:
        q, k, v = state[name].split((16, 8, 8))
        k, v = (a.view(2, 4, 16).repeat_interleave(2, dim=0).reshape(16, 16) for a in (k, v))
        state[name] = torch.cat((q, k, v))
    full.load_state_dict(state)
    idx = tokens(2, 12)
    torch.testing.assert_close(grouped(idx)[0], full(idx)[0], atol=1e-5, rtol=0)
    small, large = (KVCache(m.config, 2, idx.device, torch.float32).bytes() for m in (grouped, full))
    assert large == 2 * small == 2 * 2 * 2 * 13 * 16 * 4  # k and v, layers, batch, positions + 1, channels, bytes


@pytest.mark.parametrize("block_size", [1, 2, 7, 12])
@pytest.mark.parametrize("settings", [{}, FAST], ids=["classic", "fast"])
def test_a_full_cache_is_filled_again_with_its_last_half(block_size, settings):
    """Against a model without a cache: when the context is full, the last block_size / 2 tokens are the new context."""
    model = make(block_size=block_size, **settings)
    for prompt in (1, block_size - 1, block_size, block_size + 1, 3 * block_size):
        if prompt < 1:
            continue
        idx = tokens(2, prompt)
        text = model.generate(idx, 2 * block_size + 3, temperature=0)
        begin = max(0, prompt - block_size)  # first position of the context
        for end in range(prompt, text.size(1)):
            if end - begin > block_size:
                begin = end - max(1, block_size // 2)
            logits = model(text[:, begin:end])[0][:, -1]
            chosen = logits.gather(1, text[:, end : end + 1])[:, 0]
            assert (logits.amax(-1) - chosen).max() < 1e-4  # the most likely token, up to rounding


def test_generating_has_no_gradient_and_no_side_effects():
    model, idx = make(), tokens(2, 5)
    first = model.generate(idx, 30, temperature=0)
    assert not first.requires_grad and torch.equal(first[:, :5], idx) and first.shape == (2, 35)
    assert torch.equal(first, model.generate(idx, 30, temperature=0))
    assert torch.equal(first[:1], model.generate(idx[:1], 30, temperature=0))  # the same alone as in a batch
    assert torch.equal(model.generate(idx, 0), idx)
    steps = list(model.stream(idx, 30, temperature=0))
    assert torch.equal(torch.stack(steps, 1), first[:, 5:])


def test_the_same_seed_draws_the_same_text():
    model, idx = make(), tokens(2, 5)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(idx, 30, temperature=1.5))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_generating_under_autocast_keeps_the_cache_in_its_dtype(monkeypatch):
    caches = []
    monkeypatch.setattr(model_file, "KVCache", lambda *args: caches.append(KVCache(*args)) or caches[-1])
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(tokens(1, 3), 4)
    model.to(torch.bfloat16).generate(tokens(1, 3), 4)
    assert [cache.k[0].dtype for cache in caches] == [torch.bfloat16] * 2


# -- sampling a token

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0, 2.5, -1.0])
DRAWS = 40_000


def shares(logits: torch.Tensor = LOGITS, **options) -> np.ndarray:
    """How often each token is drawn, (V,)."""
    torch.manual_seed(0)
    drawn = sample(logits.expand(DRAWS, -1), **options)
    return torch.bincount(drawn, minlength=len(logits)).numpy() / DRAWS


def expected(p: np.ndarray, keep: list[int]) -> np.ndarray:
    kept = np.zeros_like(p)
    kept[keep] = p[keep]
    return kept / kept.sum()


def check(found: np.ndarray, wanted: np.ndarray) -> None:
    assert (found[wanted == 0] == 0).all()  # an excluded token is never drawn
    sigma = np.sqrt(wanted * (1 - wanted) / DRAWS)
    assert (np.abs(found - wanted) <= 5 * sigma + 1e-9).all()


def softmax(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    p = np.exp(logits.double().numpy() / temperature)
    return p / p.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature(temperature):
    check(shares(temperature=temperature), softmax(LOGITS, temperature))


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-40, 1e-300])
def test_temperature_zero_takes_the_most_likely(temperature):
    check(shares(temperature=temperature), np.eye(7)[1])


@pytest.mark.parametrize("top_k", [0, 1, 4, 7, 8, 10**9])
def test_top_k(top_k):
    order = [1, 3, 5, 0, 4, 6, 2]
    check(shares(top_k=top_k), expected(softmax(LOGITS), order[: top_k or 7]))


def test_top_k_keeps_all_of_a_tie():
    check(shares(top_k=2), expected(softmax(LOGITS), [1, 3, 5]))


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.3, 0.45, 0.6, 0.71, 0.9, 0.95, 0.99, 0.999, 1.0])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p):
    logits = LOGITS + torch.arange(7) / 100  # no ties
    p = softmax(logits)
    keep: list[int] = []
    for i in np.argsort(-p).tolist():
        if keep and p[keep].sum() >= top_p:
            break
        keep.append(i)
    assert top_p < 1 or len(keep) == 7
    check(shares(logits, top_p=top_p), expected(p, keep))


def test_top_p_comes_after_temperature_and_top_k():
    logits = LOGITS + torch.arange(7) / 100
    p = expected(softmax(logits, 2.0), [1, 3, 5])
    assert p[5] + p[1] > 0.65 > p[1]  # so the third token is dropped
    check(shares(logits, temperature=2.0, top_k=3, top_p=0.65), expected(p, [1, 5]))


def test_each_row_is_drawn_from_its_own_logits():
    torch.manual_seed(0)
    logits = torch.full((3, 5), -100.0)
    logits[[0, 1, 2], [4, 0, 2]] = 0.0
    for options in ({}, {"top_k": 1}, {"top_p": 0.5}, {"temperature": 0.0}):
        assert sample(logits, **options).tolist() == [4, 0, 2]


def test_repetition_penalty():
    model, idx, penalty = make(spread=0.5), tokens(2, 4), 1.7
    text = model.generate(idx, 8, temperature=0, repetition_penalty=penalty)
    plain = model.generate(idx, 8, temperature=0)
    assert not torch.equal(text, plain)
    for row in text.tolist():
        for end in range(4, 12):
            logits = naive_logits(model, row[:end])[-1]
            for seen in set(row[:end]):
                logits[seen] = logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty
            assert logits.max() - logits[row[end]] < 1e-4


# -- counts and errors


def test_parameters_and_flops_counted_by_hand():
    model = GPT(GPTConfig(block_size=32, vocab_size=10, n_layer=3, n_head=2, n_embd=8))
    matrices = 3 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8)
    norms = 3 * 2 * 8 + 8
    assert model.n_params() == 10 * 8 + 32 * 8 + matrices + norms
    # 2 operations per weight forward and 4 backward; the same for the two products of attention, over T positions
    assert model.flops_per_token(20) == 6 * (matrices + norms + 10 * 8) + 3 * 6 * (2 * 8 * 20)
    assert model.flops_per_token() == model.flops_per_token(32)
    classic = GPT(GPTConfig())
    assert classic.n_params() - 256 * 384 == 10_646_784  # the 10.65M that nanoGPT prints
    with torch.device("meta"):
        gpt2 = GPT(GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, bias=True))
    assert gpt2.n_params() == 124_439_808
    fast = GPT(GPTConfig(block_size=32, vocab_size=10, n_layer=3, n_head=4, n_kv_head=1, n_embd=8, **FAST))
    matrices = 3 * (8 * (8 + 2 * 2) + 8 * 8 + 8 * 32 + 32 * 8)
    assert fast.n_params() == 2 * 10 * 8 + matrices  # no positions, no weights in norms, a separate output layer
    assert fast.flops_per_token(20) == 6 * (matrices + 10 * 8) + 3 * 6 * (2 * 8 * 20)
    ngrams = GPT(replace(fast.config, ngram=3, ngram_rows=300))  # 10^2 pairs and 300 rows for triples: lookups
    assert ngrams.n_params() == fast.n_params() + (100 + 300) * 8
    assert ngrams.flops_per_token(20) == fast.flops_per_token(20)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_embd": 384, "n_head": 5}, ["n_embd=384", "n_head=5", "4 or 6"]),
        ({"n_head": 6, "n_kv_head": 4}, ["n_head=6", "n_kv_head=4"]),
        ({"n_head": 6, "n_kv_head": 12}, ["n_head=6", "n_kv_head=12"]),
        ({"n_kv_head": -2}, ["n_kv_head=-2", "at least 1"]),
        ({"pos": "rope", "n_embd": 18}, ["rope", "= 3 must be even"]),
        ({"pos": "rotary"}, ["pos='rotary'", "learned, rope"]),
        ({"norm": "batchnorm"}, ["norm='batchnorm'", "layernorm, rmsnorm"]),
        ({"norm_position": "middle"}, ["norm_position='middle'", "pre, post"]),
        ({"activation": "swish"}, ["activation='swish'", "gelu, gelu_tanh, relu, relu2"]),
        ({"dropout": 1.0}, ["dropout=1.0", "below 1"]),
        ({"dropout": -0.1}, ["dropout=-0.1", "at least 0"]),
        ({"dropout": math.nan}, ["dropout=nan"]),
        ({"ngram": 1}, ["ngram=1", "2 to 8"]),
        ({"ngram": 9}, ["ngram=9", "2 to 8"]),
        ({"ngram_rows": 0}, ["ngram_rows=0", "at least 1"]),
        *[({name: n}, [f"{name}={n}", "at least 1"])
          for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd") for n in (0, -1)],
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_built_raises_an_error(settings, words):
    with pytest.raises(ValueError) as error:
        GPTConfig(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)
