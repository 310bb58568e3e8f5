"""A script's knobs: its own defaults, then a config file, then the command line.

In a script, below the block of its knobs (module-level names in lower case that hold an int, float, bool or str):

    config, given = configure(globals(), __file__)
    globals().update(config)

and then `python train.py config/shakespeare_char.py --max_iters=20 --eval_only`. A config file is Python and the
user's own: it can do what any script can.
"""

import difflib
import math
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from minutegpt.errors import UserError

Knob = bool | int | float | str
WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def configure(
    defaults: Mapping[str, Any],
    script: str,
    argv: Sequence[str] | None = None,
    others: Sequence[str] = (),
    lists: Sequence[str] = (),
) -> tuple[dict[str, Knob], set[str]]:
    """The value of every knob, and the names of those set on the command line (not in the file).

    defaults: the script's globals(); script: its path, for --help, which prints the block of knobs and exits
    with 0; argv: the command line behind the script's name, sys.argv's by default; others: knobs of another script that
    a config file may set, without effect on this one; lists: knobs that take several words, `--compare a b`, which
    become one text with commas, 'a,b', as --compare=a,b gives it.
    Raises UserError that tells all the mistakes of the call at once.
    """
    knobs = {k: v for k, v in defaults.items() if type(v) in WANTED and k.islower() and not k.startswith("_")}
    files, options, mistakes = _split(sys.argv[1:] if argv is None else argv, knobs, script, lists)
    config: dict[str, Knob] = dict(knobs)
    for file in files:
        try:
            values = _run(file, "start" in knobs)
        except UserError as error:
            mistakes.append(str(error))
            continue
        for key, value in values.items():
            if key in others:
                continue
            if knobs.get(key) == "auto" and type(value) is bool:
                value = str(value)  # compile = False, as nanoGPT's configs write it
            if key not in knobs:
                mistakes.append(f"{file}: {_unknown(key, knobs)} (a helper's name starts with _)")
            elif not _fits(value, type(knobs[key])):
                mistakes.append(f"{file}: {key} takes {_wanted(knobs[key])}, not {type(value).__name__}")
            else:
                config[key] = float(value) if type(knobs[key]) is float else value
    for key, text in options:
        try:
            config[key] = _parse(text, type(knobs[key]))
        except ValueError:
            mistakes.append(f"--{key} takes {_wanted(knobs[key])}, not {text[:80]!r}")
    if mistakes:
        count = [f"{len(mistakes)} mistakes:"] if len(mistakes) > 1 else []
        last = f"(python {Path(script).name} --help lists all knobs)"
        raise UserError("\n  ".join([*count, *mistakes, last]))
    return config, {key for key, _ in options}


def _split(
    argv: Sequence[str], knobs: Mapping[str, Knob], script: str, lists: Sequence[str]
) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """The command line as config files, (key, text) pairs and mistakes."""
    files: list[str] = []
    options: list[tuple[str, str]] = []
    mistakes: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("--help", "-h"):
            print(_help(script), flush=True)  # here, where a reader who has gone (| head) is no error
            raise SystemExit(0)
        if not word.startswith("-"):
            if (key := word.partition("=")[0]) in knobs:
                mistakes.append(f"{word[:80]!r} lacks its dashes: --{key}=VALUE")
            else:
                files.append(word)
            continue
        key, equals, text = word.removeprefix("--").partition("=")  # a value may hold '=' too
        if not word.startswith("--") or key not in knobs:
            mistakes.append(_unknown(key.lstrip("-"), knobs))
            if not equals and rest and not rest[0].startswith("--") and not rest[0].endswith(".py"):
                rest.pop(0)  # the unknown key's value
        elif equals:
            options.append((key, text))
        elif type(knobs[key]) is bool:
            follows = bool(rest) and rest[0].lower() in ("true", "false")
            options.append((key, rest.pop(0) if follows else "true"))
        elif rest and not rest[0].startswith("--"):
            words = [rest.pop(0)]
            while key in lists and rest and not rest[0].startswith("--") and not rest[0].endswith(".py"):
                words.append(rest.pop(0))
            options.append((key, ",".join(words)))
        else:
            mistakes.append(f"--{key} lacks its value, {_wanted(knobs[key])}: --{key}=VALUE")
    return files, options, mistakes


