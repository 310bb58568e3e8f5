"""results/NAME.json: what ablate.py and dev/record.py measured, its tables, its picture, and whether it still holds.

result["kind"]:

ablation  result["runs"]: one object per run: variant, seed, loss, bits_per_byte, tokens, steps, seconds,
          seconds_per_step, wall_seconds; or error and log. result["differences"]: for each variant what paired.judge
          returns. Without variants it is a measurement of one config.
record    the same with result["record"] instead of the differences
commands  result["runs"]: command, seed, values (a flat dict of what the command printed), wall_seconds

A loss is in nats per token, over the whole split.
"""

import json
import statistics
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from minutegpt.errors import UserError
from minutegpt.files import atomic_write
from minutegpt.paired import below, judge, t_quantile

FORMAT, VERSION = "minutegpt results", 1
BASELINE = "baseline"
RECORD_P = 0.01  # probability that the mean loss of a record is not below the bar
COST_TOLERANCE = 1.25  # a record's cost in matrix products may grow so much on another machine
MEAN_TOLERANCE = 0.02  # nats per token: two runs of one config with other seeds differ by up to this
SCRIPTS = {"ablation": "ablate.py", "record": "ablate.py", "commands": "dev/record.py", "planner": "dev/fit_planner.py"}
Result = dict[str, Any]
EMPTY: Result = {"format": FORMAT, "version": VERSION, "date": "", "equal": "", "config": {}, "differences": {}}


def load(path: str | Path, script: str = "") -> Result:
    """script: the one that must have written it, or ""."""
    try:
        result = json.loads(Path(path).read_bytes())
        if (result["format"], result["version"]) != (FORMAT, VERSION):
            raise ValueError
        assert isinstance(result["runs"], list) and isinstance(result["variants"], list)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Type the name of a file of results") from None
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        raise UserError(f"{path} is damaged, or ablate.py did not write it. Run the experiment again") from None
    author = SCRIPTS.get(result.get("kind"), "another script")
    if script and author != script:
        raise UserError(f"{path} is of {author}, not of {script}. Type another name, or python {author} --help")
    return result


