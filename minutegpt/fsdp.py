"""FSDP2: weights, gradients and optimizer state divided among the processes, for models larger than one GPU's memory.

Each process holds 1/N of every tensor, divided by rows, as a DTensor. A layer's weights are gathered when it computes
and released after it; its gradient is averaged and divided at once. A GPU then holds 16 bytes per parameter / N, plus
the embeddings and a layer or two. Every process must make the same forward passes, and save and sample together,
because each of these gathers weights.

Sources: ZeRO, stage 3 (arXiv 1910.02054); PyTorch FSDP (arXiv 2304.11277). torch.distributed's tensors are imported in
the functions, because that takes seconds and most runs have one process.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parametrize

from minutegpt.device import Machine
from model import GPT


def shard_model(model: GPT, machine: Machine, exact: bool = False) -> None:
    """Divides the weights of a model on the CPU, in place, and moves the shares to the device part by part.

    In bfloat16 what autocast rounds anyway, the layers of attention and MLP, is rounded before it travels: half the
    bytes. exact: not that, as qat looks at the float32 weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # silence the warning that gloo falls back to all-gather
    logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)
    mesh = init_device_mesh(machine.device.type, (machine.world_size,))
    half = torch.bfloat16 if machine.dtype == torch.bfloat16 and not exact else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block.attn, mesh=mesh, mp_policy=policy)
        fully_shard(block.mlp, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)  # the rest: embeddings and norms
    machine.reasons["fsdp"] = f"weights, gradients and optimizer state in {machine.world_size} parts (FSDP2)"


def full_state(value: Any) -> Any:
    """The whole of every DTensor in a state, on rank 0's CPU; None on the other ranks, which must call it too.

    One tensor at a time is gathered. One that occurs twice, as the tied embedding does, stays one.
    """
    done: dict[int, Tensor | None] = {}

    def gather(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: gather(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(gather(item) for item in value)
        if hasattr(value, "full_tensor"):
            if id(value) not in done:
                full = value.detach().full_tensor()
                done[id(value)] = full.cpu() if dist.get_rank() == 0 else None
            return done[id(value)]
        return value.detach() if isinstance(value, Tensor) else value

    return gather(value)


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: Any) -> Any:
    """An optimizer's saved state, its moments cut as the sharded weights are: each process keeps its own rows.

    What does not fit stays as it is: checkpoint.load_optimizers checks it.
    """
    from torch.distributed.tensor import distribute_tensor

    def like(moment: Any, p: Any) -> Any:
        if not isinstance(moment, Tensor) or moment.shape != p.shape:
            return moment
        share = distribute_tensor(moment, p.device_mesh, p.placements, src_data_rank=None)
        return share.clone()  # a view would keep the whole in memory

    params = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    moments = {
        i: {key: like(moment, params[i]) for key, moment in each.items()} if i in params else each
        for i, each in state["state"].items()
    }
    return {**state, "state": moments}


@contextlib.contextmanager
def ready_to_generate(model: Any) -> Iterator[None]:
    """Around a model's methods other than its forward pass, such as generate.

    Sharded: the root's own weights are gathered; attention and MLP gather theirs when they are called. Under
    quantization-aware training: weights are rounded once, and not at each token.
    """
    with parametrize.cached():
        if not hasattr(model, "unshard"):
            yield
            return
        model.unshard()
        try:
            yield
        finally:
            model.reshard()


def full_tensor(x: Any) -> Tensor:
    """The whole of a sharded tensor, on every rank; any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def on_full_matrices(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), x (N, rows, columns), for a function of each matrix on its own.

    Where the processes have some rows of every matrix, they exchange them so that each has some whole matrices, and
    give the results back: the work is divided too.
    """
    if not hasattr(x, "full_tensor"):
        return function(x)
    from torch.distributed.tensor import DTensor, Shard

    mine: Any = x.redistribute(placements=[Shard(0)])  # type: ignore[attr-defined]
    done = DTensor.from_local(
        function(mine.to_local()), mine.device_mesh, mine.placements, run_check=False, shape=x.shape, stride=x.stride()
    )
    return done.redistribute(placements=x.placements)  # type: ignore[attr-defined]
