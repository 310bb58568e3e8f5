"""The page of a run that trains: what it shows, and when it is written.

    page = LivePage(run_log, val_data)  # on rank 0, after run_log.start
    scores = page.look()  # at an evaluation: the keys of the heads for log.jsonl, or {}
    page.record(val_loss, text)  # after its save: a row of samples.jsonl, and the page
    page.refresh()  # after a step line: the page with a longer curve
    page.close("finished", rows)  # the last one, which does not reload itself

All of it together takes at most SHARE of the run's time, after the first ALLOWANCE seconds: where evaluations come more
often than that pays for, some have no look and no row in samples.jsonl.

The data of the page (assemble):

    run          name dataset seed kind step seconds state live written expected end uses
    curve        train, val: [step, seconds, loss] each; forecast: [loss, margin]
    baselines    uniform, bigram; name: of the second, "token frequencies" for a large vocabulary
    compared     [{name, val}] of earlier runs of the same dataset
    prompt, passage (texts of its tokens), vocabulary {id: text}
    evaluations  [{step, seconds, val_loss, text, loss, top, attention, attention_tokens, heads}]: see probe.py
    shape        n_layer, n_head; births: see probe.py
    card, commands: [[label, text]]; verdict; settings: [[name, value, default]]
"""

import ast
import hashlib
import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minutegpt import probe
from minutegpt.config import model_defaults
from minutegpt.data.tokenizer import Tokenizer, from_json
from minutegpt.errors import ROOT
from minutegpt.log import append_sample, in_words, open_samples, print_line, read_log
from minutegpt.page import to_json, write
from model import GPTConfig

if TYPE_CHECKING:
    from minutegpt.data.dataset import Split
    from minutegpt.log import RunLog

PASSAGE = 160  # tokens
SHARE, ALLOWANCE = 0.03, 1.0  # of the run's time, and seconds, for looking and writing
REFRESH = 10.0  # seconds between pages, at least, where no evaluation comes
LIMIT = 900_000  # bytes of the data: the page is then below 1 MB
MOST = 60  # evaluations on a page
POINTS = 400  # of a curve
MOST_RUNS = 8  # earlier ones


