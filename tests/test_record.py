"""dev/record.py runs commands, keeps their numbers, goes on after a stop, and finds what no longer holds."""

import json

import pytest
from harness import run

LOSS = 'python -c "print(\'a line\'); print(\'{\\"loss\\": 1.SEED, \\"parts\\": {\\"speed\\": 2000}}\')"'
FAILS = "python -c 'raise SystemExit(3)'"


@pytest.fixture
def record(tmp_path):
    return lambda *argv: run("dev/record.py", *argv, f"--results_dir={tmp_path}", cwd=tmp_path)


def saved(tmp_path, name="a"):
    return json.loads((tmp_path / f"{name}.json").read_bytes())


def test_numbers_of_each_seed_and_the_table(record, tmp_path):
    done = record("--name=a", "--seeds=2", LOSS, "python -c 'pass'")
    assert done.status == 0, done.err
    runs = saved(tmp_path)["runs"]
    assert [each["values"] for each in runs if each["command"] == LOSS] == [
        {"loss": 1.1, "parts.speed": 2000}, {"loss": 1.2, "parts.speed": 2000}
    ]  # fmt: skip
    assert len(runs) == 4 and "| loss | 1.1500 | 1.1000-1.2000 |" in done.out and "| parts.speed | 2,000 |" in done.out


def test_results_of_another_kind_are_refused(record, tmp_path):
    assert record("--name=a", "python -c \"print('{}')\"").status == 0
    done = record(f"--again={tmp_path / 'a.json'}", "--check")
    assert done.status == 2 and "has no loss, so there is nothing to check" in done.err
    content = saved(tmp_path) | {"kind": "ablation"}
    (tmp_path / "b.json").write_text(json.dumps(content))
    done = record(f"--again={tmp_path / 'b.json'}")
    assert done.status == 2 and "is of ablate.py, not of dev/record.py" in done.err
    for command, words in (("", "does not start with python"), ("python -c 'pass", "a quote is not closed")):
        done = record("--name=c", command)
        assert done.status == 2 and words in done.err and "Traceback" not in done.err


def test_a_stopped_call_goes_on(record, tmp_path):
    done = record("--name=a", "--seeds=1", LOSS, FAILS)
    assert done.status == 2 and "failed with status 3" in done.err and len(saved(tmp_path)["runs"]) == 1
    began = saved(tmp_path)["runs"][0]
    assert record("--name=a", "--seeds=1", LOSS, FAILS).status == 2  # the first command does not run again
    assert saved(tmp_path)["runs"] == [began]


def test_the_same_commands_again(record, tmp_path):
    assert record("--name=a", "--seeds=2", LOSS).status == 0
    done = record(f"--again={tmp_path / 'a.json'}", "--check")
    assert done.status == 0 and "holds. It moved by +0.0000" in done.out
    known = saved(tmp_path, "a-again")
    for each in known["runs"]:
        each["values"]["loss"] = 9.0  # of an earlier check: the next one measures again
    (tmp_path / "a-again.json").write_text(json.dumps(known))
    done = record(f"--again={tmp_path / 'a.json'}", "--check")
    assert done.status == 0 and "holds. It moved by +0.0000" in done.out
    (tmp_path / "a-again.json").write_text(json.dumps(known | {"runs": known["runs"][:1], "commit": "0" * 40}))
    done = record(f"--again={tmp_path / 'a.json'}", "--check")
    assert done.status == 0 and "holds. It moved by +0.0000" in done.out
    changed = saved(tmp_path)
    for each in changed["runs"]:
        each["values"]["loss"] += 1
    (tmp_path / "b.json").write_text(json.dumps(changed | {"name": "b"}))
    done = record(f"--again={tmp_path / 'b.json'}", "--check")
    assert done.status == 1 and "does not hold" in done.out


def test_mistakes(record):
    for argv, words in (
        (["--name=a"], "commands are missing"),
        ([LOSS], "a name and commands are missing"),
        (["--name=a", "rm -r x"], "does not start with python"),
    ):
        done = record(*argv)
        assert done.status == 2 and words in done.err and "Traceback" not in done.err, done.err
