"""Runs commands that print JSON, and keeps what they print:  python dev/record.py --name=NAME "python evaluate.py ..."

    python dev/record.py --name=speed "python bench.py --parts=train --json"
    python dev/record.py --name=cpu --seeds=3 --columns=loss "python train.py --seed=SEED" "python evaluate.py --json"
    python dev/record.py --again=results/speed.json --check

Every command runs once per seed, with 1, 2, ... instead of the word SEED. A command that prints no JSON, such as a
training run, only prepares the next ones. results/NAME.json is saved after each command, so a stopped call goes on.
ablate.py compares changes of a config; this script is for everything else that the docs report.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import datetime
import json
import subprocess
import time
from typing import Any

from minutegpt import checkouts, results
from minutegpt.config import configure, split_words
from minutegpt.device import environment, init_machine, machine_name, matmul_flops
from minutegpt.errors import ROOT, UserError

# ----------------------------------------------------------------------------------------------------------------
# every setting, with its default
name = ""  # results/NAME.json
seeds = 1  # each command runs so many times
columns = ""  # comma-separated: what the table in docs/results.md shows of the values; empty: all of them
again = ""  # a file of results: runs its commands again, as NAME-again
check = False  # with --again: are the losses still the same, within the noise of the seeds?
overwrite = False  # discard earlier results of this name
results_dir = "results"
# ----------------------------------------------------------------------------------------------------------------


def run(command: str) -> dict[str, Any]:
    """Runs one command in the repository. Returns the values of its JSON, flat, and the seconds that it took."""
    words = split_words(command)
    if words[:1] not in (["python"], ["torchrun"]):
        raise UserError(f"{command!r} does not start with python. Type the command of a script of this repository")
    print(f"> {command}", flush=True)
    began = time.perf_counter()
    program = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "torch.distributed.run"]
    done = subprocess.run([*program, *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    seconds = time.perf_counter() - began
    if done.returncode:
        raise UserError(f"the command failed with status {done.returncode}: {command}. Correct it and start again")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    values = results.flat(json.loads(lines[-1])) if lines else {}
    print(f"  {seconds:.0f} s", *(f"{key}={value:.5g}" for key, value in values.items()), flush=True)
    return {"values": values, "wall_seconds": seconds}


commands = [word for word in sys.argv[1:] if not word.startswith("--")]
config, _ = configure(globals(), __file__, argv=[word for word in sys.argv[1:] if word.startswith("--")])
globals().update(config)
old = results.load(again, "dev/record.py") if again else None
if old and check and not results.losses_of(old):
    raise UserError(f"{again} has no loss, so there is nothing to check. Leave --check out to measure again")
if old:
    commands, seeds, columns = old["commands"], old["seeds"], ",".join(old["columns"])
    name = name or f"{old['name']}-again"
if not commands or not name:
    raise UserError("a name and commands are missing. Type python dev/record.py --name=NAME 'python bench.py --json'")
path = Path(results_dir) / f"{name}.json"
result: results.Result = results.load(path, "dev/record.py") if path.exists() and not overwrite else {}
now = {"commit": checkouts.commit_of(ROOT), "edited": checkouts.is_edited(ROOT)}
changed = any(result[key] != value for key, value in now.items()) if result else False
if old and result and (changed or len(result["runs"]) == len(commands) * seeds):
    result = {}  # what is run again is the code of now
if result and (result["commands"], result["seeds"]) != (commands, seeds):
    raise UserError(f"{path} has the results of other commands. Type another --name, or --overwrite to discard them")
if not result:
    machine = init_machine()
    here = {"name": machine_name(machine), "matmul_flops": matmul_flops(machine)} | environment(machine)
    result = {
        "format": results.FORMAT, "version": results.VERSION, "kind": "commands", "name": name,
        "commands": commands, "seeds": seeds, "columns": [column for column in columns.split(",") if column],
        "machine": here, **now, "date": "", "variants": [], "runs": [],
    }  # fmt: skip
for seed in range(1, seeds + 1):
    for command in commands:
        if any((run["command"], run["seed"]) == (command, seed) for run in result["runs"]):
            continue
        result["runs"].append({"command": command, "seed": seed} | run(command.replace("SEED", str(seed))))
        result["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        results.save(result, path)
print(results.markdown(result) + f"results: {path}")
if old and check:
    holds, words = results.compare(old, result)
    print(words)
    raise SystemExit(0 if holds else 1)