class LivePage:
    """run_log: its rows, card, clock and folder are read when the page is written. val_data: the validation split."""

    def __init__(self, run_log: "RunLog", config: Mapping[str, Any], val_data: "Split") -> None:
        self.log, self.config = run_log, config
        self.tokenizer = from_json(val_data.meta["tokenizer"])
        n = min(config["block_size"], PASSAGE, len(val_data) - 1)
        self.passage = val_data.tokens(0, n + 1).tolist()
        self.passage_id = hashlib.sha256(repr(self.passage).encode()).hexdigest()[:8]
        self.path = run_log.out / "run.html"
        self.samples: list[dict[str, Any]] = []
        if config["init_from"] == "resume":
            self.samples = thinned(open_samples(run_log.out / "samples.jsonl", run_log.progress.step))
        self.found: dict[str, Any] | None = None  # at the last look: the passage's part of a row
        self.compared = earlier_runs(config["compare"], config["dataset"])
        self.started = self.written = time.perf_counter()
        self.spent, self.cost = 0.0, 0.0  # seconds: in all, and for the last look with its page
        self.state, self.result = "training", list[tuple[str, str]]()

    def look(self) -> dict[str, float]:
        """Reads the passage and scores the heads, if that is affordable. Returns the scores as keys of log.jsonl."""
        self.found = None
        if not self.affordable() and not self.log.clock.now.finished:
            return {}
        began, self.cost = time.perf_counter(), 0.0
        machine, model, n_tokens = self.log.machine, self.log.model, self.tokenizer.vocab_size
        ids = torch.tensor(self.passage, device=machine.device)
        with machine.autocast():
            found = probe.passage_row(probe.read_passage(model, ids, n_tokens))
            scores = probe.to_row(probe.score_heads(model, n_tokens))
        self.found = found | {"passage": self.passage_id}
        self.count(began)
        return scores

    def record(self, val_loss: float, text: str) -> None:
        """After a look: appends a row to samples.jsonl and writes the page."""
        if self.found is None:
            return
        began, step = time.perf_counter(), self.log.progress.step
        row = {"step": step, "seconds": round(self.log.clock.seconds(), 2), "val_loss": val_loss, "text": text}
        append_sample(self.log.out / "samples.jsonl", self.samples, row | self.found)
        self.samples[:] = thinned(self.samples)
        self.found = None
        self.write()
        self.count(began)

    def refresh(self) -> None:
        """Writes the page again where the last one is older than REFRESH, and that is affordable."""
        began = time.perf_counter()
        if began - self.written > REFRESH and self.affordable():
            self.write()
            self.spent += time.perf_counter() - began

    def affordable(self) -> bool:
        return self.spent + self.cost <= ALLOWANCE + SHARE * (time.perf_counter() - self.started)

    def count(self, began: float) -> None:
        self.cost += time.perf_counter() - began
        self.spent += time.perf_counter() - began

    def close(self, state: str, result: Sequence[tuple[str, str]] = ()) -> None:
        """Writes the last page. state: in words. result: labels and texts of the summary, commands among them."""
        self.state, self.result = state, list(result)
        self.write()

    def write(self) -> None:
        write(self.path, self.data())
        self.written = time.perf_counter()

    def card(self) -> list[tuple[str, str]]:
        """Labels and texts: the start card, and what the summary adds to it or replaces."""
        rows = dict(self.log.card) | dict(self.result)
        rows["page"] = f"{in_words(self.spent)} of this session to look inside the model and to write this page"
        return [(label, text) for label, text in rows.items() if not text.startswith("python ")]

    def births(self) -> list[dict[str, Any]]:
        """The heads that have a label now: probe.births."""
        shape = (self.log.model.config.n_layer, self.log.model.config.n_head)
        measured = ((row["step"], probe.from_row(row, *shape)) for row in self.log.rows)
        return probe.births([(step, scores) for step, scores in measured if scores])

    def news(self) -> list[str]:
        """Lines about the heads that have a label since this step."""
        born = [birth for birth in self.births() if birth["step"] == self.log.progress.step] if self.found else []
        return [f"  {probe.birth_line(birth)}" for birth in born]

    def data(self) -> dict[str, Any]:
        log, config = self.log, self.config
        clock, progress, model = log.clock, log.progress, log.model.config
        live, facts = self.state == "training", getattr(log, "facts", None)  # what the verdict is made from
        interval = max(REFRESH, 1.5 * config["log_interval"] * clock.timing.step) + clock.timing.eval
        seconds, seconds_left = clock.seconds(), clock.seconds_left()
        steps_left = seconds_left / max(1e-9, clock.timing.step)
        start = self.tokenizer.start_ids()
        about = {
            "run": {
                "name": log.out.resolve().name, "dataset": config["dataset"], "seed": config["seed"],
                "kind": self.tokenizer.kind, "step": progress.step, "seconds": round(seconds, 2),
                "state": self.state, "live": live, "written": time.time(), "expected": interval if live else 0,
                "end": {
                    "step": progress.step + round(steps_left) if clock.max_minutes else clock.total_steps,
                    "seconds": round(seconds + seconds_left, 1),
                },
            },
            "baselines": {
                "uniform": math.log(model.vocab_size), "bigram": getattr(facts, "bigram", None),
                "name": facts.baseline_name if facts else "",
            },
            "forecast": getattr(facts, "forecast", None), "verdict": getattr(log, "verdict", ""),
            "compared": self.compared,
            "prompt": "" if start == [self.tokenizer.end_token] else self.tokenizer.decode(start),
            "passage": self.passage, "passage_id": self.passage_id,
            "shape": [model.n_layer, model.n_head], "births": self.births(),
            "card": self.card(),
            "commands": [row for row in self.result if row[1].startswith("python ")] or [
                ("sample", f"python sample.py --out_dir={shlex.quote(str(log.out))}")
            ],
            "settings": changed_settings(config),
        }  # fmt: skip
        return assemble(about, log.rows, self.samples, self.tokenizer)


