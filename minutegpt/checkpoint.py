"""Checkpoints: atomic writes, safe loading, and the previous checkpoint is kept.

save(out_dir, state, best=True)          # ckpt.pt, ckpt-prev.pt (the one before) and ckpt-best.pt
model, tokenizer, state = load_model(out_dir, "best", device)
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minutegpt import safe_load
from minutegpt.config import BOUNDS
from minutegpt.data.dataset import open_data
from minutegpt.data.tokenizer import Tokenizer, from_json
from minutegpt.errors import UserError
from minutegpt.files import TEMPORARY, Busy, atomic_link, atomic_write
from minutegpt.quantize import plain_names, unpack
from model import GPT, GPTConfig

VERSION = 1
LATEST, PREVIOUS, BEST = "ckpt.pt", "ckpt-prev.pt", "ckpt-best.pt"
TRIAL = "ckpt-trial" + TEMPORARY  # of the trial run
ORDER = {"latest": (LATEST, PREVIOUS, BEST), "best": (BEST, LATEST, PREVIOUS)}  # where to look, first to last
MACHINE = ("device", "dtype", "compile", "backend")  # not taken from nanoGPT: on a CPU, too, it writes down float16
KEYS = {"model": dict, "model_config": dict, "step": int, "config": dict}  # what every checkpoint of ours has
OTHERS = {"seconds": float, "best_val_loss": float, "best_step": int, "evaluated": int, "log_rows": int,
          "environment": dict, "data_fingerprint": str, "finished_minutes": float,
          "launch": str}  # fmt: skip  # what it may have
WITH_SOFTCAP = "040c685"  # the last commit whose models have this setting
LONGEST = 2**16  # block_size where no weight bears it out, as in GPTConfig: a key-value cache is as long


@dataclass
class Progress:
    """Where a run is. evaluated: the last step that was; log_rows: lines of log.jsonl; seconds: of training in all.

    finished_minutes: the max_minutes that it has reached.
    """

    step: int = 0
    seconds: float = 0.0
    best_val_loss: float = math.inf
    best_step: int = 0
    evaluated: int = -1
    log_rows: int = 0
    finished_minutes: float = 0.0


class Damaged(UserError):
    """The file is damaged or not a checkpoint: another checkpoint of the run may still be good."""


def save(out_dir: str | Path, state: dict[str, Any], best: bool = False) -> None:
    """Write ckpt.pt; the one before becomes ckpt-prev.pt; with best, ckpt-best.pt is the new one too.

    The first checkpoint of a run removes those of a run that was there before, once it is complete itself.

    state: tensors, dict, list, tuple, str, int, float, bool and None only. Killed at any moment, this leaves a
    whole ckpt.pt, and a ckpt-best.pt no older than the best loss that ckpt.pt records.
    Raises UserError for a full disk or a read-only folder; the checkpoints that were there stay.
    """
    latest, previous, held = (Path(out_dir) / name for name in (LATEST, PREVIOUS, PREVIOUS + TEMPORARY))
    first = state["step"] == 0 and state.get("evaluated") == -1
    had = latest.exists() and not first
    try:
        if had:
            atomic_link(latest, held)  # the old one keeps a name until the new one is complete
        save_checkpoint_file(Path(out_dir) / BEST if best else latest, state)
        if best:
            atomic_link(Path(out_dir) / BEST, latest)
        if had:
            atomic_link(held, previous)  # done last, so that there is always at least one valid checkpoint
        if first:
            for name in (BEST, PREVIOUS):
                with suppress(OSError):
                    (Path(out_dir) / name).unlink()
    except Busy as error:
        print(f"warning: {error}. This checkpoint is lost; the next one comes at its time", file=sys.stderr)
    except UserError as error:
        raise UserError(
            f"{error}. Then go on: python train.py --init_from=resume --out_dir={quote(str(out_dir))}"
        ) from error
    finally:
        with suppress(OSError):
            held.unlink()


def save_checkpoint_file(path: str | Path, state: dict[str, Any]) -> None:
    """Writes one checkpoint file, complete or not at all. Raises ValueError where `read_checkpoint` would refuse it."""
    state = safe_load.plain({"format": "minutegpt", "version": VERSION, **state}, lambda tensor: tensor.detach())
    with atomic_write(path, expected=size(state)) as file:
        torch.save(state, file)


def size(state: Any) -> int:
    """Bytes of all tensors of a state: about the size of its checkpoint on disk."""
    return sum(tensor.nbytes for tensor in _tensors(state))


def has_checkpoint(out_dir: str | Path) -> bool:
    """Whether the folder has any checkpoint, complete or damaged."""
    return any(os.path.exists(Path(out_dir) / name) for name in ORDER["latest"])


def is_transformers_folder(folder: str | Path) -> bool:
    """Whether Hugging Face's transformers wrote a model there. A run's folder has a config.json too, but no model."""
    return os.path.isfile(Path(folder) / "config.json") and any(Path(folder).glob("*model*"))


def load_run(out_dir: str | Path, which: str = "latest") -> dict[str, Any]:
    """The state of a run: "latest", or "best" (lowest validation loss). Where one is damaged, the next is taken.

    Raises UserError where there is none, none is whole, or it was written by a later version.
    """
    if which not in ORDER:
        raise UserError(f"there is no checkpoint called {which!r}: --ckpt=best or --ckpt=latest")
    paths = [path for name in ORDER[which] if os.path.isfile(path := Path(out_dir) / name)]
    if not paths:
        if os.path.isfile(out_dir):
            folder = quote(str(Path(out_dir).parent))
            raise UserError(f"{out_dir} is a file, and --out_dir names the run's folder: --out_dir={folder}")
        if is_transformers_folder(out_dir):
            raise UserError(
                f"{out_dir} is a model of transformers, not a run. Make a run of it: "
                f"python export.py --out_dir={quote(str(out_dir))} --format=minutegpt"
            )
        runs = sorted({path.parent.as_posix() for path in Path().glob("*/ckpt*.pt")})
        raise UserError(
            f"no checkpoint in {out_dir}: --out_dir=NAME names a run's folder"
            + (f" (here: {', '.join(runs[:5])})" if runs else "")
            + f", and `python train.py --out_dir={quote(str(out_dir))}` makes one"
        )
    for path, following in zip(paths, [*paths[1:], None], strict=True):
        try:
            return read_checkpoint(path)
        except Damaged as error:
            if following is None:
                raise
            if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes is enough
                print(f"warning: {error}. Taking {following.name} instead", file=sys.stderr)
    raise AssertionError  # the last one returned or raised


def load_model(
    out_dir: str | Path, which: str, device: str | torch.device, dataset: str = ""
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model in eval mode on the device, its tokenizer, the whole state.

    A checkpoint of nanoGPT holds no tokenizer: it comes from the dataset named here, or in its config.
    """
    state = load_run(out_dir, which)
    model = build_model(state).to(device).eval()
    if state["tokenizer"]:
        return model, from_json(state["tokenizer"]), state
    name = dataset or str(state["config"].get("dataset", ""))
    if not name:
        raise UserError(f"the checkpoint in {out_dir} has no vocabulary in it: name the dataset, --dataset=NAME")
    return model, from_json(open_data(name, "train").meta["tokenizer"]), state


