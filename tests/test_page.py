"""minutegpt/page: run.html holds the run as text and never as markup. Its data, its size, when it is written."""

import base64
import contextlib
import hashlib
import json
import math
import re
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import ROOT, copy_of_repo, resume, run, tiny, train

from minutegpt import page
from minutegpt.checkpoint import build_model, read_checkpoint
from minutegpt.data.dataset import Split, open_data
from minutegpt.data.tokenizer import byte_tokenizer, char_tokenizer, train_bpe
from minutegpt.errors import UserError
from minutegpt.page import live
from minutegpt.verdict import Facts
from model import GPT, GPTConfig

HOSTILE = [
    "</script><img src=x onerror=alert(1)>", "<!-- <script>", "]]>", "\u2028\u2029", "\x00\x01\r\n", "{{scripts}}",
    '"><svg onload=alert(1)>', "\\u003c/script>", "\ud800", "‮", "&lt;b&gt;", "</SCRIPT ", "${alert(1)}", "`",
]  # fmt: skip


class Elements(HTMLParser):
    """The tags of a page, and the content of its scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.scripts: dict[str, str] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = dict(attrs).get("id") or tag if tag in ("script", "style", "title") else ""

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        if self.inside:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + text


# ---------------------------------------------------------------------------------------- the file


def elements(text: str) -> Elements:
    return Elements(page.render({"run": {"name": text}, "settings": [[text, text, text]], text: {text: [text]}}))


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup(text, tmp_path):
    found, usual = elements(text), elements("a run")
    assert found.tags == usual.tags and len(found.attributes) == len(usual.attributes)
    assert json.loads(found.scripts["data"])["run"]["name"] == text
    assert not re.search("[<>&]", found.scripts["data"]) and found.scripts["data"].isascii()
    page.write(tmp_path / "run.html", {"run": {"name": "x"}, text: text})
    assert page.read(tmp_path / "run.html") == {"run": {"name": "x"}, text: text}


def test_the_policy_allows_the_scripts_of_the_page_and_no_request():
    html = page.render({"run": {"name": "x"}}, {"engine": "let x = '<b>';\n"}, {"weights": "QUJD"})
    found = Elements(html)
    policy = dict(part.split(" ", 1) for part in policy_of(html).split("; "))
    assert policy["default-src"] == policy["connect-src"] == policy["img-src"] == "'none'"
    assert policy["base-uri"] == policy["form-action"] == "'none'" and policy["worker-src"] == "blob:"
    assert "unsafe" not in policy_of(html) and "http" not in policy_of(html)

    def hashed(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    scripts = [found.scripts["script-page"], found.scripts["script-engine"]]
    assert policy["script-src"].split() == [hashed(text) for text in scripts]
    assert policy["style-src"] == hashed(found.scripts["style"])
    assert found.scripts["payload-weights"] == "QUJD" and found.scripts["script-engine"] == "let x = '<b>';\n"
    assert html.index("Content-Security-Policy") < html.index("<style>") < html.index("<script")


def policy_of(html: str) -> str:
    [policy] = re.findall('Content-Security-Policy" content="([^"]*)"', html)
    return policy


@pytest.mark.parametrize("source", ["</script>", "</SCRIPT x", "<!--"])
def test_a_script_that_would_end_its_element_is_refused(source):
    with pytest.raises(ValueError, match="would end its element"):
        page.render({}, {"engine": f"let x = '{source}';"})
    with pytest.raises(ValueError, match="base64"):
        page.render({}, payload={"weights": source})


def test_the_sources_make_no_markup_of_text_and_no_request():
    for path in sorted((ROOT / "minutegpt" / "page").glob("*.js")):
        source = path.read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "fetch(",
                     "XMLHttpRequest", "importScripts(", "DOMParser", "srcdoc", "http:", "https:"):  # fmt: skip
            allowed = 1 if word == "http:" and path.name == "page.js" else 0  # the name space of SVG
            assert source.count(word) <= allowed, (path.name, word)
    css = (ROOT / "minutegpt" / "page" / "style.css").read_text(encoding="utf-8")
    assert "url(" not in css and "@import" not in css


def test_numbers_that_json_lacks_are_null_and_a_broken_page_is_none(tmp_path):
    path = tmp_path / "run.html"
    assert page.read(path) is None
    page.write(path, {"run": {"name": "x"}, "a": [float("nan"), float("inf"), 1.5], "b": (1, 2), 3: None})
    assert page.read(path) == {"run": {"name": "x"}, "a": [None, None, 1.5], "b": [1, 2], "3": None}
    for text in (b"", b"<html>", b'<script type="application/json" id="data">[1]</script>',
                 b'<script type="application/json" id="data">{</script>'):  # fmt: skip
        path.write_bytes(text)
        assert page.read(path) is None


def test_text_can_be_read_in_both_colour_schemes():
    """Contrast by WCAG 2: at least 4.5 for text and for the lines of the curve, against both grounds."""
    css = (ROOT / "minutegpt" / "page" / "style.css").read_text(encoding="utf-8")

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    schemes = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for ink in ("ink", "soft", "train", "val"):
            for ground in ("paper", "raised"):
                high, low = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground, scheme)


# ---------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(("n", "most", "expected"), [
    (0, 5, []), (3, 5, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (9, 5, [0, 2, 4, 6, 8]), (100, 2, [0, 99]), (7, 1, [6]),
    (7, 0, []),
])  # fmt: skip
def test_indices_are_spread(n, most, expected):
    assert live.spread(n, most) == expected


def test_spread_keeps_the_ends_and_no_index_twice():
    for n in range(2, 80):
        for most in range(2, n + 1):
            found = live.spread(n, most)
            assert found[0] == 0 and found[-1] == n - 1 and len(set(found)) == len(found) == most


def test_a_curve_is_the_mean_of_neighbours():
    rows = [{"step": i, "seconds": i / 2, "train_loss": float(i)} for i in range(1000)]
    found = live.curve([*rows, {"step": 2000, "val_loss": 1.0, "train_loss": None}], "train_loss", 100)
    assert len(found) == 100 and found[0] == [4.5, 2.25, 4.5] and found[-1][0] == 994.5
    assert live.curve(rows[:3], "train_loss") == [[0, 0, 0], [1, 0.5, 1], [2, 1, 2]]
    assert live.curve([{"step": 5, "val_loss": 2.0}], "val_loss") == [[5, 0, 2]] and live.curve(rows, "val_loss") == []


def samples(n: int, size: int = 160, heads: int = 36, vocabulary: int = 60, text: int = 120) -> list[dict]:
    """Rows as of a run with n evaluations."""
    attention = base64.b64encode(bytes(heads * 60 * 61 // 2)).decode()
    row = {"val_loss": 2.0, "text": "x" * text, "passage": "id", "attention_tokens": 60, "attention": attention}
    loss = [1.234] * size
    top = [[(7 * i + j) % vocabulary if k == 0 else 123 for j in range(5) for k in range(2)] for i in range(size)]
    return [{"step": 10 * i, "seconds": float(i), **row, "loss": loss, "top": top} for i in range(n)]


ABOUT = {"run": {"name": "r"}, "passage": [1, 2, 3], "passage_id": "id", "shape": [6, 6]}


@pytest.mark.parametrize(("n", "text"), [(1, 120), (5, 120), (40, 120), (300, 120), (5000, 120), (300, 60_000)])
def test_the_data_is_below_the_limit_whatever_the_number_of_evaluations(n, text):
    rows = [{"step": i, "seconds": i * 1.0, "train_loss": 2.0, "val_loss": 2.0} for i in range(10 * n)]
    data = live.assemble(dict(ABOUT), rows, samples(n, text=text), char_tokenizer("".join(map(chr, range(33, 99)))))
    assert len(page.to_json(data)) <= live.LIMIT
    found = data["evaluations"]
    assert found[0]["step"] == 0 and found[-1]["step"] == 10 * (n - 1)
    assert found[-1]["attention"] and len(found) >= min(n, 2)
    if n == 5:
        assert all(row["attention"] for row in found)
    if text == 120:
        assert len(found) >= min(n, 40)
    html = page.render(data)
    assert len(html.encode()) < 1_000_000


def test_the_passage_is_shown_for_the_evaluations_that_read_it():
    rows = samples(3, size=2)
    rows[0]["passage"] = "another text"
    log = [{"step": 20, "induction/0.0": 0.5, "previous_token/0.0": 0.25}]
    about = ABOUT | {"shape": [1, 1]}
    data = live.assemble(about, log, rows, char_tokenizer("".join(map(chr, range(33, 99)))))
    assert [row["loss"] for row in data["evaluations"]] == [None, [1.234] * 2, [1.234] * 2]
    assert data["passage"] == ['"', "#", "$"]
    assert data["vocabulary"][7] == chr(40)
    assert data["evaluations"][2]["heads"] == {"previous_token": [[0.25]], "induction": [[0.5]], "copy_gain": [[0.0]]}
    assert data["evaluations"][1]["heads"] is None


def test_tokens_that_are_no_characters_are_shown_by_their_bytes():
    tokenizer = byte_tokenizer()
    assert live.token_text(tokenizer, 65) == "A" and live.token_text(tokenizer, 0xE2) == "‹e2›"


def test_the_settings_that_differ_from_the_defaults():
    from minutegpt.config import model_defaults

    config = model_defaults(GPTConfig) | {"seed": 1337, "max_iters": 7, "dataset": "x", "out_dir": "y", "min_lr": 0.0}
    assert live.changed_settings(config) == [["max_iters", 7, 5000], ["dataset", "x", "shakespeare_char"]]
    assert ["n_layer", 2, 6] in live.changed_settings(config | {"n_layer": 2})
    assert live.changed_settings(config | {"n_kv_head": 6, "n_head": 6}) == live.changed_settings(config)


def test_earlier_runs_of_the_same_dataset_are_compared(tmp_path, capsys):
    for name, dataset in (("a", "x"), ("b", "y"), ("c", "x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"dataset": dataset}))
        (tmp_path / name / "log.jsonl").write_text('{"step": 5, "seconds": 1.0, "val_loss": 2.0}\n{"torn')
    (tmp_path / "c" / "config.json").write_text("{")
    folders = ", ".join(str(tmp_path / name) for name in "abcd")
    assert live.earlier_runs(folders, "x") == [{"name": "a", "val": [[5, 1.0, 2.0]]}]
    warnings = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0].rsplit("/", 1)[1] for line in warnings] == [
        "b has another dataset",
        "c has no run",
        "d has no run",
    ]
    assert live.earlier_runs("", "x") == []


# ---------------------------------------------------------------------------------------- a run that trains


class Time:
    """A clock that tests set."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now


