"""The tables of the docs are those that results/*.json make."""

import json

import pytest
from harness import ROOT

from dev import make_results
from minutegpt import results
from minutegpt.errors import UserError
from minutegpt.results import EMPTY

HOMES = ("/home" + "/", "/root" + "/", "/Users" + "/", "/work" + "/", "C:" + "\\")


def result(name, kind="ablation", **more):
    runs = [
        {"variant": variant, "seed": seed, "loss": 2.0 + seed / 10 + extra, "steps": 9, "seconds_per_step": 0.25,
         "wall_seconds": 10.0, "matmul_flops": 1e9}
        for seed in (1, 2, 3) for variant, extra in (("baseline", 0.0), ("--a=b|c", -0.05 + seed / 1e4))
    ]  # fmt: skip
    return EMPTY | {
        "kind": kind, "name": name, "variants": ["--a=b|c"], "planned_seeds": [6], "runs": runs, "equal": "steps",
        "date": "2026-01-02T00:00:00", "command": f"python ablate.py --{name}", "machine":
        {"name": "a CPU", "torch": "2.10", "threads": 2}, "settings": {"margin": 0.01, "record": 3.0},
        "split": {"dataset": "small", "split": "val", "development": False},
    } | more  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    ablation, record = result("b"), result("a", kind="record")
    results.update_differences(ablation)
    results.update_record(record)
    for each in (ablation, record):
        results.save(each, tmp_path / "results" / f"{each['name']}.json")
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_the_tables(folder):
    path, text = make_results.page(folder / "docs", folder / "results")
    assert path.name == "measured.md" and text.index("### b") < text.index("### a")  # records come last
    assert "    python ablate.py --b\n" in text
    assert "b: whole validation split of small, at equal steps; a CPU, torch 2.10, 2 threads, 2026-01-02" in text
    assert "| `baseline` | 3 | 2.2000 |  |  | 9 | 0.25 |  |" in text
    row = next(line for line in text.splitlines() if line.startswith("| `--a=b\\|c`"))
    assert "| 2.1502 | -0.0498 ± 0.0" in row and "| 3/3 |" in row and "better by 0.0498" in row
    assert "mean loss 2.2000, bar 3, p = 0.0" in text and "10.0 s from start to exit, worth 0.01 TFLOP" in text


def test_they_go_between_the_marks_of_the_page_by_hand(folder):
    by_hand = f"# Results\n\nby hand\n\n{make_results.BEGIN}\nold\n{make_results.END}\n\nmore by hand\n"
    (folder / "docs" / "results.md").write_text(by_hand, encoding="utf-8")
    path, text = make_results.page(folder / "docs", folder / "results")
    assert path.name == "results.md" and "old" not in text and "### b" in text
    assert text.startswith("# Results\n\nby hand\n\n") and text.endswith("\n\nmore by hand\n")
    path.write_text(text, encoding="utf-8")
    assert make_results.page(folder / "docs", folder / "results")[1] == text


def test_a_file_that_is_no_result_is_refused(folder):
    (folder / "results" / "x.json").write_text(json.dumps({"format": "other"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.json is damaged"):
        make_results.page(folder / "docs", folder / "results")


def test_the_docs_of_this_repository_are_up_to_date():
    path, text = make_results.page(ROOT / "docs", ROOT / "results")
    assert path.read_text(encoding="utf-8") == text, "type python dev/make_results.py"


def test_no_result_names_a_path_of_a_machine():
    for path in (ROOT / "results").glob("*.json"):
        content = path.read_text(encoding="utf-8")
        assert not any(each in content for each in HOMES), path.name
