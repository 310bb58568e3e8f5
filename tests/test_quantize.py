import copy
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from minutegpt import quantize as Q
from model import GPT, GPTConfig


def by_hand(row, format, matrix):
    """One row of a matrix, weight by weight in plain Python -> integers, scales, rounded values."""
    bits = 8 if format == "int8" else 4
    G = len(row)
    if format != "int8":
        G = 64
        while len(row) % G:
            G //= 2
    numbers, scales, values = [], [], []
    for first in range(0, len(row), G):
        group = row[first : first + G]
        largest = max([w for r in matrix for w in r] if format == "int4-tensor" else group, key=abs)
        (exact,) = struct.unpack("<I", struct.pack("<f", largest / -(2 ** (bits - 1))))
        (scale,) = struct.unpack("<f", struct.pack("<I", exact & 0xFFFF0000))  # the upper half of a float is a bfloat16
        scale = scale or 1.0
        scales.append(scale)
        for w in group:
            exact = torch.tensor(w / scale, dtype=torch.float32).item()  # as torch divides
            numbers.append(min(max(round(exact), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1))  # both round half to even
            values.append(numbers[-1] * scale)
    return numbers, scales, values


def tiny(**settings):
    torch.manual_seed(0)
    defaults = dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=64, bias=True)
    model = GPT(GPTConfig(**(defaults | settings))).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)  # biases and norms that are not 0 and 1
    return model


@pytest.mark.parametrize("format", list(Q.FORMATS))
@pytest.mark.parametrize("C", [1, 2, 7, 32, 64, 96, 128, 192])
def test_quantize_against_plain_python(format, C):
    torch.manual_seed(C)
    w = torch.randn(5, C) * torch.tensor([1.0, 1e-3, 100.0, -5.0, 0.0])[:, None]
    q, scale = Q.quantize(w, format)
    assert q.dtype == torch.int8 and q.shape == w.shape and scale.dtype == torch.bfloat16
    for row, numbers, scales, values in zip(w, q, scale, Q.dequantize(q, scale), strict=True):
        expected = by_hand(row.tolist(), format, w.tolist())
        assert numbers.tolist() == expected[0] and scales.tolist() == expected[1]
        assert values.tolist() == pytest.approx(expected[2], rel=1e-6)


@pytest.mark.parametrize("format, step, most", [("int8", 1 / 128, 2.1), ("int4", 1 / 8, 1.1)])
def test_the_error_of_a_weight_is_at_most_half_a_step(format, step, most):
    """More only at the ends of the range: one end has one integer less, and the cut scale clips both."""
    torch.manual_seed(0)
    w = torch.randn(50, 128)
    error = (Q.dequantize(*Q.quantize(w, format)) - w).abs().unflatten(1, (-1, 64 if format == "int4" else 128))
    largest = w.abs().unflatten(1, (-1, 64 if format == "int4" else 128)).amax(-1, keepdim=True)
    assert (error <= largest * step * most).all()
    assert (error <= largest * step * 0.51).float().mean() > 0.97


