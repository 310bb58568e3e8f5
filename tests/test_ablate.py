"""ablate.py as a user runs it, in a copy of the repository where stubs/ train in no time; and once for real.

A run of the stub has the loss 2 + something of its seed + --quality + a little noise.
"""

import json
import shutil
import signal
import subprocess
import time

import pytest
from harness import ROOT, make_dataset, posix, run, start, tiny

from minutegpt import checkouts, results
from minutegpt.data.dataset import open_split
from minutegpt.data.dev_split import last_tenth, write_dev
from minutegpt.data.tokenizer import byte_tokenizer, char_tokenizer
from minutegpt.device import process_environment
from minutegpt.errors import UserError
from minutegpt.processes import error_of

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def house(tmp_path):
    """A copy of the repository, committed, with stubs of train.py and evaluate.py, and a config file."""
    house = tmp_path / "house"
    shutil.copytree(ROOT / "minutegpt", house / "minutegpt", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (ROOT / "ablate.py", *(ROOT / "tests" / "stubs").glob("*.py")):
        shutil.copy(path, house)
    make_dataset(house / "data" / "small", char_tokenizer(TEXT), TEXT, TEXT[:400])
    (house / "config").mkdir()
    (house / "config" / "mine.py").write_text("quality = 0.1\n", encoding="utf-8")
    (house / ".gitignore").write_text("/out*\n/data\n__pycache__\n", encoding="utf-8")
    for argv in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"]):
        subprocess.run(["git", *argv], cwd=house, check=True)
    return house


@pytest.fixture
def ablate(house):
    def call(*argv, status=0):
        done = run(house / "ablate.py", *argv, cwd=house)
        assert done.status == status, done.output
        return done.out if status in (0, 1) else done.err

    return call


def starts(house, name):
    return (house / "out-ablate" / name / "starts.txt").read_text(encoding="utf-8").splitlines()


def test_better_and_no_difference_are_told_apart(ablate, house):
    out = ablate("config/mine.py", "--quality=0.08", "--quality=0.1 --noise=0.0012", "--quality=0.11", "--max_iters=7")
    (path,) = (house / "results").iterdir()
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "mine-quality-quality-noise-quality.json"
    better, same, worse = (result["differences"][v] for v in result["variants"])
    assert better["verdict"].startswith("better by 0.0") and better["kind"] == "better"
    assert abs(better["mean"] + 0.02) <= better["half_width"]
    assert same["verdict"].startswith("no difference larger than 0.00") and same["kind"] == "same"
    assert worse["verdict"].startswith("worse by 0.0")
    assert better["verdict"] in out and same["verdict"] in out
    assert "whole validation split of small" in out and "at equal steps" in out
    # what was measured, and what is needed to measure it again
    assert result["command"].startswith("python ablate.py config/mine.py --quality=0.08 '--quality=0.1 --noise")
    assert result["config_text"] == "quality = 0.1\n" and result["config"]["quality"] == 0.1
    assert len(result["commit"]) == 40 and not result["edited"] and result["date"] and result["equal"] == "steps"
    assert {"name", "torch", "threads", "matmul_flops"} <= set(result["machine"])
    assert str(house) not in path.read_text(encoding="utf-8")
    one = result["runs"][0]
    assert (one["variant"], one["seed"], one["steps"]) == ("baseline", 1, 7)
    assert one["seconds_per_step"] == pytest.approx(0.01)
    seeds = better["seeds"]
    losses = {(each["variant"], each["seed"]): each["loss"] for each in result["runs"]}
    pairs = [losses["--quality=0.08", seed] - losses["baseline", seed] for seed in range(1, seeds + 1)]
    assert better["mean"] == pytest.approx(sum(pairs) / seeds)
    assert (house / "out-ablate" / path.stem / "pairs.png").read_bytes().startswith(b"\x89PNG")


def test_runs_alternate_and_what_is_decided_stops(ablate, house):
    ablate("config/mine.py", "--quality=9", "--quality=0.1 --noise=0.02", "--name=x", "--seeds=5")
    order = [line.split()[0][0] + line.split()[1] for line in starts(house, "x")]
    assert order[:6] == ["01", "11", "21", "22", "12", "02"]
    assert "25" in order and "15" not in order, "the first is decided long before, the noisy one is not"
    assert results.load(house / "results" / "x.json")["differences"]["--quality=9"]["seeds"] < 5


def test_the_same_command_runs_nothing_twice(ablate, house):
    first = ablate("config/mine.py", "--quality=0.1 --noise=0.02", "--name=x", "--seeds=2")
    assert "not decided: " in first
    before = starts(house, "x")
    assert "not decided: " in ablate("config/mine.py", "--quality=0.1 --noise=0.02", "--name=x", "--seeds=2")
    assert starts(house, "x") == before
    ablate("config/mine.py", "--quality=0.1 --noise=0.02", "--name=x", "--seeds=3")
    assert len(starts(house, "x")) == len(before) + 2
    assert results.load(house / "results" / "x.json")["planned_seeds"] == [2, 3]
    (house / "train.py").write_text((house / "train.py").read_text() + "# edited\n")
    said = ablate("config/mine.py", "--quality=0.1 --noise=0.02", "--name=x", status=2)
    assert "code changed since" in said and "--overwrite" in said
    ablate("config/mine.py", "--quality=0.1 --noise=0.02", "--name=x", "--seeds=2", "--overwrite")
    assert results.load(house / "results" / "x.json")["planned_seeds"] == [2]


def test_a_failed_variant_is_left_out_with_its_log(ablate, house):
    out = ablate("config/mine.py", "--fail_at=2", "--quality=0.05", "--name=x")
    result = results.load(house / "results" / "x.json")
    assert result["differences"]["--quality=0.05"]["kind"] == "better"
    failed = results.failure(result, "--fail_at=2")
    assert failed["error"] == "the numbers have run away" and failed["seed"] == 2
    assert "the numbers have run away" in (house / failed["log"]).read_text(encoding="utf-8")
    assert f"left out: the numbers have run away (log: {failed['log']})" in out
    assert not [each for each in result["runs"] if each["variant"] == "--fail_at=2" and each["seed"] > 2]


def test_a_baseline_that_fails_ends_it(ablate):
    said = ablate("--quality=0.05", "--common=--fail_at=1", status=2)
    assert "the baseline failed: the numbers have run away" in said


@posix
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_killed_it_goes_on(house, signum):
    """After SIGKILL the run that was started goes on by itself, and has to be waited for."""
    argv = ["config/mine.py", "--quality=0.05", "--name=x", "--common=--slow_at=2"]
    process = start(house / "ablate.py", *argv, cwd=house)
    log = house / "out-ablate" / "x" / "starts.txt"
    end = time.monotonic() + 120
    while not log.exists() or len(log.read_text(encoding="utf-8").splitlines()) < 4:
        assert time.monotonic() < end and process.alive(), process.output
        time.sleep(0.02)
    process.send(signum)
    assert process.wait() == (130 if signum == signal.SIGTERM else -signum)
    if signum == signal.SIGTERM:
        assert "stopped. The same command goes on" in process.out
    assert len(results.load(house / "results" / "x.json")["runs"]) >= 2
    done = run(house / "ablate.py", *argv, cwd=house)
    assert done.status == 0, done.output
    result = results.load(house / "results" / "x.json")
    assert result["differences"]["--quality=0.05"]["kind"] == "better"
    begun = [line for line in log.read_text().splitlines() if line.endswith("scratch")]
    resumed = [line for line in log.read_text().splitlines() if line.endswith("resume")]
    assert len(begun) == len(set(begun)) == len(result["runs"])
    assert len(resumed) == 1 and resumed[0].replace("resume", "scratch") in begun


def test_edits_against_what_is_committed(ablate, house):
    """The edit of a file is the variant; afterwards the same is run again out of its results alone."""
    text = (house / "train.py").read_text(encoding="utf-8")
    (house / "train.py").write_text(text.replace("BONUS = 0.0", "BONUS = -0.03"), encoding="utf-8")
    assert "better by 0.0" in ablate("config/mine.py", "--against=HEAD", "--name=x")
    result = results.load(house / "results" / "x.json")
    assert result["variants"] == ["these files"] and list(result["edits"]) == ["train.py"] and result["edited"]
    assert not (house / "out-ablate" / "x" / "baseline" / "out-ablate").exists()
    (house / "train.py").write_text(text, encoding="utf-8")  # gone from here
    said = ablate("--again=results/x.json", "--check")
    assert "holds, with the same losses to the last digit" in said
    assert results.load(house / "results" / "x-again.json")["edits"] == result["edits"]


def test_against_another_checkout(ablate, house, tmp_path):
    theirs = tmp_path / "theirs"
    checkouts.copy_code(house, theirs)
    text = (theirs / "train.py").read_text(encoding="utf-8")
    (theirs / "train.py").write_text(text.replace("BONUS = 0.0", "BONUS = -0.03"), encoding="utf-8")
    assert "worse by 0.0" in ablate("config/mine.py", f"--against={theirs}", "--name=x")


def test_check_finds_a_result_that_no_longer_holds(ablate, house):
    ablate("config/mine.py", "--quality=0.07", "--name=x")
    text = (house / "train.py").read_text(encoding="utf-8")
    changed = text.replace('loss = shared + config["quality"]', "loss = shared")
    assert changed != text
    (house / "train.py").write_text(changed, encoding="utf-8")
    said = ablate("--again", "results/x.json", "--check", status=1)
    assert "--quality=0.07: does not hold. Recorded: better by 0.0" in said


def test_choices_on_the_development_split_and_the_final_run(ablate, house):
    out = ablate("config/mine.py", "--quality=0.05", "--quality=0.2", "--dev", "--name=x")
    assert "development split, made of training text of small_dev" in out
    result = results.load(house / "results" / "x.json")
    assert result["split"] == {"dataset": "small_dev", "split": "val", "development": True}
    assert result["config"]["dataset"] == "small_dev"
    out = ablate("config/mine.py", "--quality=0.05", "--quality=0.2", "--dev", "--final", "--name=x")
    final = results.load(house / "results" / "x-final.json")
    assert final["variants"] == ["--quality=0.05"] and final["config"]["dataset"] == "small"
    assert "whole validation split of small" in out


def test_one_config_is_measured_without_variants(ablate, house):
    assert "nothing to compare" in ablate("config/mine.py", status=2)
    out = ablate("config/mine.py", "--seeds=3", "--name=x")
    result = results.load(house / "results" / "x.json")
    losses = [each["loss"] for each in result["runs"]]
    assert [each["seed"] for each in result["runs"]] == [1, 2, 3] and result["variants"] == []
    assert f"{min(losses):.4f}-{max(losses):.4f}" in out
    assert "baseline: holds" in ablate("--again=results/x.json", "--check")
    for each in result["runs"]:
        each["loss"] += 1
    results.save(result, house / "results" / "x.json")
    assert "baseline: does not hold" in ablate("--again=results/x.json", "--check", status=1)


def test_a_record_and_its_check(ablate, house):
    assert "p = " in (out := ablate("config/mine.py", "--record=9", "--common=--noise=0.0", "--name=x"))
    said = ablate("config/mine.py", "--record=9", "--common=--noise=0.0", "--name=x", "--seeds=5", status=2)
    assert "more would be a second try" in said
    result = results.load(house / "results" / "x.json")
    about = result["record"]
    assert [each["seed"] for each in result["runs"]] == [1, 2, 3]
    assert about["p"] < 0.01 and ": a record. " in out and about["seconds"] > 0
    costs = [each["wall_seconds"] * each["matmul_flops"] for each in result["runs"]]
    assert about["matmul_cost"] == pytest.approx(sum(costs) / 3)
    result["record"]["matmul_cost"] *= 100  # the stub's time is noise
    results.save(result, house / "results" / "x.json")
    assert "the record holds" in ablate("--again=results/x.json", "--check")
    result["record"]["matmul_cost"] /= 10000
    results.save(result, house / "results" / "x.json")
    assert "the record does not hold" in ablate("--again=results/x.json", "--check", status=1)
    assert "no record: p must be below 0.01" in ablate("config/mine.py", "--record=2.0", "--name=y")


def test_a_config_can_be_a_variant_and_equal_time_warns(ablate, house):
    (house / "config" / "other.py").write_text("quality = 0.3\n", encoding="utf-8")
    out = ablate("config/mine.py", "config/other.py --noise=0.0", "--max_minutes=1", "--jobs=2", "--name=x")
    assert "worse by 0." in out and "at equal time" in out
    assert "warning: 2 runs at the same time slow each other down" in out


def test_a_config_next_to_the_call_and_not_in_the_checkout(house, tmp_path):
    """The path is relative to the folder of the call. The checkout has another file at the same one."""
    (tmp_path / "exp" / "config").mkdir(parents=True)
    (tmp_path / "exp" / "config" / "mine.py").write_text("quality = 0.4\n", encoding="utf-8")
    argv = ["config/mine.py", "--noise=0.0", "--seeds=2", "--max_iters=3", "--name=x"]
    done = run(house / "ablate.py", *argv, cwd=tmp_path / "exp", data=house / "data")
    assert done.status == 0, done.output
    found = results.load(tmp_path / "exp" / "results" / "x.json")
    assert found["config_text"] == "quality = 0.4\n" and found["config"]["quality"] == 0.4


@pytest.mark.parametrize(("argv", "says"), [
    (["--sedes=3"], "neither ablate.py nor train.py has a setting 'sedes'"),
    (["config/mine.py"], "there is nothing to compare"),
    (["--quality=1", "--quality=1"], "a variant is given twice"),
    (["--quality=1 --seed=3"], "--seed must be the same in all runs"),
    (["--quality=1", "--max_iters=3", "--max_minutes=1"], "exclude each other"),
    (["--quality=1", "--check"], "--check needs an earlier result"),
    (["config/mine.py", "--record=9", "--quality=1"], "--record measures one config"),
    (["config/mine.py", "--record=9", "--against=HEAD"], "--record measures one config"),
    (["config/mine.py", "--record=9", "--dev"], "--record excludes --dev and --jobs"),
    (["--quality=1", "--against=HEAD"], "Leave the variants out"),
    (["--against=nowhere"], "'nowhere' is no revision that git has here, and no checkout"),
    (["config/none.py", "--quality=1"], "there is no config file 'config/none.py'"),
    (["--again=results/none.json"], "cannot read results/none.json"),
    (["--quality=1", "--jobs=0"], "--jobs=0 must be at least 1"),
])  # fmt: skip
def test_mistakes(ablate, argv, says):
    assert says in ablate(*argv, status=2)


@pytest.mark.parametrize(("output", "says"), [
    ("step 1\nerror: no such file. Prepare it\n", "no such file. Prepare it"),
    ("error: 2 mistakes:\n  --a is gone. Leave it out\n  --b\n", "2 mistakes: --a is gone. Leave it out --b"),
    ("step 1\nKilled\n", "Killed"),
    ("", "exit status 2"),
])  # fmt: skip
def test_why_a_script_failed_in_one_line(output, says):
    assert error_of(2, output) == says


def test_a_result_of_a_setting_that_is_gone_names_its_commit(ablate, house):
    ablate("config/mine.py", "--quality=0.3", "--seeds=2", "--name=x")
    old = house / "results" / "x.json"
    old.write_text(old.read_text(encoding="utf-8").replace("--quality=0.3", "--softcap=15"), encoding="utf-8")
    said = ablate("--again=results/x.json", status=2)
    assert (
        f"has a setting 'softcap'. For the code that measured it, type git checkout {results.load(old)['commit']}"
        in said
    )


def test_help_prints_the_settings(ablate):
    assert "seeds = 0" in (out := ablate("--help")) and "margin = 0.01" in out


# -- the modules


def test_the_development_split_is_made_of_training_tokens_alone(tmp_path):
    make_dataset(tmp_path / "a", char_tokenizer(TEXT), TEXT, "x" if "x" in TEXT else TEXT[:9])
    folder = write_dev("a", "a_dev", tmp_path)
    train, val = open_split(folder, "train"), open_split(folder, "val")
    cut = int(0.9 * len(TEXT))
    decode = char_tokenizer(TEXT).decode
    assert decode(train.tokens(0, len(train)).tolist()) == TEXT[:cut]
    assert decode(val.tokens(0, len(val)).tolist()) == TEXT[cut:]
    assert train.meta["splits"]["train"]["characters"] == train.meta["splits"]["train"]["bytes"] == cut
    stamp = (folder / "meta.json").stat().st_mtime_ns
    assert write_dev("a", "a_dev", tmp_path) == folder and (folder / "meta.json").stat().st_mtime_ns == stamp
    shutil.rmtree(tmp_path / "a")
    make_dataset(tmp_path / "a", char_tokenizer(TEXT), TEXT[:900], TEXT[:9])  # prepared again, with another text
    write_dev("a", "a_dev", tmp_path)
    assert len(open_split(folder, "train")) == 810
    make_dataset(tmp_path / "own", char_tokenizer(TEXT), TEXT, TEXT[:9])
    with pytest.raises(UserError, match="is not a development split of a"):
        write_dev("a", "own", tmp_path)


def test_no_document_is_divided(tmp_path):
    end = 7  # no tokenizer of a single text has one
    make_dataset(tmp_path / "b", byte_tokenizer(), "é" * 500, "y" * 9)
    train = open_split(tmp_path / "b", "train")
    assert last_tenth(train, end) == 900  # one document
    train.shards[0] = train.shards[0].copy()
    train.shards[0][[300, 880, 950]] = end
    assert last_tenth(train, end) == 881
    train.shards[0][[880, 950]] = 0
    assert last_tenth(train, end) == 900, "the last document has 700 tokens: validated on a tenth, not on 700"
    write_dev("b", "b_dev", tmp_path)
    assert open_split(tmp_path / "b_dev", "train").meta["splits"]["val"]["characters"] == 50  # of two bytes each


def test_shakespeare_dev(tmp_path, shakespeare):
    (tmp_path / "tinyshakespeare.txt").write_text(shakespeare, encoding="utf-8", newline="")
    for script in ("shakespeare_char", "shakespeare_dev"):
        done = run(f"prepare/{script}.py", f"--data_dir={tmp_path}", env={"MINUTEGPT_CACHE": str(tmp_path)})
        assert done.status == 0, done.output
    original, dev = (open_split(tmp_path / name, "train") for name in ("shakespeare_char", "shakespeare_dev"))
    assert len(original) == 1_003_854 and len(dev) == 903_468
    assert dev.meta["tokenizer"] == original.meta["tokenizer"] and dev.meta["tokenizer"]["vocab_size"] == 65
    assert (dev.tokens(0, len(dev)) == original.tokens(0, len(dev))).all()


def test_a_copy_holds_what_a_run_depends_on_and_nothing_else(tmp_path):
    house = tmp_path / "house"
    for name in ("train.py", "minutegpt/a.py", "minutegpt/page/b.html", "config/c.py", "mylib/d.py",
                 "README.md", "tests/t.py", "out-x/code/train.py", ".venv/e.py", "data/f.py"):  # fmt: skip
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text(name, encoding="utf-8")
    checkouts.copy_code(house, tmp_path / "copy")
    copy = tmp_path / "copy"
    found = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert found == {"train.py", "minutegpt/a.py", "minutegpt/page/b.html", "config/c.py", "mylib/d.py"}
    before = checkouts.fingerprint(house)
    assert before == checkouts.fingerprint(tmp_path / "copy")
    (house / "README.md").write_text("other", encoding="utf-8")
    assert checkouts.fingerprint(house) == before
    (house / "config" / "c.py").write_text("other", encoding="utf-8")
    (house / "train.py").unlink()
    (house / "new.py").write_text("new", encoding="utf-8")
    assert checkouts.fingerprint(house) != before
    changes = checkouts.edits(tmp_path / "copy", house)
    assert changes == {"config/c.py": "other", "new.py": "new", "train.py": None}
    checkouts.apply_edits(tmp_path / "copy", changes)
    assert checkouts.fingerprint(tmp_path / "copy") == checkouts.fingerprint(house)
    with pytest.raises(UserError, match="outside of the checkout"):
        checkouts.apply_edits(tmp_path / "copy", {"../x.py": "evil"})
    with pytest.raises(UserError, match=r"there is no train\.py"):
        checkouts.copy_code(tmp_path / "nowhere", tmp_path / "other")


def test_jobs_share_the_machine():
    assert process_environment(0, 1) == {}
    assert set(process_environment(1, 2)) <= {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "minutegpt results", "version": 9, "runs": []}'])
def test_damaged_results_are_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        results.load(tmp_path / "x.json")


@pytest.mark.parametrize("kind, author", [("commands", "dev/record.py"), ("planner", "dev/fit_planner.py")])
def test_results_of_another_script_are_refused(ablate, house, kind, author):
    content = results.EMPTY | {"kind": kind, "name": "x", "runs": [], "variants": []}
    results.save(content, house / "results" / "x.json")
    for argv in (["--again=results/x.json"], ["config/mine.py", "--quality=0.1", "--name=x"]):
        said = ablate(*argv, status=2)
        assert f"is of {author}, not of ablate.py" in said and "Traceback" not in said


@pytest.mark.parametrize("argv, words", [
    (["config/mine.py", "--pos='rope"], "a quote is not closed"),
    (["config/broken.py", "--quality=0.1"], "line 1: SyntaxError"),
])  # fmt: skip
def test_a_mistake_is_told_in_one_line(ablate, house, argv, words):
    (house / "config" / "broken.py").write_text("quality = (\n")
    said = ablate(*argv, status=2)
    assert words in said and "Traceback" not in said


def test_one_seed_decides_nothing_and_so_it_holds(ablate, house):
    ablate("config/mine.py", "--quality=0.1", "--name=x", "--seeds=1")
    result = results.load(house / "results" / "x.json")
    holds, words = results.compare(result, result)
    assert holds and "nothing was decided, so it holds" in words


# -- for real


@pytest.mark.slow
def test_with_the_real_train_and_evaluate(tmp_path, data):
    """A model of two layers that cannot learn with a learning rate of 0, and one that learns."""
    common = " ".join(tiny(learning_rate=3e-3, warmup_iters=0)).replace("--dataset=small ", "")
    argv = ["--learning_rate=0.0", f"--common={common} --dataset=small", "--max_iters=30", "--dev",
            "--seeds=2", f"--out_dir={tmp_path / 'out'}", f"--results_dir={tmp_path}", "--name=x"]  # fmt: skip
    done = run("ablate.py", *argv, data=data, cwd=tmp_path)
    assert done.status == 0, done.output
    result = results.load(tmp_path / "x.json")
    assert result["differences"]["--learning_rate=0.0"]["kind"] == "worse"
    assert result["split"]["dataset"] == "small_dev" and result["config"]["n_embd"] == 32
    assert [each["steps"] for each in result["runs"]] == [30] * len(result["runs"])
    again = [f"--again={tmp_path / 'x.json'}", "--check", *argv[-3:-1]]
    done = run("ablate.py", *again, data=data, cwd=tmp_path)
    assert done.status == 0, done.output
    assert "with the same losses to the last digit" in done.out
