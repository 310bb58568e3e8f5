"""Is a change better, or luck? Trains pairs of runs with the same seeds until an interval decides:

python ablate.py config/shakespeare_cpu.py "--activation=relu2" "--optimizer=adamw --learning_rate=2e-3" --max_iters=650

An argument that starts with one of the settings of this script belongs to this script. Every other argument is one
variant: settings of train.py, in quotes if there are several. A second config file is a variant too. What all runs
share goes into --common="--key=value ...". With --against=HEAD, your edited files are compared with the committed ones.
Without variants, --seeds=3 measures one config.
The statistics are in minutegpt/paired.py.
"""

import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import datetime
import json
import queue
import re
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from minutegpt import checkouts, results
from minutegpt.config import configure, run_config, settings_of, split_words
from minutegpt.data.dataset import DATA
from minutegpt.data.dev_split import dev_dataset
from minutegpt.data.pipeline import ensure_dataset
from minutegpt.device import environment, init_machine, machine_name, matmul_flops, process_environment
from minutegpt.errors import ROOT, UserError
from minutegpt.files import run_lock
from minutegpt.processes import call, error_of, stop_all, stopping, wait_for_lock
from minutegpt.results import BASELINE, Result

# ----------------------------------------------------------------------------------------------------------------
# every setting of this script, with its default. An argument --KEY=... with another KEY is a variant
name = ""  # results/NAME.json; made from the config and the variants where empty
seeds = 0  # pairs of runs at most; 0 is 6, and 3 for a record. A larger number later extends the experiment
first_seed = 1
margin = 0.01  # nats per token: a difference that does not matter. It is enough to know that there is no larger one
max_iters = 0  # equal steps for all runs; 0 leaves it to the config
max_minutes = 0.0  # equal time for all runs; 0 leaves it to the config
common = ""  # settings of train.py for all runs, the baseline too
against = ""  # the baseline is this commit, or this folder with another checkout; the variant is this checkout
dev = False  # compare on a development split, made of training text: for choices
final = False  # after --dev, the same command with --final: the better variants again, on the validation split
jobs = 1  # runs at the same time
again = ""  # a file of results: runs that experiment again
check = False  # with --again: does the result still hold? The exit status is 1 where it does not
record = 0.0  # a loss: in how many seconds, and matrix products of this machine, is a whole-split loss below it?
overwrite = False  # discard earlier results of this name
out_dir = "out-ablate"  # the runs, and the copies of the code that they use
results_dir = "results"
# ----------------------------------------------------------------------------------------------------------------
OWN = settings_of(__file__)
OF_EXPERIMENT = ("margin", "first_seed", "max_iters", "max_minutes", "common", "against", "dev", "record")
EDITED = "these files"  # the one variant of --against
RESERVED = ("seed", "dataset", "out_dir", "init_from", "overwrite")  # no variant may set these


def split_arguments(argv: list[str]) -> tuple[str, list[str], list[str]]:
    """The config file, the variants, and what is left for the settings of this script."""
    config_file, variants, rest = "", [], []
    for word in argv:
        first = word.split()[0] if word.strip() else ""
        is_config = first.endswith(".py") and not first.startswith("-")
        if is_config and not config_file:
            config_file = word
        elif is_config or (first.startswith("--") and first[2:].partition("=")[0] not in {*OWN, "help"}):
            variants.append(word)
        else:
            rest.append(word)
    return config_file, variants, rest


def check_variants(known: dict[str, str]) -> None:
    """Raises UserError for settings that train.py does not have, and those that belong to ablate.py."""
    for words in [*variants, common]:
        for key in (word[2:].partition("=")[0] for word in split_words(words) if word.startswith("--")):
            if key in RESERVED and (key, words) != ("dataset", common):
                raise UserError(f"--{key} must be the same in all runs. Leave it out of {words!r}")
            if known and key not in known:
                raise UserError(
                    f"neither ablate.py nor train.py has a setting {key!r}{at_that_time or '. See --help of both'}"
                )
    if len(set(variants)) < len(variants):
        raise UserError("a variant is given twice. Leave one out")