@pytest.fixture
def paused(tmp_path, monkeypatch):
    """The page of a run with a tiny model. The test moves its time and its steps. Returns the page and the time."""
    time = Time()
    monkeypatch.setattr(live, "time", time)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8))
    machine = SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext)
    timing = SimpleNamespace(step=0.1, eval=0.1)
    clock = SimpleNamespace(
        now=SimpleNamespace(finished=False), seconds=lambda: time.now, total_steps=9, max_minutes=0.0,
        seconds_left=lambda: 1.0,
        timing=timing,
    )  # fmt: skip
    progress = SimpleNamespace(step=0)
    log = SimpleNamespace(model=model, machine=machine, progress=progress, clock=clock, out=tmp_path, rows=[], card=[])
    config = {
        "block_size": 8,
        "dataset": "d",
        "seed": 1,
        "log_interval": 1,
        "compare": "",
        "n_head": 1,
        "init_from": "scratch",
    }
    meta = {"tokenizer": char_tokenizer("abcde").to_json()}
    val = Split([np.arange(50, dtype=np.uint16) % 5], [(50, 1.0)], meta)
    return live.LivePage(log, config, val), time


def test_looks_take_a_small_share_of_the_time_however_many_evaluations_there_are(paused):
    one, time = paused
    busy, count = 0.0, one.count

    def slow_count(began):  # a look, or a page, takes 0.2 seconds
        nonlocal busy
        time.now += 0.2
        busy += 0.2
        count(began)

    one.count = slow_count
    looks = 0
    for step in range(2000):
        one.log.progress.step = step
        looks += bool(one.look())
        one.record(2.0, "text")
        time.now += 0.05
    assert looks > 5 and len(one.samples) == looks
    assert busy <= live.ALLOWANCE + 0.4 + live.SHARE * time.now  # 0.4: one that began before it was spent
    one.log.clock.now.finished = True
    one.log.progress.step += 1
    assert one.look()  # the last evaluation always has one


