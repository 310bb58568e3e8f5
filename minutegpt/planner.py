"""Chooses the settings of a run from the text, this machine and the minutes, and predicts its loss.

    python train.py config/auto.py --dataset=my_book --max_minutes=10

describe.py  how hard the text is, and how much more of it helps
speed.py     how long a step of a model takes here
law.py       the loss of a model on such a text
plan         tries all models of a small grid, and returns the best one that can run

A setting that the user sets is kept, and the others are chosen around it.
"""

import math
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from minutegpt.config import Settings
from minutegpt.data.dataset import open_data
from minutegpt.describe import Text, describe_text
from minutegpt.device import Machine
from minutegpt.distributed import split_batch
from minutegpt.errors import STARTED, UserError
from minutegpt.law import LAW, predict_loss
from minutegpt.log import number, print_line
from minutegpt.optim import OPTIMIZERS
from minutegpt.speed import Shape, Speed, correct, measure_machine, memory_bytes, seconds_per_step
from model import GPTConfig

SIZES = [(1, 32), (2, 64), (3, 96), (4, 128), (4, 192), (5, 256), (6, 384), (8, 512), (12, 768), (16, 1024), (24, 1536)]
CONTEXTS = (64, 128, 256, 512)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
LEAST_TOKENS = 768  # per step: the law was fitted to no smaller batches
MOST_EPOCHS = 8  # the law was fitted to few runs that read their text more often
MOST_WEIGHTS = 10  # per token of text, of the hidden matrices: larger models only overfit
STEPS = np.geomspace(1, 1e7, 200).round()
TRIAL_SECONDS = 3.0  # of a run that is not training: the trial step, the first and the last save
COMPILE_SECONDS = 40.0
TRAINING_SHARE = 0.9  # of the rest; evaluations and samples take what is left
CORRECTION_SHARE = 0.01  # of the minutes: what a measured step may take, at most
MINUTES = 10.0  # where the user sets the steps and no time


class Forecast(NamedTuple):
    """loss: over the whole validation split, in nats per token. margin: 9 of 10 runs end within this."""

    loss: float
    margin: float

    def __str__(self) -> str:
        return f"{self.loss:.2f} ± {self.margin:.2f}"


class Candidate(NamedTuple):
    loss: float
    shape: dict[str, Any]
    steps: int
    seconds: float  # of all steps


class Plan(NamedTuple):
    """settings: what was chosen, without what the user set. lines: the plan in words."""

    settings: dict[str, Any]
    forecast: Forecast
    steps: int
    lines: list[str]


def plan(config: Mapping[str, Any], fixed: Collection[str], text: Text, speed: Speed, used: float = 0.0) -> Plan:
    """The run with the lowest predicted loss among those that this machine can make.

    config: all settings of train.py; those whose names are in `fixed` are kept. Only where a longer run would overfit,
    max_minutes is lowered, or becomes max_iters. used: seconds of max_minutes that are over.
    Raises UserError where what the user set leaves nothing that can run.
    """
    time_left = 60 * (config["max_minutes"] or MINUTES) - used - TRIAL_SECONDS - COMPILE_SECONDS * speed.compiled
    time_left = max(1.0, TRAINING_SHARE * time_left)
    candidates = list(all_candidates(config, fixed, text, speed, time_left))
    candidates.sort(key=lambda each: (max(0.0, each.seconds - time_left), each.loss))  # in time; else the fastest
    if not candidates:
        limits = ("n_layer", "n_embd", "n_expert", "block_size", "batch_size", "gradient_accumulation_steps")
        asked = [f"--{key}" for key in limits if key in fixed]
        raise UserError(
            "no run with these settings fits in the memory of this machine, or its rows do not divide among the "
            f"devices. Leave {' or '.join(asked)} out, so that the planner can choose"
        )
    best = candidates[0]
    chosen = best.shape | follow(best, text)
    settings = {key: value for key, value in chosen.items() if key in config and key not in fixed}
    early = bool(config["max_minutes"]) and best.seconds < 0.8 * time_left  # a longer run would overfit
    in_time = best.seconds < 0.5 * time_left  # even where the steps take twice as long as expected
    if early and in_time and "max_iters" not in fixed:
        settings |= {"max_iters": best.steps, "max_minutes": 0.0}
    elif early:
        settings["max_minutes"] = max(0.01, round(config["max_minutes"] - (time_left - best.seconds) / 60, 2))
    lines = [*describe(best, text, early), *rivals(candidates, text, time_left)]
    return Plan(settings, forecast(best, text), best.steps, lines)


