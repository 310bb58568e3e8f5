"""The docs are correct: each command in them is checked word by word and, if possible, run with a tiny model.

A command that needs a network, a GPU, several processes or another project's code is only checked. The recipes are
applied to a copy of the repository, as their page prints them. The notebook is executed from top to bottom.
"""

import ast
import importlib.metadata
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import harness
import pytest
from commands import (
    PLACEHOLDER,
    SMALL,
    SMALL_MODEL,
    as_script_folder,
    blocks,
    check,
    commands,
    defaults_of,
    mentions,
    parts,
    settings,
    small,
)
from harness import ROOT, copy_of_repo, make_dataset, small_text

MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SOURCES = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("config/*.py")), *sorted(ROOT.glob("prepare/*.py"))]
RECIPES = ROOT / "docs" / "recipes.md"
NOTEBOOK = ROOT / "minutegpt.ipynb"
# not run: GPT-2's weights and vocabulary, large downloads, other checkouts, accounts, slow BPE, many runs, a browser
HEAVY = re.compile(
    r"gpt2(?!\.py)|--download|fineweb|tinystories|openwebtext|finetune|nanogpt|minbpe|llama|track|wandb|ablate"
    r"|fit_planner|page_(speed|pictures)"
)
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs")


def text_of(path):
    return path.read_text(encoding="utf-8")