def test_between_evaluations_the_page_is_written_every_ten_seconds(paused):
    one, time = paused
    written = []
    one.write = lambda: written.append(time.now) or setattr(one, "written", time.now)
    for _ in range(120):
        time.now += 0.5
        one.refresh()
    assert written == [10.5, 21.0, 31.5, 42.0, 52.5]


def test_there_is_a_page_before_the_first_evaluation(paused):
    one, _ = paused
    one.write()
    data = page.read(one.path)
    assert (
        data["run"]["live"]
        and data["evaluations"] == data["births"] == []
        and data["curve"] == {"train": [], "val": []}
    )
    assert data["passage"] == list("abcdeabcd") and data["baselines"]["uniform"] == pytest.approx(math.log(5))


def test_the_verdict_and_what_it_is_made_from_are_on_the_page(paused):
    one, _ = paused
    one.log.verdict, one.log.facts = "Healthy.", Facts(9, 9, 3.0, 2.8, 2.5, forecast=(1.5, 0.1))
    one.write()
    data = page.read(one.path)
    assert data["verdict"] == "Healthy." and data["forecast"] == [1.5, 0.1] and data["baselines"]["bigram"] == 2.5
    assert data["baselines"]["name"] == "bigrams" and data["prompt"] == "a"
    one.log.facts = one.log.facts._replace(unigram=2.5)
    assert one.data()["baselines"]["name"] == "token frequencies", "as train.py calls it"
    one.tokenizer = train_bpe(["a b c " * 9], 259)
    assert one.data()["prompt"] == "", "the end of a text is a token, which its letters do not make"