def all_candidates(
    config: Mapping[str, Any], fixed: Collection[str], text: Text, speed: Speed, time_left: float
) -> Iterator[Candidate]:
    """The best number of rows and steps for each combination of the other settings."""
    longest = text.shortest - 1
    if longest < 1 or ("block_size" in fixed and config["block_size"] > longest):
        raise UserError(
            f"block_size {config['block_size']} is longer than the shortest split, which has {longest + 1} tokens. "
            f"Take --block_size={max(1, longest)} or less, or more text"
        )

    def options(key: str, values: Collection[Any]) -> Collection[Any]:
        return [config[key]] if key in fixed else values

    contexts = [T for T in CONTEXTS if longest // 4 >= T] or [max(1, longest // 4)]
    others = [
        options("block_size", contexts), options("optimizer", OPTIMIZERS), options("ngram", (6, 0)),
        options("ngram_rows", (16384,)), options("dropout", (0.0, 0.2)),
    ]  # fmt: skip
    keys = ("n_layer", "n_embd", "n_head", "block_size", "optimizer", "ngram", "ngram_rows", "dropout")
    shapes = sorted(sizes(config, fixed), key=lambda size: size[0] * size[1] ** 2)
    shapes = [size for size in shapes if 12 * size[0] * size[1] ** 2 <= MOST_WEIGHTS * text.tokens] or shapes[:1]
    experts = {key: config[key] for key in ("n_expert", "n_expert_active") if config.get("n_expert")}
    for values in (size + other for size, other in product(shapes, product(*others))):
        shape = dict(zip(keys, values, strict=True)) | {"vocab_size": text.vocab_size} | experts
        batch = np.array(list(batches(shape, config, fixed, speed)))  # (n, 2)
        if not len(batch):
            continue
        if "batch_size" not in fixed:
            large = batch.prod(1) * shape["block_size"] >= min(LEAST_TOKENS, text.tokens // 20)
            batch = batch[large] if large.any() else batch[-1:]
        rows = batch.prod(1)[:, None]  # (n, 1)
        seconds = seconds_per_step(shape, rows, speed)
        if config["max_minutes"]:
            steps = np.maximum(1.0, time_left // seconds)  # (n, 1), all that the time allows
            most = np.maximum(1.0, MOST_EPOCHS * text.tokens // (rows * shape["block_size"]))
            steps = np.minimum(np.minimum(steps, most), STEPS)  # (n, 200): what overfits stops earlier
        else:
            steps = np.full_like(seconds, max(1, config["max_iters"]))
        loss = predict_loss(shape, steps, rows, text)
        late = np.maximum(0.0, steps * seconds - time_left)
        i, j = np.unravel_index((loss + 1e3 * late).argmin(), loss.shape)
        shape |= {"batch_size": int(batch[i, 0]), "gradient_accumulation_steps": int(batch[i, 1])}
        yield Candidate(float(loss[i, j]), shape, int(steps[i, j]), float(steps[i, j] * seconds[i, 0]))


def sizes(config: Mapping[str, Any], fixed: Collection[str]) -> Iterator[tuple[int, int, int]]:
    """Layers, channels and heads of the models to try. A head has 64 channels, or nearly so."""
    pairs = [(config["n_layer"] if "n_layer" in fixed else L, C) for L, C in SIZES]
    if "n_head" in fixed:  # rotary positions need an even number of channels per head
        unit = 2 * max(1, config["n_head"])
        pairs = [(L, max(1, round(C / unit)) * unit) for L, C in pairs]
    if "n_embd" in fixed:
        pairs = [(L, config["n_embd"]) for L, _ in pairs]
    found, problem = False, ""
    for L, C in sorted(set(pairs)):
        near_64 = sorted((abs(C / H - 64), H) for H in range(1, C + 1) if C % H == 0)
        names = [name for name in GPTConfig.__dataclass_fields__ if name in config]
        for H in [config["n_head"]] if "n_head" in fixed else [H for _, H in near_64]:
            try:
                GPTConfig(**{name: config[name] for name in names} | {"n_layer": L, "n_embd": C, "n_head": H})
            except ValueError as error:
                problem = str(error)
            else:
                found = True
                yield L, C, H
                break
    if not found:  # a setting that the user chose allows no model
        raise UserError(problem)


def batches(shape: Shape, config: Mapping[str, Any], fixed: Collection[str], speed: Speed) -> Iterator[tuple[int, int]]:
    """batch_size and gradient_accumulation_steps that fit in memory and divide among the devices."""
    n, key = speed.devices, "gradient_accumulation_steps"
    for batch_size in [config["batch_size"]] if "batch_size" in fixed else ROWS:
        largest = memory_bytes(shape, 2 * batch_size) > speed.memory or batch_size == ROWS[-1]
        for count in [config[key]] if key in fixed else [n, 2 * n, 4 * n, 8 * n, 16 * n][: 5 if largest else 1]:
            share = math.gcd(count, n)  # see distributed.split_batch
            if batch_size * share % n == 0 and memory_bytes(shape, batch_size * share // n) <= speed.memory:
                yield batch_size, count


def follow(best: Candidate, text: Text) -> dict[str, Any]:
    """The settings that follow from the width, the steps and the epochs."""
    slower = min(1.0, (384 / best.shape["n_embd"]) ** 0.5)  # wide models bear a lower rate
    some = min(100, max(1, best.steps // 20))
    rows = best.shape["batch_size"] * best.shape["gradient_accumulation_steps"]
    return {
        "learning_rate": float(f"{3e-3 * slower:.2g}"),
        "muon_lr": float(f"{0.015 * slower:.2g}"),
        "ngram_weight_decay": ngram_weight_decay(text.tokens, epochs(best, text), rows * best.shape["block_size"]),
        "warmup_iters": some,
        "eval_iters": some,
    }


def ngram_weight_decay(tokens: int, epochs: float, batch_tokens: int) -> float:
    """The weight decay of n-gram tables, for a text of so many tokens.

    The tables memorise a text that is read again. With this decay they forget what they read a seventh of an epoch
    ago: 4 for the million tokens of Tiny Shakespeare and 1536 tokens per step, as in config/shakespeare_cpu.py.
    """
    share = min(1.0, epochs) * batch_tokens / tokens  # of an epoch, that a step reads
    return float(f"{4 * min(30.0, max(1.0, share / (1536 / 900_000))):.2g}")


# -- in words


def epochs(candidate: Candidate, text: Text) -> float:
    shape = candidate.shape
    rows = shape["batch_size"] * shape["gradient_accumulation_steps"]
    return candidate.steps * rows * shape["block_size"] / text.tokens


def forecast(candidate: Candidate, text: Text) -> Forecast:
    """The margin grows below 0.1 and above 3 million tokens, where the law was fitted to few runs."""
    loss, tokens = min(candidate.loss, math.log(text.vocab_size)), epochs(candidate, text) * text.tokens
    decades = max(0.0, math.log10(tokens / 3e6), math.log10(1e5 / tokens))
    return Forecast(loss, LAW["spread"] * loss * (1 + decades / 2))


def describe(best: Candidate, text: Text, early: bool) -> list[str]:
    shape = best.shape
    rows = shape["batch_size"] * shape["gradient_accumulation_steps"]
    layers, batch = number(shape["n_layer"], "layer"), number(rows, "row")
    return [
        f"plan: {layers}, {shape['n_embd']} channels, {batch} of {shape['block_size']} tokens per step, "
        f"{shape['optimizer']}, {'' if early else 'about '}{best.steps} steps, {epochs(best, text):.2g} epochs"
        f"{': more would overfit, so it ends early' if early else ''}",
        f"expected validation loss {forecast(best, text)} (uniform guessing {math.log(text.vocab_size):.2f}, counting "
        f"pairs {text.bigram_loss:.2f})",
    ]


def rivals(candidates: list[Candidate], text: Text, time_left: float) -> list[str]:
    """The best wider and the best narrower model than the first candidate, in words."""
    width, lines = candidates[0].shape["n_embd"], []
    for wider in (True, False):
        others = [each for each in candidates if each.shape["n_embd"] != width]
        rival = next((each for each in others if (each.shape["n_embd"] > width) == wider), None)
        if rival:
            name = {2.0: "twice as wide", 0.5: "half as wide"}.get(rival.shape["n_embd"] / width)
            reason = "too few steps" if rival.seconds > 0.8 * time_left else "too little text"
            size = f"{number(rival.shape['n_layer'], 'layer')}, {rival.shape['n_embd']} channels, {rival.steps} steps"
            name, reason = name or ("wider" if wider else "narrower"), reason if wider else "too small"
            lines.append(f"{name} ({size}): {forecast(rival, text)}, {reason}")
    return lines


def plan_run(config: Mapping[str, Any], settings: Settings, machine: Machine) -> dict[str, Any]:
    """For train.py: plans the run, prints the plan, and returns its settings with the forecast.

    config: with the dataset that is there. settings: what the command line and the config files set.
    """
    fixed = settings.given | settings.from_file
    train, val = (open_data(config["dataset"], split) for split in ("train", "val"))
    text, speed = describe_text(train, val), measure_machine(machine)
    found = plan(config, fixed, text, speed, time.perf_counter() - STARTED)
    first = dict(config) | found.settings | {"vocab_size": text.vocab_size}
    _, rows = split_batch(first["batch_size"], first["gradient_accumulation_steps"], machine.world_size)
    speed = correct(speed, first, rows, machine, CORRECTION_SHARE * 60 * (config["max_minutes"] or MINUTES))
    found = plan(config, fixed, text, speed, time.perf_counter() - STARTED)
    for line in found.lines:
        print_line(line)
    given = {key: config[key] for key in config if key in settings.given} | {"compile": str(machine.compile).lower()}
    flags = {"plan": "false", "dataset": config["dataset"], "max_minutes": config["max_minutes"]}
    flags |= given | found.settings | {"plan": "false"}
    files = [word for word in sys.argv[1:] if not word.startswith("-") and word.endswith(".py")]
    words = [*files, *(f"--{key}={value}" for key, value in flags.items())]
    print_line(f"the same run: python train.py {shlex.join(words)}")
    return found.settings | {"forecast": list(found.forecast)}
