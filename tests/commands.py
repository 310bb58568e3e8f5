"""The commands in the docs: found in markdown and docstrings, checked word by word, and made small enough to run.

for command in commands(Path("README.md").read_text()):
    check(command, ROOT)  # AssertionError if it cannot work
"""

import ast
import contextlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from minutegpt.config import configure
from minutegpt.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ("python", "torchrun", "uv", "pip", "bash")  # programs whose arguments `check` can check
# other programs that a shell line can begin with: the docs may not use them until `check` knows how to check them
OTHERS = (
    "apt apt-get brew cd conda cp curl docker export git gsutil hf huggingface-cli jupyter make mamba mkdir mv nohup "
    "npm npx pip3 poetry pytest python3 rm rsync ruff sbatch scp sh source srun ssh sudo tar tmux wget"
).split()
MENTION = re.compile(
    r"(?<![\w./`-])(?:(?:python|bash) (?=\S*[./])|torchrun (?=-|\S+\.py)|uv (?=[a-z]+\b)|pip install )[^`)\n]*"
)
ELSEWHERE = ("llama.cpp/convert_hf_to_gguf.py", "nanoGPT/train.py")  # scripts of other projects
PLACEHOLDER = re.compile(r"(?<![\w./-])[A-Z][A-Z_]*(?![\w-])|\.\.\.")  # NAME, FOLDER, N: the reader fills it in
# settings that make a run of each script last about a second
SMALL: dict[str, dict[str, Any]] = {
    "train.py": {
        "max_iters": 2, "max_minutes": 0, "batch_size": 2, "gradient_accumulation_steps": 1, "eval_iters": 1,
        "log_interval": 1, "compile": "false", "dtype": "float32",
    },
    "sample.py": {"max_new_tokens": 8},
    "evaluate.py": {"block_size": 0},  # the small model cannot read beyond its context
    "export.py": {"overwrite": "true"},
    "bench.py": {
        "parts": "train,decode", "repeats": 1, "steps": 1, "new_tokens": 4, "decode_batches": 1, "batch_size": 2,
        "compress_streams": 0, "compile": "false", "dtype": "float32",
    },
}  # fmt: skip
TAKE_MODEL_SETTINGS = ("train.py", "bench.py", "compare.py")  # scripts whose settings include those of the model
SMALL_MODEL = {"n_layer": 1, "block_size": 32}  # for a run from scratch. the width stays, since the heads divide it


def blocks(markdown: str) -> list[tuple[str, str]]:
    """The code blocks as (language, text): ```fenced, or indented by four spaces, with '' as the language."""
    fence = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.M)
    indented = re.compile(r"(?:^|(?<=\n\n))(?:    .*\n(?:[ \t]*\n(?=    ))*)+")
    found = [(match.start(), match[1].strip(), match[2]) for match in fence.finditer(markdown)]
    rest = fence.sub(lambda match: re.sub(r"[^\n]", "x", match[0]), markdown + "\n")
    found += [(match.start(), "", re.sub(r"^    ", "", match[0], flags=re.M)) for match in indented.finditer(rest)]
    return [(language, text) for _, language, text in sorted(found)]


def commands(markdown: str) -> list[str]:
    """All commands: the lines of shell blocks, and those mentioned in other blocks and in `inline code`.

    A block is a shell block if its first line begins with a program. Then each of its lines is a command.
    """
    found: list[str] = []
    for language, text in blocks(markdown):
        first = re.sub(r"^(?:[A-Z_\d]+=\S*\s+)+", "", text).split(maxsplit=1)[:1]  # after the environment
        if language in ("sh", "bash", "shell", "console") or {*first} & {*KNOWN, *OTHERS}:
            lines = text.replace("\\\n", " ").splitlines()
            found += [re.sub(r"(^|\s+)#.*", "", line.removeprefix("$ ")).strip() for line in lines]
        elif language != "diff":
            found += mentions(text)
    prose = re.sub(r"^(```.*\n(?:.*\n)*?```|    .*)$", "", markdown, flags=re.M)
    for span in re.findall(r"`([^`]+)`", prose):
        found += mentions(" ".join(span.split()))
    return [command for command in dict.fromkeys(found) if command]


