"""The commands that the docs name: found in markdown and docstrings, checked word by word, and made small to be run.

for command in commands(Path("README.md").read_text()):
    check(command, ROOT)  # AssertionError where it could not work
"""

import ast
import contextlib
import itertools
import re
import shlex
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from minutegpt.config import configure
from minutegpt.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ("python", "torchrun", "uv", "pip", "bash")  # whose words `check` can check
# what a line for a shell can begin with besides: a reader would type these, so the docs may not, until `check` knows it
OTHERS = (
    "apt apt-get brew cd conda cp curl docker export git gsutil hf huggingface-cli jupyter make mamba mkdir mv nohup "
    "npm npx pip3 poetry pytest python3 rm rsync ruff sbatch scp sh source srun ssh sudo tar tmux wget"
).split()
MENTION = re.compile(
    r"(?<![\w./`-])(?:(?:python|bash) (?=\S*[./])|torchrun (?=-|\S+\.py)|uv (?=[a-z]+\b)|pip install )[^`)\n]*"
)
ELSEWHERE = ("llama.cpp/convert_hf_to_gguf.py",)  # scripts of other projects
PLACEHOLDER = re.compile(r"(?<![\w./-])[A-Z][A-Z_]*(?![\w-])|\.\.\.")  # NAME, FOLDER, N: for the reader to fill in
SMALL: dict[str, dict[str, Any]] = {  # what makes a run of each script a matter of a second, where it has the knob
    "train.py": {
        "max_iters": 2, "max_minutes": 0, "batch_size": 2, "gradient_accumulation_steps": 1, "eval_iters": 1,
        "log_interval": 1, "compile": "false", "dtype": "float32",
    },
    "sample.py": {"max_new_tokens": 8},
    "export.py": {"overwrite": "true"},
    "bench.py": {
        "parts": "train,decode", "repeats": 1, "steps": 1, "new_tokens": 4, "decode_batches": 1, "batch_size": 2,
        "compile": "false", "dtype": "float32",
    },
}  # fmt: skip
SMALL_MODEL = {"n_layer": 1, "block_size": 32}  # of a run that starts from scratch; its width is left: heads divide it


def blocks(markdown: str) -> list[tuple[str, str]]:
    """The code blocks as (language, text): ```fenced, or indented by four spaces, whose language is ''."""
    fence = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.M)
    indented = re.compile(r"(?:^|(?<=\n\n))(?:    .*\n(?:[ \t]*\n(?=    ))*)+")
    found = [(match.start(), match[1].strip(), match[2]) for match in fence.finditer(markdown)]
    rest = fence.sub(lambda match: re.sub(r"[^\n]", "x", match[0]), markdown + "\n")
    found += [(match.start(), "", re.sub(r"^    ", "", match[0], flags=re.M)) for match in indented.finditer(rest)]
    return [(language, text) for _, language, text in sorted(found)]


def commands(markdown: str) -> list[str]:
    """Every command: the lines of blocks for a shell, and what other blocks and `inline code` name.

    A block is for a shell where its first line begins with a program; then each of its lines is a command.
    """
    found: list[str] = []
    for language, text in blocks(markdown):
        first = re.sub(r"^(?:[A-Z_\d]+=\S*\s+)+", "", text).split(maxsplit=1)[:1]  # behind the environment
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
    """The commands that a docstring or the output of a program names. [--options] are left out."""
    return [re.sub(r"\[[^]]*\]?", "", match[0]).strip() for match in MENTION.finditer(text)]


def parts(command: str) -> list[list[str]]:
    """A line as the words of each program it runs, alternatives written out: --x=a|b is two of them."""
    found: list[list[str]] = []
    for part in re.split(r"\s+(?:&&|\|\||[|;&])\s+", command):
        words = shlex.split(part, comments=True)
        while words and re.match(r"[A-Z_\d]+=", words[0]):  # the environment
            words.pop(0)
        choices = []
        for word in words:
            key, equals, values = word.rpartition("=") if word.startswith("--") else ("", "", word)
            choices.append([key + equals + value for value in values.split("|")])
        found += [list(each) for each in itertools.product(*choices) if words]
    return found


