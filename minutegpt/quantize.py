"""Weights in 8 or 4 bits: smaller files, faster decoding, and training that expects the rounding.

A group of weights shares one scale, and each weight is a small whole number of scales: w ~ q * scale. int8 has a
group for each output channel (a row of the matrix), int4 one for every 64 weights of a row. int4-tensor has one
for the whole matrix, the textbook's "per tensor": there rounding hurts, and training for it pays (measured in
config/shakespeare_fast.py). All matrices are quantized; biases and norm weights, a thousandth of the model, are not.
Nothing here is known to model.py: layers are replaced, or parametrized, from outside.

    quantize_model(model, "int8")           # in place, after training: sample.py, evaluate.py
    pack(model.state_dict(), "int4")        # for a file of about an eighth the size: export.py
    fake_quantize(model, "int4")            # quantization-aware training: train.py's qat

Measured on one thread of a 2-core Zen 4 CPU, the matrices of GPT-2 124M times one row: float32 38 ms, bfloat16 22, int8
19, int4 9. torchao 0.18 on torch 2.15: int8 18 ms, but only compiled (32 as it is); its int4 asks for a GPU's kernels.
So the kernels that PyTorch itself has are called here, in a few lines and without one more package.
Whole, on 2 cores with AVX2, batch 1 (bench.py), tokens/s as it is and compiled: float32 27 and 58, bfloat16 - and 74,
int8 54 and 116.

Sources: symmetric rounding with the full range, as llama.cpp's Q4_0 and Q8_0; the straight-through estimator,
Bengio et al. (arXiv 1308.3432); fake quantization in training, Jacob et al. (arXiv 1712.05877).
"""

import functools
import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

# bits a weight; weights that share a scale, 0 for a whole row; whether all groups of a matrix share one
FORMATS = {"int8": (8, 0, False), "int4": (4, 64, False), "int4-tensor": (4, 64, True)}
KERNEL_ROWS = 64  # up to here the kernels beat making floats first (measured on 2 CPU cores, 768 x 3072)


