"""What a model needs on a GPU, and how fast it may train there. Arithmetic alone: bench.py --needs prints it.

planned = plan(GPTConfig(), card="H100", rows=8, tokens_per_step=524_288)
print(table({"mine": planned}, rows=8))
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from minutegpt.config import model_defaults
from minutegpt.device import PEAKS
from minutegpt.errors import UserError
from minutegpt.log import si_number
from model import GPT, GPTConfig

# layers, heads, channels; all have contexts of 1024 and 50257 tokens
GPT2 = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
GIGABYTES = {  # of a card's memory, from its data sheet; the smaller one where there are two
    "H200": 141, "H100": 80, "GH200": 96, "B200": 180, "A100": 40, "A10G": 24, "A10": 24, "L40S": 48, "L4": 24,
    "T4": 16, "V100": 16, "RTX 4090": 24, "RTX 3090": 24,
}  # fmt: skip
# the share of a card's peak that training reaches. Others report 33% (nanoGPT on an A100) and 40% (llm.c on an H100)
MFU = (0.30, 0.45)
PER_PARAMETER = 16 + 2  # bytes: weight, gradient, AdamW's two moments; a copy in bfloat16
PER_CHANNEL = 38  # bytes of activations per token, layer and channel: bfloat16, fused attention, a float32 residual
PER_LOGIT = 2  # bytes: bfloat16, and in a compiled step the gradient overwrites it; 14 where it is not compiled
LAUNCHES = 33  # kernel launches per layer of a compiled pass, forward and backward: 386 in GPT-2's 12 layers
LAUNCH_SECONDS = 5e-6  # of the host, per launch: what bounds a small model
FREE = 0.9  # the share of a card's memory that PyTorch can use


@dataclass
class Plan:
    """state, activations, sent: bytes per GPU, for `rows` rows per micro-batch. most_rows: that fit into the card.

    sent: what DDP sends per step on 8 GPUs. tokens_per_second: of one GPU, at the two shares of MFU.
    """

    config: GPTConfig
    n_params: int
    state: float
    activations: float
    most_rows: int
    flops_per_step: float
    tokens_per_second: tuple[float, float]
    step_seconds: tuple[float, float]
    sent: float


def plan(config: GPTConfig, card: str, rows: int, tokens_per_step: int) -> Plan:
    """Raises UserError for a card that is not in the table."""
    if card not in GIGABYTES:
        raise UserError(f"--card={card} is not one of {', '.join(GIGABYTES)}. Type one of them")
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    N, flops = model.n_params(), model.flops_per_token()
    state = N * PER_PARAMETER
    per_row = config.block_size * (PER_CHANNEL * config.n_layer * config.n_embd + PER_LOGIT * config.vocab_size)
    fastest = rows * config.block_size / (LAUNCHES * LAUNCH_SECONDS * config.n_layer)
    speeds = (min(fastest, MFU[0] * PEAKS[card] / flops), min(fastest, MFU[1] * PEAKS[card] / flops))
    return Plan(
        config=config,
        n_params=N,
        state=state,
        activations=rows * per_row,
        most_rows=max(0, int((FREE * 1e9 * GIGABYTES[card] - state) / per_row)),
        flops_per_step=flops * tokens_per_step,
        tokens_per_second=speeds,
        step_seconds=(tokens_per_step / speeds[1], tokens_per_step / speeds[0]),
        sent=2 * 7 / 8 * 4 * N,
    )


def model_config(name: str, config: Mapping[str, Any]) -> GPTConfig:
    """Of one of GPT2's sizes, or for the name "settings" that of the settings of bench.py."""
    if name in GPT2:
        n_layer, n_head, n_embd = GPT2[name]
        return GPTConfig(block_size=1024, vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=True)
    if name != "settings":
        raise UserError(f"--needs={name} is not one of settings, {', '.join(GPT2)}. Type one of them")
    if not config["vocab_size"]:
        raise UserError("--needs=settings needs the size of the vocabulary. Type --vocab_size=50257, or your text's")
    try:
        settings = {field: config[field] for field in model_defaults(GPTConfig)}
        return GPTConfig(vocab_size=config["vocab_size"], **settings)
    except ValueError as error:
        raise UserError(str(error)) from None


def print_plans(config: Mapping[str, Any], as_json: bool) -> None:
    """What bench.py --needs prints: a table, or one JSON object on one line."""
    rows, plans = config["batch_size"], {}
    for name in config["needs"].split(","):
        model = model_config(name, config)
        tokens = rows * config["gradient_accumulation_steps"] * model.block_size
        plans[name] = plan(model, config["card"], rows, tokens)
    if as_json:
        print(json.dumps({name: {k: v for k, v in vars(p).items() if k != "config"} for name, p in plans.items()}))
    else:
        print(table(plans, rows))


def table(plans: Mapping[str, Plan], rows: int) -> str:
    """In markdown, a row per model."""
    head = ["model", "L, C", "N", "state", f"activations, {rows} rows", "rows that fit", "FLOPs per step"]
    head += ["tokens/s, 1 GPU", "step on 1 GPU", "on 8", "on 64", "sent"]
    lines = [head, ["---"] * len(head)]
    for name, each in plans.items():
        cells = [name, f"{each.config.n_layer}, {each.config.n_embd}", si_number(each.n_params)]
        cells += [si_number(each.state, "B"), si_number(each.activations, "B"), str(each.most_rows)]
        cells += [si_number(each.flops_per_step), " to ".join(map(si_number, each.tokens_per_second))]
        cells += [" to ".join(_seconds(s / gpus) for s in each.step_seconds) for gpus in (1, 8, 64)]
        lines.append([*cells, si_number(each.sent, "B")])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"
