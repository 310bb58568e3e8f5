"""What a terminal, a pipe and a script that calls train.py expect of it."""

import os
import select

import pytest
from harness import posix, run, start, tiny, train


def test_help_is_the_block_of_settings_and_exits_with_0():
    done = run("train.py", "--help")
    assert done.status == 0
    assert done.output.startswith("usage: python train.py [config/FILE.py] [--key=value ...]\n")
    for setting in ("out_dir", "batch_size", "deterministic", "tracker", "# training steps", "n_layer"):
        assert setting in done.output


@pytest.mark.parametrize("argv", [["--help"], ["--eval_interval=1"]])
def test_a_reader_who_is_gone_already_is_no_error(argv, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)  # train.py --help | true
    done = run("train.py", "--dataset=nothing_here", f"--out_dir={tmp_path}", *argv, stdout=writer, fork=False)
    os.close(writer)
    assert done.status == (0 if "--help" in argv else 2)
    assert "Traceback" not in done.err and "BrokenPipe" not in done.err


def test_a_pipe_gets_lines_and_no_bar(house):
    done = run("train.py", *tiny(max_iters=3), "--out_dir=pipe", cwd=house)
    assert done.status == 0
    assert "\r" not in done.output and "\x1b" not in done.output and "it/s" not in done.output


@posix
@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"NO_COLOR": "", "FORCE_COLOR": "1"}])
def test_a_terminal_gets_a_bar_and_no_colour_ever(house, env):
    """There is no colour to turn off: NO_COLOR (no-color.org) is kept by having none."""
    import pty

    ours, theirs = pty.openpty()
    env = env | {"TERM": "xterm-256color"}
    argv = [*tiny(max_iters=3), "--out_dir=tty", "--overwrite"]
    run = start("train.py", *argv, cwd=house, env=env, stdout=theirs, stderr=theirs)
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
    assert train(house, "zero", max_iters=1).wait() == 0
    assert train(house, "zero", max_iters=1).wait() == 2  # it holds a run already