def quantize(w: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """w (..., C) -> q int8 (..., C) and scale bfloat16 (..., C / G), with w ~ q * scale, G weights to a scale.

    The weight of largest size in a group becomes the lowest number, -8 of -8..7: its sign goes into the scale, so
    that no number is left unused. Where 64 does not divide C, G is the largest power of two that does. int4-tensor
    writes the matrix's one scale for each of int4's groups.

    >>> quantize(torch.tensor([[2.0, -4.0, 1.0, 0.1]]), "int4")  # scale 0.5
    (tensor([[ 4, -8,  2,  0]], dtype=torch.int8), tensor([[0.5000]], dtype=torch.bfloat16))
    """
    bits, together, one = FORMATS[format]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = w.detach().float().unflatten(-1, (-1, math.gcd(w.size(-1), together) if together else w.size(-1)))
    least, most = groups.aminmax(dim=-1, keepdim=True)  # (..., C/G, 1) each
    if one:
        least = least.amin(dim=(-3, -2), keepdim=True).expand_as(least)
        most = most.amax(dim=(-3, -2), keepdim=True).expand_as(most)
    largest = least.where(least.abs() >= most.abs(), most)
    # to bfloat16 by cutting its bits: torch.compile skips a cast that is undone, and what is used must be what is
    # stored. Cut and not rounded, so that the largest weight is the lowest number and a second time changes nothing
    scale = ((largest / low).view(torch.int32) & ~0xFFFF).view(torch.float32)
    scale = scale.where(scale != 0, 1)  # a group of zeros
    q = (groups / scale).round().clamp(low, high)
    return q.to(torch.int8).flatten(-2), scale.squeeze(-1).bfloat16()


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """q (..., C), scale (..., C / G) -> the weights they stand for, float32 (..., C)."""
    groups = q.unflatten(-1, (scale.size(-1), -1)) * scale.float().unsqueeze(-1)  # (..., C/G, G)
    return groups.flatten(-2)


def pack_nibbles(q: Tensor) -> Tensor:
    """q int8 (..., C), each in -8..7 -> uint8 (..., ceil(C / 2)): the even columns in the low four bits."""
    q = F.pad(q, (0, q.size(-1) % 2)).view(torch.uint8)
    return (q[..., ::2] & 15) | (q[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The reverse, int8 (..., 2 * bytes)."""
    q = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).view(torch.int8)
    return (q ^ 8) - 8  # four bits, two's complement


def restore(q: Tensor, scale: Tensor) -> Tensor:
    """`dequantize` of what a file holds: int8 as it is, int4 packed in uint8."""
    if q.dtype == torch.uint8:
        q = unpack_nibbles(q)
        if scale.size(-1) == q.size(-1) - 1:
            q = q[..., :-1]  # an odd C, with a scale for each weight, was padded
    return dequantize(q, scale)


def pack(weights: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    """A state dict with each matrix NAME as NAME.int8 (or NAME.int4, ...), and NAME.scale. Tied weights stay tied."""
    packed: dict[str, Tensor] = {}
    done: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
    for name, w in weights.items():
        if w.ndim < 2:
            packed[name] = w
            continue
        key = (w.data_ptr(), w.shape)
        if key not in done:
            q, scale = quantize(w, format)
            done[key] = (pack_nibbles(q) if FORMATS[format][0] == 4 else q, scale)
        packed[f"{name}.{format}"], packed[f"{name}.scale"] = done[key]
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that `packed` stands for, in float32; one that is not packed comes back as it is.

    Raises ValueError where numbers and scales do not fit together.
    """
    weights = {}
    for name, w in packed.items():
        stem, _, kind = name.rpartition(".")
        if kind in FORMATS:
            scale = packed.get(f"{stem}.scale", torch.empty(0))
            fits = scale.ndim == w.ndim > 1 and scale.shape[:-1] == w.shape[:-1] and w.numel() and scale.numel()
            if not fits or w.dtype not in (torch.int8, torch.uint8) or not scale.is_floating_point():
                raise ValueError(f"{name} {tuple(w.shape)} and its scales {tuple(scale.shape)} do not fit together")
            try:
                weights[stem] = restore(w, scale)
            except RuntimeError as error:  # the groups do not divide the row
                raise ValueError(f"{name} {tuple(w.shape)} and its scales {tuple(scale.shape)}: {error}") from error
        elif not (kind == "scale" and any(f"{stem}.{format}" in packed for format in FORMATS)):
            weights[name] = w
    return weights


def packed_format(weights: dict[str, Tensor]) -> str:
    """The format that a state dict is packed in; "" where it is not."""
    return next((kind for name in weights if (kind := name.rpartition(".")[2]) in FORMATS), "")


class QuantizedEmbedding(nn.Module):
    """nn.Embedding with its weight as numbers and scales: only the rows that are looked up become floats."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.q: Tensor
        self.scale: Tensor
        self.register_buffer("q", q)  # int8 (N, C), or packed uint8 (N, C / 2)
        self.register_buffer("scale", scale)  # (N, C / G), in the model's dtype, which is so the layer's

    @property
    def weight(self) -> Tensor:
        return restore(self.q, self.scale).to(self.scale.dtype)

    def forward(self, idx: Tensor) -> Tensor:
        return restore(self.q[idx], self.scale[idx]).to(self.scale.dtype)


class QuantizedLinear(QuantizedEmbedding):
    """nn.Linear with its weight as numbers and scales.

    For a few rows of x, reading the weights takes the time, and a kernel reads them small; for many, arithmetic
    does, and they become floats first. The kernel rounds x to bfloat16, as autocast would.
    """

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__(q, scale)
        self.bias = bias
        self.kernel_form: tuple[Tensor, Tensor] | None = None
        self.laid_out = False

    def forward(self, x: Tensor) -> Tensor:
        # asked first, so that it is decided before a compiler traces a decoding step: there is a prefill before it
        if x.device.type != "cpu" or not self.has_kernel() or x.numel() // x.size(-1) > KERNEL_ROWS:
            return F.linear(x, self.weight, self.bias)
        assert self.kernel_form is not None
        rows = x.reshape(-1, x.size(-1)).bfloat16().contiguous()
        y = product(rows, *self.kernel_form)[:, : len(self.scale)]
        y = y.reshape(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def has_kernel(self) -> bool:
        """Lays the weights out for the kernel, once. False where there is none for this machine or this shape."""
        if not self.laid_out:
            self.laid_out = True
            self.kernel_form = kernel_form(self.q, self.scale) if kernels_work() else None
        return self.kernel_form is not None


def kernel_form(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """Numbers and scales as PyTorch's kernels for the CPU take them; None where they do not take this shape."""
    if q.dtype == torch.int8:  # torch 2.15 reads past the row's end where 16 does not divide C: noise, or a crash
        return (q, scale[:, 0].bfloat16()) if scale.size(1) == 1 and q.size(1) % 32 == 0 else None
    if q.size(1) * 2 / scale.size(1) not in (32, 64, 128, 256):
        return None
    more = -len(q) % 64  # rows come in blocks
    numbers = F.pad(unpack_nibbles(q).int() + 8, (0, 0, 0, more))
    scale = F.pad(scale, (0, 0, 0, more)).T.bfloat16()  # (C / G, N)
    zeros = torch.zeros_like(scale)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    return packed, torch.stack((scale, zeros), dim=-1)  # (C / G, N, 2)


def product(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (rows, C) bfloat16 times the weights in kernel form -> (rows, N or more) bfloat16."""
    if scale.ndim == 1:
        return torch._weight_int8pack_mm(x, q, scale)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, q, x.size(1) // len(scale), scale)


@functools.cache
def kernels_work() -> bool:
    """Whether this PyTorch has both kernels and they compute what they should: they are not in its promised API."""
    try:
        x, w = torch.eye(128), torch.linspace(-1, 1, 80 * 128).sin().view(80, 128)
        for format in FORMATS:
            q, scale = quantize(w, format)
            form = kernel_form(pack_nibbles(q) if FORMATS[format][0] == 4 else q, scale)
            assert form
            torch.testing.assert_close(
                product(x.bfloat16(), *form)[:, :80].float(), dequantize(q, scale).T, atol=0.01, rtol=0.01
            )
    except Exception:
        return False
    return True


@torch.no_grad()
def quantize_model(model: nn.Module, format: str) -> None:
    """Quantizes a trained model in place, for evaluation and sampling, in a format of FORMATS.

    Embedding and linear layers compute with the small weights; any other matrix (the learned positions, say) takes
    the values that its numbers stand for. What `unpack` gave comes out in the very same numbers.
    """
    packed = pack(model.state_dict(), format)
    model.load_state_dict(unpack(packed))
    for name, module in list(model.named_modules()):
        if name.endswith("wpe") or f"{name}.weight.{format}" not in packed:  # the model slices its positions itself
            continue
        q, scale = packed[f"{name}.weight.{format}"], packed[f"{name}.weight.scale"].to(module.weight.dtype)
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(q, scale, module.bias))
        elif isinstance(module, nn.Embedding):
            setattr(model.get_submodule(parent), leaf, QuantizedEmbedding(q, scale))


class FakeQuantize(nn.Module):
    """w -> the values that its numbers and scales stand for. The gradient passes straight through the rounding,
    whose own derivative, zero almost everywhere, would teach nothing."""

    def __init__(self, format: str) -> None:
        super().__init__()
        self.format = format

    def forward(self, w: Tensor) -> Tensor:
        return dequantize(*quantize(w, self.format)).to(w.dtype) + (w - w.detach())


def fake_quantize(model: nn.Module, format: str) -> None:
    """Quantization-aware training: from here on every use of a matrix sees it rounded, and training moves the
    float weights behind it. The parameters stay the same objects (tied ones too); `plain_names` undoes the names.
    """
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if p.ndim >= 2:
                parametrize.register_parametrization(module, name, FakeQuantize(format))


def plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a model under `fake_quantize` with the names it had before: NAME.parametrizations.weight.original
    is NAME.weight."""
    return {re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name): w for name, w in weights.items()}
