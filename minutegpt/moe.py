"""A mixture of experts: several small MLPs instead of one, and a router that sends each token to a few of them.

The model gets more parameters at the same compute per token (arXiv 1701.06538). model.py uses MoE if n_expert > 0.

    statistics = update_router_bias(model, scale)  # after each training step; {} for a dense model

Load balancing: an expert that is rarely chosen learns little and is chosen even less. To prevent this, each expert
has a bias, which is added to its score when experts are chosen. After each step the bias goes up for experts with few
tokens and down for experts with many (arXiv 2408.15664, 2412.19437). There is no auxiliary loss.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

RATE = 0.01  # change of a bias per step; scores are 0 to 1. The paper's 0.001 suits runs of many thousand steps


def expert_width(n_embd: int, n_expert: int, n_expert_active: int) -> int:
    """The hidden size of one expert, a multiple of 8, as F.grouped_mm requires.

    The active experts and the router together have as many parameters as the dense MLP, or slightly fewer:
    n_expert_active * 2 C width + n_expert C <= 8 C C. Raises ValueError if no such experts can be built.
    """
    if n_expert < 0:
        raise ValueError(f"n_expert={n_expert} must be at least 0")
    if not 2 <= n_expert_active <= n_expert:
        raise ValueError(
            f"n_expert_active={n_expert_active} does not go with n_expert={n_expert}. A token uses at least 2 experts, "
            "because with one the router learns nothing, and at most all"
        )
    if n_embd % 8:
        raise ValueError(f"n_embd={n_embd} does not go with experts. Set an n_embd that 8 divides")
    width = (8 * n_embd - n_expert) // (16 * n_expert_active) * 8
    if width < 8:
        raise ValueError(
            f"n_expert={n_expert} with n_embd={n_embd} leaves no channels for each expert. "
            f"n_expert + {16 * n_expert_active} must be at most 8 * n_embd"
        )
    return width


class GroupedLinear(nn.Module):
    """One linear map per expert, E of them in one stack of weights. (N, n_in) -> (N, n_out), rows sorted by expert."""

    def __init__(self, n_expert: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, n_out, n_in))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """ends (E,) int32: where the rows of each expert end. An expert without rows gets a gradient of zeros."""
        weight = self.weight.to(x.dtype)
        if x.is_cuda:  # some GPUs compute garbage for an expert without rows (PyTorch issue 172439)
            weight = zero_idle(weight, ends)
        return F.grouped_mm(x, weight.mT, offs=ends)


def zero_idle(weight: Tensor, ends: Tensor) -> Tensor:
    """The weights of all experts, those without rows as zeros: whatever their gradient is, zeros arrive. (E, ..)"""
    used = ends.diff(prepend=ends.new_zeros(1)) > 0  # (E,)
    return torch.where(used[:, None, None], weight, 0.0)


class MoE(nn.Module):
    """Sends each token to the k experts with the highest scores and adds up their weighted outputs.

    (B, T, C) -> (B, T, C). router_bias is added to the scores when experts are chosen, but not when their outputs are
    weighted. No token is dropped: experts have no capacity limit. Experts have no biases.
    """

    router_bias: Tensor
    tokens_per_expert: Tensor
    entropy: Tensor

    def __init__(self, config: Any, activation: Callable[[Tensor], Tensor]) -> None:
        """config: a GPTConfig."""
        super().__init__()
        C, E, self.k = config.n_embd, config.n_expert, config.n_expert_active
        width = expert_width(C, E, self.k)
        self.router = nn.Linear(C, E, bias=False)
        self.c_fc = GroupedLinear(E, C, width)
        self.c_proj = GroupedLinear(E, width, C)
        self.activation = activation
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("router_bias", torch.zeros(E))
        # summed over the tokens of a training step: how often each expert was chosen, the entropy of the scores (nats)
        self.register_buffer("tokens_per_expert", torch.zeros(E, dtype=torch.int64), persistent=False)
        self.register_buffer("entropy", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # (N, C) with N = B * T
        logits = self.router(rows)  # (N, E)
        scores = logits.float().sigmoid()  # (N, E)
        chosen = (scores + self.router_bias).topk(self.k).indices  # (N, k)
        gate = scores.gather(1, chosen)  # (N, k)
        gate = gate / gate.sum(1, keepdim=True)  # the weights of a token sum to 1
        # sort the N * k pairs (token, expert) by expert, so that each expert has consecutive rows
        expert, order = chosen.flatten().sort(stable=True)  # (N * k,) each
        E = len(self.router_bias)
        ends = torch.searchsorted(expert, torch.arange(E, device=x.device), right=True, out_int32=True)  # (E,)
        if self.training:
            p = scores.detach() / scores.detach().sum(1, keepdim=True)  # (N, E)
            self.entropy += torch.special.entr(p).sum()
            self.tokens_per_expert += ends.diff(prepend=ends.new_zeros(1))
        rows = rows.to(logits.dtype).index_select(0, order // self.k)  # (N * k, C), in the dtype of autocast
        rows = self.activation(self.c_fc(rows, ends))  # (N * k, width)
        rows = self.c_proj(rows, ends).index_select(0, order.argsort())  # (N * k, C), in the original order
        y = (gate[..., None] * rows.unflatten(0, gate.shape)).sum(1)  # (N, C)
        return self.dropout(y.to(x.dtype).view_as(x))

    def n_idle_params(self) -> int:
        """Parameters of the experts that one token does not use."""
        E = len(self.router_bias)
        experts = [p for layer in (self.c_fc, self.c_proj) for p in layer.parameters()]
        return sum(p.numel() for p in experts) // E * (E - self.k)


@torch.no_grad()
def update_router_bias(model: nn.Module, scale: float) -> dict[str, Tensor]:
    """Moves each router bias by RATE * scale towards equal load and resets the counts. Returns statistics for the log.

    The counts are those since the last call, over all micro-steps and ranks. scale: that of the learning rate, so that
    the biases settle together with the weights.

    expert_load       most tokens of an expert / mean over experts, mean over layers
    expert_load_max   the same in the worst layer
    router_entropy    entropy of the scores as probabilities, in nats, mean over tokens and layers; at most ln n_expert
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        return {}
    load = torch.stack([layer.tokens_per_expert for layer in layers])  # (L, E), integers: exact in any order
    entropy = torch.stack([layer.entropy for layer in layers])  # (L,)
    if dist.is_initialized():
        dist.all_reduce(load)
        dist.all_reduce(entropy)
    mean = load.sum(1, keepdim=True) / load.size(1)  # (L, 1)
    for layer, direction in zip(layers, (mean - load).sign(), strict=True):
        layer.router_bias += RATE * scale * direction
        layer.tokens_per_expert.zero_()
        layer.entropy.zero_()
    largest = load.amax(1) / mean.squeeze(1)  # (L,)
    tokens = load.sum(1) / layers[0].k  # (L,)
    return {
        "expert_load": largest.mean(),
        "expert_load_max": largest.max(),
        "router_entropy": (entropy / tokens).mean(),
    }
