"""A script's settings: its own defaults, then a config file, then the command line.

In a script, below the block of its settings (lower-case module-level names that hold an int, float, bool or str):

    config, given = configure(globals(), __file__)
    globals().update(config)

and then `python train.py config/shakespeare_char.py --max_iters=20 --overwrite`. A config file is Python. It can do
what any script can, and it can start from another one: `from config.shakespeare_cpu import *`. It may hold a section
for one kind of device, which is used only there: `cpu = dict(batch_size=4)`.
"""

import ast
import difflib
import inspect
import math
import os
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from minutegpt.errors import UserError

Setting = bool | int | float | str
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
DEVICE_KINDS = ("cpu", "cuda", "mps", "xpu")  # the names of sections in a config file
PATHS = {  # a leading ~ is expanded
    "out_dir", "init_from", "teachers", "data_dir", "input", "compare", "nanogpt", "minbpe", "to", "plot_file",
    "attention_plot", "embedding_plot", "file",
}  # fmt: skip

# -- bounds and choices, for every script. The upper ones are far above any use: a config may come with a checkpoint

BOUNDS: dict[str, tuple[float, float]] = {
    "batch_size": (1, 2**22), "gradient_accumulation_steps": (1, math.inf), "seed": (0, math.inf),
    "eval_interval": (1, math.inf), "eval_iters": (1, math.inf), "log_interval": (1, math.inf),
    "max_iters": (0, math.inf), "max_minutes": (0, 1e6), "warmup_iters": (0, math.inf),
    "learning_rate": (0, math.inf), "min_lr": (0, math.inf), "muon_lr": (0, math.inf), "grad_clip": (0, math.inf),
    "checkpoint_minutes": (0, math.inf), "n_expert_active": (1, 2**16),
    "decay_fraction": (1e-6, 1), "beta1": (0, 0.99999), "beta2": (0, 0.99999),
    "weight_decay": (0, math.inf), "muon_weight_decay": (0, math.inf), "ngram_weight_decay": (0, math.inf),
    "n_layer": (0, 1000), "n_embd": (0, 2**16), "block_size": (0, 2**20),  # GPTConfig asks for at least 1
    "num_samples": (1, 10_000), "max_new_tokens": (0, math.inf), "temperature": (0, 1000), "top_k": (0, math.inf),
    "top_p": (1e-9, 1), "repetition_penalty": (0.01, 100),
    "max_tokens": (0, math.inf), "workers": (0, 1024),
    "stride": (0, math.inf), "memorization_tokens": (0, 1_000_000),
    "streams": (0, 1024), "repeats": (1, math.inf), "read_megabytes": (0.01, math.inf),
    "compress_megabytes": (0.001, math.inf), "steps": (1, math.inf), "new_tokens": (1, math.inf),
    "seeds": (0, 60), "first_seed": (0, math.inf), "jobs": (1, 1000), "margin": (0, math.inf), "record": (0, math.inf),
}  # fmt: skip
CHOICES: dict[str, tuple[str, ...]] = {
    "lr_schedule": ("cosine", "linear", "constant"),
    "qat": ("", "int8", "int4", "int4-tensor"),
    "quantize": ("", "int8", "int4", "int4-tensor"),
    "tracker": ("none", "tensorboard", "wandb", "trackio"),
    "split": ("train", "val"),
    "section": ("auto", "none", *DEVICE_KINDS),
    "format": ("hf", "safetensors", "html", "minutegpt", "int8", "int4", "int4-tensor"),
}
MAX_TOKENS = 2**22  # per forward pass
# settings of earlier versions: the new name, or what to do instead
RENAMED = {
    "distill": "teachers", "attention": "attention_plot", "embedding": "embedding_plot",
    "more": "extra", "sampled": "memorization_tokens", "picture": "plot_file",
}  # fmt: skip
REMOVED = {
    "decay_lr": "A constant learning rate is --lr_schedule=constant",
    "lr_decay_iters": "The decay ends at --max_iters",
    "eval_only": "Evaluate with python evaluate.py --out_dir=NAME",
    "backend": "It follows from --device",
    "fsdp": "torchrun divides the batch (docs/scaling.md). A model larger than a GPU needs torchtitan",
    "shard": "torchrun divides the batch (docs/scaling.md). A model larger than a GPU needs torchtitan",
    "softcap": "Leave it out, as it brought nothing (docs/results.md#simpler)",
    "zero_init": "Leave it out, as it brought nothing (docs/results.md#simpler)",
}


class Settings(NamedTuple):
    """values of all settings; given: names set on the command line; from_file: names that a config file sets; section:
    the kind of device whose section was used, or ""; sections: all that the config files have.
    """

    values: dict[str, Setting]
    given: set[str]
    from_file: set[str]
    section: str
    sections: set[str]