@pytest.mark.parametrize("format", Q.FORMATS)
@pytest.mark.parametrize("C", [*range(1, 10), 63, 64, 65])
def test_a_matrix_of_any_width_comes_back_from_its_packed_form(format, C):
    torch.manual_seed(C)
    w = torch.randn(6, C)
    again = Q.unpack(Q.pack({"w": w}, format))["w"]
    assert torch.equal(again, w if C == 1 and format != "int8" else Q.dequantize(*Q.quantize(w, format)))


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_nibbles_are_packed_and_unpacked(rows, C, seed):
    q = torch.randint(-8, 8, (rows, C), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = Q.pack_nibbles(q)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, (C + 1) // 2)
    assert torch.equal(Q.unpack_nibbles(packed)[:, :C], q)


@pytest.mark.parametrize("format, most", [("int8", 1 / 3.9), ("int4", 1 / 7.4), ("int4-tensor", 1 / 7.4)])
@pytest.mark.parametrize("tie", [True, False])
def test_a_packed_state_is_small_and_complete(format, most, tie, tmp_path):
    model = tiny(n_embd=128, vocab_size=500, tie=tie)
    packed = Q.pack(model.state_dict(), format)
    torch.save(model.state_dict(), tmp_path / "float.pt")
    torch.save(packed, tmp_path / "packed.pt")
    n_bytes = sum(w.nbytes for w in {w.data_ptr(): w for w in packed.values()}.values())
    assert n_bytes < most * sum(p.nbytes for p in model.parameters()) + 12_000  # biases and norms stay float32
    assert (tmp_path / "packed.pt").stat().st_size < n_bytes + 20_000  # a tied matrix is written once
    weights = Q.unpack(packed)
    assert list(weights) == list(model.state_dict())
    for name, w in model.state_dict().items():
        if w.ndim < 2:
            assert weights[name] is packed[name] and torch.equal(w, weights[name])
        else:
            assert torch.equal(weights[name], Q.dequantize(*Q.quantize(w, format)))
    assert Q.unpack(model.state_dict()).keys() == model.state_dict().keys()


@pytest.mark.parametrize("C", [5, 6, 64, 100])
@pytest.mark.parametrize("format", ["int4", "int4-tensor"])
def test_any_width_is_packed_and_unpacked(format, C):
    w = torch.randn(3, C)
    three = torch.randn(2, 3, C)  # the experts' matrices are stacked
    weights = Q.unpack(Q.pack({"a.weight": w, "b.weight": three}, format))
    assert torch.equal(weights["a.weight"], Q.dequantize(*Q.quantize(w, format)))
    assert torch.equal(weights["b.weight"][1], Q.dequantize(*Q.quantize(three[1], format)))  # every expert separately


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.pop("w.scale"),
        lambda p: p.update({"w.scale": torch.ones(4, 3, dtype=torch.bfloat16)}),  # 128 / 3
        lambda p: p.update({"w.scale": torch.ones(3, 2)}),
        lambda p: p.update({"w.scale": torch.ones(4, 0)}),
        lambda p: p.update({"w.scale": torch.ones(4)}),
        lambda p: p.update({"w.scale": torch.ones(4, 2, dtype=torch.int64)}),
        lambda p: p.update({"w.int4": torch.ones(4, 64)}),
        lambda p: p.update({"w.int4": torch.ones(4, 0, dtype=torch.uint8)}),
        lambda p: p.update({"w.int4": torch.ones(64, dtype=torch.uint8)}),
        lambda p: p.update({"w.scale": torch.ones(4, 1000)}),
    ],
)
def test_integers_and_scales_that_do_not_fit_together_raise_an_error(change):
    packed = Q.pack({"w": torch.randn(4, 128)}, "int4")
    change(packed)
    with pytest.raises(ValueError, match=r"w\.int4"):
        Q.unpack(packed)