def mentions(text: str) -> list[str]:
    """The commands that a docstring or the output of a program mentions. [--options] are left out."""
    return [re.sub(r"\[[^]]*\]?", "", match[0]).strip() for match in MENTION.finditer(text)]


def parts(command: str) -> list[list[str]]:
    """The words of each program that a line runs. Alternatives are written out: --x=a|b is two programs."""
    found: list[list[str]] = []
    for part in re.split(r"\s+(?:&&|\|\||[|;&])\s+", command):
        words = shlex.split(part, comments=True)
        while words and re.match(r"[A-Z_\d]+=", words[0]):  # the environment
            words.pop(0)
        choices = []
        for word in words:
            key, equals, values = word.rpartition("=") if word.startswith("--") else ("", "", word)
            choices.append([key + equals + value for value in values.split("|")])
        found += [list(choice) for choice in itertools.product(*choices) if words]
    return found


def check(command: str, root: Path) -> None:
    """Raises AssertionError, with the reason, for a command that cannot work in the repository at root."""
    for words in parts(command):
        _check(words, root)


def _check(words: list[str], root: Path) -> None:
    program, *rest = words
    if program == "python" and rest[:1] == ["-m"]:
        return _check(rest[1:], root)
    if program == "python":
        if rest and rest[0] not in ELSEWHERE:
            settings(rest[0], rest[1:], root)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        try:
            args = get_args_parser().parse_args([PLACEHOLDER.sub("1", word) for word in rest])
        except SystemExit:
            raise AssertionError(f"torchrun does not accept these arguments: {rest}") from None
        settings(args.training_script, rest[len(rest) - len(args.training_script_args) :], root)
    elif program == "uv":
        _check_uv(rest, root)
    elif program == "pip":
        assert rest[:1] == ["install"] and set(rest[1:]) - {"-q", "-U"} <= {"uv", *tools(root)}, f"pip {rest}"
    elif program == "bash":
        done = subprocess.run(["bash", "-n", *rest], cwd=root, capture_output=True, text=True)
        assert rest and done.returncode == 0, done.stderr
    else:
        raise AssertionError(f"unknown program {program}. Add a check to tests/commands.py, or remove it from the docs")


def _check_uv(words: list[str], root: Path) -> None:
    assert words, "uv without a subcommand does nothing"
    subcommands = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    verb = subcommands[:2] if subcommands[0] == "pip" else subcommands[:1]
    assert verb[0] in ("sync", "run", "pip", "venv", "lock"), f"unknown: uv {verb[0]}. Add a check to tests/commands.py"
    rest = words[len(verb) :]
    options = list(itertools.takewhile(lambda word: word.startswith("-"), rest)) if verb == ["run"] else rest
    for option in options:
        if option.startswith("--"):
            assert f"{option.partition('=')[0]}" in uv_help(*verb), f"uv {' '.join(verb)} has no {option}"
    if verb == ["run"] and (inner := rest[len(options) :]):
        if inner[0] in ("python", "torchrun"):
            _check(inner, root)
        else:
            assert inner[0] in tools(root), f"{inner[0]} is not a package of pyproject.toml"


@cache
def uv_help(*verb: str) -> str:
    if not shutil.which("uv"):
        import pytest

        pytest.skip("uv is not installed")
    return subprocess.run(["uv", "help", *verb], capture_output=True, text=True, check=True).stdout