def configure(*args: Any, **options: Any) -> tuple[dict[str, Setting], set[str]]:
    """The value of every setting, and the names of those set on the command line. For arguments see read_settings."""
    settings = read_settings(*args, **options)
    return settings.values, settings.given


def read_settings(
    defaults: Mapping[str, Any],
    script: str,
    argv: Sequence[str] | None = None,
    *,
    model: type | None = None,
    ignore: Collection[str] = (),
    lists: Collection[str] = (),
    config_files: bool = True,
    positional: str = "",
) -> Settings:
    """Reads the config files and the command line of a call.

    defaults: the script's globals(). script: its path, for --help, which prints its block of settings and exits with
    0. argv: the command line after the script's name (default: sys.argv's). model: a dataclass whose fields, but for
    vocab_size, are settings too. ignore: settings of another script, which a config file may set without effect.
    lists: settings that take several words, `--compare a b`, joined with commas: the same as --compare=a,b.
    config_files: False where the script takes none.
    positional: the setting that a word without dashes sets, instead of a config file.
    Raises UserError that lists all mistakes of the call at once.
    """
    settings = {k: v for k, v in defaults.items() if type(v) in KINDS and k.islower() and not k.startswith("_")}
    settings = model_defaults(model) | settings
    files, options, mistakes = _split(
        sys.argv[1:] if argv is None else argv, settings, script, lists, model, positional
    )
    values: dict[str, Setting] = dict(settings)
    if positional:
        mistakes += [f"unexpected argument {word[:80]!r}. Type one file per call" for word in files[1:]]
        options, files = options + [(positional, word) for word in files[:1]], []
    if not config_files and files:
        mistakes += [f"unexpected argument {word[:80]!r}. Did you mean --input={word[:80]}?" for word in files]
        files = []
    from_file: set[str] = set()
    sections: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            found = run_config(file, "start" in settings)
        except UserError as error:
            mistakes.append(str(error))
            continue
        for kind in DEVICE_KINDS:
            if kind not in settings and isinstance(found.get(kind), dict):
                sections.setdefault(kind, {}).update(found.pop(kind))
        from_file |= _apply(found, settings, values, ignore, file, mistakes)
    given = {key: _parse(key, text, settings, mistakes) for key, text in options}
    section = _device_section(sections, values | {k: v for k, v in given.items() if v is not None})
    if given.get("section", "auto") not in ("auto", "none", *sections):
        there = f"which has {', '.join(sections)}" if sections else "which has none"
        mistakes.append(f"--section={given['section']} is not in the config file, {there}. Leave --section out")
    if section:
        from_file |= _apply(sections[section], settings, values, ignore, f"{files[-1]}, section {section}", mistakes)
    values |= {key: value for key, value in given.items() if value is not None}
    mistakes += out_of_bounds(values)
    if mistakes:
        count = [f"{len(mistakes)} mistakes:"] if len(mistakes) > 1 else []
        last = f"(python {_command(script)} --help lists all settings)"
        raise UserError("\n  ".join([*count, *mistakes, last]))
    return Settings(values, set(given), from_file, section, set(sections))


def model_defaults(model: type | None) -> dict[str, Setting]:
    """Names and defaults of the model's settings: the fields of its config, but for the vocabulary's size."""
    if model is None:
        return {}
    return {f.name: f.default for f in fields(model) if f.name != "vocab_size" and f.default is not MISSING}


