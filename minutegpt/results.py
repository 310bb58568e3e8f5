"""results/NAME.json: what ablate.py measured, its tables, its picture, and whether a result still holds.

result["runs"]: one object per run: variant, seed, loss, bits_per_byte, tokens, steps, seconds, seconds_per_step,
wall_seconds; or error and log. result["differences"]: for each variant what paired.judge returns. A record has
result["record"] instead. A loss is in nats per token, over the whole split.
"""

import json
import statistics
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from minutegpt.errors import UserError
from minutegpt.files import atomic_write
from minutegpt.paired import below, judge

FORMAT, VERSION = "minutegpt results", 1
BASELINE = "baseline"
RECORD_P = 0.01  # probability that the mean loss of a record is not below the bar
COST_TOLERANCE = 1.25  # a record's cost in matrix products may grow so much on another machine
Result = dict[str, Any]
EMPTY: Result = {"format": FORMAT, "version": VERSION, "date": "", "equal": "", "config": {}, "differences": {}}


def load(path: str | Path) -> Result:
    try:
        result = json.loads(Path(path).read_bytes())
        if (result["format"], result["version"]) != (FORMAT, VERSION):
            raise ValueError
        assert isinstance(result["runs"], list) and isinstance(result["variants"], list)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Type the name of a file of results") from None
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        raise UserError(f"{path} is damaged, or ablate.py did not write it. Run the experiment again") from None
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
        row = dict.fromkeys(["", "seeds", "loss", "difference", "better", "steps", "s/step", "verdict"], "")
        row |= {"": variant, "seeds": str(len(runs))}
        if runs:
            row["loss"] = f"{statistics.fmean(run['loss'] for run in runs):.4f}"
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


def caption(result: Result) -> str:
    """What was compared, where, and how to read the interval."""
    split = result["split"]
    text = "development split, made of training text" if split["development"] else "validation split"
    machine = result["machine"]
    how = f", at equal {result['equal']}" if result["equal"] else ""
    return (
        f"{result['name']}: whole {text} of {split['dataset']}{how}; {machine['name']}, torch {machine['torch']}, "
        f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}, {result['date'][:10]}"
    )


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
    table = rows(result)
    for row in table:
        row["variant"] = f"`{row.pop('')}`"
    names = ["variant", *(name for name in table[0] if name != "variant")]
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in table)]
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
    found = []
    for variant, before in old["differences"].items():
        now = new["differences"].get(variant)
        if not now or now["half_width"] is None:
            found.append((False, f"{variant}: recorded {before['verdict']}; now there are too few runs"))
            continue
        margin = old["settings"]["margin"]
        small = all(abs(each["mean"]) + (each["half_width"] or 0) <= margin for each in (before, now))
        overlap = abs(before["mean"] - now["mean"]) <= (before["half_width"] or 0) + now["half_width"]
        holds = before["kind"] == "undecided" or ((before["kind"] == now["kind"] or small) and overlap)
        word = "holds" if holds else "not confirmed" if overlap else "does not hold"
        losses = [{seed: run["loss"] for seed, run in good_runs(each, variant).items()} for each in (old, new)]
        same = ", with the same losses to the last digit" if losses[0] == losses[1] else ""
        found.append((holds, f"{variant}: {word}{same}. Recorded: {before['verdict']}. Now: {now['verdict']}"))
    return all(holds for holds, _ in found), "\n".join(words for _, words in found)


def _compare_records(old: Result, new: Result) -> tuple[bool, str]:
    before, now = old["record"], new.get("record")
    if not now:
        return False, record_line(new)
    ratio = now["matmul_cost"] / before["matmul_cost"]
    holds = now["p"] < RECORD_P and ratio <= COST_TOLERANCE
    word = "holds" if holds else "does not hold"
    return holds, f"the record {word}: {ratio:.2f} times the recorded cost in matrix products. Now: {record_line(new)}"
