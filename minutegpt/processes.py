"""Scripts as processes that can be stopped: for ablate.py, which trains many runs.

status, output = call(checkout, ["train.py", "--max_iters=20"], Path("run.log"), {})
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

from minutegpt.errors import UserError
from minutegpt.files import run_lock

stopping = threading.Event()  # set once all is to end
_children: set[subprocess.Popen] = set()


def call(checkout: Path, argv: list[str], log: Path, env: dict[str, str]) -> tuple[int, str]:
    """Runs a script of a checkout; its exit status, and what it printed, which is appended to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a+", encoding="utf-8", errors="replace") as file:
        start = file.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            [sys.executable, *argv], cwd=checkout, env=os.environ | env, stdout=file, stderr=file,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        _children.add(child)
        status = child.wait()
        _children.discard(child)
        file.seek(start)
        return status, file.read()


def error_of(status: int, output: str) -> str:
    """Why a script failed, in one line: its error message, else the last thing that it printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or [f"exit status {status}"]
    at = next((i for i, line in enumerate(lines) if line.startswith("error: ")), len(lines) - 1)
    end = len(lines) if lines[at].endswith(":") else at + 1  # "2 mistakes:" and the lines that name them
    return " ".join(lines[at:end]).removeprefix("error: ")[:300]


def stop_all() -> None:
    """Asks all scripts to end: train.py saves first."""
    stopping.set()
    for child in list(_children):
        child.terminate()


def wait_for_lock(out: Path) -> None:
    """Waits for a run in this folder that an earlier, killed call has started; makes the folder."""
    while not stopping.is_set():
        try:
            return run_lock(out).close()
        except UserError:
            if not (out / ".lock").exists() or not os.access(out, os.W_OK):
                raise
            stopping.wait(2)