def build_model(state: dict[str, Any]) -> GPT:
    """The model of a state, on the CPU. Raises UserError where its config and its weights do not fit together."""
    try:
        weights = unpack(state["model"])
        weights = {name.replace(".mlp.balance", ".mlp.router_bias"): w for name, w in weights.items()}  # its old name
        config = GPTConfig(**_checked_config(state["model_config"], weights))
        with torch.device("meta"), _Uninitialised():  # shapes without memory
            wanted = {name: weight.shape for name, weight in GPT(config).state_dict().items()}
        found = {name: weight.shape for name, weight in weights.items()}
        if wanted != found:
            name = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            raise ValueError(f"{name} is {found.get(name)}, not {wanted.get(name)}")
    except (ValueError, TypeError) as error:
        raise UserError(f"the checkpoint's model config and its weights do not fit together: {error}") from error
    model = GPT(config)
    model.load_state_dict(weights)
    return model


def load_optimizers(optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    """Moments and counters from the state; learning rates and the like stay as the config has them now."""
    saved = state.get("optimizer") or []
    saved = [saved] if isinstance(saved, dict) else saved
    try:
        if len(saved) != len(optimizers):  # --optimizer changed, or this code did
            raise ValueError(f"there are {len(saved)} optimizers in it, and this run has {len(optimizers)}")
        for optimizer, theirs in zip(optimizers, saved, strict=True):
            own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
            optimizer.load_state_dict(theirs)
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group.update(settings)
                for p in group["params"] if group.get("fused") else ():  # a fused kernel counts on the device
                    if "step" in (moments := optimizer.state.get(p, {})):
                        moments["step"] = moments["step"].to(p.device, torch.float32)
            for p, moments in optimizer.state.items():  # a fused kernel believes every shape it is given
                if any(isinstance(m, Tensor) and m.ndim and m.shape != p.shape for m in moments.values()):
                    raise ValueError(f"its moments are not shaped like the weights, {tuple(p.shape)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the checkpoint's optimizer does not fit the model: {error}. Start a new run from its weights, with "
            "--init_from=FOLDER"
        ) from error


def restore(
    state: dict[str, Any] | None, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler
) -> Progress:
    """Fills optimizers and scaler from a run's state, and returns how far it was; all fresh where state is None."""
    if state is None:
        return Progress()
    load_optimizers(optimizers, state)
    state.pop("optimizer", None)  # 8 bytes per parameter, in each process
    scaler.load_state_dict(state.get("scaler") or scaler.state_dict())
    return Progress(**{field.name: state[field.name] for field in fields(Progress) if field.name in state})


def run_state(
    model: GPT, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, progress: Progress,
    **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """Everything that a run needs to go on in the same bits, as tensors and plain values.

    others: config, tokenizer, environment, ...
    """
    return asdict(progress) | {
        "model": plain_names(model.state_dict()),
        "model_config": asdict(model.config),
        "optimizer": [optimizer.state_dict() for optimizer in optimizers],
        "scaler": scaler.state_dict(),
        **others,
    }


class _Uninitialised(TorchFunctionMode):
    """Skips what works in place, as initialisation does: on the meta device it would import a compiler, for seconds."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_place = function.__name__.endswith("_") and not function.__name__.endswith("__")
        return [*args, *(kwargs or {}).values()][0] if in_place else function(*args, **(kwargs or {}))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """One checkpoint file, of ours or of nanoGPT, as a state of ours. Raises Damaged (a UserError) or UserError."""
    try:
        state = safe_load.safe_load(path)
        if {"model", "model_args", "iter_num"} <= state.keys():
            state = _from_nanogpt(state)
        if state.get("format") != "minutegpt" or type(state.get("version")) is not int:
            raise ValueError("not a minuteGPT or nanoGPT checkpoint")
        if state["version"] <= VERSION:
            wrong = [key for key, kind in KEYS.items() if type(state.get(key)) is not kind]
            wrong += [key for key, kind in OTHERS.items() if type(state.get(key, kind())) is not kind]
            if wrong or not 0 <= state["step"] < 2**40 or {*map(type, state["model"].values())} - {Tensor}:
                raise ValueError(f"{', '.join(wrong) or 'step or model'} missing or of the wrong kind")
            if {*map(type, state.get("environment", {}).values())} - {str, int}:
                raise ValueError("environment of the wrong kind")
    except Exception as error:  # a damaged or hostile file can fail in any way
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise Damaged(f"{path} is damaged or not a checkpoint: {why}") from error
    if state["version"] > VERSION:
        raise UserError(
            f"{path} was written by a later minuteGPT (format {state['version']}, this one reads up to {VERSION}): "
            "update this checkout with `git pull`"
        )
    return {"tokenizer": None, "nanogpt": False, **state, "model_config": _without_removed(state["model_config"], path)}


def _without_removed(config: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A model's config without the settings that no longer exist. Raises UserError where the model needs one."""
    softcap = config.get("softcap", 0)  # limited the logits; zero_init only drew the initial weights
    if type(softcap) not in (int, float) or softcap != 0:
        raise UserError(
            f"{path} was trained with softcap={softcap!r:.40}, which this version does not have any more. To use it, "
            f"type `git checkout {WITH_SOFTCAP}`"
        )
    return {name: value for name, value in config.items() if name not in ("softcap", "zero_init")}


def _checked_config(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """The model's config, each number borne out by the weights before anything of its size is built."""
    kinds = {field.name: type(field.default) for field in fields(GPTConfig)}
    for name, value in config.items():
        if name not in kinds or not (type(value) is kinds[name] or (kinds[name] is float and type(value) is int)):
            raise ValueError(f"{name}={value!r:.40} is no {kinds.get(name, object).__name__} of this model")
    if getattr(weights.get("transformer.wte.weight"), "ndim", 0) != 2:
        raise ValueError("there is no transformer.wte.weight (the token embedding, V x C) among them")
    vocab_size, n_embd = weights["transformer.wte.weight"].shape
    n_layer = len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})
    positions = len(weights.get("transformer.wpe.weight", range(LONGEST)))
    widest = max(max(weight.shape, default=0) for weight in weights.values())
    exact = {"vocab_size": vocab_size, "n_embd": n_embd, "n_layer": n_layer}
    for name, value in exact.items():
        if config.get(name) != value:
            raise ValueError(f"{name}={config.get(name)}, and the weights say {value}")
    limits = {"block_size": positions, "ngram_rows": 2**28}  # the tables' own rows are compared with the model's
    limits |= {} if config.get("n_expert") else {"n_expert_active": int(BOUNDS["n_expert_active"][1])}
    for name, value in config.items():
        most = limits.get(name, widest)
        if name not in exact and type(value) is int and not 0 <= value <= most:
            raise ValueError(f"{name}={value} is out of bounds (0 to {most})")
    return config


def _from_nanogpt(state: dict[str, Any]) -> dict[str, Any]:
    """A state that nanoGPT saved, compiled or not, in our form. Its own tokenizer is a pickle: never read."""
    weights = {name.removeprefix("_orig_mod."): weight for name, weight in state["model"].items()}
    loss = state.get("best_val_loss", float("inf"))
    return {
        "format": "minutegpt",
        "version": VERSION,
        "nanogpt": True,
        "model": {name: w for name, w in weights.items() if not name.endswith(".attn.bias")},  # causal masks
        "model_config": state["model_args"],
        "optimizer": state.get("optimizer"),
        "step": state["iter_num"],
        "seconds": 0.0,
        "best_val_loss": float(loss),
        "config": {key: value for key, value in state.get("config", {}).items() if key not in MACHINE},
        "tokenizer": None,
    }


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
