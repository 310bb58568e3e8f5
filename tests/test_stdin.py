"""minutegpt/stdin.py in real processes: which standard input belongs to a shell."""

import os
import subprocess
import sys

import pytest
from harness import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX only")
CODE = "from minutegpt import stdin; print(stdin.has_input(), stdin.belongs_to_shell())"
proc = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="without /proc a shared pipe is not recognised")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("echo hi | {python}", "True False"),
        ("{python} < hi.txt", "True False"),
        ("{python} < /dev/null", "True False"),
        ("sleep 2 | {python}", "False False"),
        ("echo hi | timeout 99 {python}", "True False"),
        ("{ read -r line; {python}; } < hi.txt", "True True"),  # partly read
        pytest.param("{ {python}; true; } < hi.txt", "True True", marks=proc),
        pytest.param("echo hi | { {python}; true; }", "True True", marks=proc),
        pytest.param("echo hi | { timeout 99 {python}; true; }", "True True", marks=proc),
        pytest.param("{ {python}; true; } <<< hi", "True True", marks=proc),
    ],
)
def test_whose_standard_input_it_is(tmp_path, line, answer):
    (tmp_path / "hi.txt").write_text("hi\nho\n", encoding="utf-8")
    line = line.replace("{python}", f'"{sys.executable}" -c "{CODE}"')
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == answer, done
