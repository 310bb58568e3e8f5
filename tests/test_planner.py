"""minutegpt/planner.py: a plan can always run, keeps what the user set, and predicts a loss."""

import ast
import json
import math
import shlex
import shutil
from collections import Counter
from dataclasses import fields
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from harness import ROOT, ranks, refused, run

from minutegpt import describe, planner, setup
from minutegpt import speed as speed_module
from minutegpt.config import Settings, out_of_bounds, read_settings
from minutegpt.data.dataset import Split
from minutegpt.describe import Text
from minutegpt.device import Machine
from minutegpt.distributed import split_batch
from minutegpt.errors import UserError
from minutegpt.speed import Speed, correct, measure_machine, memory_bytes, parameters, seconds_per_step
from model import GPT, GPTConfig

SLOW = Speed((2e9, 2e9, 2e9), 2e-5, 5e7, 1e9)  # one old core
LAPTOP = Speed((60e9, 70e9, 75e9), 3e-6, 8e8, 8e9)  # two cores
GPUS = Speed((50e12, 300e12, 600e12), 6e-6, 2e11, 70e9, devices=8, compiled=True)
MACHINES = {"slow": SLOW, "laptop": LAPTOP, "8 GPUs": GPUS}
TINY = Text(270, 30, 40, 270, 2.9, 0.05, 2.7, 0.0, 30)
BOOK = Text(900_000, 100_000, 65, 2**18, 1.75, 0.07, 2.5, 0.0, 100_000)
WEB = Text(900_000_000, 100_000_000, 65, 2**18, 1.8, 0.1, 2.5, 0.0, 100_000_000)
GPT2 = Text(200_000_000, 20_000_000, 50257, 2**18, 6.5, 0.07, 6.5, 0.1, 20_000_000)
SAME = Text(50_000, 5_000, 2, 50_000, 0.01, 0.0, 0.01, 0.99, 5_000)
TEXTS = {"300 bytes": TINY, "a book": BOOK, "1 GB": WEB, "GPT-2's vocabulary": GPT2, "one line repeated": SAME}


def settings(*argv: str) -> tuple[dict, set[str]]:
    """What `train.py config/auto.py argv...` starts from: all settings, and the names of those that are set."""
    block = ast.parse((ROOT / "train.py").read_text(encoding="utf-8")).body
    defaults = {}
    for node in block:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            defaults[ast.unparse(node.targets[0])] = node.value.value
    found = read_settings(defaults, "train.py", [str(ROOT / "config" / "auto.py"), *argv], model=GPTConfig)
    return dict(found.values), found.given | found.from_file


def make_plan(text: Text, speed: Speed, *argv: str) -> tuple[planner.Plan, dict]:
    config, fixed = settings(*argv)
    found = planner.plan(config, fixed, text, speed)
    return found, config | found.settings


def check_that_it_can_run(config: dict, text: Text, speed: Speed) -> None:
    assert not out_of_bounds(config)
    model = {field.name: config[field.name] for field in fields(GPTConfig) if field.name != "vocab_size"}
    shape = GPTConfig(vocab_size=text.vocab_size, **model)
    assert shape.n_expert == 0
    assert (min(text.tokens, text.val_tokens) - 1) // shape.block_size >= 1, "an evaluation has no window"
    micro_steps, micro_batch = split_batch(config["batch_size"], config["gradient_accumulation_steps"], speed.devices)
    needed = memory_bytes(model | {"vocab_size": text.vocab_size, "optimizer": config["optimizer"]}, micro_batch)
    assert micro_steps >= 1 and needed <= speed.memory


@pytest.mark.parametrize("machine, text", list(product(MACHINES, TEXTS)))
def test_every_plan_can_run(machine, text):
    for minutes in (1 / 3, 10, 1440):
        found, config = make_plan(TEXTS[text], MACHINES[machine], f"--max_minutes={minutes}")
        check_that_it_can_run(config, TEXTS[text], MACHINES[machine])
        assert config["max_minutes"] <= minutes and found.steps >= 1
        assert 0 < found.forecast.loss <= math.log(TEXTS[text].vocab_size) and found.forecast.margin > 0


def test_more_minutes_never_make_the_forecast_worse():
    for speed, text in product(MACHINES.values(), TEXTS.values()):
        losses = [make_plan(text, speed, f"--max_minutes={m}")[0].forecast.loss for m in (1 / 3, 2, 10, 300)]
        assert all(later <= earlier + 0.002 for earlier, later in pairwise(losses)), losses


