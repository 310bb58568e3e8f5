"""What a terminal, a pipe and a script that calls train.py expect of it."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from runs import House, tiny

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks its runs")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with House(tmp_path_factory.mktemp("terminal")) as house:
        yield house


def test_help_is_the_block_of_knobs_and_exits_with_0(house):
    run = house.run("train.py", "--help")
    assert run.wait() == 0
    assert run.output.startswith("usage: python train.py [config/FILE.py] [--key=value ...]\n")
    for setting in ("out_dir", "batch_size", "fsdp", "tracker", "# training steps", "n_layer"):
        assert setting in run.output


@pytest.mark.parametrize("argv", [["--help"], ["--eval_interval=1"]])
def test_a_reader_who_is_gone_already_is_no_error(argv, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)  # train.py --help | true
    command = [sys.executable, str(ROOT / "train.py"), "--dataset=nothing_here", f"--out_dir={tmp_path}", *argv]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(writer)
    assert result.returncode == (0 if "--help" in argv else 2)
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


def test_a_pipe_gets_lines_and_no_bar(house):
    run = house.run("train.py", *tiny(max_iters=3), "--out_dir=pipe")
    assert run.wait() == 0
    assert "\r" not in run.output and "\x1b" not in run.output and "it/s" not in run.output


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"NO_COLOR": "", "FORCE_COLOR": "1"}])
def test_a_terminal_gets_a_bar_and_no_colour_ever(house, env):
    """There is no colour to turn off: NO_COLOR (no-color.org) is kept by having none."""
    import pty

    ours, theirs = pty.openpty()
    env = env | {"TERM": "xterm-256color"}
    knobs = tiny(max_iters=3)
    run = house.run("train.py", *knobs, "--out_dir=tty", "--overwrite", env=env, log=Path(os.ttyname(theirs)))
    output = b""
    while True:
        over = not run.alive()  # looked at first: what was written before the end is still read
        while select.select([ours], [], [], 0.1)[0]:
            output += os.read(ours, 4096)
        if over:
            break
    assert run.wait() == 0, output
    assert b"\r" in output and b"3/3" in output and b"\x1b" not in output


def test_exit_codes(house):
    """0 well, 2 a user's mistake; 1 numbers that ran away and 128 + N a signal are in test_resume.py."""
    assert house.train(out="zero", max_iters=1).wait() == 0
    assert house.train(out="zero", max_iters=1).wait() == 2  # a run stands there