def settings_of(script: str | Path) -> set[str]:
    """The names that a script's block of settings sets, without running it."""
    names: set[str] = set()
    for node in ast.parse(Path(script).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):  # configure(...) ends the block
            break
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def out_of_bounds(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with these values by BOUNDS and CHOICES, a line each."""
    mistakes = []
    for key, (low, high) in BOUNDS.items():
        if key in values and values[key] < low:
            mistakes.append(f"--{key}={values[key]} must be at least {low:g}")
        if key in values and values[key] > high:
            mistakes.append(f"--{key}={values[key]} must be at most {high:g}")
    for key, choices in CHOICES.items():
        if key in values and values[key] not in choices:
            mistakes.append(f"--{key}={values[key]} is not one of {', '.join(filter(None, choices))}")
    if (
        values.get("min_lr", 0) > values.get("learning_rate", 0)
        and not mistakes
        and values.get("lr_schedule") != "constant"
    ):
        rates = f"--min_lr={values['min_lr']} is above --learning_rate={values['learning_rate']}"
        mistakes.append(f"{rates}. Type a smaller --min_lr")
    rows = MAX_TOKENS // max(1, int(values.get("block_size", 1)))
    if values.get("batch_size", 1) > max(1, rows) and not mistakes:
        mistakes.append(f"--batch_size={values['batch_size']} must be at most {max(1, rows)} with this block_size")
    return mistakes


def check_bounds(values: Mapping[str, Any]) -> None:
    """Raises UserError for values out of bounds: for settings that came with a checkpoint."""
    if mistakes := out_of_bounds(values):
        raise UserError("\n  ".join(mistakes))


def _split(
    argv: Sequence[str], settings: Mapping[str, Setting], script: str, lists: Collection[str], model: type | None,
    positional: str,
) -> tuple[list[str], list[tuple[str, str]], list[str]]:  # fmt: skip
    """The command line as config files, (key, text) pairs and mistakes."""
    files: list[str] = []
    options: list[tuple[str, str]] = []
    mistakes: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("--help", "-h"):
            print(_help(script, model, positional), flush=True)  # here, so that `| head` is no error
            raise SystemExit(0)
        if not word.startswith("-"):
            if word.partition("=")[0] in settings:
                mistakes.append(f"unknown argument {word[:80]!r}. Did you mean --{word[:80]}?")
            else:
                files.append(word)
            continue
        key, equals, text = word.removeprefix("--").partition("=")  # a value may hold '=' too
        if not word.startswith("--") or key not in settings:
            mistakes.append(_unknown(key.lstrip("-"), settings))
            if not equals and rest and not rest[0].startswith("--") and not rest[0].endswith(".py"):
                rest.pop(0)  # the unknown setting's value
        elif equals:
            options.append((key, text))
        elif type(settings[key]) is bool:
            follows = bool(rest) and rest[0].lower() in ("true", "false")
            options.append((key, rest.pop(0) if follows else "true"))
        elif rest and not rest[0].startswith("--"):
            words = [rest.pop(0)]
            while key in lists and rest and not rest[0].startswith("--") and not rest[0].endswith(".py"):
                words.append(rest.pop(0))
            options.append((key, ",".join(words)))
        else:
            mistakes.append(f"--{key} has no value. Type --{key}=VALUE, {_wanted(settings[key])}")
    return files, options, mistakes


def _apply(
    found: Mapping[str, Any], settings: Mapping[str, Setting], values: dict[str, Setting], ignore: Collection[str],
    file: str, mistakes: list[str],
) -> set[str]:  # fmt: skip
    """Puts what a file sets into `values`, and its mistakes into `mistakes`; returns the names that it sets."""
    names = set()
    for key, value in found.items():
        if key in ignore and key not in settings:
            continue
        if settings.get(key) == "auto" and type(value) is bool:
            value = str(value)  # compile = False, as nanoGPT's configs write it
        if key not in settings:
            mistakes.append(f"{file}: {_unknown(key, settings)} A helper's name starts with _.")
        elif not _fits(value, type(settings[key])):
            mistakes.append(f"{file}: {key} must be {_wanted(settings[key])}, not {type(value).__name__}")
        else:
            values[key] = float(value) if type(settings[key]) is float else value
            names.add(key)
    return names


def _parse(key: str, text: str, settings: Mapping[str, Setting], mistakes: list[str]) -> Setting | None:
    """The value of a setting on the command line; None, and a mistake, where the text is not of its kind."""
    kind = type(settings[key])
    try:
        value: Any = {"true": True, "false": False}.get(text.lower()) if kind is bool else kind(text)
    except ValueError:
        value = None
    if not _fits(value, kind):
        mistakes.append(f"--{key} must be {_wanted(settings[key])}, not {text[:80]!r}")
        return None
    if key in PATHS:  # most shells leave the ~ of --out_dir=~/x as it is
        value = ",".join(os.path.expanduser(part) if part.startswith("~") else part for part in value.split(","))
    return value


def _fits(value: Any, kind: type) -> bool:
    if kind is float and type(value) in (int, float):
        return abs(value) < 1e300 and not math.isnan(value)
    if kind is int and type(value) is int:
        return abs(value) < 2**63
    return type(value) is kind


def _wanted(default: Setting) -> str:
    return f"{KINDS[type(default)]} (like {str(default).lower() if type(default) is bool else repr(default)})"


def _unknown(key: str, settings: Mapping[str, Setting]) -> str:
    if key in RENAMED and RENAMED[key] in settings:
        return f"--{key} is now --{RENAMED[key]}. Type --{RENAMED[key]}=VALUE."
    if key in REMOVED and "n_layer" in settings:
        return f"--{key} no longer exists. {REMOVED[key]}."
    if key == "data_dir" and "dataset" in settings:
        return "--data_dir is a setting of the scripts in prepare/. Here, type MINUTEGPT_DATA=FOLDER before python."
    near = difflib.get_close_matches(key[:60].lower().replace("-", "_"), settings, n=3)
    return f"unknown setting {key[:60]!r}." + (f" Did you mean {' or '.join(near)}?" if near else "")


def _device_section(sections: Collection[str], values: Mapping[str, Any]) -> str:
    """The section that holds on the device of these settings, "" where there is none."""
    if not sections or values.get("section", "auto") == "none":
        return ""
    if values.get("section", "auto") in sections:
        return str(values["section"])
    kind = str(values.get("device", "auto")).split(":")[0]
    if kind == "auto":
        from minutegpt.device import auto_kind  # imports torch

        kind = auto_kind()
    return kind if kind in sections else ""


def split_words(command: str) -> list[str]:
    """The words of a command, as a shell splits them."""
    try:
        return shlex.split(command)
    except ValueError:
        raise UserError(f"a quote is not closed in {command!r}. Close it") from None


def run_config(file: str, prompts: bool = False) -> dict[str, Any]:
    """The names that a config file sets, without its modules and functions. prompts: the script takes --start too."""
    path = Path(file)
    if not os.path.isfile(path):
        near = sorted(p.as_posix() for p in Path("config").glob("*.py"))
        near = difflib.get_close_matches(file[:60], near, n=3, cutoff=0.4) or near[:5]
        near += [f"--out_dir={shlex.quote(file)} for a run's folder"] * os.path.isdir(path)
        near += [f"--start={file[:60]!r} for a prompt"] * (prompts and not os.path.isdir(path) and path.suffix != ".py")
        hint = f". Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"there is no config file {file[:200]!r}{hint}")
    if path.suffix != ".py":
        raise UserError(
            f"{file[:200]} is not a config file: the name of one ends in .py. A text to train on is prepared first: "
            f"python prepare/text.py --input={shlex.quote(file[:200])}"
        )
    try:
        names = runpy.run_path(file)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's Python can do: a syntax error, an exception, sys.exit
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        what = traceback.format_exception_only(error)[-1].strip()
        raise UserError(f"{file}, line {line}: {what}") from None
    return {
        key: value
        for key, value in names.items()
        if not key.startswith("_") and not isinstance(value, ModuleType) and not callable(value)
    }


def _command(script: str) -> str:
    """The script as a user types it: train.py, prepare/text.py."""
    path = Path(script)
    return f"{path.parent.name}/{path.name}" if path.parent.name in ("prepare", "dev") else path.name


def _help(script: str, model: type | None, positional: str) -> str:
    """The block of the script between its first two lines that start with '# ----', and the model's settings."""
    lines = Path(script).read_text(encoding="utf-8").splitlines()
    marks = [i for i, line in enumerate(lines) if line.startswith("# ----")] + [len(lines), len(lines)]
    lines = [
        f"usage: python {_command(script)} {positional.upper() or '[config/FILE.py]'} [--key=value ...]",
        "",
        *lines[marks[0] + 1 : marks[1]],
    ]
    if model:
        lines += ["", f"# the model ({model.__name__} in model.py)"]
        block = [line.strip() for line in inspect.getsource(model).splitlines()]
        lines += [line for line in block if re.match(r"\w+: \w+ = ", line) and not line.startswith("vocab_size")]
    return "\n".join(lines)


def resume_config(
    settings: Settings, state: Mapping[str, Any], model: Collection[str], of_this_call: Collection[str]
) -> tuple[dict[str, Setting], list[str]]:
    """The config of the run that `state` was saved by, with what the command line changes; and notes for the user.

    model: settings that make the model, which cannot change; of_this_call: those that the run does not bring along.
    The notes name what changed, and what a config file of this call sets in vain. Raises UserError for a change of the
    model.
    """
    saved = modern_names({**state["config"], **state["model_config"]})
    merged = dict(settings.values)
    notes: list[str] = []
    refused: list[str] = []
    for key, default in settings.values.items():
        value = saved.get(key, default)
        if key in of_this_call or not _fits(value, type(default)):
            continue
        if key not in settings.given:
            merged[key] = value
            if key in settings.from_file and value != default:
                notes.append(f"not taken from the config file: {key}={default}. The run goes on with {key}={value}")
        elif default != value:
            (refused if key in model else notes).append(f"{key} {value} -> {default}")
    if refused:
        raise UserError(
            f"a resumed run keeps its model, and this would change it: {', '.join(refused)}. Leave that out, or train "
            "a new model in another --out_dir"
        )
    return merged, notes


def modern_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A config that an earlier version saved, under today's names."""
    config = {RENAMED.get(key, key): value for key, value in saved.items()}
    if config.get("decay_lr") is False:
        config["lr_schedule"] = "constant"
    return config