def test_a_larger_budget_gets_a_larger_model():
    small, large = (make_plan(WEB, LAPTOP, f"--max_minutes={m}")[1]["n_embd"] for m in (0.5, 600))
    assert small < large


@pytest.mark.parametrize("argv", [
    ["--n_embd=100"], ["--n_head=5"], ["--n_layer=7"], ["--block_size=100"], ["--batch_size=5"], ["--dropout=0.1"],
    ["--ngram=3", "--ngram_rows=500"], ["--optimizer=adamw"], ["--learning_rate=1e-4"], ["--muon_lr=0.03"],
    ["--gradient_accumulation_steps=3"], ["--n_kv_head=2"], ["--max_iters=100", "--max_minutes=0"], ["--pos=learned"],
    ["--warmup_iters=7"], ["--n_embd=96", "--n_head=6", "--n_layer=1"], ["--activation=relu2", "--eval_iters=3"],
])  # fmt: skip
def test_what_the_user_sets_is_kept(argv):
    found, config = make_plan(BOOK, LAPTOP, *argv)
    asked, fixed = settings(*argv)
    assert {key: config[key] for key in fixed - {"max_minutes"}} == {key: asked[key] for key in fixed - {"max_minutes"}}
    assert not found.settings.keys() & (fixed - {"max_minutes"})
    check_that_it_can_run(config, BOOK, LAPTOP)


def test_steps_that_the_user_sets_are_predicted():
    few, many = (make_plan(BOOK, LAPTOP, f"--max_iters={n}", "--max_minutes=0")[0] for n in (50, 500))
    assert (few.steps, many.steps) == (50, 500) and many.forecast.loss < few.forecast.loss
    endless, config = make_plan(BOOK, SLOW, "--max_iters=10000000", "--max_minutes=0")
    assert endless.steps == 10_000_000 and config["n_embd"] == 32, "no model makes these steps in time: the fastest"
    assert make_plan(BOOK, LAPTOP, "--max_iters=0", "--max_minutes=0")[0].steps == 1


def test_minutes_win_over_steps_as_in_train_py():
    both, minutes = (make_plan(BOOK, LAPTOP, "--max_minutes=2", *argv) for argv in (["--max_iters=50"], []))
    assert both[0].steps == minutes[0].steps > 50 and both[1]["max_minutes"] == 2.0
    assert "overfit" not in " ".join(both[0].lines)


def test_experts_count_in_the_memory():
    dense, experts = ({"n_layer": 2, "n_embd": 64, "vocab_size": 65, "ngram": 0, "ngram_rows": 0} for _ in range(2))
    experts |= {"n_expert": 8, "n_expert_active": 2}
    real = [
        sum(p.numel() for p in GPT(GPTConfig(pos="rope", n_head=1, **shape)).transformer.h.parameters())
        for shape in (dense | {"ngram_rows": 1}, experts | {"ngram_rows": 1})
    ]
    assert parameters(dense)[0] == pytest.approx(real[0], rel=0.02)
    assert parameters(experts)[0] == pytest.approx(real[1], rel=0.06)
    _, config = make_plan(BOOK, LAPTOP, "--n_expert=64", "--n_expert_active=2", "--max_minutes=600")
    assert memory_bytes({**config, "vocab_size": 65}, 1) <= LAPTOP.memory and config["n_expert"] == 64


def test_a_run_that_would_overfit_is_planned_in_steps():
    """In minutes, a faster machine than predicted would read the text too often."""
    found, config = make_plan(TINY, LAPTOP, "--max_minutes=0.5")
    assert (config["max_iters"], config["max_minutes"]) == (found.steps, 0.0)
    assert make_plan(TINY, LAPTOP, "--max_minutes=0.5", "--max_iters=7")[1]["max_iters"] == 7, "what is given is kept"
    found, config = make_plan(WEB, LAPTOP, "--max_minutes=0.5")
    assert config["max_minutes"] == 0.5, "a run that needs all of its time is planned in minutes"