def check(command: str, root: Path) -> None:
    """Raises AssertionError, with the reason, for a command that could not work in the repository at root."""
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
            raise AssertionError(f"torchrun takes no such words: {rest}") from None
        settings(args.training_script, rest[len(rest) - len(args.training_script_args) :], root)
    elif program == "uv":
        _check_uv(rest, root)
    elif program == "pip":
        assert rest[:1] == ["install"] and set(rest[1:]) - {"-q", "-U"} <= {"uv", *tools(root)}, f"pip {rest}"
    elif program == "bash":
        done = subprocess.run(["bash", "-n", *rest], cwd=root, capture_output=True, text=True)
        assert rest and done.returncode == 0, done.stderr
    else:
        raise AssertionError(f"{program}: teach tests/commands.py how to check it, or leave it out of the docs")


def _check_uv(words: list[str], root: Path) -> None:
    assert words, "uv does nothing by itself"
    spoken = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    verb = spoken[:2] if spoken[0] == "pip" else spoken[:1]
    assert verb[0] in ("sync", "run", "pip", "venv", "lock"), f"uv {verb[0]}: teach tests/commands.py how to check it"
    rest = words[len(verb) :]
    options = list(itertools.takewhile(lambda word: word.startswith("-"), rest)) if verb == ["run"] else rest
    for option in options:
        if option.startswith("--"):
            assert f"{option.partition('=')[0]}" in uv_help(*verb), f"uv {' '.join(verb)} has no {option}"
    if verb == ["run"] and (inner := rest[len(options) :]):
        if inner[0] in ("python", "torchrun"):
            _check(inner, root)
        else:
            assert inner[0] in tools(root), f"{inner[0]} is none of pyproject.toml's packages"


@cache
def uv_help(*verb: str) -> str:
    if not shutil.which("uv"):
        import pytest

        pytest.skip("uv is not on this machine")
    return subprocess.run(["uv", "help", *verb], capture_output=True, text=True, check=True).stdout


@cache
def tools(root: Path) -> set[str]:
    """The packages that pyproject.toml names."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    named = itertools.chain(project["project"]["dependencies"], *project["dependency-groups"].values())
    return {re.split(r"[^\w-]", name)[0] for name in named}


def knobs(script: Path) -> dict[str, Any]:
    """The script's knobs with their defaults, read and not run; none for one without that block."""
    source = script.read_text(encoding="utf-8")
    marks = [i for i, line in enumerate(source.splitlines(), 1) if line.startswith("# ----")]
    if len(marks) < 2:
        return {}
    return {
        target.id: eval(compile(ast.Expression(node.value), str(script), "eval"))
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and marks[0] < node.lineno < marks[1]
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def settings(script: str, argv: list[str], root: Path) -> dict[str, Any]:
    """The value of every knob under this command line; AssertionError where the script would refuse it."""
    assert (root / script).is_file(), f"there is no {script}"
    own = knobs(root / script)
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
    others = list(knobs(root / "train.py")) if script == "bench.py" else []
    several = re.search(r"configure\(.*lists=(\(.*?\))", (root / script).read_text(encoding="utf-8"))
    lists = ast.literal_eval(several[1]) if several else ()
    try:
        with contextlib.chdir(root):
            return dict(configure(own, str(root / script), filled, ignore=others, lists=lists)[0])
    except UserError as error:
        raise AssertionError(f"python {script} {' '.join(argv)}: {error}") from None


def small(script: str, argv: list[str], root: Path) -> list[str]:
    """The same command line, made a matter of a second by words behind it."""
    own, set_to = knobs(root / script), settings(script, argv, root)
    more = dict(SMALL.get(script, {})) | {"device": "cpu"}
    if script == "bench.py" or set_to.get("init_from") == "scratch":
        more |= SMALL_MODEL
    if script == "train.py":
        more |= {"max_iters": 9} if set_to["init_from"] == "resume" else {"overwrite": "true"}
    if script == "bigram.py":
        return [*argv, "text.txt"]
    if any(word.startswith("--parts") for word in argv):
        more.pop("parts")
    return [*argv, *(f"--{key}={value}" for key, value in more.items() if key in own)]