def _parse(text: str, kind: type) -> Knob:
    """Raises ValueError where the text is not of that kind."""
    value: Any = {"true": True, "false": False}.get(text.lower()) if kind is bool else kind(text)
    if not _fits(value, kind):
        raise ValueError
    return value


def _fits(value: Any, kind: type) -> bool:
    if kind is float and type(value) in (int, float):
        return abs(value) < 1e300 and not math.isnan(value)
    if kind is int and type(value) is int:
        return abs(value) < 2**63
    return type(value) is kind


def _wanted(default: Knob) -> str:
    return f"{WANTED[type(default)]} (like {str(default).lower() if type(default) is bool else repr(default)})"


def _unknown(key: str, knobs: Mapping[str, Knob]) -> str:
    near = difflib.get_close_matches(key[:60].lower().replace("-", "_"), knobs, n=3)
    return f"there is no knob {key[:60]!r}" + (f", did you mean {' or '.join(near)}?" if near else "")


def _run(file: str, prompts: bool = False) -> dict[str, Any]:
    """The names that a config file sets. Modules and functions in it are its own affair. prompts: of sample.py."""
    path = Path(file)
    if not path.is_file():
        near = sorted(p.as_posix() for p in Path("config").glob("*.py"))
        near = difflib.get_close_matches(file[:60], near, n=3, cutoff=0.4) or near[:5]
        near += [f"--out_dir={file} for a run's folder"] * path.is_dir()
        near += [f"--start={file[:60]!r} for a prompt"] * (prompts and not path.is_dir() and path.suffix != ".py")
        raise UserError(f"there is no config file {file[:200]!r}" + (f"; there is {', '.join(near)}" if near else ""))
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


def _help(script: str) -> str:
    """The block of the script between its first two lines that start with '# ----'."""
    name = Path(script).name
    lines = Path(script).read_text(encoding="utf-8").splitlines()
    marks = [i for i, line in enumerate(lines) if line.startswith("# ----")] + [len(lines), len(lines)]
    usage = f"usage: python {name} [config/FILE.py] [--key=value ...]"
    return "\n".join([usage, "", *lines[marks[0] + 1 : marks[1]]])


def resume_config(
    config: Mapping[str, Knob], given: set[str], state: Mapping[str, Any], fixed: Sequence[str], own: Sequence[str]
) -> tuple[dict[str, Knob], list[str]]:
    """The config of the run that `state` was saved by, with what the command line changes; and the changes in words.

    given: the knobs set on the command line; fixed: those that make the model, which cannot change; own: those of
    this call alone, which the run does not bring along. Raises UserError for a change of a fixed knob.
    """
    saved = {**state["config"], **state["model_config"]}
    merged = dict(config)
    changes: list[str] = []
    refused: list[str] = []
    for key, default in config.items():
        value = saved.get(key, default)
        if key in own or not _fits(value, type(default)):
            continue
        if key not in given:
            merged[key] = value
        elif config[key] != value:
            (refused if key in fixed else changes).append(f"{key} {value} -> {config[key]}")
    if refused:
        raise UserError(
            f"a resumed run keeps its model, and this would change it: {', '.join(refused)}. Leave that out, or train "
            "a new model in another --out_dir"
        )
    return merged, changes


def require(
    config: Mapping[str, Any],
    at_least: Mapping[str, float] | None = None,
    at_most: Mapping[str, float] | None = None,
    one_of: Mapping[str, Sequence] | None = None,
) -> None:
    """Raises UserError, with all that is wrong at once, for a number out of bounds or a word that is no choice."""
    mistakes = [f"--{k}={config[k]} must be at least {low}" for k, low in (at_least or {}).items() if config[k] < low]
    mistakes += [f"--{k}={config[k]} must be at most {high}" for k, high in (at_most or {}).items() if config[k] > high]
    mistakes += [
        f"--{key}={config[key]} is not one of {', '.join(str(c) for c in choices if c != '')}"  # '' is its absence
        for key, choices in (one_of or {}).items()
        if config[key] not in choices
    ]
    if mistakes:
        raise UserError("\n  ".join(mistakes))
