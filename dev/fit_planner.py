"""Makes the runs that the planner's law is fitted to, and fits it:  python dev/fit_planner.py --minutes=60

Each run is train.py at a fixed number of steps, then evaluate.py over the whole validation split. A run that is in
results/NAME.json already is not made again, so this script can be stopped and started at any time. It fits the law
to all runs of the file and writes it into minutegpt/law.py. --minutes=0 only fits.

The texts: the development split of Tiny Shakespeare (never its validation text), the development split of the Python
corpus, and the manual pages of the installed Debian packages. Two more, Git's release notes (Debian's package
git) and the headers of the installed C libraries, take no part in the fit. On Git's notes the plan is compared with six
hand-picked configs, at equal time. On five texts its loss is compared with the loss that it expects:

    python dev/fit_planner.py --compare=hand_picked --texts=git --name=planner-git --budgets=0.5,2,8 --minutes=120
    python dev/fit_planner.py --compare=plan --texts=git,headers,shakespeare,python,man --name=planner-texts \
        --budgets=0.5,2,8 --minutes=120
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import datetime
import gzip
import json
import math
import random
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np

import minutegpt.errors  # noqa: F401  finds the environment that has torch
from minutegpt import checkouts, results
from minutegpt.config import configure
from minutegpt.data.dataset import DATA, Split, open_data, open_split
from minutegpt.data.dev_split import dev_dataset, write_split
from minutegpt.data.pipeline import write_dataset
from minutegpt.data.shards import ShardWriter, publish
from minutegpt.data.sources import from_input
from minutegpt.data.tokenizer import from_json
from minutegpt.describe import Text, describe_text
from minutegpt.device import environment, init_machine, machine_name, matmul_flops
from minutegpt.errors import ROOT, UserError
from minutegpt.law import LAW, predict_loss
from minutegpt.planner import ngram_weight_decay
from minutegpt.processes import call, error_of

# ----------------------------------------------------------------------------------------------------------------
name = "planner-law"  # results/NAME.json
extra = "cpu-size"  # other results that the law is fitted to: of ablate.py --dev, or of --compare=plan
texts = "man,shakespeare,python,man_bpe,man_small,shakespeare_small"  # of those in TEXTS
budgets = "0.5,2"  # minutes of two quiet CPU cores: the steps of each run follow from these
compare = ""  # instead of runs to fit to: "plan" runs config/auto.py, "hand_picked" six hand-picked configs as well
seeds = 1  # of the compared runs
minutes = 0.0  # start no run after this time; 0 makes no runs
out_dir = "out-fit-planner"  # the runs, one at a time
# ----------------------------------------------------------------------------------------------------------------

VAL_TOKENS = 131_072  # of each validation split: pieces from all of it, so that evaluating takes seconds
PIECE = 1024
QUIET = ["--eval_interval=1000000", "--eval_iters=2", "--checkpoint_minutes=0"]  # evaluate.py evaluates
UNSEEN = ("git", "headers")  # texts that the law is not fitted to
PLANNED = (
    "n_layer", "n_embd", "n_head", "block_size", "batch_size", "gradient_accumulation_steps", "ngram", "ngram_rows",
    "optimizer", "learning_rate", "muon_lr", "ngram_weight_decay", "dropout",
)  # fmt: skip
HAND_PICKED = {
    "shakespeare_cpu": "config/shakespeare_cpu.py",
    "shakespeare_fast": "config/shakespeare_fast.py",
    "shakespeare_char": "config/shakespeare_char.py",
    "small, many rows": "config/shakespeare_cpu.py --n_layer=2 --n_embd=64 --n_head=1 --batch_size=24 --block_size=128",
    "tinygpt": "config/tinygpt.py",
    "nanoGPT's for a CPU": "config/tinygpt.py --n_embd=128 --learning_rate=1e-3 --warmup_iters=100",
}
MAN_BYTES = 8_000_000
MOST_EPOCHS = 16  # runs that would read their text more often are not made, and not fitted
LEAST_TOKENS = 100_000  # of a text: the law does not fit those of smaller ones
REFERENCE_FLOPS = 80e9  # what two quiet Zen 4 cores reach in a training step, FLOP/s
STEP_OVERHEAD = 0.01  # seconds per step there
STARTUP = 8.0  # seconds of a budget that are not training
SIZES = [(2, 64), (3, 96), (4, 128), (4, 192), (5, 256), (6, 384), (8, 512)]  # layers, channels
BEST = {0.5: 1, 2.0: 1, 8.0: 2, 30.0: 3}  # budget -> the size to search around, an index of SIZES
ROWS = [(24, 256), (12, 128), (3, 256)]  # rows and context: other than the usual (6, 256)


def man_pages() -> Iterator[str]:
    """The text of the manual pages, without roff's commands, in a random but fixed order."""
    pages = sorted(path for section in "23578" for path in Path("/usr/share/man", f"man{section}").glob("*.gz"))
    random.Random(0).shuffle(pages)
    for page in pages:
        lines = gzip.decompress(page.read_bytes()).decode("utf-8", "replace").splitlines()
        text = "\n".join(
            re.sub(r'^\.[A-Z]+ "?(.*?)"?$', r"\1", line) for line in lines if line[:2] not in ('.\\"', "'\\")
        )
        text = (
            re.sub(r"\\f[A-Z]|\\f\(..|\\&|\\[|^/]", "", text)
            .replace("\\-", "-")
            .replace("\\(aq", "'")
            .replace("\\*(Aq", "'")
        )
        text = re.sub(r"^[.'].*\n|^\d+\n|\\\(..|[^\x20-\x7e\n]", "", text, flags=re.MULTILINE)
        yield re.sub(r"\n{3,}", "\n\n", text) + "\n\n"


