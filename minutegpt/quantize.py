"""Quantization: weights in 8 or 4 bits, for smaller files and faster decoding, and training for it (QAT).

    quantize_model(model, "int8")           # in place, after training: sample.py, evaluate.py
    pack(model.state_dict(), "int4")        # for a file of about an eighth of the size: export.py
    fake_quantize(model, "int4")            # quantization-aware training: the setting qat of train.py

A group of weights shares one scale, and each weight is a small integer times that scale: w ~ q * scale.

    format        bits   weights that share a scale
    int8          8      one row of the matrix (an output channel)
    int4          4      64 weights of a row
    int4-tensor   4      the whole matrix ("per tensor"): the largest rounding errors

All matrices are quantized, biases and norm weights are not. model.py does not know about it: layers are replaced, or
parametrized, from outside. On a CPU the products use kernels that PyTorch has, so no other package is needed.

Sources: symmetric rounding with the full range, as in llama.cpp's Q4_0 and Q8_0; the straight-through estimator,
Bengio et al. (arXiv 1308.3432); fake quantization in training, Jacob et al. (arXiv 1712.05877).
"""

import functools
import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

# bits per weight; weights per scale, 0 = a whole row; whether all groups of a matrix share one scale
FORMATS = {"int8": (8, 0, False), "int4": (4, 64, False), "int4-tensor": (4, 64, True)}
KERNEL_ROWS = 64  # up to this many rows of x the kernels are faster than dequantizing the weights first


