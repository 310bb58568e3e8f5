"""Imported first by every script: finds the right Python, and prints a user's mistake in one line.

`python train.py` in a fresh shell is the system's Python, which has no torch. If there is a `.venv` next to the
scripts (made by `uv sync`), the script runs itself again with the Python in it. This file and the imports of the
scripts use only syntax that an old Python can parse, so that its user sees the message below.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

STARTED = time.perf_counter()  # what max_minutes counts from
ROOT = Path(__file__).resolve().parent.parent
TORCH_FLOOR = (2, 10)  # below it torch.load(weights_only=True) has holes: CVE-2025-32434, CVE-2026-24747


class UserError(Exception):
    """A user's mistake. The message is the problem, then what to do. The scripts exit with 2."""

    status = 2


def _missing():
    """What this Python lacks to run the scripts, in words; '' if nothing is missing."""
    if sys.version_info < (3, 11):
        return "it is Python %d.%d, and 3.11 is needed" % sys.version_info[:2]
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("torch")
    except PackageNotFoundError:
        return "it has no torch"
    if tuple(int(part) for part in found.split(".")[:2]) < TORCH_FLOOR:
        return "its torch is {}, and {}.{} is needed".format(found, *TORCH_FLOOR)
    return ""


def _ensure_environment():
    lacks = _missing()
    if not lacks:
        return
    python = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if os.environ.get("MINUTEGPT_PYTHON") or not python.exists():  # the variable stops a loop of re-runs
        where = "" if os.environ.get("MINUTEGPT_PYTHON") else " and there is no .venv next to the scripts"
        sys.stderr.write(
            "error: {} cannot run this: {}{}. Type `uv sync` in {} (uv: `pip install uv`), then the same command "
            "again.\n".format(sys.executable, lacks, where, ROOT)
        )
        raise SystemExit(2)
    os.environ["MINUTEGPT_PYTHON"] = str(python)
    command = [str(python)] + sys.argv  # noqa: RUF005
    if os.name != "nt":
        os.execv(str(python), command)  # the same process: signals and exit status pass by themselves
    child = subprocess.Popen(command)
    while True:
        try:
            raise SystemExit(child.wait())
        except KeyboardInterrupt:  # Ctrl-C reaches the child too, which saves and decides
            continue


def _is_connection_error(error):
    """Whether a process of torchrun only lost the connection to another one, in gloo's words."""
    return "RANK" in os.environ and ("by peer" in str(error) or "Broken pipe" in str(error))


def _wait_for_other_ranks(error):
    """Waits 5 seconds, in which torchrun can end this process, so that the rank that failed is heard first.

    Rank 0 reports errors that all ranks share. A rank that only lost its connection did not fail itself.
    """
    if os.environ.get("RANK", "0") != "0" or _is_connection_error(error):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)


def _print_error(kind, error, trace):
    _wait_for_other_ranks(error)
    if _is_connection_error(error):  # the other one is on another machine, or was slower to report
        sys.stderr.write("error: the connection to another process of this run is lost. Its own message says why\n")
        raise SystemExit(1)
    if issubclass(kind, UserError):
        sys.stdout.flush()
        stderr = sys.__stderr__ or sys.stderr  # torch.distributed replaces it by a buffer, and drops that
        stderr.write("error: {}\n".format(error))
        stderr.flush()
        raise SystemExit(getattr(error, "status", 2))  # 3: a text that cannot be had here
    if issubclass(kind, BrokenPipeError):  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the last flush would complain
        raise SystemExit(0)
    if issubclass(kind, KeyboardInterrupt):  # before a script has anything to save
        raise SystemExit(130)
    sys.__excepthook__(kind, error, trace)


# only for a script of ours. A program that imports this package, or `python -c`, keeps its own Python and hook
if sys.argv[0].endswith(".py") and Path(sys.argv[0]).resolve().parent in (ROOT, ROOT / "prepare", ROOT / "dev"):
    _ensure_environment()
    # Windows redirects to a code page that lacks most characters, and file names need not be UTF-8
    with suppress(AttributeError, OSError):  # a stream of another kind, or one that was read from
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.excepthook = _print_error