def git_notes() -> Iterator[str]:
    notes = sorted(Path("/usr/share/doc/git/RelNotes").glob("*"))
    random.Random(0).shuffle(notes)
    for note in notes:
        content = note.read_bytes()
        text = (gzip.decompress(content) if note.suffix == ".gz" else content).decode("utf-8", "replace")
        yield re.sub(r"[^\x20-\x7e\n]", "", text) + "\n\n"


def c_headers() -> Iterator[str]:
    headers = sorted(path for path in Path("/usr/include").rglob("*.h") if not path.is_symlink())
    random.Random(0).shuffle(headers)
    for header in headers:
        yield re.sub(r"[^\x20-\x7e\n\t]", "", header.read_bytes().decode("utf-8", "replace")) + "\n\n"


def plain_text(dataset: str, pages: Iterator[str], tokenizer: str = "char") -> str:
    """Prepares a dataset from pages of text, the last tenth for validation."""
    if not (DATA / dataset / "meta.json").exists():
        path = Path(out_dir) / f"{dataset}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = ""
        for page in pages:
            content += page
            if len(content) > MAN_BYTES:
                break
        if len(content) < 1000:
            raise UserError(f"the text of {dataset} is not installed here. Leave it out of --texts")
        path.write_text(content, encoding="utf-8")
        write_dataset(dataset, from_input(path), tokenizer, vocab_size=1024, workers=1)
    return dataset


# text -> the dataset that it is made of, and how many training tokens it takes of it (0: all)
TEXTS = {
    "shakespeare": (lambda: dev_dataset("shakespeare_char"), 0),
    "python": (lambda: dev_dataset("python_code"), 0),
    "man": (lambda: plain_text("man_pages", man_pages()), 0),
    "man_bpe": (lambda: plain_text("man_pages_bpe", man_pages(), "bpe"), 0),
    "man_small": (lambda: plain_text("man_pages", man_pages()), 100_000),
    "shakespeare_small": (lambda: dev_dataset("shakespeare_char"), 30_000),
    "git": (lambda: plain_text("git_notes", git_notes()), 0),
    "headers": (lambda: plain_text("c_headers", c_headers()), 0),
}


def prepare(text: str) -> str:
    """The dataset of a text, with a validation split of at most VAL_TOKENS. Returns its name."""
    source, n_train = TEXTS[text]
    dataset = f"planner_{text}"
    folder = DATA / dataset
    if not (folder / "meta.json").exists():
        train, val = (open_split(DATA / source(), split) for split in ("train", "val"))
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = from_json(train.meta["tokenizer"])
        splits = {}
        for split, ids in (("train", train.tokens(0, n_train or len(train))), ("val", spread(val, VAL_TOKENS))):
            writer = ShardWriter(folder, split, tokenizer.vocab_size)
            splits[split] = write_split(Split([ids], [(len(ids), 1.0)], {}).tokens, (0, len(ids)), writer, tokenizer)
        publish(folder, {"dataset": dataset, "tokenizer": train.meta["tokenizer"], "splits": splits})
    return dataset


