"""The operations of a model, each with a formula in float64 that shares no kernel with it, for minutegpt/truth.py.

The inputs are random numbers that the dtype holds exactly, at the sizes of the model. A right result then differs from
the formula's by the roundings on the way, and by nothing else.
"""

import copy
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from minutegpt.moe import GroupedLinear, MoE
from minutegpt.optim import AdamW, Muon
from model import (
    ACTIVATIONS,
    GPT,
    CausalSelfAttention,
    GPTConfig,
    KVCache,
    NGrams,
    attention_by_hand,
    causal_attention,
    make_norm,
    rotary,
    rotate,
)

# Newton-Schulz steps multiply small singular values, and what rounding added to them, by up to 3.4445**5
MUON_ROUNDINGS = (256.0, 4.0)
Function = Callable[..., Tensor]


@dataclass
class Operation:
    """run returns results of the device, exact the same ones from float64 on the CPU.

    roundings: to dtype, one after the other, on the way to a result. along: of them, what may be left along the result.
    itself: the code of run in float64 on the CPU. Where exact differs from it, the code was edited: itself is right.
    """

    name: str
    run: Callable[[], list[Tensor]]
    exact: Callable[[], list[Tensor]]
    dtype: torch.dtype
    roundings: float
    along: float = 1.0
    itself: Callable[[], list[Tensor]] | None = None


