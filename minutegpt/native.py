"""Decoding on a CPU by a C function, decode.c.

    use_native_decoding(model)  # once, when the weights are final; then model.generate as usual

For few tokens Python takes longer than the arithmetic. torch.compile helps too, after half a minute. The machine's C
compiler builds decode.c in a second, and later processes find it in ~/.cache/minutegpt.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from minutegpt.files import cache_folder
from minutegpt.quantize import QuantizedLinear
from model import ACTIVATIONS, GPT, KVCache

SOURCE = Path(__file__).with_name("decode.c")
# -fassociative-math lets sums use vectors. NaN and infinity keep their meaning
FLAGS = (
    "-O3 -march=native -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -fPIC -shared".split()
)
MOST_TOKENS = {"float32": 32, "int8": 256}  # in one call: for more, PyTorch's matrix products are faster
CHUNK = 32  # tokens that decode.c reads at once


class Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weights", "scale", "bias")] + [
        (name, ctypes.c_long) for name in ("rows", "cols")
    ]


class Block(ctypes.Structure):
    _fields_ = [(name, Matrix) for name in ("c_attn", "c_proj", "c_fc", "mlp_proj")] + [
        (name, ctypes.c_void_p) for name in ("ln_1", "ln_1_bias", "ln_2", "ln_2_bias", "k", "v")
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("layers", "C", "H", "D", "room", "qk_norm", "kind", "threads")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "ln_f", "ln_f_bias")),
        ("lm_head", Matrix),
    ]


@functools.cache
def build() -> Any:
    """The C function, built for this machine; None where there is no compiler that can."""
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("cc")
    if not compiler or os.name == "nt":
        return None
    try:
        # what -march=native means here: another machine with the same home folder gets its own file
        macros = subprocess.run([compiler, *FLAGS, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, check=True)
        key = hashlib.sha256(SOURCE.read_bytes() + macros.stdout).hexdigest()[:16]
        path = cache_folder() / f"decode-{key}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as work:
                built = Path(work) / "decode.so"
                command = [compiler, *FLAGS, str(SOURCE), "-o", str(built), "-lm"]
                if subprocess.run([*command, "-fopenmp"], capture_output=True).returncode:  # Apple's has no OpenMP
                    subprocess.run(command, capture_output=True, check=True)
                built.replace(path)
        decode: Any = ctypes.CDLL(str(path)).decode
        decode.argtypes = [ctypes.POINTER(Model), ctypes.POINTER(Block), *4 * [ctypes.c_long], *2 * [ctypes.c_void_p]]
        return decode
    except (OSError, subprocess.CalledProcessError):
        return None


def address(tensor: Any) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def matrix(layer: Any, rows: int | None = None) -> Matrix:
    """The weights of a linear layer, or their first rows."""
    weights, scale = (layer.q, layer.scale) if isinstance(layer, QuantizedLinear) else (layer.weight, None)
    return Matrix(address(weights), address(scale), address(layer.bias), rows or len(weights), weights.size(1))


def norm(layer: nn.Module) -> tuple[int | None, int | None]:
    return address(getattr(layer, "weight", None)), address(getattr(layer, "bias", None))


def supports(model: GPT) -> bool:
    """Whether decode.c knows such a model: float32 or int8 weights on a CPU, a dense MLP, the norms first."""
    c = model.config
    if c.n_expert or c.norm_position != "pre" or c.n_kv_head != c.n_head or c.head_dim % 2 or c.block_size < 3:
        return False
    if any(parametrize.is_parametrized(module) for module in model.modules()):  # each reading makes other weights
        return False
    int8 = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    return all(m.q.dtype == torch.int8 and m.scale.size(1) == 1 for m in int8) and all(
        w.device.type == "cpu" and w.dtype in (torch.float32, torch.int8, torch.int64)
        for w in (*model.parameters(), *model.buffers())
    )


def lookup(layer: Any) -> Callable[[int], Tensor]:
    """row -> that row of an embedding layer, (C). An integer finds it faster than a tensor of indices does."""
    if isinstance(layer, nn.Embedding):
        return layer.weight.detach().__getitem__
    q, scale = layer.q, layer.scale
    return lambda row: q[row] * scale[row]


class NativeDecoder:
    """The decoding step of a model, whose logits are cut to V."""

    def __init__(self, model: GPT, V: int) -> None:
        c, parts = model.config, model.transformer
        self.model, self.cache = model, KVCache(c, 0, torch.device("cpu"), torch.float32)
        self.wte, self.wpe = lookup(parts.wte), lookup(parts.wpe) if c.pos == "learned" else None
        ngrams = zip(parts.ngrams.rows, parts.ngrams.tables, strict=True) if c.ngram else ()
        self.tables = [(rows, lookup(table)) for rows, table in ngrams]
        self.rotation = model.rotation  # cos and sin, (2, T, D/2)
        if c.pos == "learned":  # a rotation by nothing
            self.rotation = torch.stack((torch.ones_like(self.rotation[0]), torch.zeros_like(self.rotation[1])))
        blocks = []
        for block in parts.h:
            layers = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
            blocks.append(Block(*map(matrix, layers), *norm(block.ln_1), *norm(block.ln_2)))
        self.blocks = (Block * c.n_layer)(*blocks)
        sizes = (c.n_layer, c.n_embd, c.n_head, c.head_dim, c.block_size + 1)
        kinds = (c.qk_norm, [*ACTIVATIONS].index(c.activation), torch.get_num_threads())
        angles = (address(table) for table in self.rotation)
        self.weights = Model(*sizes, *kinds, *angles, *norm(parts.ln_f), matrix(model.lm_head, V))

    def embed(self, token: int, cache: KVCache) -> Tensor:
        """GPT.embed of one token, (1, 1, C), without PyTorch's overhead for each small operation."""
        V, x = self.model.config.vocab_size, [self.wte(token)]
        if self.wpe:
            x.append(self.wpe(cache.length))
        if self.tables:  # as in NGrams.forward
            tokens, prime = [*cache.past_tokens[0].tolist(), token], 2**31 - 1
            cache.past_tokens = torch.tensor([tokens[1:]])
            for n, (rows, table) in enumerate(self.tables, start=2):
                key = 0
                for token in tokens[-n:]:
                    key = (key * V + token) % prime
                x.append(table(key if rows == V**n else key * 40503 % prime % rows))
        total = torch.stack(x).sum(0)[None, None]
        rms = self.model.config.norm == "rmsnorm"
        return nn.functional.rms_norm(total, total.shape[-1:], eps=1e-6) if rms else total

    def next_logits(self, idx: Tensor, cache: KVCache) -> Tensor:
        """GPT.next_logits: idx (B, T) -> (B, V)."""
        if cache is not self.cache:
            self.cache = cache
            for block, k, v in zip(self.blocks, cache.k, cache.v, strict=True):
                block.k, block.v = k.data_ptr(), v.data_ptr()
        single = idx.numel() == 1 and 0 < cache.length < self.model.config.block_size
        x = self.embed(int(idx), cache) if single else self.model.embed(idx, cache)  # (B, T, C)
        (B, T, _), V = x.shape, self.weights.lm_head.rows
        logits, texts = torch.empty(B, V), max(1, CHUNK // T)
        for i, t in product(range(0, B, texts), range(0, T, CHUNK)):
            part = x[i : i + texts, t : t + CHUNK].contiguous()
            sizes = (i, cache.length + t, *part.shape[:2])
            build()(self.weights, self.blocks, *sizes, part.data_ptr(), logits[i].data_ptr())
        cache.length += T
        return logits


@torch.no_grad()
def logits_to_compare(model: GPT, next_logits: Callable[[Tensor, KVCache], Tensor]) -> Tensor:
    """Logits (5, V) of made-up texts: two short ones in two pieces, and one more token after a full context.

    That context is random keys and values: so each part of the attention to it shows in the logits.
    """
    c, random = model.config, torch.Generator().manual_seed(1)
    idx = torch.randint(c.vocab_size, (2, 3), generator=random)
    short, full = (KVCache(c, B, idx.device, torch.float32) for B in (2, 1))
    found = [next_logits(idx[:, :2], short), next_logits(idx[:, 2:], short)]
    full.length = c.block_size - 1
    full.past_tokens = torch.randint(c.vocab_size, (1, max(0, c.ngram - 1)), generator=random)
    for k, v in zip(full.k, full.v, strict=True):
        k.normal_(generator=random)
        v.normal_(std=4, generator=random)  # a mean over many positions is small
    return torch.cat([*found, next_logits(idx[:1, :1], full)])


@torch.no_grad()
def use_native_decoding(model: GPT, batch_size: int = 1) -> bool:
    """Lets model.next_logits decode by decode.c. False, and nothing changes, where that cannot be or is not correct.

    Few tokens at once, in float32; anything else runs as before, and that is faster for a large batch_size.
    `del model.next_logits` undoes it. Weights that change in place are seen. hide_padding comes first: it decides how
    many logits there are.
    """
    weights = "int8" if isinstance(model.lm_head, QuantizedLinear) else "float32"
    most = MOST_TOKENS[weights]
    if batch_size > most or torch.is_autocast_enabled("cpu") or not supports(model) or not build():
        return False
    expected = logits_to_compare(model, functools.partial(GPT.next_logits, model))
    decoder = NativeDecoder(model, expected.size(1))
    found = logits_to_compare(model, decoder.next_logits)
    rounding = 0.05 if weights == "int8" else 0.001  # PyTorch's int8 kernel rounds inputs
    if not (found - expected).abs().max() <= rounding * expected.abs().max():
        return False

    def next_logits(idx: Tensor, cache: KVCache) -> Tensor:
        if cache.k[0].dtype == torch.float32 and idx.numel() <= most:
            return decoder.next_logits(idx, cache)
        return GPT.next_logits(model, idx, cache)

    model.next_logits = next_logits  # type: ignore[method-assign]
    return True


@contextlib.contextmanager
def native_decoding(model: GPT) -> Iterator[None]:
    """use_native_decoding, for a `with` block."""
    used = use_native_decoding(model)
    try:
        yield
    finally:
        if used:
            del model.next_logits