def spread(split: Split, n: int) -> np.ndarray:
    """n tokens of a split, in pieces from all of it."""
    if len(split) <= n:
        return split.tokens(0, len(split))
    starts = np.linspace(0, len(split) - PIECE, n // PIECE).astype(int)
    return np.concatenate([split.tokens(start, start + PIECE) for start in starts.tolist()])


# -- the runs


def flops_per_token(layers: int, width: int, context: int, vocab_size: int) -> float:
    return 6 * (12 * layers * width**2 + vocab_size * width) + 12 * layers * width * context


def run_settings(size: tuple[int, int], rows: tuple[int, int], budget: float, vocab_size: int, **extra: Any) -> dict:
    """The settings of one run: the fast recipe at this size, with the steps that the budget allows."""
    (layers, width), (batch_size, context) = size, rows
    seconds = batch_size * context * flops_per_token(layers, width, context, vocab_size) / REFERENCE_FLOPS
    steps = round((60 * budget - STARTUP) / (seconds + STEP_OVERHEAD))
    shape = {"n_layer": layers, "n_embd": width, "n_head": max(1, round(width / 64))}
    return shape | {"batch_size": batch_size, "block_size": context, "max_iters": steps} | extra


def grid(text: str, budget: float, vocab_size: int) -> list[tuple[int, dict]]:
    """The runs of a text at a budget, each with its turn: the lower, the earlier it is made.

    First sizes around the best, then what limits overfitting (of small texts), rows and context, and rates.
    """
    best, usual = BEST[budget], (6, 256)
    first = 0 if budget < 1 else 2 if budget < 8 else 4
    runs: list[tuple[int, tuple[int, int], tuple[int, int], dict[str, Any]]]
    runs = [(first, size, usual, {}) for size in (SIZES[best], *SIZES[best - 1 : best + 2 : 2])]
    runs.append((6, SIZES[best + 2], usual, {}))
    if text.endswith("_small"):
        runs = [(1, SIZES[0], usual, {}), (1, SIZES[best], usual, {})]
        for size, extra in (
            (SIZES[best], {"ngram": 0}),
            (SIZES[best], {"dropout": 0.2}),
        ):
            runs.append((1, size, usual, extra))
        epoch = TEXTS[text][1] / math.prod(usual)  # steps
        for size, epochs in product(SIZES[best - 1 : best + 2 : 2], (1, 2, 4, 8, 16)):
            runs.append((1, size, usual, {"max_iters": round(epochs * epoch)}))
    else:
        for rows in ROWS:
            turn = 5 if budget > 2 else first if budget > 1 or text == "man" else 3
            runs.append((turn, SIZES[best], rows, {}))
        runs += [(7, SIZES[best], usual, {"muon_lr": rate}) for rate in (0.0075, 0.03)]
    found = [(turn, run_settings(size, rows, budget, vocab_size, **extra)) for turn, size, rows, extra in runs]
    if budget < 1 and not text.endswith("_small"):
        found.insert(1, (0, run_settings(SIZES[best], usual, budget / 2, vocab_size)))
    return found


def train_and_evaluate(run: dict[str, Any], argv: list[str], dataset: str) -> dict[str, Any]:
    """One run, as results.py describes it: train.py with these arguments, then evaluate.py."""
    out, log = Path(out_dir) / "run", Path(out_dir) / "log.txt"
    shutil.rmtree(out, ignore_errors=True)
    env = {"MINUTEGPT_DATA": str(DATA.resolve())}
    began = time.perf_counter()
    where = [f"--dataset={dataset}", f"--out_dir={out.resolve()}"]
    status, output = call(ROOT, ["train.py", *argv, *where], log, env)
    if not status:
        run["wall_seconds"] = time.perf_counter() - began
        flags = [f"--out_dir={out.resolve()}", "--ckpt=latest", "--json"]
        status, output = call(ROOT, ["evaluate.py", *flags], log, env)
    if status:
        return run | {"error": error_of(status, output), "log": log.as_posix()}
    score = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    run |= {key: score[key] for key in ("loss", "bits_per_byte", "tokens")}
    run |= results.read_run(out)
    config = json.loads((out / "config.json").read_bytes())
    if "forecast" in config:
        settings = {key: config[key] for key in PLANNED} | {"max_iters": run["steps"]}
        run |= {"forecast": config["forecast"], "settings": settings}
    return run


def fit_runs(datasets: dict[str, str]) -> list[tuple[dict[str, Any], list[str], str]]:
    """The runs to fit to, in their order: the run as results.py describes it, train.py's arguments, the dataset."""
    todo = []
    for budget in map(float, budgets.split(",")):
        for text, dataset in datasets.items():
            train = open_split(DATA / dataset, "train")
            for turn, settings in grid(text, budget, train.meta["tokenizer"]["vocab_size"]):
                batch_tokens = settings["batch_size"] * settings["block_size"]
                epochs = settings["max_iters"] * batch_tokens / len(train)
                if epochs > MOST_EPOCHS:
                    continue
                if (decay := ngram_weight_decay(len(train), epochs, batch_tokens)) > 4:  # 4 is the config's
                    settings.setdefault("ngram_weight_decay", decay)
                flags = [f"--{key}={value}" for key, value in settings.items()]
                run = {"variant": shlex.join([text, *flags]), "seed": 1337, "text": text, "budget": budget}
                argv = ["config/shakespeare_cpu.py", *flags, "--max_minutes=0", "--compile=false", *QUIET]
                todo.append((turn, run | {"settings": settings}, argv, dataset))
    return [(run, argv, dataset) for _, run, argv, dataset in sorted(todo, key=lambda each: each[0])]


def compared_runs(datasets: dict[str, str]) -> list[tuple[dict[str, Any], list[str], str]]:
    """The plan and, if asked for, six hand-picked configs, each for as many minutes."""
    todo = []
    rivals = HAND_PICKED if compare == "hand_picked" else {}
    for budget, (text, dataset) in product(map(float, budgets.split(",")), datasets.items()):
        for label, words in {"the plan": "config/auto.py", **rivals}.items():
            argv = [*words.split(), f"--max_minutes={budget}"]
            for seed in map(str, range(1337, 1337 + seeds)):
                run = {"variant": f"{text}, {budget:g} minutes: {label}", "seed": int(seed), "text": text}
                todo.append((run | {"budget": budget}, [*argv, f"--seed={seed}"], dataset))
    return todo


def open_results(path: Path) -> results.Result:
    machine = init_machine()
    here = {"name": machine_name(machine), "matmul_flops": matmul_flops(machine)} | environment(machine)
    result = results.load(path, "dev/fit_planner.py") if path.exists() else results.EMPTY | {
        "kind": "planner", "name": name, "command": shlex.join(["python", "dev/fit_planner.py", *sys.argv[1:]]),
        "commit": checkouts.commit_of(ROOT), "equal": "time" if compare else "steps",
        "config_file": "config/shakespeare_cpu.py", "variants": [], "runs": [],
        "split": {"dataset": "", "split": "val", "development": True},
    }  # fmt: skip
    result["split"]["dataset"] = ", ".join(
        dict.fromkeys([*filter(None, result["split"]["dataset"].split(", ")), *texts.split(",")])
    )
    return result | {"machine": here}


# -- the fit

# known within a factor of 3
FREE = (
    "dropout", "masking", "size", "vocabulary", "steps", "context", "overfit", "no_tables", "adamw", "noise",
    "learning",
)  # fmt: skip
KNOWN = (  # within a factor of 1.3
    "memory", "batch", "patience", "epochs", "rest", "gain",
    "size_power", "steps_power", "batch_power", "overfit_power", "scarcity_power",
)  # fmt: skip
START = {  # epochs: what arXiv 2305.16264 found
    "rest": 0.85, "size": 0.02, "size_power": 0.4, "gain": 1.0, "steps": 0.01, "steps_power": 1.0, "vocabulary": 0.05,
    "context": 0.01, "overfit": 0.1, "patience": 1.0, "epochs": 15.0, "dropout": 0.5, "no_tables": 0.06, "adamw": 0.012,
    "masking": 0.03, "memory": 0.33, "batch": 12000.0, "noise": 0.02, "batch_power": 0.7, "overfit_power": 0.3,
    "scarcity_power": 0.6, "learning": 0.05, "spread": 0.06,
}  # fmt: skip
TEXT_ERROR = 0.05  # of a text: counting does not say all about how hard it is
ERROR = 0.01  # of a run, in the logarithm of its loss: two seeds differ by so much
SHAPE = {"ngram": 6, "ngram_rows": 16384, "optimizer": "muon", "dropout": 0.0}  # of the runs, where not set


class Point(NamedTuple):
    """A run: what the law needs, and the loss that it ended at."""

    text: str
    description: Text
    shape: dict[str, Any]
    steps: int
    rows: int
    loss: float


def points(result: results.Result) -> list[Point]:
    """All runs that the law is fitted to, and those on texts that it is not fitted to."""
    runs = [(run["text"], run["settings"], run["loss"]) for run in result["runs"]]
    for path in (ROOT / "results" / f"{each}.json" for each in filter(None, extra.split(","))):
        if not path.exists():
            continue
        other = results.load(path)
        if other["kind"] == "planner":
            runs += [(run["text"], run["settings"], run["loss"]) for run in other["runs"]]
            continue
        base = other["config"]
        for run in other["runs"] if base["dataset"] == "shakespeare_dev" else []:
            words = [] if run["variant"] == results.BASELINE else shlex.split(run["variant"])
            changed: dict[str, Any] = dict(word[2:].split("=") for word in words)
            if changed.keys() <= {"ngram", "optimizer", "n_layer", "n_embd"}:
                changed |= {key: int(value) for key, value in changed.items() if value.isdigit()}
                runs.append(("shakespeare", base | {"max_iters": run["steps"]} | changed, run["loss"]))
    texts: dict[str, Text] = {}
    found = []
    for text, settings, loss in runs:
        if text not in texts:
            texts[text] = describe_text(*(open_data(prepare(text), split) for split in ("train", "val")))
        shape = SHAPE | settings | {"vocab_size": texts[text].vocab_size}
        rows = settings["batch_size"] * settings.get("gradient_accumulation_steps", 1)
        batch_tokens = rows * settings["block_size"]
        epochs = settings["max_iters"] * batch_tokens / texts[text].tokens
        planned = ngram_weight_decay(texts[text].tokens, epochs, batch_tokens)
        decay = settings.get("ngram_weight_decay", 4.0) if shape["ngram"] else planned
        if texts[text].tokens < LEAST_TOKENS or epochs > MOST_EPOCHS:
            continue
        if not planned / 1.5 < decay < 1.5 * planned:  # no plan is like that
            continue
        found.append(Point(text, texts[text], shape, settings["max_iters"], rows, loss))
    return found


def base_of(point: Point) -> str:
    return point.text.split("_")[0]


def error(point: Point, law: dict[str, float]) -> float:
    """The logarithm of the predicted loss over the loss."""
    LAW.update(law)
    return math.log(predict_loss(point.shape, point.steps, point.rows, point.description) / point.loss)


def fit(runs: list[Point]) -> dict[str, float]:
    """The coefficients by least squares on the logarithm of the loss, where a large error counts linearly (Huber).

    A coefficient is a logarithm here, with a normal prior around START: few runs cannot say all of them. Each text may
    be easier or harder than counting says, by a factor of its own. So the coefficients follow from the differences
    between runs of one text, which is what a plan needs.
    """
    names, bases = [*FREE, *KNOWN], sorted({base_of(point) for point in runs})
    prior = np.array([math.log(3)] * len(FREE) + [math.log(1.3)] * len(KNOWN) + [TEXT_ERROR] * len(bases))
    start = np.log([START[key] for key in names] + [1.0] * len(bases))
    text = np.array([bases.index(base_of(point)) for point in runs])

    def residuals(theta: np.ndarray) -> np.ndarray:
        law = dict(zip(names, np.exp(theta[: len(names)]).tolist(), strict=True))
        errors = (np.array([error(point, law) for point in runs]) - theta[len(names) :][text]) / ERROR
        large = np.abs(errors) > 1
        errors[large] = np.sign(errors[large]) * np.sqrt(2 * np.abs(errors[large]) - 1)
        return np.concatenate([errors, (theta - start) / prior])

    theta, damping = start, 1.0
    r = residuals(theta)
    for _ in range(200):  # Levenberg and Marquardt
        jacobian = np.stack([(residuals(theta + step) - r) / 1e-5 for step in 1e-5 * np.eye(len(theta))], axis=1)
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -jacobian.T @ r)
        new = residuals(theta + step)
        if new @ new < r @ r:
            theta, r, damping = theta + step, new, damping / 3
        else:
            damping *= 4
    return START | dict(zip(names, np.exp(theta[: len(names)]).tolist(), strict=True))