def test_the_samples_in_memory_are_few_and_evenly_spread():
    samples = []
    for step in range(0, 50_000, 10):
        samples = live.thinned([*samples, {"step": step}])
        assert len(samples) <= 4 * live.MOST
    steps = np.array([row["step"] for row in samples])
    assert steps[0] == 0 and steps[-1] == 49_990 and np.diff(steps).max() <= 4 * 49_990 / live.MOST / 2


def test_a_head_that_is_born_is_told_at_once_and_once(paused):
    one, _ = paused
    none, some = ({"induction/0.0": 0.0, "previous_token/0.0": score} for score in (0.1, 0.9))
    told = []
    for step, scores in enumerate((none, some, some, none, some)):
        one.log.progress.step = step
        one.log.rows.append({"step": step, **scores})
        one.found = {"loss": []}
        told.append(one.news())
    line = "head 0.0 looks at the token before"
    assert told == [[], [f"  step 1: {line}"], [], [], [f"  step 4: {line}"]]


@pytest.fixture(scope="module")
def trained(house) -> Path:
    assert train(house, "whole", max_iters=12, eval_interval=4).wait() == 0
    return house / "whole"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_its_page_and_its_samples(trained):
    data, rows = page.read(trained / "run.html"), rows_of(trained / "samples.jsonl")
    assert data["run"]["state"] == "finished" and not data["run"]["live"] and data["run"]["step"] == 12
    assert [row["step"] for row in rows] == [0, 4, 8, 12] == [row["step"] for row in data["evaluations"]]
    logged = {row["step"]: row for row in rows_of(trained / "log.jsonl") if row["val_loss"] is not None}
    for row, shown in zip(rows, data["evaluations"], strict=True):
        assert (
            row["val_loss"] == logged[row["step"]]["val_loss"]
            and row["text"] == shown["text"]
            and len(row["text"]) > 50
        )
        assert len(row["loss"]) == 32 == len(row["top"])
        assert 0 <= logged[row["step"]]["induction/1.1"] <= 1
        assert shown["heads"]["previous_token"][0][1] == logged[row["step"]]["previous_token/0.1"]
    assert len(data["passage"]) == 33 and data["shape"] == [2, 2]
    V = read_checkpoint(trained / "ckpt.pt")["model_config"]["vocab_size"]
    assert data["baselines"]["uniform"] == pytest.approx(math.log(V))
    assert ["n_layer", 2, 6] in data["settings"] and data["run"]["dataset"] == "small"
    assert any("python sample.py" in text for _, text in data["commands"])
    assert "of this session to look inside" in dict(data["card"])["page"]
    assert dict(data["card"])["model"] and "best validation loss" in dict(data["card"])
    assert (trained / "run.html").stat().st_size < 1_000_000


def test_the_loss_of_the_passage_is_that_of_the_model(trained, data, monkeypatch):
    model = build_model(read_checkpoint(trained / "ckpt.pt")).eval()
    ids = torch.tensor(open_data("small", "val", 32, data).tokens(0, 33).tolist())
    with torch.no_grad():
        loss = model(ids[None, :-1], ids[None, 1:])[1].item()
    found = rows_of(trained / "samples.jsonl")[-1]["loss"]
    assert sum(found) / len(found) == pytest.approx(loss, abs=1e-3)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "ckpt.pt")["model"]


