"""The tables of the docs are those that results/*.json make."""

import io
import json
import re
import tokenize

import pytest
from harness import ROOT

from dev import make_results
from minutegpt import results
from minutegpt.errors import UserError
from minutegpt.results import EMPTY

PAGE = ROOT / "docs" / "results.md"
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
    text = make_results.page("# Results\n", folder / "results")
    assert text.index("## a") < text.index("## b")
    assert "    python ablate.py --b\n" in text
    assert "b: whole validation split of small, at equal steps; a CPU, torch 2.10, 2 threads, 2026-01-02" in text
    assert "| `baseline` | 3 | 2.2000 |  |  | 9 | 0.25 |  |" in text
    row = next(line for line in text.splitlines() if line.startswith("| `--a=b\\|c`"))
    assert "| 2.1502 | -0.0498 ± 0.0" in row and "| 3/3 |" in row and "better by 0.0498" in row
    assert "mean loss 2.2000, bar 3, p = 0.0" in text and "10.0 s from start to exit, worth 0.01 TFLOP" in text


def test_they_go_between_the_marks_of_the_page_by_hand(folder):
    by_hand = "# Results\n\nby hand\n\n<!-- results: b -->\nold\n<!-- end -->\n\nmore by hand\n"
    text = make_results.page(by_hand, folder / "results")
    assert "old" not in text and text.index("python ablate.py --b") < text.index("more by hand") < text.index("## a")
    assert text.startswith("# Results\n\nby hand\n\n<!-- results: b -->\n")
    assert make_results.page(text, folder / "results") == text


def test_a_mark_without_a_result_is_an_error(folder):
    with pytest.raises(KeyError, match="gone"):
        make_results.page("<!-- results: gone -->\n<!-- end -->", folder / "results")


def commands_result(*values, **more):
    command = "python a.py --seed=SEED"
    about = {"commands": [command], "columns": ["loss", "speed"], "seeds": 2, "variants": []}
    runs = [
        {"command": command, "seed": i, "values": each, "wall_seconds": 4.0 * i} for i, each in enumerate(values, 1)
    ]
    return result("c", kind="commands") | about | {"runs": runs} | more


def test_a_table_of_commands():
    one = commands_result({"loss": 1.5, "speed": 12345.0, "other": 1.0}, {"loss": 1.6, "speed": 12347.0})
    text = make_results.section(one)
    assert text.startswith("    python a.py --seed=SEED  # 6 s\n") and "other" not in text
    assert "| loss | 1.5500 | 1.5000-1.6000 |" in text and "| speed | 12,346 |" in text
    two = one | {"runs": one["runs"] + [{"command": "python b.py", "seed": 1, "values": {"loss": 2.0}}]}
    assert "| `python a.py --seed=SEED` | 1.5500 | 1.5000-1.6000 | 12,346 |" in results.markdown(two)
    assert "| `python b.py` | 2.0000 |  |  |" in results.markdown(two)


def test_means_that_moved_by_more_than_their_noise_do_not_hold():
    old = commands_result({"loss": 1.50}, {"loss": 1.51}, {"loss": 1.49})
    assert results.compare(old, commands_result({"loss": 1.505}, {"loss": 1.495}, {"loss": 1.51}))[0]
    holds, words = results.compare(old, commands_result({"loss": 1.60}, {"loss": 1.61}, {"loss": 1.59}))
    assert not holds and "does not hold. It moved by +0.1000" in words
    assert not results.compare(old, commands_result())[0]  # no runs confirm nothing
    plain = result("d") | {"variants": []}
    assert results.compare(plain, plain)[0]
    assert not results.compare(plain, plain | {"runs": [run | {"loss": run["loss"] + 1} for run in plain["runs"]]})[0]


def test_a_file_that_is_no_result_is_refused(folder):
    (folder / "results" / "x.json").write_text(json.dumps({"format": "other"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.json is damaged"):
        make_results.page("", folder / "results")


def test_the_docs_of_this_repository_are_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert make_results.page(text, ROOT / "results") == text, "type python dev/make_results.py"


# -- every figure of the other documents is on that page

# what others measured or published, and what is computed instead of measured
KNOWN = {
    "4.17": "ln 65", "2.85": "nanoGPT's README", "3.11": "nanoGPT's README; also a version of Python",
    "95%": "paired.py's interval", "0.0123": "an example of a verdict", "0.0041": "the same", "0.0062": "the same",
    "20,000": "experiments that test_paired.py simulates", "524,288": "tokens per step", "491,520": "tokens per step",
    "32,768": "tokens per step", "300,000": "tokens of the text", "600,000": "nanoGPT's steps",
    "40%": "assumed, scaling.md", "60%": "decay_fraction", "0.95": "GPT-2's beta2",
}  # fmt: skip
FIGURE = re.compile(
    r"(?<![\w.=/-])(?:\d[\d,]*\.\d{2,}(?![\w.]*\.\d)\b|[\d.]+%|\d{1,3}(?:,\d{3})+\b"
    r"|[\d.,]+(?= (?:times as|tokens/s|characters per second|MB/s|nats)))"
)


def prose(path):
    """The sentences of a document, or the comments and strings of a config; without commands and paper numbers."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        words = tokenize.generate_tokens(io.StringIO(text).readline)
        text = "\n".join(word.string for word in words if word.type in (tokenize.COMMENT, tokenize.STRING))
    else:
        text = re.sub(r"```.*?```|^ {4}.*$", "", text, flags=re.S | re.M if "```" in text else re.M)
    return re.sub(r"arXiv [\d.]+", "", text)


def figures_without_a_result(path):
    """Figures that are neither on the page of results, as they are or with more digits, nor KNOWN."""
    measured = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", PAGE.read_text())]

    def has_result(figure):
        digits = len(figure.rstrip("%").partition(".")[2])
        value = float(figure.rstrip("%").replace(",", ""))
        return any(abs(number - value) <= 0.5001 * 10**-digits for number in measured)

    return [each for each in FIGURE.findall(prose(path)) if each not in KNOWN and not has_result(each)]


DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("config/*.py"))]
COMPUTED = {"scaling.md"}  # tables of bench.py --needs


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p != PAGE and p.name not in COMPUTED], ids=lambda p: p.name)
def test_every_figure_has_a_result(path):
    assert figures_without_a_result(path) == []


def test_a_figure_without_a_result_is_found(tmp_path):
    text = "A loss of 1.2345 in 98,765 steps (arXiv 1234.56789), 123.4 tokens/s.\n\n    --x=9.99\n"
    (tmp_path / "a.md").write_text(text)
    (tmp_path / "a.py").write_text('"""A loss of 1.2345."""\nlearning_rate = 9.99  # 87.6% lower\n')
    assert figures_without_a_result(tmp_path / "a.md") == ["1.2345", "98,765", "123.4"]
    assert figures_without_a_result(tmp_path / "a.py") == ["1.2345", "87.6%"]


def test_no_result_names_a_path_of_a_machine():
    for path in (ROOT / "results").glob("*.json"):
        content = path.read_text(encoding="utf-8")
        assert not any(each in content for each in HOMES), path.name