def fit_and_report(result: results.Result) -> dict[str, float]:
    """Fits the law; prints how well it meets the runs, and those of each text when fitted without that text."""
    found = points(result)
    runs = [point for point in found if point.text not in UNSEEN]
    law = fit(runs)
    unseen = [error(point, law) for point in found if point.text in UNSEEN]
    if unseen:
        print(f"{', '.join(UNSEEN)}: {len(unseen)} runs, error {np.mean(unseen):+.3f}, spread {np.std(unseen):.3f}")
    for base in sorted({base_of(point) for point in runs}):
        without = fit([point for point in runs if base_of(point) != base])
        errors = [error(point, without) for point in runs if base_of(point) == base]
        unseen += errors
        print(
            f"{base}, fitted without it: {len(errors)} runs, error {np.mean(errors):+.3f}, spread {np.std(errors):.3f}"
        )
    for point in found:
        shape = " ".join(f"{key}={point.shape[key]}" for key in ("n_layer", "n_embd", "block_size", "ngram", "dropout"))
        print(
            f"{point.text:18} {shape} rows={point.rows} steps={point.steps}: {point.loss:.3f} {error(point, law):+.3f}"
        )
    law["spread"] = 1.65 * float(np.sqrt(np.mean(np.square(unseen))))  # 90% of a normal distribution
    fitted = np.sqrt(np.mean([error(point, law) ** 2 for point in runs]))
    print(f"{len(runs)} runs: error {fitted:.3f} fitted, {law['spread'] / 1.65:.3f} on a text that took no part")
    return {key: float(f"{value:.3g}") for key, value in law.items()}