@pytest.mark.parametrize("text, machine", list(product(TEXTS, MACHINES)))
def test_a_plan_keeps_the_minutes_where_steps_take_twice_as_long(text, machine):
    for minutes in (0.5, 2, 60):
        found, config = make_plan(TEXTS[text], MACHINES[machine], f"--max_minutes={minutes}")
        rows = config["batch_size"] * config["gradient_accumulation_steps"]
        shape = config | {"vocab_size": TEXTS[text].vocab_size}
        seconds = 2 * found.steps * seconds_per_step(shape, rows, MACHINES[machine])
        assert config["max_minutes"] or seconds < 60 * minutes


def test_a_context_longer_than_the_shortest_split_is_refused():
    with pytest.raises(UserError, match="Take --block_size=4999 or less, or more text"):
        make_plan(SAME, LAPTOP, "--block_size=6000", "--batch_size=1")


@pytest.mark.parametrize("argv, words", [
    (["--block_size=200000", "--batch_size=1"], "Take --block_size=99999 or less, or more text"),
    (["--n_embd=60000", "--n_layer=100"], "Leave --n_layer or --n_embd out"),
    (["--n_embd=100", "--n_head=3"], "Set n_head to"),
    (["--n_head=0"], "n_head=0 must be at least 1"),
    (["--activation=tanh"], "activation='tanh' is not one of gelu"),
    (["--n_kv_head=-1"], "n_kv_head=-1 must be at least 1"),
    (["--n_expert=4", "--n_expert_active=1", "--n_embd=64", "--n_head=1"], "n_expert"),
])  # fmt: skip
def test_settings_that_leave_no_plan_are_refused_with_advice(argv, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        make_plan(BOOK, LAPTOP, *argv)


def test_a_batch_that_does_not_divide_among_the_devices_is_refused():
    with pytest.raises(UserError, match="Leave --batch_size or --gradient_accumulation_steps out"):
        make_plan(BOOK, GPUS, "--batch_size=3", "--gradient_accumulation_steps=1")


def test_a_plan_names_two_rivals_with_their_forecasts():
    found, _ = make_plan(BOOK, LAPTOP, "--max_minutes=2")
    wider, narrower = found.lines[2:]
    assert "too few steps" in wider and "too small" in narrower and "±" in wider and "±" in narrower


# -- the time model


def test_the_parameters_are_the_models():
    shape = {"n_layer": 3, "n_embd": 64, "n_head": 2, "block_size": 32, "ngram": 4, "ngram_rows": 500}
    model = GPT(GPTConfig(vocab_size=20, pos="rope", norm="rmsnorm", tie=False, **shape))
    assert sum(parameters(shape | {"vocab_size": 20})) == model.n_params()


def test_a_step_takes_longer_where_there_is_more_to_do_and_less_on_a_faster_machine():
    shape = {"n_layer": 4, "n_embd": 256, "block_size": 256, "vocab_size": 65, "ngram": 6, "ngram_rows": 16384}
    shape |= {"optimizer": "adamw"}
    seconds = seconds_per_step(shape, 8, LAPTOP)
    assert seconds < seconds_per_step(shape | {"optimizer": "muon"}, 8, LAPTOP)
    assert seconds < seconds_per_step(shape, 9, LAPTOP)
    assert seconds < seconds_per_step(shape | {"n_layer": 5}, 8, LAPTOP)
    assert seconds > seconds_per_step(shape, 8, LAPTOP._replace(devices=2))
    fast = LAPTOP._replace(flops=tuple(2 * f for f in LAPTOP.flops), call=LAPTOP.call / 2, elements=2 * LAPTOP.elements)
    assert seconds_per_step(shape, 8, fast) == pytest.approx(seconds / 2)


@pytest.mark.parametrize("limit, rows", [(1e9, 8), (0.013, 4)])
def test_the_formula_is_corrected_by_a_measured_step(limit, rows, monkeypatch):
    config = settings("--n_layer=2", "--n_embd=32", "--n_head=1", "--block_size=64")[0] | {"vocab_size": 65}
    formula = seconds_per_step(config, 8, LAPTOP)
    assert seconds_per_step(config, 8, LAPTOP) > 0.013 > seconds_per_step(config, 4, LAPTOP)
    seen = []
    monkeypatch.setattr(GPT, "forward", lambda self, x, y, real=GPT.forward: seen.append(len(x)) or real(self, x, y))
    monkeypatch.setattr(speed_module.time, "perf_counter", iter(range(100)).__next__)  # every step takes a second
    found = correct(LAPTOP, config, 8, Machine(torch.device("cpu"), torch.float32, False), limit)
    assert set(seen) == {rows} and seconds_per_step(config, rows, found) == pytest.approx(1.0)
    assert seconds_per_step(config, 8, found) == pytest.approx(found.slower * formula)


def test_a_machine_without_the_memory_for_a_step_keeps_the_formula(monkeypatch):
    def fail(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] not enough memory: you tried to allocate 31 GB")

    monkeypatch.setattr(GPT, "forward", fail)
    config, machine = settings()[0] | {"vocab_size": 65}, Machine(torch.device("cpu"), torch.float32, False)
    assert correct(LAPTOP, config, 8, machine, 1e9) == LAPTOP


def test_the_measured_step_has_the_rows_of_one_device(monkeypatch):
    seen = []
    monkeypatch.setattr(speed_module, "measure_step", lambda config, rows, machine: seen.append(rows) or 1.0)
    config = settings("--n_layer=2", "--n_embd=32", "--n_head=1", "--block_size=64")[0] | {"vocab_size": 65}
    eight = LAPTOP._replace(devices=8)
    found = correct(eight, config, 4, Machine(torch.device("cpu"), torch.float32, False), 1e9)
    assert seen == [4] and seconds_per_step(config, 32, found) == pytest.approx(1.0)


def test_nothing_is_measured_where_a_step_takes_too_long_or_is_compiled(monkeypatch):
    monkeypatch.setattr(GPT, "forward", None)
    config, machine = settings()[0] | {"vocab_size": 65}, Machine(torch.device("cpu"), torch.float32, False)
    assert correct(LAPTOP, config, 8, machine, 1e-9) == LAPTOP
    assert correct(GPUS, config, 8, machine, 1e9) == GPUS


def test_a_machine_is_measured(monkeypatch):
    from minutegpt.device import init_machine

    speed = measure_machine(init_machine("cpu", compile="false"))
    assert all(1e7 < f < 1e14 for f in speed.flops) and 1e-8 < speed.call < 1e-2 and speed.elements > 1e6
    assert speed.memory > 1e8 and speed.devices == 1


# -- the text


def split_of(ids: np.ndarray, vocab_size: int) -> Split:
    return Split([ids], [(len(ids), 1.0)], {"tokenizer": {"vocab_size": vocab_size}})


def test_counting_agrees_with_counting_in_python():
    random = np.random.default_rng(0)
    train, val = (random.integers(0, 5, n) ** 2 % 5 for n in (400, 90))
    train[50:150], val[20:60] = train[200:300], train[200:240]
    found = describe.ngram_probabilities(train, val, 6, order=4)

    def probability(word: int, before: tuple[int, ...]) -> float:
        if before:
            follow = Counter(
                train[i + len(before)] for i in range(len(train) - len(before))
                if tuple(train[i : i + len(before)]) == before
            )  # fmt: skip
            lower, n, kinds = probability(word, before[1:]), sum(follow.values()), len(follow)
            return (follow[word] + kinds * lower) / (n + kinds) if n else lower
        kinds = len(set(train.tolist()))
        return (Counter(train.tolist())[word] + kinds / 6) / (len(train) + kinds)

    for order in (1, 2, 3, 4):
        expected = [probability(val[i], tuple(val[i - order + 1 : i])) for i in range(order - 1, len(val))]
        assert found[order - 1] == pytest.approx(expected)


def test_copying_lowers_the_loss_of_a_text_that_repeats_itself_nearby_and_of_no_other():
    random = np.random.default_rng(1)
    noise, even = random.integers(0, 30, 3000), np.full(3000, 1 / 30)
    assert describe.copying_loss(noise, even) == pytest.approx(math.log(30), abs=0.02)
    near = np.concatenate([np.tile(random.integers(0, 30, 100), 2) for _ in range(15)])  # 100 tokens, and again
    assert describe.copying_loss(near, even) < 0.6 * math.log(30)
    far = np.tile(random.integers(0, 30, 300), 10)  # the copy is out of the window
    assert describe.copying_loss(far, even) == pytest.approx(math.log(30), abs=0.1)


def test_a_text_is_described():
    random = np.random.default_rng(0)
    noise = random.integers(0, 50, 60_000).astype(np.uint16)
    text = describe.describe_text(split_of(noise, 50), split_of(noise[:2000], 50))
    assert (text.tokens, text.val_tokens, text.vocab_size, text.repeated) == (60_000, 2000, 50, 0.0)
    assert text.bigram_loss == pytest.approx(math.log(50), abs=0.05)
    line = np.tile(noise[:100], 600)
    text = describe.describe_text(split_of(line, 50), split_of(line[:2000], 50))
    assert text.repeated > 0.99 and text.counting_loss < 0.1


@pytest.mark.parametrize("tokens, epochs, batch_tokens, decay", [
    (900_000, 1.5, 1536, 4), (900_000, 6.0, 1536, 4),  # shakespeare_cpu.py's, however often the text is read
    (900_000, 3.0, 6144, 16),  # larger steps are fewer
    (100_000, 5.0, 1536, 36), (30_000, 5.0, 1536, 120), (1_000, 5.0, 1536, 120),  # a small text comes again sooner
    (100_000, 0.5, 1536, 18), (9_000_000, 0.5, 1536, 4),  # nothing comes again
])  # fmt: skip
def test_tables_forget_after_a_seventh_of_an_epoch(tokens, epochs, batch_tokens, decay):
    assert planner.ngram_weight_decay(tokens, epochs, batch_tokens) == pytest.approx(decay, rel=0.03)
    shape = {"n_embd": 96, "block_size": 256, "batch_size": batch_tokens // 256, "gradient_accumulation_steps": 1}
    text = BOOK._replace(tokens=tokens)
    found = planner.follow(planner.Candidate(1.5, shape, round(epochs * tokens / batch_tokens), 1.0), text)
    assert found["ngram_weight_decay"] == pytest.approx(decay, rel=0.1)  # whole steps


@pytest.mark.parametrize("vocab_size", [1, 256])
def test_one_character_over_and_over_is_described(vocab_size):
    ids = np.zeros(50_000, np.uint16)
    text = describe.describe_text(split_of(ids, vocab_size), split_of(ids[:500], vocab_size))
    assert 0 < text.counting_loss < 1e-3 and 0 <= text.gain <= 0.3
    found, config = make_plan(text, LAPTOP, "--max_minutes=2")
    check_that_it_can_run(config, text, LAPTOP)
    assert 0 <= found.forecast.loss < 0.01


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_shortest_texts_are_described(n):
    ids = (np.arange(n) % 3).astype(np.uint16)
    text = describe.describe_text(split_of(ids, 3), split_of(ids[:2], 3))
    assert text.tokens == n and math.isfinite(text.counting_loss) and math.isfinite(text.bigram_loss)


# -- a run


def write_text(folder, name: str, n_bytes: int) -> None:
    words = "the cat sat on a mat and saw the dog run to the sea while rain fell on old stone".split()
    random = np.random.default_rng(n_bytes)
    content = ""
    while len(content) < n_bytes:
        content += " ".join(random.choice(words, 9)) + ".\n"
    (folder / f"{name}.txt").write_text(content[:n_bytes], encoding="utf-8")
    done = run("prepare/text.py", f"--input={name}.txt", "--workers=1", cwd=folder)
    assert done.status == 0, done.output


@pytest.fixture(scope="module")
def planned(house):
    """A run that config/auto.py planned, on 30 kB."""
    write_text(house, "book", 30_000)
    done = run("train.py", str(ROOT / "config" / "auto.py"), "--dataset=book", "--max_minutes=0.2", "--device=cpu",
               "--compile=false", "--seed=7", "--n_layer=1", cwd=house)  # fmt: skip
    assert done.status == 0, done.output
    return done


def test_a_planned_run_ends_in_time_with_its_forecast_in_its_config(house, planned):
    saved = json.loads((house / "out-auto" / "config.json").read_text(encoding="utf-8"))
    loss, margin = saved["forecast"]
    assert saved["plan"] is False and 0 < margin < loss
    assert planned.out.count(f"xpected validation loss {loss:.2f} ± {margin:.2f}") == 2, "in the plan and on the card"


def test_the_card_repeats_the_forecast_of_the_plan_to_the_digit(monkeypatch):
    """0.10496 is 0.10, also after it went through config.json: it was rounded to 0.1050 before."""
    expected = planner.Forecast(0.72496, 0.10496)
    monkeypatch.setattr(planner, "open_data", lambda dataset, split: None)
    monkeypatch.setattr(planner, "describe_text", lambda train, val: BOOK)
    monkeypatch.setattr(planner, "measure_machine", lambda machine: LAPTOP)
    monkeypatch.setattr(planner, "correct", lambda speed, *_: speed)
    monkeypatch.setattr(planner, "plan", lambda *_: planner.Plan({}, expected, 10, []))
    config, _ = settings("--dataset=book")
    chosen = planner.plan_run(
        config, Settings({}, set(), set(), "", set()), Machine(torch.device("cpu"), torch.float32, False)
    )
    assert str(planner.Forecast(*json.loads(json.dumps(chosen["forecast"])))) == str(expected) == "0.72 ± 0.10"


def test_the_flags_of_a_plan_make_the_same_config(house, planned):
    line = next(line for line in planned.out.splitlines() if line.startswith("the same run: python train.py"))
    _, argv = line.split("train.py ")
    done = run("train.py", *shlex.split(argv), "--out_dir=again", "--max_iters=1", "--max_minutes=0", cwd=house)
    assert done.status == 0, done.output
    ours, again = (json.loads((house / out / "config.json").read_text()) for out in ("out-auto", "again"))
    different = {key for key in ours if ours[key] != again.get(key)}
    assert different <= {"out_dir", "forecast", "max_iters", "max_minutes"}, different


def test_without_a_config_the_flags_of_a_plan_name_none(house, planned):
    argv = ["--plan", "--dataset=book", "--max_minutes=0.2", "--device=cpu", "--compile=false", "--n_layer=1"]
    done = run("train.py", *argv, "--out_dir=plain", cwd=house)
    line = next(line for line in done.out.splitlines() if line.startswith("the same run: python train.py"))
    words = shlex.split(line.split("train.py ")[1])
    assert done.status == 0 and "--plan=false" in words and all(word.startswith("--") for word in words), done.output


def test_a_resumed_run_is_not_planned_again(house, planned):
    before = json.loads((house / "out-auto" / "config.json").read_text(encoding="utf-8"))
    shutil.copytree(house / "out-auto", house / "longer")
    argv = [str(ROOT / "config" / "auto.py"), "--init_from=resume", "--out_dir=longer"]
    done = run("train.py", *argv, "--max_minutes=0.3", cwd=house)
    assert done.status == 0 and "plan:" not in done.out, done.output
    after = json.loads((house / "longer" / "config.json").read_text(encoding="utf-8"))
    assert before.pop("forecast") and "forecast" not in after, "a longer run has another loss than was predicted"
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {"init_from", "out_dir", "max_minutes", "n_kv_head"}  # n_kv_head: 0 means n_head


@pytest.mark.parametrize("notes, kept", [
    ([], True), (["not taken from the config file: plan=True"], True), (["max_minutes 1 -> 2"], False),
])  # fmt: skip
def test_a_resumed_run_keeps_its_forecast_where_nothing_changed(monkeypatch, notes, kept):
    monkeypatch.setattr(setup, "find_dataset", lambda *args: "book")
    start = setup.Start(Settings({}, set(), set(), "", set()), {"config": {"forecast": [1.5, 0.1]}}, notes=notes)
    assert (
        "forecast" in setup.choose({"plan": False}, Machine(torch.device("cpu"), torch.float32, False), start)
    ) is kept


def test_two_processes_make_the_same_plan(house, planned):
    out = ranks(house, 2, str(ROOT / "config" / "auto.py"), "--dataset=book", "--max_minutes=0.3", "--device=cpu",
                "--compile=false", "--out_dir=two")  # fmt: skip
    saved = json.loads((house / "two" / "config.json").read_text(encoding="utf-8"))
    assert out.count("plan:") == 1 and saved["batch_size"] * saved["gradient_accumulation_steps"] % 2 == 0


def test_a_text_of_300_bytes_is_planned_and_trained(house):
    write_text(house, "note", 300)
    done = run("train.py", str(ROOT / "config" / "auto.py"), "--dataset=note", "--max_minutes=0.1", "--device=cpu",
               "--compile=false", "--out_dir=note", cwd=house)  # fmt: skip
    assert done.status == 0 and "best validation loss" in done.out, done.output


def test_weights_that_are_given_are_not_planned(house, planned):
    done = run("train.py", str(ROOT / "config" / "auto.py"), "--dataset=book", "--init_from=out-auto",
               "--out_dir=other", cwd=house)  # fmt: skip
    refused(done, "the planner chooses a new one")
