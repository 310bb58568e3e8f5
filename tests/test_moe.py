"""The mixture of experts against a dense formula: every expert on every token, most of them times zero."""

import copy
import json
import math
from dataclasses import asdict

import harness
import pytest
import torch
from harness import optimizers_of, posix, ranks, run, small_text, tiny, train
from test_resume import assert_same, kill_and_resume
from torch import nn
from torch.nn import functional as F

from minutegpt.checkpoint import build_model
from minutegpt.errors import UserError
from minutegpt.huggingface import hf_files, weights_file
from minutegpt.moe import RATE, MoE, update_router_bias, zero_idle
from minutegpt.optim import orthogonalize
from minutegpt.quantize import fake_quantize, pack, packed_format, plain_names, quantize_model, unpack
from model import GPT, GPTConfig, KVCache

TINY = asdict(harness.TINY) | {"n_kv_head": 0, "n_embd": 32, "n_expert": 4}
FAST = {"pos": "rope", "norm": "rmsnorm", "activation": "relu2", "qk_norm": True, "tie": False}
SHARES = [(2, 2), (4, 2), (8, 2), (5, 3), (6, 6)]  # experts, active


def make(**settings) -> GPT:
    """A tiny model whose every weight matters and whose experts get different numbers of tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        for layer in moe_layers(model):
            layer.router_bias.normal_(std=0.05)
    return model


def moe_layers(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def tokens(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def naive(layer: MoE, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """x (N, C) -> (N, C): one token, one expert after another."""
    rows = []
    for token in x:
        scores = [1 / (1 + torch.exp(-(row @ token))) for row in weights["router.weight"]]
        ranking = sorted(range(len(scores)), key=lambda e: -(scores[e].item() + layer.router_bias[e].item()))
        y = torch.zeros_like(token)
        total = sum(scores[e] for e in ranking[: layer.k])
        for e, score in enumerate(scores):
            gate = score / total if e in ranking[: layer.k] else 0 * score
            y = y + gate * (weights["c_proj.weight"][e] @ layer.activation(weights["c_fc.weight"][e] @ token))
        rows.append(y)
    return torch.stack(rows)


# -- what it computes


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
@pytest.mark.parametrize("n_expert, active", SHARES)
def test_output_and_gradients_are_those_of_every_expert_on_every_token(n_expert, active, activation):
    layer = moe_layers(make(n_expert=n_expert, n_expert_active=active, activation=activation))[0]
    x = torch.randn(3, 7, 32, requires_grad=True)
    weights = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact = x.detach().double().requires_grad_()
    y, wanted = layer(x), naive(layer, exact.flatten(0, 1), weights).view(3, 7, 32)
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(y.double(), wanted, atol=1e-5, rtol=1e-4)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * towards).sum().backward()
    (wanted * towards).sum().backward()
    for name, p, wanted in [("x", x, exact), *((n, p, weights[n]) for n, p in layer.named_parameters())]:
        size = wanted.grad.abs().max()
        assert size > 0.1, name
        torch.testing.assert_close(p.grad.double(), wanted.grad, atol=1e-5 * size.item(), rtol=1e-4, msg=name)


def test_gradients_are_the_slopes_of_the_loss():
    """The whole model, along a random direction of each parameter, with steps that change no choice."""
    model, idx, targets = make(), tokens(2, 12), tokens(2, 12, seed=1)
    choices: list[torch.Tensor] = []
    for layer in moe_layers(model):
        layer.router.register_forward_hook(
            lambda module, inputs, output, layer=layer: choices.append(
                (output.sigmoid() + layer.router_bias).topk(2).indices.sort().values
            )
        )
    model(idx, targets)[1].backward()
    unchanged = torch.cat(choices)
    for name, p in model.named_parameters():
        h = 1e-3
        direction = p.grad / p.grad.norm()
        losses = []
        for sign in (1, -1):
            choices.clear()
            with torch.no_grad():
                p += sign * h * direction
                losses.append(model(idx, targets)[1].item())
                p -= sign * h * direction
            assert torch.equal(torch.cat(choices), unchanged), name
        assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(p.grad.norm().item(), rel=0.02, abs=1e-3), name


def test_an_expert_without_tokens_has_a_gradient_of_zeros():
    layer = moe_layers(make())[0]
    layer.router_bias[2] = -2.0  # scores are at most 1
    layer(torch.randn(2, 9, 32)).sum().backward()
    for weight in (layer.c_fc.weight, layer.c_proj.weight):
        assert weight.grad[2].eq(0).all() and all(weight.grad[e].ne(0).any() for e in (0, 1, 3))
    layer.router_bias[:] = torch.tensor([3.0, 3.0, 0.0, 0.0])  # all tokens go to two experts
    layer.train()(torch.randn(2, 9, 32))
    assert layer.tokens_per_expert.tolist() == [18, 18, 0, 0]


def test_positions_do_not_see_each_other_in_it():
    layer, x = moe_layers(make())[0], torch.randn(3, 12, 32)
    alone = torch.stack([layer(row[None, t : t + 1])[0, 0] for row in x for t in range(12)]).view_as(x)
    torch.testing.assert_close(layer(x), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, FAST], ids=["classic", "fast"])
def test_cached_logits_are_the_uncached_ones(settings):
    model, idx = make(**settings), tokens(3, 12)
    with torch.no_grad():
        whole = model(idx)[0]
        cache = KVCache(model.config, 3, idx.device, torch.float32)
        pieces = [model.unembed(model.hidden(piece, cache)) for piece in idx.split((5, 1, 1, 3, 1, 1), dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=0)
    text = model.generate(idx[:, :3], 9, temperature=0)
    assert torch.equal(model(text)[0][:, 2:-1].argmax(-1), text[:, 3:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_other_dtypes(dtype):
    model, idx, targets = make(), tokens(2, 12), tokens(2, 12, seed=1)
    exact = model(idx, targets)[1]
    seen = []
    moe_layers(model)[0].c_fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype):
        _, loss = model(idx, targets)
    loss.backward()
    assert seen == [dtype] and loss.dtype == torch.float32 and 0 < abs(loss - exact) < 0.3
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert model.to(dtype)(idx)[0].isfinite().all()


def test_dropout_is_on_its_output():
    layer = moe_layers(make(dropout=0.5))[0].train()
    assert 0.35 < (layer(torch.randn(2, 12, 32)) == 0).float().mean() < 0.65


@pytest.mark.slow
def test_compiled_is_eager():
    """In one graph, with its gradients and its counts."""
    eager = make().train()
    compiled = copy.deepcopy(eager)
    fast = torch.compile(compiled, fullgraph=True)
    for seed in range(3):
        idx, targets = tokens(4, 12, seed), tokens(4, 12, seed + 10)
        losses = [model(idx, targets)[1] for model in (eager, fast)]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
        for loss in losses:
            loss.backward()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-3)
    for layer, other in zip(moe_layers(eager), moe_layers(compiled), strict=True):
        assert torch.equal(layer.tokens_per_expert, other.tokens_per_expert)
        assert layer.tokens_per_expert.sum() == 3 * 4 * 12 * 2
        torch.testing.assert_close(layer.entropy, other.entropy)


# -- load balancing


def test_the_router_bias_moves_as_in_the_paper():
    model = make(n_expert=4).train()
    before = [layer.router_bias.clone() for layer in moe_layers(model)]
    model(tokens(4, 12))
    loads = [layer.tokens_per_expert.tolist() for layer in moe_layers(model)]
    entropy = [layer.entropy.item() for layer in moe_layers(model)]
    statistics = update_router_bias(model, 0.5)
    for layer, old, load in zip(moe_layers(model), before, loads, strict=True):
        assert sum(load) == 4 * 12 * 2  # no token is dropped
        signs = [(n < 24) - (n > 24) for n in load]
        torch.testing.assert_close(layer.router_bias - old, 0.5 * RATE * torch.tensor(signs), atol=1e-6, rtol=0)
        assert layer.tokens_per_expert.sum() == 0 and layer.entropy == 0  # the counts start again
    assert statistics["expert_load"].item() == pytest.approx(sum(max(load) / 24 for load in loads) / 2)
    assert statistics["expert_load_max"].item() == pytest.approx(max(max(load) / 24 for load in loads))
    assert statistics["router_entropy"].item() == pytest.approx(sum(entropy) / 2 / 48)
    assert update_router_bias(make(n_expert=0), 1.0) == {}


def test_the_router_entropy_is_that_of_its_scores():
    layer, x = moe_layers(make())[0].train(), torch.randn(2, 5, 32)
    layer(x)
    p = torch.sigmoid(x @ layer.router.weight.T).double()
    p = p / p.sum(-1, keepdim=True)
    assert layer.entropy.item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)
    assert layer.entropy / 10 < math.log(4)


def test_loads_become_even_on_uneven_data():
    """All tokens point in one direction, so that the router first sends them to the same two of eight experts."""
    layer = moe_layers(make(n_expert=8))[0].train()
    nn.init.zeros_(layer.router_bias)
    random = torch.Generator().manual_seed(0)
    centre = 0.4 * torch.randn(32, generator=random)
    largest = []
    for _ in range(150):
        with torch.no_grad():
            layer(centre + 0.3 * torch.randn(16, 32, 32, generator=random))
        largest.append(update_router_bias(layer, 1.0)["expert_load_max"].item())
    # by chance it is 1.1 with 128 tokens per expert
    assert largest[0] > 2.5 and sum(largest[-20:]) / 20 < 1.25, largest


def test_counts_add_up_over_micro_steps_and_skip_evaluation():
    whole, parts = make().train(), make().train()
    idx = tokens(8, 12)
    whole(idx)
    for piece in idx.split(2):
        parts(piece)
        parts.eval()
        parts(tokens(4, 12, seed=3))  # an evaluation in between
        parts.generate(piece[:, :4], 3)
        parts.train()
    for a, b in zip(moe_layers(whole), moe_layers(parts), strict=True):
        assert torch.equal(a.tokens_per_expert, b.tokens_per_expert)
        torch.testing.assert_close(a.entropy, b.entropy)
    update_router_bias(whole, 1.0), update_router_bias(parts, 1.0)
    assert_same(whole.state_dict(), parts.state_dict())
    saved = copy.deepcopy(parts.state_dict())
    parts.eval()(idx)
    assert_same(parts.state_dict(), saved)
    assert [name for name in saved if name.endswith("router_bias")] and not [n for n in saved if "tokens" in n]


# -- counts, weights, optimizers


def test_a_checkpoint_with_the_old_name_of_the_router_bias_loads():
    model = make()
    weights = {name.replace("router_bias", "balance"): w for name, w in model.state_dict().items()}
    assert len(weights.keys() - model.state_dict().keys()) == 2
    old = build_model({"model": weights, "model_config": asdict(model.config)})
    assert_same(old.state_dict(), model.state_dict())


@pytest.mark.parametrize("C, n_expert, active", [(64, 32, 2), (128, 32, 2), (128, 64, 4), (192, 64, 2)])
def test_active_parameters_are_the_dense_models(C, n_expert, active):
    settings = {"n_embd": C, "n_layer": 3}
    with torch.device("meta"):
        dense = GPT(GPTConfig(**TINY | settings | {"n_expert": 0}))
        model = GPT(GPTConfig(**TINY | settings | {"n_expert": n_expert, "n_expert_active": active}))
    assert model.n_params(active=True) == dense.n_params() == dense.n_params(active=True)
    assert model.flops_per_token() == dense.flops_per_token()
    width = (8 * C - n_expert) // (2 * active)
    assert model.n_params() == dense.n_params() + 3 * (n_expert - active) * 2 * C * width
    assert model.n_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("n_expert, active", SHARES)
def test_other_widths_have_slightly_fewer_active_parameters(n_expert, active):
    dense, model = make(n_expert=0), make(n_expert=n_expert, n_expert_active=active)
    fewer = (dense.n_params() - model.n_params(active=True)) / 2  # per layer
    assert 0 <= fewer < 16 * active * 32


def test_initialisation_is_that_of_the_dense_model():
    torch.manual_seed(0)
    settings = {"n_layer": 8, "n_embd": 96, "n_expert": 6, "tie": False}
    for name, p in GPT(GPTConfig(**TINY | settings)).named_parameters():
        if p.ndim > 1:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.07), name


def test_muon_takes_each_expert_as_a_matrix_and_adamw_the_router():
    model = make().train()
    adamw, muon = optimizers_of(model, "muon", muon_lr=0.02)
    name_of = {id(p): name.removeprefix("transformer.h.") for name, p in model.named_parameters()}
    taken = [[name_of[id(p)] for group in opt.param_groups for p in group["params"]] for opt in (adamw, muon)]
    assert sorted(taken[1]) == sorted(
        f"{i}.{part}.weight" for i in (0, 1) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )
    assert {"0.mlp.router.weight", "1.mlp.router.weight"} <= set(taken[0])
    model(tokens(4, 12), tokens(4, 12, seed=1))[1].backward()
    weight = moe_layers(model)[0].c_fc.weight
    before, g = weight.detach().clone(), weight.grad.clone()
    muon.step()
    for e in range(4):
        update = orthogonalize((0.95 * 0.05 + 0.05) * g[e][None])[0]  # Nesterov's first step
        wanted = before[e] - 0.02 * math.sqrt(g.size(1) / g.size(2)) * update
        torch.testing.assert_close(weight[e], wanted, atol=1e-5, rtol=1e-4)
    (plain,) = optimizers_of(model, "adamw", weight_decay=0.25)
    decayed = {name_of[id(p)] for p in plain.param_groups[0]["params"]}
    assert {"0.mlp.router.weight", "0.mlp.c_fc.weight", "0.mlp.c_proj.weight"} <= decayed


@pytest.mark.parametrize("format", ["int8", "int4", "int4-tensor"])
def test_quantization_covers_the_experts(format, monkeypatch):
    model, idx = make(), tokens(2, 12)
    packed = pack(model.state_dict(), format)
    assert packed_format(packed) == format and f"transformer.h.0.mlp.c_fc.weight.{format}" in packed
    again = make()
    again.load_state_dict(unpack(packed))
    assert not torch.equal(again.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)
    trained = make()
    fake_quantize(trained, format)
    torch.testing.assert_close(trained(idx)[0], again(idx)[0], atol=1e-5, rtol=1e-5)
    trained(idx, tokens(2, 12, seed=1))[1].backward()
    assert all(p.grad is not None for p in trained.parameters())
    assert_same(dict(sorted(plain_names(trained.state_dict()).items())), dict(sorted(model.state_dict().items())))
    with_kernels = copy.deepcopy(model)
    quantize_model(with_kernels, format)
    close = F.cosine_similarity(with_kernels(idx)[0].flatten(), again(idx)[0].flatten(), dim=0)
    assert close > (0.9 if format == "int4-tensor" else 0.99)  # rounding x to bfloat16 may change a choice
    monkeypatch.setattr("minutegpt.quantize.kernels_work", lambda: False)
    quantize_model(model, format)
    torch.testing.assert_close(model(idx)[0], again(idx)[0], atol=1e-5, rtol=1e-5)


def test_transformers_has_no_class_for_it_and_safetensors_takes_it():
    with pytest.raises(UserError, match=r"no class for this block\. The nearest is .*n_expert=0, not 4. Type --format"):
        hf_files(make(), None)
    assert len(weights_file(make(), None)) > 4 * make().n_params()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"n_expert": -1}, ["n_expert=-1", "at least 0"]),
        ({"n_expert": 4, "n_expert_active": 5}, ["n_expert_active=5", "n_expert=4", "at most all"]),
        ({"n_expert": 4, "n_expert_active": 1}, ["n_expert_active=1", "n_expert=4", "at least 2"]),
        ({"n_expert": 4, "n_embd": 20}, ["n_embd=20", "8 divides"]),
        ({"n_expert": 250}, ["n_expert=250", "n_embd=32", "n_expert + 32", "no channels"]),
    ],
)
def test_experts_that_cannot_be_built_raise_an_error(settings, words):
    with pytest.raises(ValueError) as error:
        GPTConfig(**TINY | settings)
    assert all(word in str(error.value) for word in words), str(error.value)


# -- runs


def log_of(house, out: str) -> list[dict]:
    lines = (house / out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["train_loss"] is not None]


STATISTICS = ("expert_load", "expert_load_max", "router_entropy")


@posix
def test_a_killed_run_resumes_to_the_same_bits_and_logs_its_experts(house):
    kill_and_resume(house, "killed", 2, n_expert=4, optimizer="muon")
    log = log_of(house, "killed-straight")
    assert all(1 <= row["expert_load"] <= row["expert_load_max"] <= 4 for row in log)
    assert all(0 < row["router_entropy"] <= math.log(4) for row in log)
    last = log[-1]
    assert train(house, "dense", max_iters=2).wait() == 0
    assert not any(key in row for row in log_of(house, "dense") for key in STATISTICS)
    assert last.keys() >= set(STATISTICS)


def test_the_card_prints_all_and_active_parameters(house):
    card = train(house, "card", max_iters=1, n_expert=8)
    assert card.wait() == 0
    model = GPT(GPTConfig(vocab_size=len(set(small_text())), n_layer=2, n_head=2, n_embd=32, block_size=32, n_expert=8))
    whole, active = model.n_params() / 1000, model.n_params(active=True) / 1000
    line = next(line for line in card.output.splitlines() if line.split()[:1] == ["model"])
    assert f"{whole:.3g}k parameters, {active:.3g}k of them active" in line
    for script in ("sample.py", "evaluate.py"):
        assert run(script, "--out_dir=card", cwd=house).status == 0


@posix
@pytest.mark.slow
def test_every_world_size_counts_the_same_loads(house):
    settings = tiny(dropout=0.0, max_iters=8, n_expert=4)
    for n in (1, 2):
        ranks(house, n, *settings, f"--out_dir=world-{n}")
    one, two = (log_of(house, f"world-{n}") for n in (1, 2))
    assert len(one) == 8
    for a, b in zip(one, two, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        for key in STATISTICS:
            assert a[key] == pytest.approx(b[key], rel=1e-5), key


def test_an_expert_without_rows_gets_a_gradient_of_zeros_from_any_kernel():
    """Some GPUs leave what was in memory, which may be NaN (PyTorch issue 172439)."""

    class Garbage(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            gradient[1] = float("nan")
            return gradient

    weight = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)  # expert 1 has no rows
    (Garbage.apply(zero_idle(weight, ends)) ** 2).sum().backward()
    assert torch.equal(weight.grad[[0, 2]], 2 * weight.detach()[[0, 2]]) and weight.grad[1].abs().max() == 0