def anchors(path):
    """What a link can name in a markdown file: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)", text_of(path), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def all_commands():
    """(file name, command) of all docs but the recipes, whose commands need their edits."""
    found = [(path.name, command) for path in MARKDOWN if path != RECIPES for command in commands(text_of(path))]
    for path in SOURCES:
        found += [(path.name, command) for command in mentions(ast.get_docstring(ast.parse(text_of(path))) or "")]
    return found


def runnable(command):
    """The Python scripts, each with its arguments, that a command line starts and that finish in about a second."""
    return [
        words[1:] for words in parts(re.sub(r"--out_dir=[A-Z]+\b", "--out_dir=out-supplied", command))
        if words[0] == "python" and len(words) > 1 and words[1] != "-m" and (ROOT / words[1]).exists()
        and not any(HEAVY.search(word) or PLACEHOLDER.search(word) for word in words[2:])
        and not HEAVY.search(words[1])
    ]  # fmt: skip


COMMANDS = all_commands()
RUNS = sorted({tuple(words) for _, command in COMMANDS for words in runnable(command)})


# -- word by word


@pytest.mark.parametrize("where, command", COMMANDS)
def test_the_command_works(where, command):
    check(command, ROOT)


def test_commands_of_all_kinds_are_found():
    found = [command for _, command in COMMANDS]
    assert "uv sync && python train.py config/shakespeare_char.py" in found  # a block for a shell
    assert "python evaluate.py --out_dir=out-shakespeare-char" in found
    assert "python train.py --init_from=resume --out_dir=out-shakespeare-cpu" in found  # inline
    assert "uv run ruff check . && uv run mypy ." in found
    assert ("gpt2.py", "python evaluate.py --out_dir=gpt2 --dataset=openwebtext") in COMMANDS  # a docstring
    assert ("sample.py", "--out_dir=out-shakespeare-char") in RUNS
    assert ("export.py", "--out_dir=out-supplied", "--format=int8") in RUNS and len(RUNS) > 12


@pytest.mark.parametrize("command", [
    "make train", "python frobnicate.py", "python train.py --learning_rat=1", "python train.py config/mime.py",
    "python train.py --max_iters=many", "uv frob", "uv sync --frob", "uv run frob", "bash .ci/walk", "pip install frob",
    "torchrun --frob train.py", "torchrun --standalone --nproc_per_node=2 train.py --frob=1",
    "python sample.py --out_dir=out && python sample.py --frob", "python export.py --format=hf|x --frob=1",
    "PYTHONUTF8=1 python bigram.py --frob",
])  # fmt: skip
def test_a_command_that_cannot_work_is_rejected(command):
    for markdown in (f"    {command}\n", f"text\n\n    uv sync\n    {command}\n\ntext\n", f"```sh\n{command}\n```\n"):
        assert command in commands(markdown)
    with pytest.raises(AssertionError):
        check(command, ROOT)


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_the_files_and_links_exist(path):
    names = {
        entry.name
        for folder in (ROOT, *ROOT.iterdir(), *(ROOT / "minutegpt").iterdir())
        if folder.is_dir()
        for entry in folder.iterdir()
    }
    made = re.findall(r"^# (\S+\.py)$", text_of(RECIPES), re.M)
    prose = re.sub(r"^(```.*\n(?:.*\n)*?```|    .*)$", "", text_of(path), flags=re.M)
    for name in re.findall(r"`([\w/.-]+\.(?:py|md|toml|ipynb))`", prose):
        assert (ROOT / name).exists() or ("/" not in name and name in names) or name in made, name
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", prose):
        if "://" not in link:
            assert (path.parent / link).exists(), link
            assert not anchor or anchor in anchors(path.parent / link if link else path), f"{link}#{anchor}"


def test_the_names_in_the_reading_order_are_in_the_code():
    code = set(re.findall(r"\w+", " ".join(map(text_of, [*SOURCES, *ROOT.glob("minutegpt/**/*.py")]))))
    names = set(re.findall(r"`((?:[A-Za-z_]\w*\.)?[A-Za-z_]\w*)`", text_of(ROOT / "docs" / "reading.md")))
    names = {part for name in names if not name.endswith(".py") for part in name.split(".")}
    assert len(names) > 20 and names <= code, names - code


def test_ci_runs_what_contributing_says():
    workflow = pytest.importorskip("yaml").safe_load(text_of(ROOT / ".github" / "workflows" / "ci.yml"))
    assert {"run": "bash .ci/run"} in workflow["jobs"]["ci"]["steps"]
    done = {re.sub(r" -n 2\b.*| --\S+", "", line).strip() for line in text_of(ROOT / ".ci" / "run").splitlines()}
    assert {"uv sync", "uv run ruff check .", "uv run mypy .", "uv run pytest"} <= done
    assert "bash .ci/run" in commands(text_of(ROOT / "CONTRIBUTING.md"))


# -- the configs


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.name)
def test_a_config_is_short_and_links_to_its_result(path):
    assert len(text_of(path).splitlines()) <= 30
    links = re.findall(r"docs/results\.md#([\w-]+)", text_of(path))
    assert set(links) <= anchors(ROOT / "docs" / "results.md")
    assert links or "not measured" in text_of(path).lower() or "not run" in text_of(path).lower()


def test_a_config_that_starts_from_another_one_keeps_its_settings():
    cpu, fast, best = (
        settings("train.py", [f"config/shakespeare_{name}.py"], ROOT) for name in ("cpu", "fast", "best")
    )
    changed = {name for name in cpu if cpu[name] != fast[name]}
    assert changed == {"out_dir", "max_minutes", "eval_interval", "n_layer", "n_head", "n_embd"}
    changed = {name for name in fast if fast[name] != best[name]}
    assert changed == {"out_dir", "max_minutes", "max_iters", "batch_size", "block_size"}


def test_the_runs_that_the_docs_export_for_transformers_fit_its_classes():
    """Exporting refuses n-gram tables. test_the_command_finishes exports another run, so it cannot notice."""
    texts = [command for _, command in COMMANDS] + commands(json.loads(text_of(NOTEBOOK))["cells"][-1]["source"][-1])
    found = {out for text in texts for out in re.findall(r"export\.py --out_dir=(out-[\w-]++)(?! --format)", text)}
    assert found == {"out-tinygpt", "out-gpt2"}
    for path in ROOT.glob("config/*.py"):
        with as_script_folder(ROOT):
            config = runpy.run_path(str(path))
        if config["out_dir"] in found:
            sections = [config, *(value for value in config.values() if isinstance(value, dict))]
            assert not any(section.get("ngram") for section in sections), path.name


# -- run with a tiny model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of datasets that has shakespeare_char, of another text."""
    data = tmp_path_factory.mktemp("docs") / "data"
    supply_dataset(data, "shakespeare_char")
    return data