def write_law(law: dict[str, float]) -> None:
    """Replaces the coefficients in minutegpt/law.py."""
    path = ROOT / "minutegpt" / "law.py"
    lines = ["LAW = {"]
    for i in range(0, len(law), 4):
        lines.append("    " + " ".join(f'"{key}": {law[key]},' for key in [*law][i : i + 4]))
    source = re.sub(
        r"LAW = \{.*?\}", "\n".join([*lines, "}"]), path.read_text(encoding="utf-8"), count=1, flags=re.DOTALL
    )
    path.write_text(source, encoding="utf-8")


if __name__ == "__main__":
    globals().update(configure(globals(), __file__, config_files=False)[0])
    if compare not in ("", "plan", "hand_picked"):
        raise UserError(f"compare is {compare!r}. Use 'plan', 'hand_picked', or leave it out")
    if unknown := {*texts.split(",")} - TEXTS.keys():
        raise UserError(f"--texts={','.join(sorted(unknown))} is not one of {', '.join(TEXTS)}")
    if not re.fullmatch(r"[\d.]+(,[\d.]+)*", budgets):
        raise UserError(f"--budgets={budgets} is no list of minutes. Type numbers, such as 0.5,2")
    if not compare and minutes and (unfit := {*map(float, budgets.split(","))} - BEST.keys()):
        raise UserError(f"--budgets={','.join(map(str, sorted(unfit)))} is not one of {', '.join(map(str, BEST))}")
    path, stop_at = ROOT / "results" / f"{name}.json", time.monotonic() + 60 * minutes
    result = open_results(path)
    if minutes:
        datasets = {text: prepare(text) for text in texts.split(",")}
        known = {(run["variant"], run["seed"]) for run in result["runs"]}
        for run, argv, dataset in compared_runs(datasets) if compare else fit_runs(datasets):
            if (run["variant"], run["seed"]) in known:
                continue
            if time.monotonic() > stop_at:
                break
            run = train_and_evaluate(run, argv, dataset)
            print(results.run_line(run), flush=True)
            if "error" not in run:
                result["runs"].append(run)
                result["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                results.save(result, path)
    if not compare and len({run["text"].split("_")[0] for run in result["runs"]}) > 1:
        write_law(fit_and_report(result))
