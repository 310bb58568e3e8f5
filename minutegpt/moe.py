"""Keeps a mixture of experts in balance: what the routers did in a step, summed, and what follows from it.

    router = balance(model, fraction)  # after each step; {} for a dense model

An expert that is seldom chosen learns little, and is chosen still less. Against that, each expert's bias in the choice
goes one small step up where it had fewer visits than the mean, and down where it had more (arXiv 2408.15664): no term
in the loss, so that no gradient serves two masters.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import MoE

RATE = 0.01  # of the bias, beside scores of 0 to 1; the paper's 0.001 is made for runs of many thousand steps


@torch.no_grad()
def balance(model: nn.Module, fraction: float) -> dict[str, Tensor]:
    """Moves the biases by what was counted since the last call, over all micro-steps and ranks, and counts anew.

    fraction: of RATE; the learning rate's, so that the biases come to rest with the weights. Gives what the log tells:
    expert_load (the largest load over the mean load, mean over the layers), expert_load_max (in the worst layer) and
    router_entropy (of the scores as probabilities, in nats, mean over tokens and layers; at most ln n_expert).
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        return {}
    load = torch.stack([layer.load for layer in layers])  # (L, E) whole numbers: their sum knows no order
    entropy = torch.stack([layer.entropy for layer in layers])  # (L,)
    if dist.is_initialized():
        dist.all_reduce(load)
        dist.all_reduce(entropy)
    mean = load.sum(1, keepdim=True) / load.size(1)  # (L, 1)
    for layer, step in zip(layers, (mean - load).sign(), strict=True):
        layer.balance += RATE * fraction * step
        layer.load.zero_()
        layer.entropy.zero_()
    largest = load.amax(1) / mean.squeeze(1)  # (L,)
    tokens = load.sum(1) / layers[0].k  # (L,)
    return {
        "expert_load": largest.mean(),
        "expert_load_max": largest.max(),
        "router_entropy": (entropy / tokens).mean(),
    }