def reference(model, format):
    """The same model with every matrix rounded, in float32. The quantized model must compute the same."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.copy_(torch.tensor([by_hand(row, format, p.tolist())[2] for row in p.tolist()]))
    return model


@pytest.mark.parametrize("format", list(Q.FORMATS))
@pytest.mark.parametrize(
    "settings", [{}, dict(tie=False, bias=False), dict(pos="rope", norm="rmsnorm", qk_norm=True, n_kv_head=1)]
)
@torch.no_grad()
def test_quantized_model_against_rounded_weights(format, settings):
    model = tiny(**settings)
    expected = reference(model, format)
    Q.quantize_model(model, format)
    idx = torch.randint(65, (3, 32))
    torch.testing.assert_close(model(idx)[0], expected(idx)[0], atol=1e-4, rtol=1e-4)  # 96 rows: floats
    few, exact = model(idx[:1, :5])[0], expected(idx[:1, :5])[0]  # 5 rows: the kernel, bfloat16 inside
    assert 0 < (few - exact).norm() < 0.02 * exact.norm()
    for name, w in expected.state_dict().items():  # biases are kept, tied weights are one
        module, _, attribute = name.rpartition(".")
        torch.testing.assert_close(getattr(model.get_submodule(module), attribute), w)
    assert model.generate(idx[:, :4], 40, temperature=0).shape == (3, 44)
    assert (model.transformer.wte.q.data_ptr() == model.lm_head.q.data_ptr()) == model.config.tie


@torch.no_grad()
def test_quantized_model_in_bfloat16_and_autocast():
    model = tiny()
    exact = reference(model, "int4")
    Q.quantize_model(model, "int4")
    idx = torch.randint(65, (2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(idx)[0] - exact(idx)[0]).norm() < 0.02 * exact(idx)[0].norm()
    before = model.lm_head.weight
    model.to(torch.bfloat16)
    assert model.transformer.wte(idx).dtype == model.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.lm_head.weight.float(), before, rtol=0.01, atol=0)
    logits = model(idx)[0]
    assert (logits - exact(idx)[0]).norm() < 0.05 * exact(idx)[0].norm()
    assert model.generate(idx, 4).shape == (2, 12)
    late = tiny().to(torch.bfloat16)  # the other order
    Q.quantize_model(late, "int4")
    assert late.transformer.wte(idx).dtype == late.lm_head.weight.dtype == torch.bfloat16
    assert (late(idx)[0] - exact(idx)[0]).norm() < 0.1 * exact(idx)[0].norm()


@pytest.mark.parametrize("format", list(Q.FORMATS))
@pytest.mark.parametrize("shape", [(65, 64), (50, 128), (257, 192), (16, 320), (7, 96), (3, 40), (64, 63)])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_kernel_against_plain_product(format, shape, rows):
    torch.manual_seed(1)
    q, scale = Q.quantize(torch.randn(shape), format)
    bias = torch.randn(shape[0])
    linear = Q.QuantizedLinear(Q.pack_nibbles(q) if format != "int8" else q, scale.float(), bias)
    x = torch.randn(rows, 1, shape[1]).bfloat16().float()
    y = linear(x)
    w = [
        [n * s for n, s in zip(a, b.repeat_interleave(shape[1] // len(b)).tolist(), strict=True)]
        for a, b in zip(q.tolist(), scale.float(), strict=True)
    ]
    expected = x @ torch.tensor(w).T + bias
    assert y.shape == expected.shape and (y - expected).norm() < 0.01 * expected.norm()


def test_without_kernels_the_result_is_the_same(monkeypatch):
    model = tiny()
    Q.quantize_model(model, "int8")
    fast = model(torch.zeros(1, 4, dtype=torch.long))[0]
    monkeypatch.setattr(Q, "kernels_work", lambda: False)
    model = tiny()
    Q.quantize_model(model, "int8")
    slow = model(torch.zeros(1, 4, dtype=torch.long))[0]
    assert not model.lm_head.has_kernel()
    assert (fast - slow).norm() < 0.02 * slow.norm()


@pytest.mark.parametrize("format", list(Q.FORMATS))
def test_a_packed_file_loads_as_the_same_model(tmp_path, format):
    model = tiny()
    torch.save(Q.pack(model.state_dict(), format), tmp_path / "packed.pt")
    packed = torch.load(tmp_path / "packed.pt", weights_only=True)
    assert Q.packed_format(packed) == format and Q.packed_format(model.state_dict()) == ""
    read = GPT(model.config).eval()
    read.load_state_dict(Q.unpack(packed))
    Q.quantize_model(read, Q.packed_format(packed))
    Q.quantize_model(model, format)
    idx = torch.randint(65, (2, 32))
    assert torch.equal(read(idx)[0], model(idx)[0]) and torch.equal(read(idx[:1, :4])[0], model(idx[:1, :4])[0])


@pytest.mark.parametrize("format", list(Q.FORMATS))
def test_quantizing_twice_changes_nothing(format):
    torch.manual_seed(0)
    w = torch.cat(
        (torch.randn(2000, 64), torch.randn(500, 64) ** 3, torch.randint(-9, 9, (500, 64)) / 8, torch.zeros(1, 64))
    )
    q, scale = Q.quantize(w, format)
    again, same = Q.quantize(Q.dequantize(q, scale), format)
    assert torch.equal(q, again) and torch.equal(scale, same)


# -- quantization-aware training


@pytest.mark.parametrize("format", list(Q.FORMATS))
def test_fake_quantization_computes_the_same_as_the_quantized_model(format):
    model = tiny()
    trained = copy.deepcopy(model)
    Q.fake_quantize(model, format)
    Q.quantize_model(trained, format)
    idx = torch.randint(65, (3, 32))
    torch.testing.assert_close(model(idx)[0], trained(idx)[0], atol=1e-5, rtol=1e-5)


def test_gradient_passes_straight_through_by_hand():
    """The gradient of the loss at the rounded weights is that of the float weights."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 3)
    x, target = torch.randn(5, 64), torch.randn(5, 3)
    rounded = torch.tensor([by_hand(row, "int4", None)[2] for row in linear.weight.tolist()], requires_grad=True)
    bias = linear.bias.detach().clone().requires_grad_()
    F.mse_loss(F.linear(x, rounded, bias), target).backward()
    w = linear.weight
    Q.fake_quantize(linear, "int4")
    F.mse_loss(linear(x), target).backward()
    torch.testing.assert_close(w.grad, rounded.grad)
    torch.testing.assert_close(linear.bias.grad, bias.grad)
    assert w.grad.abs().max() > 0


