"""The first thing to run on a GPU:  python dev/gpu_check.py [--only=02] [--device=cpu]

Runs tests/test_gpu.py in its order, up to the first failure, and writes results/gpu_check.json: what was chosen, each
test's outcome and seconds, and the numbers that it measured. It takes about 25 minutes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import datetime
import os
from typing import Any

import pytest

from minutegpt import checkouts, results
from minutegpt.config import configure
from minutegpt.device import environment, init_machine
from minutegpt.errors import ROOT, UserError

# ----------------------------------------------------------------------------------------------------------------
# every setting, with its default
device = "auto"  # cpu runs what needs no GPU of its own, to see that the tests work
only = ""  # a part of the names of tests: 02, or speed
keep_going = False  # go on after a failure
results_dir = "results"
# ----------------------------------------------------------------------------------------------------------------


class Recorder:
    """A plugin of pytest that keeps the outcome of each test."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            test = report.nodeid.partition("::")[2]
            values = {"passed": float(report.passed), "skipped": float(report.skipped)}
            measured = {key: value for key, value in report.user_properties if isinstance(value, int | float)}
            words = {key: str(value) for key, value in report.user_properties if isinstance(value, str)}
            self.runs.append({
                "command": f"pytest -m gpu tests/test_gpu.py::{test}", "seed": 1, "wall_seconds": report.duration,
                "values": values | measured, "words": words, "problem": report.longreprtext[-2000:],
            })  # fmt: skip


config, _ = configure(globals(), __file__, config_files=False)
globals().update(config)
machine = init_machine(device)
if machine.is_cpu and device == "auto":
    raise UserError("this PyTorch finds no GPU. Type --device=cpu to see that the tests work")
os.environ["MINUTEGPT_GPU_TEST_ON"] = str(machine.device)
recorder = Recorder()
words = ["-m", "gpu", "-v", "-p", "no:xdist", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_gpu.py")]
words += ["-k", only] if only else []
status = pytest.main(words + ([] if keep_going else ["-x"]), plugins=[recorder])
result: results.Result = {
    "format": results.FORMAT, "version": results.VERSION, "kind": "commands", "name": "gpu_check",
    "commands": [run["command"] for run in recorder.runs], "seeds": 1, "columns": ["passed", "skipped"],
    "machine": environment(machine) | {"why": machine.reasons}, "commit": checkouts.commit_of(ROOT),
    "edited": checkouts.is_edited(ROOT), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "variants": [], "runs": recorder.runs,
}  # fmt: skip
path = Path(results_dir) / "gpu_check.json"
results.save(result, path)
print(f"{len(recorder.runs)} tests, written to {path}. python dev/make_results.py puts them into the docs")
raise SystemExit(int(status))
