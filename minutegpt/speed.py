"""How fast this machine is, and how long a training step of a model takes on it.

speed = measure_machine(machine)
seconds_per_step(shape, rows, speed)
correct(speed, config, rows, machine)  # the same speed, corrected by the measured time of a real step
memory_bytes(shape, rows)  # of such a step
"""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from minutegpt.device import Machine, synchronize, usable_memory
from minutegpt.optim import make_optimizers, set_lr
from model import GPT, GPTConfig

Shape = Mapping[str, Any]  # settings of a model and its optimizer
Numbers = Any  # a float, or a numpy array of them

WIDTHS = (64, 256, 768)  # of the matrix products that are measured


class Speed(NamedTuple):
    """flops: FLOP/s of matrix products of each of WIDTHS. call: seconds of an operation on few numbers.

    elements: numbers per second that pass through x * sigmoid(x) + x. memory: bytes that a run may take on each device.
    slower: see correct.
    """

    flops: tuple[float, ...]
    call: float
    elements: float
    memory: float
    devices: int = 1
    compiled: bool = False
    slower: float = 1.0

    def flops_at(self, width: int) -> float:
        return float(np.exp(np.interp(math.log(width), np.log(WIDTHS), np.log(self.flops))))


def measure_machine(machine: Machine) -> Speed:
    """Measures matrix products, small operations and elementwise ones on this machine, in about half a second."""
    device, dtype = machine.device, machine.dtype
    rows = 1024 if machine.is_cpu else 16384

    def best(call: Any, repeats: int) -> float:
        seconds = []
        for _ in range(repeats + 1):  # the first one warms up
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    flops = []
    for width in WIDTHS:
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, width), (width, 4 * width)))
        flops.append(8 * rows * width**2 / best(lambda a=a, b=b: a @ b, 5))
    small, large = torch.zeros(64, device=device), torch.zeros(rows, 1024, device=device)
    call = best(lambda: [small.add_(1) for _ in range(200)], 3) / 200
    elements = large.numel() / best(lambda: large * large.sigmoid() + large, 5)
    return Speed(tuple(flops), call, elements, usable_memory(device), machine.world_size, machine.compile)


# fitted to the CPU seconds of steps of 15 shapes, which it meets within 3% (standard deviation; docs/planner.md)
TIMES = {"products": 1.25, "newton_schulz": 310.0, "activations": 68.0, "logits": 8.4, "updates": 3.6, "calls": 1000.0}


def seconds_per_step(shape: Shape, rows: Numbers, speed: Speed) -> Numbers:
    """Seconds of one training step on `rows` rows, divided among the devices."""
    L, C, T, V = (shape[key] for key in ("n_layer", "n_embd", "block_size", "vocab_size"))
    tokens = rows * T / speed.devices
    products = TIMES["products"] * 6 * tokens * (12 * L * C**2 + V * C + 2 * L * T * C)
    if shape["optimizer"] == "muon":
        products += TIMES["newton_schulz"] * L * C**3
    elements = TIMES["activations"] * tokens * L * C + TIMES["logits"] * tokens * V
    elements += TIMES["updates"] * parameters(shape)[1]
    calls = TIMES["calls"] * (L + 1) * (0.5 if speed.compiled else 1)
    return speed.slower * (products / speed.flops_at(C) + elements / speed.elements + calls * speed.call)


def correct(speed: Speed, config: Shape, rows: int, machine: Machine, limit: float) -> Speed:
    """`speed` with slower = seconds of a real training step / seconds of the formula, which is up to 2 times off.

    config: the settings of a run, and vocab_size. rows: of one forward pass on this device, at most; fewer where its
    step would take longer than `limit` seconds. Where steps are compiled, nothing is measured.
    """
    alone = speed._replace(devices=1)
    while rows > 1 and seconds_per_step(config, rows, alone) > limit:
        rows //= 2
    formula = float(seconds_per_step(config, rows, alone))
    if speed.compiled or formula > limit:
        return speed
    try:
        return speed._replace(slower=speed.slower * measure_step(config, rows, machine) / formula)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if "memory" not in str(error):
            raise
        return speed


def measure_step(config: Shape, rows: int, machine: Machine) -> float:
    """Seconds of a training step of the model of these settings: the best of five."""
    names = [name for name in GPTConfig.__dataclass_fields__ if name in config]
    model = GPT(GPTConfig(**{name: config[name] for name in names})).to(machine.device)
    optimizers = make_optimizers(model, config, machine.matmul_dtype)
    set_lr(optimizers, 0.0)
    idx = torch.randint(config["vocab_size"], (rows, config["block_size"] + 1)).to(machine.device)  # (B, T + 1)
    seconds = []
    for _ in range(5):  # the first ones also allocate memory
        synchronize(machine.device)
        began = time.perf_counter()
        with machine.training():
            _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize(machine.device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def parameters(shape: Shape) -> tuple[int, int]:
    """The number of weights in hidden matrices, and in embeddings, n-gram tables and the output matrix."""
    L, C, V = shape["n_layer"], shape["n_embd"], shape["vocab_size"]
    idle = shape["n_expert"] / shape["n_expert_active"] if shape.get("n_expert") else 1  # all experts / those in use
    tables = sum(min(V**n, shape["ngram_rows"]) for n in range(2, shape["ngram"] + 1))
    return round((4 + 8 * idle) * L * C**2), (2 * V + tables) * C


def memory_bytes(shape: Shape, rows: int) -> float:
    """Bytes of a step with `rows` rows on one device: weights, gradients and optimizer state, and activations."""
    L, C, T, V = (shape[key] for key in ("n_layer", "n_embd", "block_size", "vocab_size"))
    return 24 * sum(parameters(shape)) + rows * T * (L * C * 150 + V * 24)