def test_fake_quantization_keeps_parameters_and_names():
    model = tiny()
    before = {name: p for name, p in model.named_parameters()}
    names = list(model.state_dict())
    Q.fake_quantize(model, "int8")
    assert {id(p) for p in model.parameters()} == {id(p) for p in before.values()}
    plain = Q.plain_names(model.state_dict())
    assert sorted(plain) == sorted(names)
    for name, p in before.items():
        assert torch.equal(plain[name], p)
    assert model.n_params() == tiny().n_params() and model.flops_per_token() == tiny().flops_per_token()
    fresh = tiny()
    fresh.load_state_dict(plain)
    tied = model.transformer.wte.parametrizations.weight.original
    assert tied is model.lm_head.parametrizations.weight.original is before["transformer.wte.weight"]
    assert Q.plain_names(fresh.state_dict()).keys() == fresh.state_dict().keys()


@pytest.mark.slow
def test_compiled_training_sees_the_same_rounding():
    """A compiler that keeps the scales in float32 instead of bfloat16 would round differently."""
    model = tiny()
    Q.fake_quantize(model, "int4")
    idx = torch.randint(65, (4, 33))
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    _, compiled = torch.compile(model)(idx[:, :-1], idx[:, 1:])
    compiled.backward()
    assert compiled.item() == pytest.approx(loss.item(), abs=2e-5)
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).norm() < 1e-3 * gradients[name].norm() + 1e-7


def test_quantization_aware_training_beats_rounding_afterwards():
    """A small task, learned in float. Then more steps in float and rounding, or more steps with fake quantization."""
    torch.manual_seed(0)
    idx = torch.randint(17, (16, 1))
    for _ in range(15):
        idx = torch.cat((idx, (idx[:, -1:] * 3 + idx[:, max(0, idx.size(1) - 2), None] + 1) % 17), dim=1)
    base = GPT(GPTConfig(block_size=16, vocab_size=17, n_layer=1, n_head=2, n_embd=64))

    def train(model, steps, lr):
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            model(idx[:, :-1], idx[:, 1:])[1].backward()
            optimizer.step()

    def rounded_loss(model):
        fresh = GPT(model.config)
        fresh.load_state_dict(Q.plain_names(model.state_dict()))
        exact = fresh(idx[:, :-1], idx[:, 1:])[1].item()
        Q.quantize_model(fresh, "int4")
        with torch.no_grad():
            return fresh(idx[:, :-1], idx[:, 1:])[1].item(), exact

    train(base, 60, 5e-3)
    further, aware = base, copy.deepcopy(base)
    Q.fake_quantize(aware, "int4")
    train(further, 40, 1e-3)
    train(aware, 40, 1e-3)
    after, exact = rounded_loss(further)
    with_qat, _ = rounded_loss(aware)
    assert exact < math.log(17) and after > exact
    assert with_qat < after
