"""Weights that others trained, or an earlier run: GPT-2 as Hugging Face has it, to look at or to start from.

state = load("gpt2")  # a checkpoint's state: of GPT-2 by its name, of its folder, or of a run's folder
model, tokenizer, config = start_from("out-shakespeare-char", config, given)  # for train.py's init_from
model = teacher("out-shakespeare-char", model.config, tokenizer, dataset)  # for train.py's distill
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from minutegpt import checkpoint
from minutegpt.errors import UserError
from minutegpt.huggingface import SIZES, load_any
from model import GPT, GPTConfig


def start_from(
    place: str, config: dict[str, Any], given: set[str]
) -> tuple[GPT, dict[str, Any] | None, dict[str, Any]]:
    """For train.py's init_from: the model, its tokenizer as JSON (None if unknown), the config with its knobs.

    place: as `load` takes it; given: the knobs set on the command line. Of the config, block_size cuts the context
    where it is smaller, and dropout is taken. Raises UserError for a knob that contradicts the weights.
    """
    if place not in SIZES and not Path(place).is_dir():
        raise UserError(f"--init_from={place} is none of scratch, resume, {', '.join(SIZES)}, nor a folder")
    state = load_any(place)
    model = checkpoint.build_model(state)
    had = asdict(model.config)
    fixed = given & (had.keys() - {"block_size", "dropout", "zero_init"})
    wanted = {knob: config[knob] for knob in sorted(fixed)}
    if wanted.get("n_kv_head") == 0:
        wanted["n_kv_head"] = had["n_head"]
    T, longest = config["block_size"], had["block_size"]
    if had["pos"] == "learned":  # it knows these positions and no others
        wanted |= {"block_size": T} if "block_size" in given and longest < T else {}
        T = min(T, longest)
        model.transformer.wpe.weight = nn.Parameter(model.transformer.wpe.weight.detach()[:T].clone())
    if wrong := [f"{knob}={had[knob]} (not {value})" for knob, value in wanted.items() if value != had[knob]]:
        raise UserError(f"the model in {place} has {', '.join(wrong)}. Leave that out, or train from scratch")
    try:
        model.config = GPTConfig(**had | {"block_size": T, "dropout": config["dropout"]})
    except ValueError as error:
        raise UserError(str(error)) from None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = config["dropout"]
    return model, state["tokenizer"], config | {k: v for k, v in asdict(model.config).items() if k in config}


def check_vocabulary(model: GPT, tokenizer: dict[str, Any] | None, ours: dict[str, Any], dataset: str) -> None:
    """Raises UserError where the ids of the dataset, whose tokenizer is `ours`, mean other things to the model.

    tokenizer: the model's; where it has none, sizes are compared, which may be padded to a multiple of 128.
    """
    size = model.config.vocab_size
    if tokenizer != ours if tokenizer else not 0 <= size - ours["vocab_size"] < 128:
        what = f"{tokenizer['kind']}, " if tokenizer else ""
        raise UserError(
            f"{dataset} was prepared with another tokenizer ({ours['kind']}, {ours['vocab_size']} ids) than the model "
            f"to start from ({what}{size} ids), so its ids mean other things. Prepare it with the same one, or train "
            "from scratch"
        )


def teacher(place: str, student: GPTConfig, ours: dict[str, Any], dataset: str) -> GPT:
    """For train.py's distill: the model at a place that `load` takes, in eval mode, its weights fixed.

    ours: the dataset's tokenizer. Raises UserError where the teacher knows other ids, or fewer positions.
    """
    if place not in SIZES and not Path(place).is_dir():
        raise UserError(f"--distill={place}: a teacher is one of {', '.join(SIZES)}, or a folder, and this is neither")
    state = load_any(place)
    model = checkpoint.build_model(state).eval().requires_grad_(False)
    if (state["tokenizer"] or ours) != ours or model.config.vocab_size != student.vocab_size:
        raise UserError(
            f"--distill={place}: this teacher's {model.config.vocab_size} ids are not the {student.vocab_size} of "
            f"{dataset}. Take one that was trained with the same tokenizer, or prepare the data with the teacher's"
        )
    T = model.config.block_size
    if model.config.pos == "learned" and student.block_size > T:
        raise UserError(f"--distill={place}: this teacher reads {T} tokens at most. Type --block_size={T}")
    return model
