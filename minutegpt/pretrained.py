"""Weights that others trained, or an earlier run: GPT-2 as Hugging Face has it, to look at or to start from.

    state = load("gpt2")  # a checkpoint's state: of GPT-2 by its name, of its folder, or of a run's folder
    model, tokenizer, config = start_from("out-shakespeare-char", config, given)  # for train.py's init_from
    model = teacher("out-shakespeare-char", model.config, tokenizer, dataset)  # for train.py's distill
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minutegpt import checkpoint
from minutegpt.hf import ACTIVATIONS
from minutegpt.start import UserError
from minutegpt.text import caches, own_cache
from minutegpt.tokenizer import gpt2_tokenizer
from model import GPT, GPTConfig

SIZES = {"gpt2": 0.5, "gpt2-medium": 1.5, "gpt2-large": 3.2, "gpt2-xl": 6.4}  # GB to download
FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")
FIXED = {  # fields of config.json that our model takes for granted
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}  # fmt: skip
DEFAULTS = {  # GPT-2's own values, which transformers may leave out
    "model_type": "gpt2", **FIXED, "n_inner": None, "n_positions": 1024, "vocab_size": 50257, "n_layer": 12,
    "n_head": 12, "n_embd": 768, "activation_function": "gelu_new", "tie_word_embeddings": True,
}  # fmt: skip


def load(place: str, ckpt: str = "best") -> dict[str, Any]:
    """A checkpoint's state: of GPT-2 by its name (downloaded if need be), of its folder, or of a run's folder."""
    folder = Path(place)
    if place in SIZES and not folder.is_dir():
        folder = _find_gpt2(place)
    theirs = any(folder.glob("*model*")) and (folder / "config.json").is_file()  # a run has a config.json too
    return load_gpt2(folder) if theirs and not checkpoint.stands(folder) else checkpoint.load(place, ckpt)


def load_gpt2(folder: Path) -> dict[str, Any]:
    """The state of a GPT-2 that transformers saved, without an optimizer; with the tokenizer where GPT-2's is there.

    folder: has config.json and model.safetensors, perhaps vocab.json and merges.txt. Raises UserError for any other
    model. Sizes are believed only once `checkpoint.build_model` has held config and weights to each other.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"{folder} has a config.json and no model.safetensors, one file with all weights. transformers writes it: "
            "GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(OTHER, max_shard_size='100GB')"
        )
    try:
        with open(folder / "config.json", "rb") as file:
            theirs = DEFAULTS | json.loads(file.read(1_000_000))
        fixed = {"model_type": "gpt2", **FIXED, "n_inner": theirs["n_inner"] and 4 * theirs["n_embd"]}
        if strange := [f"{key}={theirs[key]!r:.40}" for key, value in fixed.items() if theirs[key] != value]:
            raise ValueError(f"{', '.join(strange)} is not GPT-2's")
        activation = {their: our for our, their in ACTIVATIONS.items()}[theirs["activation_function"]]
        config = {key: theirs[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        config |= {"block_size": theirs["n_positions"], "tie": theirs["tie_word_embeddings"]}
        config |= {"activation": activation, "bias": True}
        weights = _read_gpt2(path)
        if config["tie"] is True:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        why = str(error) or type(error).__name__
        raise UserError(f"{folder} is not a GPT-2 that can be read: {why:.200}") from error
    state = {"model": weights, "model_config": config, "step": 0, "config": {}, "optimizer": None, "tokenizer": None}
    if config["vocab_size"] == 50257 and all((folder / name).is_file() for name in FILES):
        state["tokenizer"] = gpt2_tokenizer(folder).to_json()
    return state


def _read_gpt2(path: Path) -> dict[str, Tensor]:
    """The tensors under our names and in our shapes. The library holds every size in the header to the file's."""
    weights = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no dict
            kind = file.get_slice(name).get_dtype()
            if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks
                continue
            if kind not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{name:.80} is of dtype {kind}, no float")
            w, ours = file.get_tensor(name), f"transformer.{name.removeprefix('transformer.')}"
            if name == "lm_head.weight":
                ours = name
            elif ".h." in ours and w.ndim == 2:  # their Conv1D is (in, out)
                w = w.t()
            weights[ours] = torch.empty(w.shape).copy_(w)  # float32, and off the map, which Windows would lock
    return weights


def _find_gpt2(name: str) -> Path:
    """The folder of a published GPT-2: where texts are, in the hub's own cache, or downloaded from the hub."""
    for place in caches():
        if all((place / name / file).is_file() for file in ("config.json", "model.safetensors")):
            return place / name
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repo = f"openai-community/{name}"
    if SIZES[name] > 1 and not isinstance(try_to_load_from_cache(repo, "model.safetensors"), str):
        raise UserError(
            f"{name} is not on this machine, and {SIZES[name]} GB to download. To do so, type: "
            f"hf download {repo} {' '.join(FILES)}"
        )
    try:
        return Path([hf_hub_download(repo, file) for file in FILES][-1]).parent
    except Exception as error:  # the hub's client has many ways to fail
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name} is not on this machine and cannot be downloaded ({why:.200}). Three ways out: put its "
            f"{', '.join(FILES)} into {own_cache() / name}; name a folder that has them instead of {name}; or start "
            "from a run's folder, or from scratch"
        ) from None


def start_from(
    place: str, config: dict[str, Any], given: set[str]
) -> tuple[GPT, dict[str, Any] | None, dict[str, Any]]:
    """For train.py's init_from: the model, its tokenizer as JSON (None if unknown), the config with its knobs.

    place: as `load` takes it; given: the knobs set on the command line. Of the config, block_size cuts the context
    where it is smaller, and dropout is taken. Raises UserError for a knob that contradicts the weights.
    """
    if place not in SIZES and not Path(place).is_dir():
        raise UserError(f"--init_from={place} is none of scratch, resume, {', '.join(SIZES)}, nor a folder")
    state = load(place)
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
    state = load(place)
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