def save(result: Result, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl up to the first that is not whole. (log.py imports model.py, which may be broken here.)"""
    rows = []
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    return rows


def read_run(out: Path) -> dict[str, Any]:
    """steps, seconds and seconds_per_step of a finished run, from its log.

    The median over the lines of the log is taken, so that evaluations and busy moments do not count.
    """
    rows = read_log(out / "log.jsonl")
    steps, seconds = rows[-1]["step"], rows[-1]["seconds"]
    marks = [(row["step"], row["seconds"]) for row in rows if row["train_loss"] is not None]
    laps = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(marks) if b[0] > a[0]]
    per_step = statistics.median(laps) if laps else seconds / max(1, steps)
    return {"steps": steps, "seconds": seconds, "seconds_per_step": per_step}


def progress(out: Path) -> str:
    rows = [row for row in read_log(out / "log.jsonl") if row["train_loss"] is not None]
    return f"step {rows[-1]['step']}, loss {rows[-1]['train_loss']:.4f}" if rows else "starting"


def run_line(run: dict[str, Any]) -> str:
    loss = f"loss {run['loss']:.4f}" if "loss" in run else f"failed: {run['error']}"
    return f"seed {run['seed']}, {run['variant']}: {loss}"


def good_runs(result: Result, variant: str) -> dict[int, dict[str, Any]]:
    """seed -> the run of this variant, without failed ones."""
    return {run["seed"]: run for run in result["runs"] if run["variant"] == variant and "error" not in run}


def failure(result: Result, variant: str) -> dict[str, Any] | None:
    return next((run for run in result["runs"] if run["variant"] == variant and "error" in run), None)


def update_differences(result: Result) -> None:
    """Judges every variant by the seeds that it shares with the baseline."""
    baseline = good_runs(result, BASELINE)
    result["differences"] = {}
    for variant in result["variants"]:
        runs = good_runs(result, variant)
        pairs = [(runs[seed], run) for seed, run in baseline.items() if seed in runs]
        result["differences"][variant] = judge(
            [run["loss"] - base["loss"] for run, base in pairs],
            n_variants=len(result["variants"]), plan=result["planned_seeds"], margin=result["settings"]["margin"],
        )  # fmt: skip


def update_record(result: Result) -> None:
    """Judges a record: the mean loss against the bar, and what it cost in this machine's matrix products."""
    runs = list(good_runs(result, BASELINE).values())
    if len(runs) < 2:
        return
    losses = [run["loss"] for run in runs]
    bar = result["settings"]["record"]
    result["record"] = {
        "bar": bar,
        "loss": statistics.fmean(losses),
        "p": below(losses, bar),
        "seconds": statistics.fmean(run["wall_seconds"] for run in runs),
        "matmul_flops": statistics.fmean(run["matmul_flops"] for run in runs),
        "matmul_cost": statistics.fmean(run["wall_seconds"] * run["matmul_flops"] for run in runs),
    }


# -- for people


def rows(result: Result) -> list[dict[str, str]]:
    """The table: a row per variant, the baseline first. Means over the seeds that each one ran."""
    found = []
    for variant in [BASELINE, *result["variants"]]:
        runs = list(good_runs(result, variant).values())
        about = result["differences"].get(variant, {})
        compared = ["difference", "better"] if result["variants"] else ["range"]
        row = dict.fromkeys(["", "seeds", "loss", *compared, "steps", "s/step", "verdict"], "")
        row |= {"": variant, "seeds": str(len(runs))}
        if runs:
            row["loss"] = f"{statistics.fmean(run['loss'] for run in runs):.4f}"
            if not result["variants"]:
                row["range"] = spread([run["loss"] for run in runs])
            row["steps"] = f"{statistics.fmean(run['steps'] for run in runs):.0f}"
            row["s/step"] = f"{statistics.fmean(run['seconds_per_step'] for run in runs):.3g}"
        if about.get("seeds"):
            row["difference"] = f"{about['mean']:+.4f}"
            if about["half_width"] is not None and about["half_width"] < 1:  # two seeds alone say next to nothing
                row["difference"] += f" ± {about['half_width']:.4f}"
            row["better"] = f"{about['better_seeds']}/{about['seeds']}"
        row["verdict"] = about.get("verdict", "")
        if failed := failure(result, variant):
            row["verdict"] = f"failed at seed {failed['seed']}, left out: {failed['error']} (log: {failed['log']})"
        found.append(row)
    return found


def spread(values: list[float]) -> str:
    return f"{min(values):.4f}-{max(values):.4f}" if len(values) > 1 else ""


def planner_rows(result: Result) -> list[dict[str, str]]:
    """A row for each run of dev/fit_planner.py, with what the planner predicted."""
    found = []
    for run in result["runs"]:
        loss, margin = run.get("forecast", (0, 0))
        row = {
            "": run["variant"],
            "loss": f"{run['loss']:.4f}",
            "predicted": f"{loss:.2f} ± {margin:.2f}" if loss else "",
        }
        found.append(row | {"steps": str(run["steps"]), "s/step": f"{run['seconds_per_step']:.3g}"})
    return found


def caption(result: Result) -> str:
    """What was compared, and where."""
    text, machine = result["name"], result["machine"]
    if split := result.get("split"):
        kind = "development split, made of training text" if split["development"] else "validation split"
        how = f", at equal {result['equal']}" if result["equal"] and result["variants"] else ""
        text += f": whole {kind} of {split['dataset']}{how}"
    return (
        f"{text}; {machine['name']}, torch {machine['torch']}, "
        f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}, {result['date'][:10]}"
    )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in a nested object, under names with dots. An object in a list is named by its first value.

    >>> flat({"train": {"mfu": 0.5, "source": "measured"}, "by_position": [{"from": 9, "loss": 1.5}]})
    {'train.mfu': 0.5, 'by_position.9.from': 9, 'by_position.9.loss': 1.5}
    """
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) and item for item in value):
            value = {str(next(iter(item.values()))): item for item in value}
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


def command_values(result: Result) -> dict[str, dict[str, list[float]]]:
    """command -> column -> its values, one per seed; of the commands that printed any."""
    table: dict[str, dict[str, list[float]]] = {}
    for run in result["runs"]:
        for key, value in run["values"].items():
            if key in result["columns"] or not result["columns"]:
                table.setdefault(run["command"], {}).setdefault(key, []).append(value)
    return table


def number(value: float) -> str:
    """Enough digits for a loss, and no more for a speed.

    >>> number(1.47312), number(12345.6), number(0.1234), number(111540)
    ('1.4731', '12,346', '0.1234', '111,540')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}" if abs(value) >= 10 else f"{value:.4f}"