def supply_dataset(data, name):
    from minutegpt.data.tokenizer import char_tokenizer

    text = "".join(map(chr, range(32, 127))) + small_text()
    if not (data / name).exists():
        make_dataset(data / name, char_tokenizer(text), text[:-1000], text[-1000:])


def copy_of_the_repository(folder):
    copy_of_repo(folder)
    for name in ("text.txt", "my_book.txt", "book.txt"):
        (folder / name).write_text(small_text(), encoding="utf-8")
    return folder


def run(data, house, script, *argv):
    done = harness.run(house / script, *small(script, list(argv), house), cwd=house, data=data)
    assert done.status == 0, f"{script} {' '.join(argv)}\n{done.out}\n{done.err}"
    return done.out


@pytest.fixture(scope="module")
def house(data, tmp_path_factory):
    house = copy_of_the_repository(tmp_path_factory.mktemp("house"))
    run(data, house, "train.py", "--out_dir=out-supplied")
    return house


@posix
@pytest.mark.slow
@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_the_command_runs(data, house, words):
    """In any order: a run or a dataset that an earlier command of the docs made is supplied."""
    script, *argv = words
    values = settings(script, argv, house)
    if script in ("train.py", "bench.py"):
        for name in re.findall(r"[\w-]+(?=:|,|$)", values["dataset"]):
            supply_dataset(data, name)
    new_run = script == "train.py" and values["init_from"] == "scratch"  # its own folder is not there yet
    read = [word.partition("=")[2] for word in words if not (new_run and word.startswith("--out_dir="))]
    for out in {name for value in read for name in re.findall(r"\bout[\w-]*(?![\w=])", value)}:
        if not (house / out).exists():
            shutil.copytree(house / "out-supplied", house / out)
    run(data, house, script, *argv)


# -- the recipes


def sections():
    """The title of each recipe -> its markdown."""
    found = [section.partition("\n") for section in re.split(r"^## ", text_of(RECIPES), flags=re.M)]
    return {title: body for title, _, body in found}


def apply_edits(recipe, house):
    """Applies the edits of one recipe."""
    for language, block in blocks(recipe):
        first, _, rest = block.partition("\n")
        if language == "python":
            path = re.fullmatch(r"# (\S+\.py)", first)
            assert path, f"the first line names the new file: # config/mine.py, not {first}"
            assert not (house / path[1]).exists()
            (house / path[1]).write_text(rest, encoding="utf-8")
        elif language == "diff":
            path = re.fullmatch(r"--- (\S+)", first)
            assert path, f"the first line names the file: --- model.py, not {first}"
            text = text_of(house / path[1])
            for hunk in re.split(r"^@@\n", rest, flags=re.M):
                lines = hunk.splitlines(keepends=True)
                assert all(line[0] in " +-\n" for line in lines), hunk
                old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
                new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
                assert f"\n{text}".count(f"\n{old}") == 1, f"{path[1]} does not have exactly one:\n{old}"
                text = text.replace(old, new)
            (house / path[1]).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("title", sections())
def test_the_recipe_fits_the_code(title, tmp_path):
    house = copy_of_the_repository(tmp_path)
    recipe = sections()[title]
    apply_edits(recipe, house)
    assert commands(recipe), "a recipe has a command that tries it"
    for command in commands(recipe):
        check(command, house)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("title", sections())
def test_the_recipe_works(data, title, tmp_path):
    house = copy_of_the_repository(tmp_path)
    recipe = sections()[title]
    apply_edits(recipe, house)
    for command in commands(recipe):
        for _, script, *argv in parts(command):
            run(data, house, script, *argv)
            if script == "train.py":
                out = house / str(settings(script, argv, house)["out_dir"])
                saved = json.loads(text_of(out / "config.json"))
                assert {key: saved[key] for key in defaults_of(house / "train.py")}, (
                    "the settings that the recipe added are saved too"
                )
                assert len(text_of(out / "log.jsonl").splitlines()) >= 2


