"""The optimizers and the learning-rate schedules.

A schedule is one number per step, from 0 to 1. `set_lr` multiplies it by the `base_lr` of each parameter group, so
that AdamW and Muon warm up and decay together.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minutegpt.device import FUSED_ADAMW
from minutegpt.errors import UserError

OPTIMIZERS = ("adamw", "muon")


class Optimizer(torch.optim.Optimizer):
    """PyTorch's, whose methods import all of torch.compile at their first call: 1.5 s that no step needs. Not these."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Optimizer, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def make_optimizers(
    model: nn.Module, config: Mapping[str, Any], matmul_dtype: torch.dtype = torch.float32, compile_muon: bool = False
) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters (weight decay of matrices only), or Muon for the hidden matrices and AdamW for the rest.

    config: the settings optimizer, learning_rate, weight_decay, beta1, beta2, muon_lr, muon_weight_decay and
    ngram_weight_decay. matmul_dtype: for Muon's Newton-Schulz steps. compile_muon: compiles them.

    The n-gram tables have a separate weight decay, fifty times the usual one. Each row belongs to one character
    sequence, and long sequences occur only a few times. Without decay, a row memorises what followed in the training
    text, and in the second epoch the model learns to rely on that. With a decay of 5 and a learning rate of 3e-3, a
    row that is not read again halves in about 50 steps.
    The order of AdamW's groups, and of the parameters in them, is nanoGPT's, so that its optimizer state loads.
    """
    if config["optimizer"] not in OPTIMIZERS:
        raise UserError(f"--optimizer={config['optimizer']} is not one of {', '.join(OPTIMIZERS)}. Type one of them")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden: list[Tensor] = []
    if config["optimizer"] == "muon":  # embeddings, head and routers are tables of vectors, not maps between spaces
        hidden = [p for name, p in named.items() if p.ndim >= 2 and ".h." in name and ".router." not in name]
    tables = [p for name, p in named.items() if ".ngrams." in name]
    rest = [p for p in named.values() if not any(p is q for q in hidden + tables)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config["weight_decay"]},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    if tables:
        groups.append({"params": tables, "weight_decay": config["ngram_weight_decay"]})
    lr, betas = config["learning_rate"], (config["beta1"], config["beta2"])
    fused = rest[0].device.type in FUSED_ADAMW
    optimizers: list[torch.optim.Optimizer] = [AdamW(groups, lr=lr, betas=betas, fused=fused)]
    if hidden:
        muon = Muon(hidden, config["muon_lr"], weight_decay=config["muon_weight_decay"], ns_dtype=matmul_dtype)
        if compile_muon:
            muon.orthogonalize = torch.compile(orthogonalize, dynamic=False)  # once per shape
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    """Sets every learning rate to `scale` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale


def lr_scale(schedule: str, decay: float, min_scale: float = 0.0, decay_fraction: float = 1.0) -> float:
    """The learning rate as a share of its peak, after the warmup, at a share `decay` (0 to 1) of the run.

    cosine: falls from 1 to min_scale along half a wave (nanoGPT's). linear: stays at 1, then falls in a straight line
    over the last decay_fraction (arXiv 2405.18392). constant: 1. After the end it stays at min_scale.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * min(decay, 1.0)))
    else:
        shape = min(1.0, max(0.0, 1 - decay) / decay_fraction)
    return min_scale + (1 - min_scale) * shape


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to g (..., rows, columns), approximated by five Newton-Schulz steps.

    Each step applies a polynomial of degree 5 to the singular values, which moves them to about 0.7 .. 1.2. It needs
    matrix products only (Keller Jordan, https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g  # so that x @ x.mT is the smaller of the two squares
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values of at most 1, for which it converges
    if x.size(-1) < 2 * x.size(-2) or x.dtype == torch.bfloat16:
        for _ in range(steps):
            s = x @ x.mT  # (..., rows, rows)
            x = a * x + (b * s + c * s @ s) @ x
    else:  # the product of the polynomials of s first, and x once at the end: half the work for a long x.
        # not in bfloat16: s has the squares of the singular values, and the small ones would be lost
        s = x @ x.mT  # (..., rows, rows)
        identity = torch.eye(s.size(-1), dtype=s.dtype, device=s.device)
        p = product = a * identity + (b * s + c * s @ s)  # (..., rows, rows)
        for _ in range(steps - 1):
            s = p @ s @ p  # equals x @ x.mT after this step
            p = a * identity + (b * s + c * s @ s)
            product = p @ product
        x = product @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Momentum, orthogonalized: every direction of a matrix moves equally far. For hidden matrices and stacks of them.

    All matrices of one shape are one batch of Newton-Schulz steps; torch.optim.Muon takes one matrix at a time.
    ns_dtype: the dtype of these steps.
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ns_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.ns_dtype = ns_dtype
        self.orthogonalize: Callable[[Tensor], Tensor] = orthogonalize

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (*_, rows, columns), params in shapes.items():
                for p in params:
                    self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                grads = [p.grad for p in params if p.grad is not None]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))  # Nesterov
                updates = self.orthogonalize(updates.to(self.ns_dtype)).to(updates.dtype)  # (N, ..., rows, columns)
                scale = max(1, rows / columns) ** 0.5  # the same change of the output for every shape
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.unbind()), alpha=-group["lr"] * scale)
