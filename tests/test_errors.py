"""minutegpt/errors.py: any Python that a shell calls `python` runs the scripts, or says in one line what to type."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("prepare/*.py")])
OURS = [path for path in SCRIPTS if "\nimport minutegpt.errors" in path.read_text(encoding="utf-8")]
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX only")
PROBE = """
import minutegpt.errors
import importlib.util, json, os, signal, sys, time
assert importlib.util.find_spec("torch")
if sys.argv[1] == "catch":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(77))
print(json.dumps([sys.executable, sys.argv]), flush=True)
if sys.argv[1] == "exit":
    sys.exit(int(sys.argv[2]))
if sys.argv[1] == "mistake":
    raise minutegpt.errors.UserError("no such thing. Type another")
if sys.argv[1] == "bug":
    raise ValueError("a bug")
time.sleep(60)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python without torch: the executable of an empty environment, and its folder of packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    return python, next(path for path in folder.rglob("site-packages") if path.is_dir())


@pytest.fixture
def house(tmp_path):
    """A checkout with errors.py and one script, without .venv."""
    (tmp_path / "minutegpt").mkdir()
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "minutegpt" / name, tmp_path / "minutegpt")
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    return tmp_path


def with_environment(house, folder=sys.prefix):
    """Puts an environment next to the scripts; without argument the one that runs this test, which has torch."""
    if not (Path(folder) / "bin" / "python").exists():
        pytest.skip("these tests do not run in an environment that can be linked to")
    (house / ".venv").symlink_to(folder)


def start(python, house, *argv, **how):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MINUTEGPT_PYTHON")}
    command = [str(python), str(house / "probe.py"), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **how)


def run(*args, **how):
    process = start(*args, **how)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def refused(result, *words):
    status, out, err = result
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


@posix
def test_it_runs_again_with_the_environment_beside_it(bare, house, tmp_path_factory):
    with_environment(house)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    status, out, err = run(bare[0], house, "exit", "41", "two words", "--a=b", "", cwd=elsewhere)
    assert (status, err) == (41, "")
    assert f'"{house}/.venv/bin/python"' in out and '["exit", "41", "two words", "--a=b", ""]' in out.replace(
        f'"{house}/probe.py", ', ""
    )


@posix
def test_signals_reach_the_script(bare, house):
    with_environment(house)
    for argument, signum, status in (("sleep", signal.SIGTERM, -15), ("catch", signal.SIGTERM, 77),
                                     ("sleep", signal.SIGINT, 130)):  # fmt: skip
        process = start(bare[0], house, argument)
        process.stdout.readline()  # it is there
        process.send_signal(signum)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (status, "")


def test_without_an_environment_it_says_what_to_type(bare, house):
    refused(run(bare[0], house, "exit", "0"), "has no torch", "there is no .venv", "`uv sync`", str(house))


@posix
def test_an_environment_without_torch_is_told_and_not_tried_for_ever(bare, house):
    with_environment(house, bare[0].parent.parent)
    refused(run(bare[0], house, "exit", "0"), "has no torch", "`uv sync`", str(house))


def test_a_torch_that_is_too_old(bare, house):
    told = bare[1] / "torch-2.9.1.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1+cpu\n", encoding="utf-8")
    try:
        refused(run(bare[0], house, "exit", "0"), "its torch is 2.9.1+cpu, and 2.10 is needed", "`uv sync`")
    finally:
        shutil.rmtree(told)


def test_a_python_that_is_too_old(house):
    """The version is feigned; that old ones parse the scripts is the test below."""
    code = "import runpy, sys; sys.version_info = (3, 9, 1); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    command = [sys.executable, "-S", "-c", code, str(house / "probe.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=house, env={**os.environ, "PYTHONPATH": "."})
    refused((done.returncode, done.stdout, done.stderr), "it is Python 3.9, and 3.11 is needed", "`uv sync`")


@pytest.mark.parametrize("path", [*OURS, ROOT / "minutegpt/errors.py"], ids=lambda path: path.name)
def test_an_old_python_gets_as_far_as_that_line(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    imported = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported += [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    before = imported[: imported.index("minutegpt.errors")] if path.name != "errors.py" else imported
    assert set(before) <= sys.stdlib_module_names  # nothing comes first that could be missing


def test_every_script_that_needs_torch_begins_so():
    assert {"train.py", "sample.py", "evaluate.py", "text.py", "shakespeare_char.py"} <= {path.name for path in OURS}
    assert {path.name for path in SCRIPTS} - {path.name for path in OURS} <= {"model.py", "bigram.py"}


def test_mistakes_are_told_in_a_line_and_bugs_in_full(house):
    status, _, err = run(sys.executable, house, "mistake")
    assert (status, err) == (2, "error: no such thing. Type another\n")
    status, _, err = run(sys.executable, house, "bug")
    assert status == 1 and err.startswith("Traceback") and err.endswith("ValueError: a bug\n")


def test_who_imports_a_module_keeps_their_own_python_and_hook(bare, house, tmp_path_factory):
    script = tmp_path_factory.mktemp("theirs") / "own.py"
    script.write_text("import sys, minutegpt.errors\nprint(sys.excepthook is sys.__excepthook__)", encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(house)}
    done = subprocess.run([str(bare[0]), str(script)], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_a_line_of_python_in_the_repository_is_no_script_of_ours(bare, house):
    code = "import sys, minutegpt.errors; print(sys.excepthook is sys.__excepthook__)"
    done = subprocess.run([str(bare[0]), "-c", code], cwd=house, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.skipif(os.name == "nt", reason="a shell's pipe")
def test_a_reader_that_leaves_early_is_no_error():
    """`python train.py --help | head -1`: no traceback, and an exit status of 0."""
    command = f"'{sys.executable}' '{ROOT / 'train.py'}' --help | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.stderr == ""
    assert result.stdout.strip() == "0"