# -- the notebook


def cells():
    return [
        "".join(cell["source"]) for cell in json.loads(text_of(NOTEBOOK))["cells"] if cell["cell_type"] == "code"
    ]  # fmt: skip


def execute(sources, shell, monkeypatch):
    """Runs cells as Jupyter would: !lines go to a shell with {names} filled in, %cd changes the folder."""

    def picture(path):
        assert Path(path).read_bytes().startswith(b"\x89PNG")

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(Image=picture))
    names = {"shell": shell, "cd": monkeypatch.chdir}
    for source in sources:
        source = re.sub(r"^( *)!(.*)$", lambda line: f"{line[1]}shell(f{line[2]!r})", source, flags=re.M)
        exec(re.sub(r"^( *)%cd (.*)$", r"\1cd('\2')", source, flags=re.M), names)
    return names


def test_the_notebook_is_valid_and_small():
    notebook = json.loads(text_of(NOTEBOOK))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK.stat().st_size < 20_000
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    assert text_of(NOTEBOOK).count("YOUR_NAME") == 1 and "uv " not in text_of(NOTEBOOK)


def test_the_commands_of_the_notebook_work():
    code = "\n".join(cells())
    names = dict(re.findall(r'^([A-Z]+) = .*"([^"\n]*)"', code, re.M))
    lines = [line.format_map(names) for line in re.findall(r"^ *!(python .*)$", code, re.M)]
    assert len(lines) == 6
    for line in lines:
        check(line, ROOT)


def test_the_notebook_clones_into_an_empty_folder(tmp_path, monkeypatch):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    origin = copy_of_the_repository(tmp_path / "origin")
    for argv in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x"]):
        subprocess.run(["git", *argv], cwd=origin, check=True)
    (tmp_path / "content").mkdir()
    monkeypatch.chdir(tmp_path / "content")
    first = re.sub(r'REPOSITORY = ".*"', f"REPOSITORY = {origin.as_posix()!r}", cells()[0])
    for _ in range(2):  # the second time does nothing
        execute([first], lambda line: subprocess.run(line.split(), check=True), monkeypatch)
        assert Path.cwd() == tmp_path / "content" / "minuteGPT" and Path("train.py").exists()
    monkeypatch.chdir(tmp_path / "content")  # a new kernel in the same folder
    execute([first], pytest.fail, monkeypatch)
    assert Path("train.py").exists()


def test_the_notebook_installs_only_missing_packages(monkeypatch):
    monkeypatch.chdir(ROOT)
    requests = []
    execute(cells()[:2], requests.append, monkeypatch)
    assert requests == []
    real_version = importlib.metadata.version

    def version(name):
        if name == "tiktoken":
            raise importlib.metadata.PackageNotFoundError
        return "2.9.1+cu126" if name == "torch" else real_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    execute(cells()[:2], requests.append, monkeypatch)
    (line,) = requests
    assert re.fullmatch(r'pip install --quiet "torch>=[\d.]+" "tiktoken"', line)


@posix
@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(data, tmp_path, monkeypatch):
    house = copy_of_the_repository(tmp_path / "house")
    tiny = SMALL["train.py"] | SMALL_MODEL | {"device": "cpu"}
    monkeypatch.setenv("MINUTEGPT_NOTEBOOK_SETTINGS", " ".join(f"--{key}={value}" for key, value in tiny.items()))
    monkeypatch.chdir(house)
    outputs = []

    def shell(line):
        program, script, *argv = shlex.split(line)
        assert program == "python"
        done = harness.run(house / script, *argv, cwd=house, data=data)
        assert done.status == 0, f"{line}\n{done.out}\n{done.err}"
        outputs.append(done.out)

    execute(cells(), shell, monkeypatch)
    assert "best validation loss" in outputs[0] and outputs[1].startswith("ROMEO:") and "perplexity" in outputs[2]
    assert (house / "out-notebook-own" / "ckpt.pt").exists()