@cache
def tools(root: Path) -> set[str]:
    """The packages in pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    named = itertools.chain(project["project"]["dependencies"], *project["dependency-groups"].values())
    return {re.split(r"[^\w-]", name)[0] for name in named}


def defaults_of(script: Path) -> dict[str, Any]:
    """The script's settings and their defaults, without running it; none if it has no block of settings."""
    source = script.read_text(encoding="utf-8")
    marks = [i for i, line in enumerate(source.splitlines(), 1) if line.startswith("# ----")]
    if len(marks) < 2:
        return {}
    block = [node for node in ast.parse(source).body if marks[0] < node.lineno < marks[1]]
    root = script.parents[1] if script.parent.name == "dev" else script.parent
    return (model_settings(root) if script.name in TAKE_MODEL_SETTINGS else {}) | assigned(block)


def model_settings(root: Path) -> dict[str, Any]:
    """The fields of GPTConfig in root/model.py and their defaults, but for vocab_size."""
    body = ast.parse((root / "model.py").read_text(encoding="utf-8")).body
    found = assigned(next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == "GPTConfig"))
    return {name: value for name, value in found.items() if name != "vocab_size"}


def assigned(body: Sequence[ast.stmt]) -> dict[str, Any]:
    """The names that these statements assign, annotated or not, and their values."""
    found = {}
    for node in body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found[target.id] = eval(compile(ast.Expression(node.value), "settings", "eval"))
    return found


def settings(script: str, argv: list[str], root: Path) -> dict[str, Any]:
    """The value of every setting under this command line. Raises AssertionError if the script would refuse it."""
    assert (root / script).is_file(), f"there is no {script}"
    own = defaults_of(root / script)
    if not own:
        assert not [word for word in argv if word.startswith("-")], f"{script} takes no options: {argv}"
        return {}
    if script == "ablate.py":  # the settings of train.py are variants, a config file is the one that they start from
        keys = {word: word[2:].partition("=")[0] for word in argv if word.startswith("--")}
        for word in argv:
            if word.endswith(".py") or keys.get(word, "help") not in {*own, "help"}:
                settings("train.py", shlex.split(word), root)
                argv = [each for each in argv if each != word]
    filled = []
    for word in argv:
        key, equals, value = word.removeprefix("--").partition("=")
        if equals and PLACEHOLDER.fullmatch(value) and key in own:
            word = f"--{key}={own[key]}"
        if word != "..." and word != "--help" and not re.search(r"\b[A-Z]+\.py$", word):
            filled.append(word)
    with_model = script in ("bench.py", "dev/compare.py", "dev/page_speed.py")
    others = list(defaults_of(root / "train.py")) if with_model else []
    call = re.search(r"configure\(.*", (root / script).read_text(encoding="utf-8"))
    several = re.search(r"lists=(\(.*?\))", call[0]) if call else None
    named = re.search(r'positional="(\w+)"', call[0]) if call else None
    options: dict[str, Any] = {"lists": ast.literal_eval(several[1]) if several else ()}
    options["positional"] = named[1] if named else ""
    try:
        with contextlib.chdir(root), as_script_folder(root):
            return dict(configure(own, str(root / script), filled, ignore=others, **options)[0])
    except UserError as error:
        raise AssertionError(f"python {script} {' '.join(argv)}: {error}") from None


@contextlib.contextmanager
def as_script_folder(root: Path) -> Iterator[None]:
    """Puts root on sys.path, as Python does with a script's folder: a config may start from another one in it."""
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))


def small(script: str, argv: list[str], root: Path) -> list[str]:
    """The same command line, with arguments at its end that make it last about a second."""
    own, values = defaults_of(root / script), settings(script, argv, root)
    extra = dict(SMALL.get(script, {})) | {"device": "cpu"}
    if script == "bench.py" or values.get("init_from") == "scratch":
        extra |= SMALL_MODEL
    if script == "train.py":
        extra |= {"max_iters": 9} if values["init_from"] == "resume" else {"overwrite": "true"}
    if script == "bigram.py":
        return [*argv, "text.txt"]
    if any(word.startswith("--parts") for word in argv):
        extra.pop("parts")
    return [*argv, *(f"--{key}={value}" for key, value in extra.items() if key in own)]