def command_rows(result: Result) -> list[dict[str, str]]:
    """The table of a result of commands: a row per command, or, for a single command, a row per value."""
    table = command_values(result)
    if len(table) == 1:
        cells = next(iter(table.values()))
        return [{"what": key, "value": number(statistics.fmean(v)), "range": spread(v)} for key, v in cells.items()]
    columns = list(dict.fromkeys(key for cells in table.values() for key in cells))
    found = []
    for command, cells in table.items():
        row = {"command": f"`{command}`"}
        for column in columns:
            values = cells.get(column, [])
            row[column] = number(statistics.fmean(values)) if values else ""
            if column == "loss" and len(values) > 1:
                row["range"] = spread(values)
        found.append(row)
    return found


def text(result: Result) -> str:
    """The caption and the table, for a terminal: aligned columns, the last one to the left."""
    table = rows(result)
    cells = [list(table[0]), *(list(row.values()) for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [caption(result)]
    for line in cells:
        middle = [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *middle, line[-1]]).rstrip())
    return "\n".join(lines)


def record_line(result: Result) -> str:
    about = result.get("record")
    if not about:
        return "no record yet: it takes 2 seeds at least"
    verdict = "a record" if about["p"] < RECORD_P else f"no record: p must be below {RECORD_P}"
    return (
        f"mean loss {about['loss']:.4f}, bar {about['bar']:g}, p = {about['p']:.2g}: {verdict}. "
        f"{about['seconds']:.1f} s from start to exit, worth {about['matmul_cost'] / 1e12:.3g} TFLOP of "
        f"matrix products at {about['matmul_flops'] / 1e9:.3g} GFLOP/s"
    )


def markdown(result: Result) -> str:
    """The same as a table for docs/results.md."""
    if result["kind"] == "record":
        return f"{caption(result)}\n\n{record_line(result)}\n"
    if result["kind"] == "commands":
        table = command_rows(result)
        if not any(row.get("range") for row in table):
            table = [{key: cell for key, cell in row.items() if key != "range"} for row in table]
        names = list(dict.fromkeys(name for row in table for name in row))
    else:
        found = planner_rows(result) if result["kind"] == "planner" else rows(result)
        table = [{"variant": f"`{row.pop('')}`"} | row for row in found]
        names = [name for name in table[0] if any(row[name] for row in table)]
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in table)]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{caption(result)}\n\n{body}\n"


def draw(result: Result, path: Path) -> None:
    """The losses, a line per seed from the baseline to each variant; and the mean differences with their intervals."""
    from matplotlib.figure import Figure  # half a second to import

    from minutegpt import plot

    variants = [variant for variant in result["variants"] if good_runs(result, variant)]
    if not variants:
        return
    columns = [BASELINE, *variants]
    figure = Figure(figsize=(4 + 2 * len(columns), 4), dpi=120, layout="constrained")
    left, right = plot.new_axes(figure, 1, 2)
    runs = {variant: good_runs(result, variant) for variant in columns}
    for i, seed in enumerate(sorted(runs[BASELINE])):
        known = [(x, runs[variant][seed]["loss"]) for x, variant in enumerate(columns) if seed in runs[variant]]
        colour = plot.COLOURS[i % len(plot.COLOURS)]
        left.plot(*zip(*known, strict=True), "o-", color=colour, linewidth=1, markersize=4, label=f"seed {seed}")
    labels = [f"{variant[:27]}..." if len(variant) > 30 else variant for variant in columns]
    left.set_xticks(range(len(columns)), labels, rotation=15, fontsize=7)
    left.set_ylabel("loss, nats per token", color=plot.INK)
    left.legend(fontsize=7, frameon=False)
    for x, variant in enumerate(variants):
        about = result["differences"][variant]
        half = about["half_width"]
        right.errorbar(x, about["mean"], yerr=None if half is None else half, fmt="o", color=plot.INK, capsize=4)
    margin = result["settings"]["margin"]
    right.axhspan(-margin, margin, color="#eeeeee", zorder=0)
    right.axhline(0, color=plot.GREY, linewidth=1)
    right.set_xticks(range(len(variants)), labels[1:], rotation=15, fontsize=7)
    right.set_xlim(-0.6, len(variants) - 0.4)
    right.set_ylabel("difference to the baseline; below 0 is better", color=plot.INK)
    for text in (*left.get_xticklabels(), *right.get_xticklabels()):
        text.set_parse_math(False)
    plot.save(figure, path)


