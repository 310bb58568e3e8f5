"""The optimizers against PyTorch's, a singular value decomposition, and their formulas in numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
from harness import optimizers_of
from torch import nn

from minutegpt.errors import UserError
from minutegpt.optim import Muon, lr_scale, orthogonalize, set_lr
from model import GPT, GPTConfig

SHAPES = [(32, 32), (48, 16), (16, 48), (1, 8), (8, 1)]


def quintic(x: np.ndarray, steps: int = 5) -> np.ndarray:
    """What the iteration does to each singular value, as a function of one number."""
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def orthogonalized(g: np.ndarray) -> np.ndarray:
    """The same from the singular value decomposition: only the singular values change."""
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    return u @ np.diag(quintic(s / (np.linalg.norm(g) + 1e-7))) @ vt


def tiny(**settings) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 16, **settings}))


def backward(model: GPT, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (4, model.config.block_size + 1), generator=generator)
    loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    loss.backward()
    return loss.detach()


# -- Newton-Schulz


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_changes_the_singular_values_only(shape):
    g = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one, got in zip(g.numpy(), orthogonalize(g).numpy(), strict=True):
        np.testing.assert_allclose(got, orthogonalized(one), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6])
def test_orthogonalize_brings_every_direction_near_one(scale):
    """Whatever the size of the gradient, unless it is small compared with the guard against division by zero."""
    g = scale * torch.randn(4, 64, 24, generator=torch.Generator().manual_seed(2))
    s = torch.linalg.svdvals(orthogonalize(g))
    if scale < 1e-7:
        assert s.max() < 1.3  # it may only become smaller
    else:
        assert s.min() > 0.6 and s.max() < 1.3


def test_orthogonalize_of_zero_is_zero():
    assert orthogonalize(torch.zeros(2, 4, 6)).abs().max() == 0


def test_orthogonalize_in_bfloat16_is_near_float32():
    g = torch.randn(2, 96, 32, generator=torch.Generator().manual_seed(3))
    exact, rough = orthogonalize(g), orthogonalize(g.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (exact - rough.float()).norm() / exact.norm() < 0.06  # a few roundings of 2^-8 each


# -- Muon


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_follows_its_formula(weight_decay):
    """Four steps on matrices of three shapes (two share one), in float64, against numpy and its decomposition."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(12, 6), (6, 12), (12, 6), (9, 9)]
    params = [nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator)) for shape in shapes]
    optimizer = Muon(params, lr=0.05, momentum=0.9, weight_decay=weight_decay, ns_dtype=torch.float64)
    expected = [p.detach().numpy().copy() for p in params]
    momentum = [np.zeros(shape) for shape in shapes]
    for _ in range(4):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator)
            g = p.grad.numpy()
            momentum[i] = 0.9 * momentum[i] + 0.1 * g
            update = orthogonalized(0.1 * g + 0.9 * momentum[i])  # Nesterov: a step ahead
            rows, columns = p.shape
            expected[i] = (1 - 0.05 * weight_decay) * expected[i] - 0.05 * math.sqrt(max(1, rows / columns)) * update
        optimizer.step()
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), e, atol=1e-8)