def test_without_a_look_the_run_is_the_same_in_every_bit(trained, tmp_path, data):
    """A look that fails is a warning. The weights and losses of the run are those of the run with looks."""
    repo = copy_of_repo(tmp_path / "repo")
    (repo / "minutegpt" / "probe.py").write_text("raise RuntimeError('no look')\n")
    argv = tiny(max_iters=12, eval_interval=4)
    done = run(repo / "train.py", *argv, "--out_dir=without", cwd=tmp_path, data=data)
    assert done.status == 0, done.output
    assert "warning: the page run.html failed (no look)" in done.out
    assert not (tmp_path / "without" / "run.html").exists()
    expected, found = weights(trained), weights(tmp_path / "without")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[row[key] for row in rows_of(folder / "log.jsonl") for key in ("train_loss", "val_loss")]
              for folder in (trained, tmp_path / "without")]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["run.html", "samples.jsonl"])
def test_a_page_that_cannot_be_written_is_a_warning(trained, house, name):
    folder = house / f"blocked-{name}"
    shutil.copytree(trained, folder)
    (folder / name).unlink()
    (folder / name).mkdir()  # no file can have the name
    done = resume(house, folder.name, "--max_iters=16")
    assert done.wait() == 0, done.output
    assert "warning: the page run.html failed (" in done.out and "Traceback" not in done.output
    assert read_checkpoint(folder / "ckpt.pt")["step"] == 16 and rows_of(folder / "log.jsonl")[-1]["step"] == 16


def test_a_killed_run_is_live_on_its_page_and_goes_on_there(house):
    running = train(house, "killed", max_iters=10_000, eval_interval=3)
    running.await_output("step 9: train")
    running.await_output(" 10/10000")
    running.send(signal.SIGKILL)
    running.wait()
    folder = house / "killed"
    data = page.read(folder / "run.html")
    assert data["run"]["live"] and data["run"]["state"] == "training" and data["run"]["expected"] >= 10
    at = read_checkpoint(folder / "ckpt.pt")["step"]
    with open(folder / "samples.jsonl", "a") as file:  # what a run wrote after its last checkpoint, and a torn line
        file.write(json.dumps({"step": at + 3, "val_loss": 9.9, "text": "later"}) + '\n{"step": 1')
    again = resume(house, "killed", f"--max_iters={at + 4}")
    assert again.wait() == 0, again.output
    rows = rows_of(folder / "samples.jsonl")
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == at + 4
    assert not any(row["val_loss"] == 9.9 for row in rows)
    data = page.read(folder / "run.html")
    assert data["run"]["state"] == "finished" and [row["step"] for row in data["evaluations"]] == steps


def test_an_interrupted_run_has_a_whole_page(house):
    running = train(house, "stopped", max_iters=10_000, eval_interval=1000)
    running.await_output(" 3/10000")
    running.send(signal.SIGINT)
    assert running.wait() == 130
    run_of = page.read(house / "stopped" / "run.html")["run"]
    assert not run_of["live"] and run_of["state"] == "stopped by SIGINT"


def test_a_new_run_in_a_folder_begins_a_new_page(house):
    for iters in (4, 2):
        assert train(house, "again", "--overwrite", max_iters=iters, eval_interval=2).wait() == 0
    assert [row["step"] for row in rows_of(house / "again" / "samples.jsonl")] == [0, 2]


def test_earlier_runs_are_on_the_page(trained, house):
    second = train(house, "second", "--compare", "whole", "nowhere", max_iters=1)
    assert second.wait() == 0, second.output
    assert "warning: --compare=nowhere has no run" in second.out
    [earlier] = page.read(house / "second" / "run.html")["compared"]
    assert earlier["name"] == "whole" and [point[0] for point in earlier["val"]] == [0, 4, 8, 12]


def test_the_old_page_stays_where_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / "run.html"
    page.write(path, {"run": {"name": "old"}})
    with pytest.raises(ValueError, match="would end"):
        page.write(path, {"run": {"name": "new"}}, {"x": "<!--"})
    assert page.read(path)["run"]["name"] == "old"
    with pytest.raises(UserError):
        page.write(tmp_path / "no" / "folder.html", {})