# -- does a result still hold?


def compare(old: Result, new: Result) -> tuple[bool, str]:
    """Whether `new`, the same experiment run again, confirms all claims of `old`; and each of them in words."""
    if old["kind"] == "record":
        return _compare_records(old, new)
    if old["kind"] == "commands" or not old["variants"]:
        return _compare_means(old, new)
    found = []
    for variant, before in old["differences"].items():
        now = new["differences"].get(variant)
        if before["kind"] == "undecided":
            found.append((True, f"{variant}: nothing was decided, so it holds. Recorded: {before['verdict']}"))
            continue
        if not now or now["half_width"] is None:
            found.append((False, f"{variant}: recorded {before['verdict']}; now there are too few runs"))
            continue
        margin = old["settings"]["margin"]
        small = all(abs(each["mean"]) + (each["half_width"] or 0) <= margin for each in (before, now))
        overlap = abs(before["mean"] - now["mean"]) <= (before["half_width"] or 0) + now["half_width"]
        holds = (before["kind"] == now["kind"] or small) and overlap
        word = "holds" if holds else "not confirmed" if overlap else "does not hold"
        losses = [{seed: run["loss"] for seed, run in good_runs(each, variant).items()} for each in (old, new)]
        same = ", with the same losses to the last digit" if losses[0] == losses[1] else ""
        found.append((holds, f"{variant}: {word}{same}. Recorded: {before['verdict']}. Now: {now['verdict']}"))
    return all(holds for holds, _ in found), "\n".join(words for _, words in found)


def losses_of(result: Result) -> dict[str, list[float]]:
    """What is compared of a result without variants: its losses, one per seed."""
    if result["kind"] != "commands":
        return {BASELINE: [run["loss"] for run in good_runs(result, BASELINE).values()]}
    kinds = ("loss", "bits_per_byte")
    return {
        f"{command}, {key}": values
        for command, cells in command_values(result).items() for key, values in cells.items()
        if key.rpartition(".")[2] in kinds
    }  # fmt: skip


def _compare_means(old: Result, new: Result) -> tuple[bool, str]:
    """Two means hold together where they differ by less than 99% of pairs from one source would (Student's t).

    One run each has no noise to compare with: then MEAN_TOLERANCE decides.
    """
    found, now = [], losses_of(new)
    for name, before in losses_of(old).items():
        after = now.get(name, [])
        if not after:
            found.append((False, f"{name}: there is no run to compare"))
            continue
        difference, df = statistics.fmean(after) - statistics.fmean(before), len(before) + len(after) - 2
        allowed = MEAN_TOLERANCE
        if min(len(before), len(after)) > 1:
            squares = sum(statistics.variance(x) * (len(x) - 1) for x in (before, after))
            allowed = t_quantile(0.01, df) * (squares / df * (1 / len(before) + 1 / len(after))) ** 0.5
        holds = abs(difference) <= allowed
        word = "holds" if holds else "does not hold"
        found.append((holds, f"{name}: {word}. It moved by {difference:+.4f}; up to {allowed:.4f} is noise"))
    return bool(found) and all(holds for holds, _ in found), "\n".join(words for _, words in found)


def _compare_records(old: Result, new: Result) -> tuple[bool, str]:
    before, now = old["record"], new.get("record")
    if not now:
        return False, record_line(new)
    ratio = now["matmul_cost"] / before["matmul_cost"]
    holds = now["p"] < RECORD_P and ratio <= COST_TOLERANCE
    word = "holds" if holds else "does not hold"
    return holds, f"the record {word}: {ratio:.2f} times the recorded cost in matrix products. Now: {record_line(new)}"