def quantize(w: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """w (..., C) -> q int8 (..., C) and scale bfloat16 (..., C / G), with w ~ q * scale and G weights per scale.

    The weight with the largest absolute value in a group becomes the lowest integer, for example -8 of -8..7. The
    scale takes its sign, so that every integer is used. If 64 does not divide C, G is the largest power of two that
    does. int4-tensor repeats the scale of the matrix for each group of int4.

    >>> quantize(torch.tensor([[2.0, -4.0, 1.0, 0.1]]), "int4")  # scale 0.5
    (tensor([[ 4, -8,  2,  0]], dtype=torch.int8), tensor([[0.5000]], dtype=torch.bfloat16))
    """
    bits, group_size, one_scale = FORMATS[format]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    G = math.gcd(w.size(-1), group_size) if group_size else w.size(-1)
    groups = w.detach().float().unflatten(-1, (-1, G))  # (..., C/G, G)
    least, most = groups.aminmax(dim=-1, keepdim=True)  # (..., C/G, 1) each
    if one_scale:
        least = least.amin(dim=(-3, -2), keepdim=True).expand_as(least)
        most = most.amax(dim=(-3, -2), keepdim=True).expand_as(most)
    largest = least.where(least.abs() >= most.abs(), most)
    # to bfloat16 by cutting bits, because torch.compile removes a cast that is undone: the scale that is used must be
    # the one that is stored. Cut, not rounded, so that quantizing again changes nothing
    scale = ((largest / low).view(torch.int32) & ~0xFFFF).view(torch.float32)
    scale = scale.where(scale != 0, 1)  # a group of zeros
    q = (groups / scale).round().clamp(low, high)
    return q.to(torch.int8).flatten(-2), scale.squeeze(-1).bfloat16()


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """q (..., C), scale (..., C / G) -> the weights q * scale, float32 (..., C)."""
    groups = q.unflatten(-1, (scale.size(-1), -1)) * scale.float().unsqueeze(-1)  # (..., C/G, G)
    return groups.flatten(-2)


def pack_nibbles(q: Tensor) -> Tensor:
    """q int8 (..., C), each in -8..7 -> uint8 (..., ceil(C / 2)), with even columns in the low four bits."""
    q = F.pad(q, (0, q.size(-1) % 2)).view(torch.uint8)
    return (q[..., ::2] & 15) | (q[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The reverse of pack_nibbles: uint8 (..., N) -> int8 (..., 2 N)."""
    q = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).view(torch.int8)
    return (q ^ 8) - 8  # two's complement of four bits


def restore(q: Tensor, scale: Tensor) -> Tensor:
    """`dequantize` for the form of a file, in which int4 is packed as uint8."""
    if q.dtype == torch.uint8:
        q = unpack_nibbles(q)
        if scale.size(-1) == q.size(-1) - 1 > 1:
            q = q[..., :-1]  # an odd C was padded; it has one scale per weight
    return dequantize(q, scale)


def pack(weights: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    """A state dict in which each matrix NAME becomes NAME.int8 (or NAME.int4, ...) and NAME.scale.

    Tied weights stay tied.
    """
    packed: dict[str, Tensor] = {}
    done: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
    for name, w in weights.items():
        if w.ndim < 2 or (FORMATS[format][0] == 4 and w.size(-1) == 1):  # one column would look like two
            packed[name] = w
            continue
        key = (w.data_ptr(), w.shape)
        if key not in done:
            q, scale = quantize(w, format)
            done[key] = (pack_nibbles(q) if FORMATS[format][0] == 4 else q, scale)
        packed[f"{name}.{format}"], packed[f"{name}.scale"] = done[key]
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 state dict of a packed one. One that is not packed is returned unchanged.

    Raises ValueError if integers and scales do not fit together.
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
    """The format of a packed state dict, "" for one that is not packed."""
    return next((kind for name in weights if (kind := name.rpartition(".")[2]) in FORMATS), "")


class QuantizedEmbedding(nn.Module):
    """nn.Embedding with a quantized weight. Only the rows that are looked up are dequantized."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.q: Tensor
        self.scale: Tensor
        self.register_buffer("q", q)  # int8 (N, C), or packed uint8 (N, C / 2)
        self.register_buffer("scale", scale)  # (N, C / G), in the dtype of the layer's output

    @property
    def weight(self) -> Tensor:
        return restore(self.q, self.scale).to(self.scale.dtype)

    def forward(self, idx: Tensor) -> Tensor:
        return restore(self.q[idx], self.scale[idx]).to(self.scale.dtype)


class QuantizedLinear(QuantizedEmbedding):
    """nn.Linear with a quantized weight.

    With few rows of x most time goes into reading weights, and a kernel reads the small ones. With many rows it goes
    into arithmetic, and the weights are dequantized first. The kernel rounds x to bfloat16, as autocast would.
    """

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__(q, scale)
        self.bias = bias
        self.kernel_form: tuple[Tensor, Tensor] | None = None
        self.laid_out = False

    def forward(self, x: Tensor) -> Tensor:
        # has_kernel() before the number of rows: the first call, a prompt, decides it, before a compiler traces a step
        if x.device.type != "cpu" or not self.has_kernel() or x.numel() // x.size(-1) > KERNEL_ROWS:
            return F.linear(x, self.weight, self.bias)
        assert self.kernel_form is not None
        rows = x.reshape(-1, x.size(-1)).bfloat16().contiguous()
        y = product(rows, *self.kernel_form)[:, : len(self.scale)]
        y = y.reshape(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def has_kernel(self) -> bool:
        """Converts the weights for the kernel, once. False if there is no kernel for this machine or shape."""
        if not self.laid_out:
            self.laid_out = True
            self.kernel_form = kernel_form(self.q, self.scale) if kernels_work() else None
        return self.kernel_form is not None


def kernel_form(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """Integers and scales in the form of PyTorch's CPU kernels; None if these do not support the shape."""
    if q.dtype == torch.int8:  # torch 2.15 reads past the end of a row if 16 does not divide C: noise, or a crash
        return (q, scale[:, 0].bfloat16()) if scale.size(1) == 1 and q.size(1) % 32 == 0 else None
    if q.size(1) * 2 / scale.size(1) not in (32, 64, 128, 256):
        return None
    padding = -len(q) % 64  # the kernel works on blocks of rows
    unsigned = F.pad(unpack_nibbles(q).int() + 8, (0, 0, 0, padding))
    scale = F.pad(scale, (0, 0, 0, padding)).T.bfloat16()  # (C / G, N)
    zeros = torch.zeros_like(scale)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    return packed, torch.stack((scale, zeros), dim=-1)  # (C / G, N, 2)


def product(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (rows, C) bfloat16 times the weights in kernel form -> (rows, N or more) bfloat16."""
    if scale.ndim == 1:
        return torch._weight_int8pack_mm(x, q, scale)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, q, x.size(1) // len(scale), scale)


@functools.cache
def kernels_work() -> bool:
    """Whether this PyTorch has both kernels and they are correct. They are not part of its public API."""
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

    Embedding and linear layers compute with quantized weights. Any other matrix, such as the learned positions, takes
    its rounded values. Weights that `unpack` returned are quantized to the same integers again.
    """
    packed = pack(model.state_dict(), format)
    model.load_state_dict(unpack(packed))
    for name, module in list(model.named_modules()):
        if name.endswith("wpe") or f"{name}.weight.{format}" not in packed:  # the model slices wpe directly
            continue
        q, scale = packed[f"{name}.weight.{format}"], packed[f"{name}.weight.scale"].to(module.weight.dtype)
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(q, scale, module.bias))
        elif isinstance(module, nn.Embedding):
            setattr(model.get_submodule(parent), leaf, QuantizedEmbedding(q, scale))


class FakeQuantize(nn.Module):
    """w -> its rounded values. The gradient ignores the rounding, whose own derivative is zero almost everywhere."""

    def __init__(self, format: str) -> None:
        super().__init__()
        self.format = format

    def forward(self, w: Tensor) -> Tensor:
        return dequantize(*quantize(w, self.format)).to(w.dtype) + (w - w.detach())


def fake_quantize(model: nn.Module, format: str) -> None:
    """Quantization-aware training: from now on the model computes with rounded matrices and trains the float ones.

    The parameters stay the same objects, tied ones too. `plain_names` restores the names of the state dict.
    """
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if p.ndim >= 2:
                parametrize.register_parametrization(module, name, FakeQuantize(format))


def plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model under `fake_quantize` with the names of before.

    NAME.parametrizations.weight.original becomes NAME.weight.
    """
    return {re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name): w for name, w in weights.items()}
