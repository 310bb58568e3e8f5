"""Imported first by every script: finds the right Python, and tells a user's mistake in one line.

`python train.py` in a fresh shell is the system's Python, which has no torch. Where `.venv` (made by `uv sync`)
stands beside the scripts, the script runs itself again with that environment's Python. This file and the
scripts keep to syntax that an old system Python can parse, so that the message below is what its user sees.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()  # what max_minutes counts from
ROOT = Path(__file__).resolve().parent.parent
TORCH_FLOOR = (2, 10)  # below it torch.load(weights_only=True) has holes: CVE-2025-32434, CVE-2026-24747


class UserError(Exception):
    """A user's mistake: the message says what is wrong, why, and what to type next. The scripts exit with 2."""

    status = 2


def _missing():
    """What this Python lacks to run the scripts, in words; '' where nothing is missing."""
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
        where = "" if os.environ.get("MINUTEGPT_PYTHON") else " and there is no .venv beside the scripts"
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
    """Whether a process of torchrun's only lost the connection to another one: gloo's words for it."""
    return "RANK" in os.environ and ("by peer" in str(error) or "Broken pipe" in str(error))


def _wait_for_other_ranks(error):
    """Gives torchrun 5 seconds to end this process before it speaks, where another one has more to say.

    Rank 0 tells a mistake that all made; and who lost the connection to one that died did not fail itself.
    """
    if os.environ.get("RANK", "0") != "0" or _is_connection_error(error):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)


def _print_error(kind, error, trace):
    _wait_for_other_ranks(error)
    if _is_connection_error(error):  # torchrun stopped this process first, or the other one is on another machine
        sys.stderr.write("error: the connection to another process of this run is lost; that one tells why\n")
        raise SystemExit(1)
    if issubclass(kind, UserError):
        sys.stdout.flush()
        stderr = sys.__stderr__ or sys.stderr  # torch.distributed puts a buffer in its place, and drops it
        stderr.write("error: {}\n".format(error))
        stderr.flush()
        raise SystemExit(getattr(error, "status", 2))  # 3: a text that cannot be had here
    if issubclass(kind, BrokenPipeError):  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the last flush would complain
        raise SystemExit(0)
    if issubclass(kind, KeyboardInterrupt):  # before a script has anything to save
        raise SystemExit(130)
    sys.__excepthook__(kind, error, trace)


# only for a script of ours: whoever imports a module of this package keeps their own Python and hook
if Path(sys.argv[0] or ".").resolve().parent in (ROOT, ROOT / "prepare", ROOT / "dev"):
    _ensure_environment()
    sys.excepthook = _print_error