def test_muon_is_torchs_muon():
    """In bfloat16, which torch.optim.Muon always uses: the same change of the weights, up to rounding."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(96, 32), (32, 128), (96, 32), (32, 8)]
    start = [torch.randn(*shape, generator=generator) for shape in shapes]
    params, torch_params = ([nn.Parameter(s.clone()) for s in start] for _ in range(2))
    optimizers = [
        Muon(params, lr=0.02, momentum=0.95, weight_decay=0.1, ns_dtype=torch.bfloat16),
        torch.optim.Muon(torch_params, lr=0.02, momentum=0.95, weight_decay=0.1),
    ]
    for _ in range(5):
        for p, q in zip(params, torch_params, strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    for p, q, s in zip(params, torch_params, start, strict=True):
        change, torch_change = p.detach() - s, q.detach() - s
        assert change.norm() > 0.1  # the weights did move
        assert (change - torch_change).norm() / torch_change.norm() < 0.02, p.shape


def test_muon_leaves_a_parameter_without_gradient():
    still, moving = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    moving.grad = torch.randn(4, 4)
    Muon([still, moving], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(still.detach(), torch.ones(4, 4))
    assert not torch.equal(moving.detach(), torch.ones(4, 4))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_saved_state_continues_to_the_same_bits(name):
    """Six steps give the same weights as three steps, a save, and three steps of new optimizers that load it."""
    results = []
    for cut in (False, True):
        model = tiny()
        optimizers = optimizers_of(model, name)
        for step in range(6):
            if cut and step == 3:
                saved = [optimizer.state_dict() for optimizer in optimizers]
                optimizers = optimizers_of(model, name)
                for optimizer, state in zip(optimizers, saved, strict=True):
                    optimizer.load_state_dict(state)
            backward(model, seed=step)
            set_lr(optimizers, 1 - step / 6)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


# -- the groups


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_adamw_decays_matrices_only(tie, bias):
    model = tiny(tie=tie, bias=bias)
    (optimizer,) = optimizers_of(model, "adamw", weight_decay=0.25)
    decayed, rest = optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    # nanoGPT's rule and its order: its checkpoints' optimizer state is matched by position
    named = [p for _, p in model.named_parameters()]
    assert [id(p) for p in decayed["params"]] == [id(p) for p in named if p.dim() >= 2]
    assert [id(p) for p in rest["params"]] == [id(p) for p in named if p.dim() < 2]


@pytest.mark.parametrize(
    "settings", [{}, {"tie": False, "bias": True}, {"norm": "rmsnorm", "pos": "rope", "tie": False}]
)
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(settings):
    model = tiny(**settings)
    adamw, muon = optimizers_of(model, "muon", dtype=torch.bfloat16)
    assert isinstance(muon, Muon) and muon.ns_dtype == torch.bfloat16
    name_of = {id(p): name for name, p in model.named_parameters()}
    taken = [[name_of[id(p)] for group in opt.param_groups for p in group["params"]] for opt in (adamw, muon)]
    assert sorted(taken[0] + taken[1]) == sorted(name_of.values())  # every parameter once
    assert len(taken[1]) == 4 * model.config.n_layer  # two of attention, two of the MLP
    assert all(name.startswith("transformer.h.") and name.endswith("weight") for name in taken[1])


def test_frozen_parameters_are_left_out():
    model = tiny()
    model.transformer.h[0].requires_grad_(False)
    adamw, muon = optimizers_of(model, "muon")
    frozen = {id(p) for p in model.transformer.h[0].parameters()}
    assert not any(id(p) in frozen for opt in (adamw, muon) for group in opt.param_groups for p in group["params"])


def test_adamw_follows_its_formula():
    """Three steps of the fused kernel against Loshchilov and Hutter's update (arXiv 1711.05101) in numpy."""
    model = tiny(bias=True)
    (optimizer,) = optimizers_of(model, learning_rate=0.01, beta1=0.8, beta2=0.95)
    expected = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    m = {name: np.zeros_like(e) for name, e in expected.items()}
    v = {name: np.zeros_like(e) for name, e in expected.items()}
    for t in range(1, 4):
        optimizer.zero_grad()
        backward(model, seed=t)
        for name, p in model.named_parameters():
            g = p.grad.double().numpy()
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            expected[name] *= 1 - 0.01 * (0.1 if p.ndim >= 2 else 0)
            expected[name] -= 0.01 * (m[name] / (1 - 0.8**t)) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
        optimizer.step()
    for name, p in model.named_parameters():
        # where a gradient is nearly zero its sign is rounding: key biases do not change attention at all
        close = np.isclose(p.detach().numpy(), expected[name], atol=1e-5)
        assert close.mean() > (0.6 if name.endswith("c_attn.bias") else 0.999), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_both_learn(name):
    model = tiny(tie=False)
    optimizers = optimizers_of(model, name, learning_rate=3e-3)
    first = last = backward(model)
    for _ in range(60):
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        last = backward(model)
    assert last < 0.5 * first


# -- schedules


def test_set_lr_keeps_the_proportions():
    optimizers = optimizers_of(tiny(), "muon", learning_rate=3e-3, muon_lr=0.02)
    for fraction in (0.5, 0.0, 1.0):  # from zero it comes back
        set_lr(optimizers, fraction)
        got = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert got == [3e-3 * fraction, 3e-3 * fraction, 0.02 * fraction]


def test_cosine_is_nanogpts():
    """Its get_lr after the warmup, with learning_rate 1e-3, min_lr 1e-4, decay from step 100 to 5000."""
    for step in (100, 101, 800, 2550, 4999, 5000, 9000):
        ratio = min(1.0, (step - 100) / (5000 - 100))
        nanogpt = 1e-4 + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (1e-3 - 1e-4)
        assert 1e-3 * lr_scale("cosine", (step - 100) / 4900, min_scale=0.1) == pytest.approx(nanogpt)


def test_linear_stays_then_falls_straight():
    values = [lr_scale("linear", done, 0.0, 0.5) for done in (0, 0.25, 0.5, 0.75, 1.0, 1.5)]
    assert values == pytest.approx([1, 1, 1, 0.5, 0, 0])
    assert lr_scale("linear", 0.75, min_scale=0.2, decay_fraction=0.5) == pytest.approx(0.6)
    assert [lr_scale("linear", done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedules_never_rise(kind):
    values = [lr_scale(kind, done / 100, 0.1, 0.6) for done in range(130)]
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert values[0] == 1 and values[-1] == pytest.approx(0.1)


def test_a_constant_rate_is_constant():
    assert [lr_scale("constant", done / 10, 0.1, 0.6) for done in range(15)] == [1.0] * 15


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match="--optimizer=sgd is not one of adamw, muon"):
        optimizers_of(tiny(), "sgd")


# -- n-gram tables


def test_ngram_tables_have_a_separate_weight_decay():
    model = tiny(ngram=3, ngram_rows=50, norm="rmsnorm", pos="rope", tie=False)
    backward(model)
    optimizers = optimizers_of(model, "muon", learning_rate=0.01, weight_decay=0.0, ngram_weight_decay=5.0)
    tables = list(model.transformer.ngrams.parameters())
    with torch.no_grad():
        for table in tables:
            table.fill_(1.0)
            table.grad = torch.zeros_like(table)  # no gradient: only the decay changes them
    embedding = model.transformer.wte.weight.detach().clone()
    model.transformer.wte.weight.grad = torch.zeros_like(embedding)
    for optimizer in optimizers:
        optimizer.step()
    for table in tables:
        torch.testing.assert_close(table, torch.full_like(table, 1 - 0.01 * 5.0))
    assert torch.equal(model.transformer.wte.weight, embedding)  # weight_decay is 0
    assert sum(p is t for g in optimizers[0].param_groups for p in g["params"] for t in tables) == len(tables)