def find_dataset(known: dict[str, str]) -> str:
    """The dataset of all runs, from --common, the config or train.py, prepared; with --dev its development split."""
    named = re.findall(r"--dataset[= ](\S+)", common)
    found = run_config(str(mine / config_in(mine))) if config_file else {}
    text = named[-1] if named else str(found.get("dataset", known.get("dataset", "shakespeare_char").strip("\"'")))
    return dev_dataset(text) if dev else ensure_dataset(text)


# -- one experiment: what is compared, with which code


def experiment_name() -> str:
    keys = [word[2:].partition("=")[0] for variant in variants for word in variant.split() if word.startswith("--")]
    words = ["record"] * bool(record) + [Path(config_file or "train").stem, *keys]
    if against:  # each edit is an experiment of its own
        words += ["against", Path(against).name, checkouts.fingerprint(ROOT)[:6]]
    return re.sub(r"[^\w.-]+", "_", "-".join(words))[:80]


def config_in(code: Path) -> str:
    recorded = bool(old) and not against
    return config_file and checkouts.place_config(config_file, plan["config_text"], code, recorded)


# -- one run


def command_of(label: str, seed: int, out: Path) -> tuple[Path, list[str]]:
    """The checkout that a run uses, and its arguments to train.py."""
    checkout = base if label == BASELINE else mine
    flags = [] if label in (BASELINE, EDITED) else shlex.split(label)
    argv = [flags.pop(0)] if flags and flags[0].endswith(".py") else list(filter(None, [config_in(checkout)]))
    argv += shlex.split(common)
    argv += [f"--max_iters={max_iters}", "--max_minutes=0"] if max_iters else []
    argv += [f"--max_minutes={max_minutes}"] if max_minutes else []
    return checkout, [*argv, *flags, f"--dataset={dataset}", f"--seed={seed}", f"--out_dir={out.resolve()}"]


def run_folder(label: str, seed: int) -> Path:
    words = re.sub(r"[^\w.=-]+", "_", label.strip("-"))[:50]
    return folder / f"{[BASELINE, *variants].index(label)}-{words}" / f"seed-{seed}"


def train_and_evaluate(label: str, seed: int) -> dict[str, Any] | None:
    """One run, as results.py describes it; None where it was interrupted. An interrupted run at equal steps goes on."""
    out, slot = run_folder(label, seed), slots.get()
    run: dict[str, Any] = {"variant": label, "seed": seed}
    try:
        wait_for_lock(out)
        saved = json.loads((out / "config.json").read_bytes()) if (out / "config.json").exists() else {}
        by_time = bool(max_minutes or saved.get("max_minutes"))  # a planned run by time may have its own steps
        resumed = (out / "ckpt.pt").exists() and not by_time and not record
        if not resumed:
            shutil.rmtree(out)
        checkout, argv = command_of(label, seed, out)
        argv += ["--init_from=resume"] * resumed
        log, env = out.with_suffix(".log"), process_environment(slot, jobs) | {"MINUTEGPT_DATA": str(DATA.resolve())}
        began = time.perf_counter()
        status, output = call(checkout, ["train.py", *argv], log, env)
        wall = time.perf_counter() - began
        if not status and not stopping.is_set():
            saved = json.loads((out / "config.json").read_bytes())
            argv = ["evaluate.py", f"--out_dir={out.resolve()}", "--ckpt=latest", "--json"]
            status, output = call(checkout, [*argv, f"--device={saved.get('device', 'auto')}"], log, env)
        if stopping.is_set():
            return None
        if status:
            return run | {"error": error_of(status, output), "log": log.as_posix()}
        score = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        run |= {key: score[key] for key in ("loss", "bits_per_byte", "tokens")}
        run |= results.read_run(out) | {"wall_seconds": None if resumed else wall}
        result["equal"] = "time" if max_minutes or saved.get("max_minutes") else "steps"
        if label == BASELINE and not result["config"]:
            result["config"] = {key: value for key, value in saved.items() if key not in ("out_dir", "seed")}
        return run | ({"matmul_flops": matmul_flops(machine)} if record else {})
    finally:
        slots.put(slot)


# -- all runs