@dataclass
class Place:
    """Where operations run, in what dtype, within what context (autocast), and whether gradients are wanted.

    narrow: the weights are in dtype themselves, and there is no autocast.
    """

    device: torch.device
    dtype: torch.dtype
    context: Callable[[], AbstractContextManager]
    backward: bool
    attend: Function = causal_attention
    narrow: bool = False
    seed: int = 0

    @property
    def wide(self) -> torch.dtype:
        """The dtype of weights and of the residual stream."""
        return self.dtype if self.narrow else torch.float32

    def draw(self, *shape: int, scale: float = 1.0, key: int = 0) -> Tensor:
        """Normal numbers that dtype holds exactly, as float32 on the CPU. The random state is not touched."""
        pool = _pool(self.seed).roll(1009 * key)  # drawn once and repeated: faster
        n = math.prod(shape)
        return (pool.repeat(n // len(pool) + 1)[:n] * scale).to(self.dtype).float().view(shape)

    def results(self, function: Function, inputs: list[Tensor]) -> list[Tensor]:
        """function(*inputs), and the gradients of its sum, weighted at random, where gradients are wanted."""
        inputs = [x.detach().clone() for x in inputs]
        wanted = [x.requires_grad_() for x in inputs if x.is_floating_point() and self.backward]
        y = function(*inputs)
        if not wanted:
            return [y]
        weights = self.draw(*y.shape, key=99) * (1024 if self.dtype == torch.float16 else 1)  # as the scaler does
        return [y.detach(), *gradients(y, wanted, weights)]

    def operation(
        self, name: str, function: Function, exact: Function, *inputs: Tensor, dtype: torch.dtype | None = None,
        roundings: float = 2,
    ) -> Operation:  # fmt: skip
        """dtype: of its inputs, where it is not that of matrix products."""
        dtype = dtype or self.dtype

        def run() -> list[Tensor]:
            moved = [x.to(self.device, dtype if x.is_floating_point() else x.dtype) for x in inputs]
            with self.context(), torch.set_grad_enabled(self.backward):
                return self.results(function, moved)

        def reference(function: Function) -> list[Tensor]:
            return self.results(function, [x.double() if x.is_floating_point() else x for x in inputs])

        exactly, itself = functools.partial(reference, exact), functools.partial(reference, function)
        return Operation(name, run, exactly, dtype, roundings, itself=itself)


class InFloat64(TorchFunctionMode):
    """Code that asks for float32, such as the angles of rotary positions, gets float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in (kwargs or {}).items()}
        return (torch.Tensor.double if function is torch.Tensor.float else function)(*args, **kwargs)


def difference(found: list[Tensor], exact: list[Tensor], operation: Operation) -> tuple[float, float]:
    """How far results are off: as a share of the exact ones, and in units of what rounding explains.

    Roundings are independent: n of them differ by sqrt(n) times one. They go up as often as down, so along the exact
    result less is left of them, and a wrong factor of 1% shows in bfloat16 too.
    """
    unit, worst = _rounding(operation.dtype), (0.0, 0.0)
    for result, right in zip(found, exact, strict=True):
        right = right.detach().cpu().double()
        error = result.detach().cpu().double() - right
        size = right.norm().item() or 1e-9  # where zero is right, nothing else is
        off, along = error.norm().item() / size, abs((error * right).sum().item()) / size**2
        excess = max(off / math.sqrt(operation.roundings), along / operation.along) / unit
        worst = max(worst, (off, excess) if math.isfinite(excess) else (math.inf, math.inf), key=lambda pair: pair[1])
    return worst


def _rounding(dtype: torch.dtype) -> float:
    """The largest relative error of one result of a dtype. Sums of float32 are taken to be of 2**16 numbers."""
    if dtype != torch.float32:
        return torch.finfo(dtype).eps / 2
    return 2**-16 if torch.get_float32_matmul_precision() == "highest" else 2**-11  # 11 bits: TF32, on a GPU


@functools.cache
def _pool(seed: int) -> Tensor:
    return torch.randn(2**18 - 5, generator=torch.Generator().manual_seed(seed))


def gradients(y: Tensor, inputs: list[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    """Of the weighted sum of y. (autograd.grad imports sympy, half a second, for weights that are passed to it.)"""
    return torch.autograd.grad((y * weights.to(y)).sum(), inputs)


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """causal_attention without a fused kernel: attention_by_hand, also for grouped heads."""
    group = q.size(1) // k.size(1)
    return attention_by_hand(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def exact_softmax(x: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def exact_tanh(x: Tensor) -> Tensor:
    return 1 - 2 / ((2 * x).exp() + 1)


def exact_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """RMSNorm; with a weight LayerNorm."""
    if weight is None:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    x = x - x.mean(-1, keepdim=True)
    y = weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y if bias is None else y + bias


def exact_loss(logits: Tensor, targets: Tensor) -> Tensor:
    likelihood = (exact_softmax(logits) * (targets[:, None] == torch.arange(logits.size(1)))).sum(1)
    return -likelihood[targets >= 0].log().mean()


def exact_rotation(x: Tensor) -> Tensor:
    """rotary and rotate: a pair is a complex number, which turns by its angle."""
    T, half = x.size(2), x.size(3) // 2
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 10000 ** -(torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat((turned.real, turned.imag), -1)


EXACT: dict[str, Function] = {
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + exact_tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
}


def operations(config: GPTConfig, place: Place, rows: int) -> Iterator[Operation]:
    """Every operation of a model at its own sizes. rows: of a micro-batch, B * T."""
    C, D, V, T = config.n_embd, config.head_dim, config.vocab_size, config.block_size
    draw, operation, few = place.draw, place.operation, 33
    yield from attentions(config, place)
    for bias, n_in, n_out in sorted(matrices(config)):
        yield linear(place, bias, n_in, n_out, rows)
    for table in {V, *([min(V**config.ngram, config.ngram_rows)] if config.ngram else [])}:
        yield embedding(place, table, C)
    if config.pos == "rope":
        turn = lambda x: rotate(x, *rotary(0, T, D, x.device))  # noqa: E731
        angles = 4 + (T / 256) ** 2  # an angle of T radians is rounded to T * 2**-24
        yield operation(
            "rotary positions", turn, exact_rotation, draw(2, 1, T, D), dtype=torch.float32, roundings=angles
        )
    norm, x = make_norm(config), draw(few, C, key=4)
    if isinstance(norm, nn.LayerNorm):
        parts = [x, 1 + draw(C, scale=0.25, key=5), *([draw(C, key=6)] if config.bias else [])]
        layer_norm = lambda x, *w: F.layer_norm(x, (C,), *w)  # noqa: E731
        yield operation("layer norm", layer_norm, exact_norm, *parts, dtype=place.wide)
    else:
        yield operation("RMS norm", norm, exact_norm, x, dtype=place.wide)
    if config.qk_norm:
        yield operation("RMS norm of heads", lambda x: F.rms_norm(x, (D,), eps=1e-6), exact_norm, draw(few, D))
    act = config.activation
    exact = EXACT.get(act, ACTIVATIONS[act])  # one that was added to model.py: itself, in float64 on the CPU
    yield operation(act, ACTIVATIONS[act], exact, draw(few, 4 * C), roundings=3)
    logits = draw(few, V, scale=4.0, key=7)
    targets = torch.cat((torch.arange(few - 1) * 7919 % V, torch.tensor([-1])))
    loss = lambda x, y: F.cross_entropy(x, y, ignore_index=-1)  # noqa: E731
    yield operation("cross-entropy", loss, exact_loss, logits, targets, dtype=torch.float32)
    yield operation("softmax", lambda x: x.softmax(-1), exact_softmax, logits, dtype=torch.float32)
    if config.ngram:
        yield ngrams(config, place)
    if config.n_expert:
        yield experts(config, place)


def matrices(config: GPTConfig) -> set[tuple[bool, int, int]]:
    """The kinds of linear layer: whether there is a bias, inputs, outputs."""
    C, width = config.n_embd, config.n_head * config.head_dim
    found = {(config.bias, C, width + 2 * config.n_kv_head * config.head_dim), (config.bias, width, C)}
    found |= {(False, C, config.vocab_size)}
    if config.n_expert:
        return found | {(False, C, config.n_expert)}
    return found | {(config.bias, C, 4 * C), (config.bias, 4 * C, C)}


def attentions(config: GPTConfig, place: Place) -> Iterator[Operation]:
    """Attention of all positions, and of the last ones, as the model calls it: on transposed views."""
    T, D, group = config.block_size, config.head_dim, config.n_head // config.n_kv_head
    long = min(2048, T)  # of 65,536 queries, float64 would take minutes

    def by_head(attend: Function) -> Function:
        return lambda q, k, v: attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    for name, queries, keys in (
        ("attention", min(64, T), min(64, T)), ("attention of a long context", long, long),
        ("attention of one query", 1, T - T // 4), ("attention of a few queries", min(5, T), T),
    ):  # fmt: skip
        K = max(1, min(config.n_kv_head, 2**20 // (queries * keys * group)))  # not all heads: float64 is slow
        q, (k, v) = place.draw(2, queries, K * group, D, key=1), place.draw(2, 2, keys, K, D, key=2)
        operation = place.operation(name, by_head(place.attend), by_head(exact_attention), q, k, v, roundings=8)
        operation.along = 1 if queries > 1 else 2  # of few numbers, more is left by chance
        yield operation


def linear(place: Place, bias: bool, n_in: int, n_out: int, rows: int) -> Operation:
    """A linear layer. Of each result, 64 rows and columns are compared, as all of them would take float64 too long."""
    rows = min(rows, max(64, 2**24 // n_out))
    x, w = place.draw(rows, n_in, key=8), place.draw(n_out, n_in, scale=n_in**-0.5, key=9)
    b = [place.draw(n_out, key=10)] if bias else []
    g = place.draw(rows, n_out, key=11)  # the gradient of the result
    r, i, o = (torch.linspace(0, n - 1, min(n, 64)).long() for n in (rows, n_in, n_out))

    def run() -> list[Tensor]:
        inputs = [t.to(place.device, place.wide).detach().requires_grad_(place.backward) for t in (x, w, *b)]
        with place.context(), torch.set_grad_enabled(place.backward):
            y = F.linear(*inputs)
        grads = gradients(y, inputs, g) if place.backward else []
        places = ((r, o), (r, i), (o, i), (o,))
        return [
            t.detach().cpu()[p[0]][..., p[-1]] if len(p) > 1 else t.cpu()[p[0]]
            for t, p in zip((y, *grads), places, strict=False)
        ]

    def exact() -> list[Tensor]:
        X, W, G = x.double(), w.double(), g.double()
        y = X[r] @ W[o].T + (b[0].double()[o] if b else 0)
        return [y, G[r] @ W[:, i], G[:, o].T @ X[:, i], *(G[:, o].sum(0) for _ in b)] if place.backward else [y]

    return Operation(f"a linear layer, {n_in} to {n_out}", run, exact, place.dtype, 3)


def embedding(place: Place, n: int, C: int) -> Operation:
    """A lookup in a table of n rows, some of them twice, and where its gradient goes."""
    table, ids = place.draw(n, C, key=9), torch.arange(128) ** 2 * 7919 % n
    g, some = place.draw(128, C, key=12), ids.unique()[:64]

    def run() -> list[Tensor]:
        weight = table.to(place.device, place.wide).detach().requires_grad_(place.backward)
        with place.context(), torch.set_grad_enabled(place.backward):
            y = F.embedding(ids.to(place.device), weight)
        grads = gradients(y, [weight], g) if place.backward else []
        return [y.detach(), *(grad.cpu()[some] for grad in grads)]

    def exact() -> list[Tensor]:
        y = torch.from_numpy(table.numpy()[ids.numpy()]).double()
        return [y, (some[:, None] == ids).double() @ g.double()] if place.backward else [y]

    return Operation(f"an embedding of {n} rows", run, exact, place.wide, 1)


def ngrams(config: GPTConfig, place: Place) -> Operation:
    """The rows of the n-gram tables: 64-bit integers, here next to Python's."""
    small = replace(config, n_embd=8, n_head=1, n_kv_head=1, n_expert=0)
    with torch.random.fork_rng(devices=[]):  # not on the meta device: that would import the compiler, for a second
        module = NGrams(small)
    tables = [place.draw(rows, 8, key=n) for n, rows in enumerate(module.rows)]
    ids = torch.arange(48) ** 3 % 1009 % config.vocab_size
    prime, padded = 2**31 - 1, [0] * (config.ngram - 1) + ids.tolist()

    def run(device: torch.device = place.device, dtype: torch.dtype = place.wide) -> list[Tensor]:
        on_device: Any = module.to_empty(device=device).to(dtype)
        for layer, table in zip(on_device.tables, tables, strict=True):
            layer.weight.data.copy_(table)
        with place.context(), torch.no_grad():
            return [on_device(ids[None].to(device))[0]]

    def exact() -> list[Tensor]:
        total = torch.zeros(len(ids), 8, dtype=torch.float64)
        for t in range(len(ids)):
            key = padded[t + config.ngram - 1]
            for n, (rows, table) in enumerate(zip(module.rows, tables, strict=True), start=2):
                last = padded[t + config.ngram - n : t + config.ngram]
                key = functools.reduce(lambda key, token: (key * config.vocab_size + token) % prime, last, 0)
                total[t] += table[key if rows == config.vocab_size**n else key * 40503 % prime % rows].double()
        return [total]

    itself = functools.partial(run, torch.device("cpu"), torch.float64)
    return Operation("n-gram ids", run, exact, place.wide, 4, itself=itself)


def experts(config: GPTConfig, place: Place) -> Operation:
    """The linear map of each expert for its own rows; one has none."""
    E, width = config.n_expert, MoE(config, F.relu).c_fc.weight.size(1)
    ends = [min(96, 3 * (e + (e < E - 1)) * 32 // E) for e in range(E)]
    x, w = place.draw(ends[-1], config.n_embd), place.draw(E, width, config.n_embd, scale=config.n_embd**-0.5, key=9)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return F.grouped_mm(x, w.to(x.dtype).mT, offs=torch.tensor(ends, dtype=torch.int32, device=x.device))

    exact = functools.partial(exact_experts, ends=torch.tensor(ends))
    return place.operation("the experts' linear layers", run, exact, x, w, roundings=3)


def exact_experts(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ weight.T for rows, weight in zip(x.split(sizes), w, strict=True)])


def optimizer_steps(optimizers: Iterable[torch.optim.Optimizer], place: Place) -> Iterator[Operation]:
    """Two updates of each optimizer as it is set up, and the norm of gradients."""
    gradients = [place.draw(33, 65, key=1), place.draw(7, key=2)]

    def clip(*g: Tensor) -> list[Tensor]:
        params = [nn.Parameter(torch.zeros_like(x)) for x in g]
        for p, x in zip(params, g, strict=True):
            p.grad = x.clone()
        gradients = [p.grad for p in params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(params, 1.0, norm.cpu())
        return [norm, *gradients]

    def exact_clip(*g: Tensor) -> list[Tensor]:
        norm = sum(x.square().sum() for x in g) ** 0.5
        return [norm, *(x / norm for x in g)]

    yield Operation("the gradient norm", lambda: clip(*(g.to(place.device) for g in gradients)),
                    lambda: exact_clip(*(g.double() for g in gradients)), torch.float32, 1)  # fmt: skip
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            shapes = sorted({tuple(min(n, 256) for n in p.shape) for p in optimizer.param_groups[0]["params"]})
            muon = functools.partial(Muon, lr=0.1, weight_decay=0.1, ns_dtype=optimizer.ns_dtype)
            wide = functools.partial(muon, ns_dtype=torch.float64)
            yield steps("Muon's step", muon, wide, exact_muon, place, shapes, optimizer.ns_dtype, MUON_ROUNDINGS)
        else:
            group = optimizer.param_groups[0]
            how = {key: group[key] for key in ("betas", "fused", "foreach")}
            adamw = functools.partial(AdamW, lr=0.1, weight_decay=0.1, **how)
            exact = functools.partial(exact_adamw, *group["betas"])
            name = f"AdamW's {'fused ' if group['fused'] else ''}step"
            yield steps(name, adamw, adamw, exact, place, [(33, 65), (7,)], torch.float32, (4, 1))


def steps(
    name: str, make: Callable[..., torch.optim.Optimizer], wide: Callable[..., torch.optim.Optimizer],
    exact: Callable[..., Tensor], place: Place, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype,
    roundings: tuple[float, float],
) -> Operation:  # fmt: skip
    """wide: make for float64. exact(w, g, h): the weights w after two steps, whose gradients are g and h."""
    weights, first, second = ([place.draw(*shape, key=n + i) for n, shape in enumerate(shapes)] for i in (1, 51, 71))

    def updates(make: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        params = [nn.Parameter(w.to(device, dtype, copy=True)) for w in weights]
        optimizer = make(params)
        for gradients in (first, second):
            for p, g in zip(params, gradients, strict=True):
                p.grad = g.to(device, dtype)
            optimizer.step()
        return [p.detach().cpu() - w for p, w in zip(params, weights, strict=True)]

    def reference() -> list[Tensor]:
        return [exact(*(t.double() for t in each)) - each[0] for each in zip(weights, first, second, strict=True)]

    run = functools.partial(updates, make, place.device, torch.float32)
    itself = functools.partial(updates, wide, torch.device("cpu"), torch.float64)
    return Operation(name, run, reference, dtype, *roundings, itself=itself)


def exact_adamw(beta1: float, beta2: float, w: Tensor, *gradients: Tensor) -> Tensor:
    m = v = torch.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        w = w * (1 - 0.1 * 0.1) - 0.1 * m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
    return w


def exact_muon(w: Tensor, *gradients: Tensor) -> Tensor:
    m = torch.zeros_like(w)
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        x = 0.05 * g + 0.95 * m
        x = x / x.square().sum((-2, -1), keepdim=True).sqrt()
        for _ in range(5):  # Newton-Schulz
            s = x @ x.mT if x.size(-2) <= x.size(-1) else x.mT @ x
            p = -4.7750 * s + 2.0315 * s @ s
            x = 3.4445 * x + (p @ x if x.size(-2) <= x.size(-1) else x @ p)
        w = w * (1 - 0.1 * 0.1) - 0.1 * x * max(1, w.size(-2) / w.size(-1)) ** 0.5
    return w


def whole_model(config: GPTConfig, place: Place) -> Operation:
    """A model of two such layers: logits, loss and gradients; without gradients, logits through the cache too."""
    T = min(config.block_size, 32)
    small = replace(
        config, n_layer=min(config.n_layer, 2), vocab_size=min(config.vocab_size, 256), block_size=T, dropout=0.0,
        ngram_rows=min(config.ngram_rows, 1024),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = GPT(small)
    with torch.no_grad():
        for key, p in enumerate(model.parameters()):
            p.copy_(place.draw(*p.shape, scale=p.size(-1) ** -0.5, key=key) + (0 if p.ndim > 1 else 1))
        for module in model.modules():
            if isinstance(module, MoE):  # always the first experts: else a rounding decides which one is chosen
                module.router_bias[: module.k] = 10.0
    tokens = (torch.arange(2 * T + 2).view(2, T + 1) ** 2 * 7919 + place.seed) % small.vocab_size
    scale = 1024 if place.dtype == torch.float16 else 1

    def results(model: GPT, idx: Tensor, cache_dtype: torch.dtype) -> list[Tensor]:
        if place.backward:
            logits, loss = model(idx[:, :-1], idx[:, 1:])
            assert loss is not None
            grads = torch.autograd.grad(loss * scale, list(model.parameters()))
            return [logits.detach(), loss.detach(), *(g / scale for g in grads)]
        logits, past = model(idx[:, :-1])[0], max(1, T - 3)
        cache, pieces = KVCache(small, 2, idx.device, cache_dtype), [idx[:, :past]]
        pieces += [idx[:, t : t + 1] for t in range(past, T)]
        return [logits, torch.stack([model.next_logits(piece, cache) for piece in pieces], dim=1)]

    def run() -> list[Tensor]:
        on_device = copy.deepcopy(model).to(place.device, place.wide).train(place.backward)
        set_attention(on_device, place.attend)
        with place.context(), torch.set_grad_enabled(place.backward):
            return results(on_device, tokens.to(place.device), place.dtype)

    def exact(attend: Function = exact_attention) -> list[Tensor]:
        reference = copy.deepcopy(model).double().train(place.backward)
        set_attention(reference, attend)
        for module in reference.modules():
            if isinstance(module, GroupedLinear):
                module.forward = lambda x, ends, w=module.weight: exact_experts(x, w, ends)  # type: ignore
        with torch.set_grad_enabled(place.backward):
            found = results(reference, tokens, torch.float64)
        if not place.backward and not torch.allclose(found[1], found[0][:, -found[1].size(1) :], rtol=1e-6, atol=1e-6):
            warn_of_cache()
        return found

    itself = functools.partial(exact, place.attend)
    return Operation("the whole model", run, exact, place.dtype, 10 + 30 * small.n_layer, along=4, itself=itself)


@functools.cache
def warn_of_cache() -> None:
    """Once: an edit of model.py is at fault, not the device."""
    print(
        "warning: with the KV cache, model.py computes other logits than without it, so what sample.py writes is not "
        "what this model learned. Keep in KVCache what the model needs of earlier positions",
        file=sys.stderr,
    )


def set_attention(model: nn.Module, attend: Function) -> None:
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.attend = attend  # type: ignore[method-assign]