def assemble(
    about: dict[str, Any], rows: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """The data of a page: `about` (passage: ids), and what the rows of log.jsonl and samples.jsonl add.

    Evaluations, and then attention, are thinned out until the data has at most LIMIT bytes.
    """
    passage = about["passage"]
    scores = {row["step"]: found for row in rows if (found := probe.from_row(row, *about["shape"]))}
    evaluations = [dict(row) for row in samples]
    for row in evaluations:
        row["heads"] = scores.get(row["step"])
        if row.pop("passage", None) != about["passage_id"]:  # a resumed run may have another text or context length
            row |= {"loss": None, "top": None, "attention": None, "attention_tokens": 0}
    data = {
        **about,
        "passage": [token_text(tokenizer, i) for i in passage],
        "curve": {"train": curve(rows, "train_loss"), "val": curve(rows, "val_loss")},
    }
    most = MOST
    while True:
        kept = [evaluations[i] for i in spread(len(evaluations), most)]
        ids = {i for row in kept for top in row["top"] or [] for i in top[::2]}
        data["vocabulary"] = {i: token_text(tokenizer, i) for i in sorted(ids)}
        data["evaluations"] = [{**row, "attention": None} for row in kept]
        size = len(to_json(data))
        if size <= LIMIT * (0.6 if any(row["attention"] for row in kept) else 1) or most <= 2:
            break
        most = most * 2 // 3
    with_attention = [i for i, row in enumerate(kept) if row["attention"]]
    if with_attention:
        room = (LIMIT - size) // max(len(kept[i]["attention"]) for i in with_attention)
        for j in spread(len(with_attention), max(0, room)):
            i = with_attention[j]
            data["evaluations"][i]["attention"] = kept[i]["attention"]
    return data


def thinned(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows; where there are more than a page needs, those nearest to evenly spread steps, and the last one."""
    if len(samples) <= 4 * MOST:
        return samples
    steps = np.array([row["step"] for row in samples])
    wanted = np.linspace(steps[0], steps[-1], 2 * MOST)
    return [samples[i] for i in sorted({len(samples) - 1, *np.abs(steps[:, None] - wanted).argmin(0).tolist()})]


def spread(n: int, most: int) -> list[int]:
    """At most `most` of the indices 0 to n - 1, evenly spread, the last one and, from two, the first among them."""
    if n <= most:
        return list(range(n))
    if most < 2:
        return [n - 1][:most]
    return [round(i * (n - 1) / (most - 1)) for i in range(most)]


def curve(rows: Sequence[dict[str, Any]], key: str, points: int = POINTS) -> list[list[float]]:
    """[step, seconds, loss] of the rows of log.jsonl that have this loss; means of neighbours where there are many."""
    found = [(row["step"], row.get("seconds") or 0.0, row[key]) for row in rows if row.get(key) is not None]
    size = -(-len(found) // points) or 1
    groups = [found[i : i + size] for i in range(0, len(found), size)]
    means = [[sum(values) / len(group) for values in zip(*group, strict=True)] for group in groups]
    return [[round(step, 1), round(seconds, 2), round(loss, 4)] for step, seconds, loss in means]


def token_text(tokenizer: Tokenizer, i: int) -> str:
    """The text of one token; its bytes in hexadecimal where they are no characters of their own."""
    raw = tokenizer.decode_bytes([i])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return f"‹{raw.hex()}›"


def changed_settings(config: Mapping[str, Any]) -> list[list[Any]]:
    """[name, value, default] of the settings of train.py that have another value than their default."""
    defaults: dict[str, Any] = model_defaults(GPTConfig)
    for node in ast.parse((ROOT / "train.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):  # the block of settings ends
            break
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            defaults[node.targets[0].id] = ast.literal_eval(node.value)
    if config.get("n_kv_head") == config.get("n_head"):
        defaults["n_kv_head"] = config["n_head"]  # 0 means that
    changed = [name for name in defaults if name in config and config[name] != defaults[name]]
    return [[name, config[name], defaults[name]] for name in changed if name not in ("out_dir", "overwrite", "compare")]


def earlier_runs(compare: str, dataset: str) -> list[dict[str, Any]]:
    """Name and validation curve of the runs in these comma-separated folders that have the same dataset."""
    runs: list[dict[str, Any]] = []
    for folder in filter(None, (part.strip() for part in compare.split(","))):
        path = Path(folder)
        try:
            other = dict(json.loads((path / "config.json").read_bytes()))["dataset"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            print_line(f"warning: --compare={folder} has no run, so run.html does not show it")
            continue
        if other == dataset:
            runs.append({"name": path.name, "val": curve(read_log(path / "log.jsonl"), "val_loss", 150)})
        else:
            print_line(f"warning: --compare={folder} has another dataset, {other}, so run.html does not show it")
    return runs[:MOST_RUNS]