def show(text: str) -> None:
    """On a terminal, instead of what was shown before."""
    global shown
    if sys.stdout.isatty() and shown:
        sys.stdout.write(f"\x1b[{shown}F\x1b[J")
    shown = sum(1 + len(line) // shutil.get_terminal_size().columns for line in text.splitlines())
    print(text, flush=True)


def state_of_all(running: list[tuple[str, int]]) -> str:
    text = results.text(result)
    for label, seed in running:
        text += f"\nrunning: seed {seed}, {label}: {results.progress(run_folder(label, seed))}"
    if result.get("equal") == "time" and jobs > 1:
        text += f"\nwarning: {jobs} runs at the same time slow each other down. Compare equal time with --jobs=1"
    return text


def run_round(todo: list[tuple[str, int]]) -> None:
    """Runs these, `jobs` at a time, and saves each result when it is there."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(train_and_evaluate, *each): each for each in todo}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=2 if sys.stdout.isatty() else None, return_when=FIRST_COMPLETED)
                for future in done:
                    del waiting[future]
                    if run := future.result():
                        result["runs"].append(run)
                        results.update_record(result) if record else results.update_differences(result)
                        results.save(result, path)
                        if not sys.stdout.isatty():
                            print(results.run_line(run), flush=True)
                if sys.stdout.isatty():
                    show(state_of_all([each for future, each in waiting.items() if future.running()]))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            raise


def run_all() -> None:
    """Round after round, one seed each, until all variants are decided, have failed, or the seeds are used up."""
    for seed in range(first_seed, first_seed + result["planned_seeds"][-1]):
        active = [v for v in variants if not result["differences"][v]["decided"] and not results.failure(result, v)]
        if variants and not active:
            break
        known = {(run["variant"], run["seed"]) for run in result["runs"]}
        todo = [(label, seed) for label in [BASELINE, *active] if (label, seed) not in known]
        if (seed - first_seed) % 2:
            todo.reverse()  # A B, B A: a machine that slows down does not favour one
        run_round(todo)
        if failed := results.failure(result, BASELINE):
            raise UserError(f"the baseline failed: {failed['error']}. Its log is {failed['log']}{at_that_time}")
        if todo:
            show(state_of_all([]))
    if not shown:
        show(state_of_all([]))


# -- the call, from its arguments to the verdicts

config_file, variants, rest = split_arguments(sys.argv[1:])
config, given = configure(globals(), __file__, argv=rest)
globals().update(config)
old = results.load(again, "ablate.py") if again else None  # what is run again
at_that_time = f". For the code that measured it, type git checkout {old['commit']}" if old else ""
if old:
    if old["kind"] == "record" and "record" not in old:
        raise UserError(f"{again} is no record yet: that takes 2 seeds at least. Finish it with the same command first")
    if config_file or variants:
        raise UserError("--again takes the config and the variants from its file. Leave yours out")
    config_file, variants, seeds = old["config_file"], old["variants"], seeds or old["planned_seeds"][-1]
    globals().update({key: old["settings"][key] for key in OF_EXPERIMENT if key not in given})
elif against and variants:
    raise UserError("--against compares two checkouts with the same settings. Leave the variants out, or use --common")
elif config_file and not Path(config_file).is_file():
    raise UserError(f"there is no config file {config_file!r}")
typed = ["python", "ablate.py", *sys.argv[1:]]
if config_file and not old and Path(config_file).resolve().is_relative_to(ROOT):  # the same on another machine
    place = Path(config_file).resolve().relative_to(ROOT).as_posix()
    config_file, typed[typed.index(config_file)] = place, place
elif config_file and not old:
    config_file = str(Path(config_file).resolve())
if record and not old and (variants or against):
    raise UserError("--record measures one config. Put settings into it or into --common, and leave --against out")
variants = [EDITED] if against else variants
if not (variants or record or seeds):
    raise UserError("there is nothing to compare. Type a variant like '--tie=false', or --against=HEAD, or --seeds=3 "
                    "to measure one config")  # fmt: skip
if max_iters and max_minutes:
    raise UserError("--max_iters and --max_minutes exclude each other. Leave one out")
if check and not again:
    raise UserError("--check needs an earlier result. Add --again=FILE")
if record and (dev or jobs > 1):
    raise UserError("--record excludes --dev and --jobs. Leave them out")
name = name or (f"{old['name']}-again" if old else experiment_name())
if final:
    chosen = results.load(Path(results_dir) / f"{name}.json")
    variants = [variant for variant, about in chosen["differences"].items() if about["kind"] == "better"]
    if not (variants and chosen["settings"]["dev"]):
        raise UserError(f"{name} has no variant that was better on a development split. Run it with --dev first")
    name, dev = f"{name}-final", False
folder, path = Path(out_dir) / name, Path(results_dir) / f"{name}.json"
mine, base = folder / "code", folder / ("baseline" if against else "code")
edits = old["edits"] if old else {}  # of an experiment with --against that is run again
plan: dict[str, Any] = {
    "config_file": config_file, "variants": variants, "config_text": "",
    "settings": {key: globals()[key] for key in OF_EXPERIMENT},
    "code": old["code"] if old and edits else checkouts.fingerprint(ROOT), "baseline_commit": "",
}  # fmt: skip
if old:
    plan |= {key: old[key] for key in ("config_text", "baseline_commit")}
elif config_file:
    plan["config_text"] = (ROOT / config_file).read_text(encoding="utf-8")
if against and not old:
    plan["baseline_commit"] = checkouts.baseline_commit(against)
lock = run_lock(folder)
result: Result = results.load(path, "ablate.py") if path.exists() and not overwrite else {}
if changed := [key for key, value in plan.items() if result and result[key] != value]:
    raise UserError(
        f"{path} has results of another experiment: {', '.join(changed)} changed since. Type --name=NAME for a new "
        "one, or --overwrite to discard these"
    )
if not result:
    for each in [mine, base, *folder.glob("[0-9]*-*")]:
        shutil.rmtree(each, ignore_errors=True)
checkouts.copy_experiment(base, mine, against if checkouts.is_checkout(against) else plan["baseline_commit"], edits)
known = checkouts.train_defaults(mine)
check_variants(known)
dataset = find_dataset(known)
machine = init_machine()
slots: queue.Queue[int] = queue.Queue()
for i in range(jobs):
    slots.put(i)
shown = 0
here = {"name": machine_name(machine), "matmul_flops": matmul_flops(machine)} | environment(machine)
if old and record and old.get("equal") == "time" and old["machine"]["device"] == here["device"]:
    # as many matrix products as then: a slower machine gets more time
    max_minutes = old["record"]["matmul_cost"] / here["matmul_flops"] / 60
result = result or results.EMPTY | {
    "kind": "record" if record else "ablation", "name": name, **plan, "planned_seeds": [seeds or (3 if record else 6)],
    "command": shlex.join(typed), "commit": checkouts.commit_of(ROOT),
    "edited": checkouts.is_edited(ROOT), "edits": checkouts.edits(base, mine) if against else {}, "machine": here,
    "split": {"dataset": dataset, "split": "val", "development": dev}, "runs": [],
}  # fmt: skip
result["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
result["runs"] = [run for run in result["runs"] if "error" not in run]  # what failed is tried again
if seeds > result["planned_seeds"][-1]:
    if record:  # its p would be wrong: more seeds until it passes
        raise UserError(f"{path} has its seeds, and more would be a second try. Type another --name and --first_seed")
    result["planned_seeds"].append(seeds)
results.update_differences(result)
results.save(result, path)
signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt
began = time.perf_counter()
try:
    run_all()
except KeyboardInterrupt:
    print(f"stopped. The same command goes on; {path} has the results so far", flush=True)
    raise SystemExit(130) from None
results.draw(result, folder / "pairs.png")
if record:
    print(results.record_line(result))
print(f"{time.perf_counter() - began:.0f} s; results: {path}; picture: {folder / 'pairs.png'}")
if dev:
    print("these are choices on the development split. Add --final to run the better ones on the validation split")
if old and check:
    holds, words = results.compare(old, result)
    print(words)
    raise SystemExit(0 if holds else 1)
