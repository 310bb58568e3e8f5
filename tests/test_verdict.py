"""minutegpt/verdict.py and baseline.py: each planted cause is named, and a healthy run gets no complaint."""

import json
import math
import random
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from harness import make_dataset, resume, run, tiny, train

from minutegpt import baseline
from minutegpt.baseline import baselines, repeated_share
from minutegpt.data.dataset import Split
from minutegpt.data.tokenizer import char_tokenizer, train_bpe
from minutegpt.verdict import FACTS, Facts, verdict, verdict_of_run

UNIFORM, UNIGRAM, BIGRAM = 4.17, 3.35, 2.49
FACTS_OF_TEXT = Facts(1_000_000, 100_000, UNIFORM, UNIGRAM, BIGRAM)


def cause(sentence):
    return sentence.partition(":")[0].split(" since ")[0]


# ---------------------------------------------------------------------------------------- curves that are drawn


def rows_of(steps, loss, val=None, fit=None, every=40, lr=1e-3, tokens_per_step=1000):
    """Rows of log.jsonl of a run of so many steps, logged each 10. loss, val, fit: functions of the step."""
    rows, none = [], dict.fromkeys(("lr", "grad_norm", "train_loss", "val_loss", "eval_train_loss"))
    for step in range(0, steps + 1, 10):
        row = {"step": step, "tokens": step * tokens_per_step, "seconds": 0.1 * step} | none
        if step:
            rows.append(row | {"lr": lr, "grad_norm": 1.0, "train_loss": loss(step)})
        if step % every == 0 or step == steps:
            rows.append(row | {"val_loss": (val or loss)(step), "eval_train_loss": (fit or loss)(step)})
    return rows


def learned(step, end=1.6, pace=15):
    """The loss of a run that learns: fast at first, then slowly."""
    return end + (UNIFORM - end) / (1 + step / pace)


def noise(step, size=0.03):
    return size * math.sin(12.9898 * step) * 1.4


CURVES = {
    "": rows_of(800, learned),
    "The learning rate is too high": rows_of(
        400, lambda t: 3.4 + 3 * math.exp(-t / 30) + noise(t) if t else UNIFORM, lr=0.01
    ),
    "The learning rate is too low": rows_of(400, lambda t: UNIFORM - 0.5 * t / 400),
    "Nothing to learn": rows_of(400, lambda t: UNIGRAM + (UNIFORM - UNIGRAM) * math.exp(-t / 8) + noise(t)),
    "Overfitting": rows_of(
        800, lambda t: learned(t, 1.2), val=lambda t: learned(t, 1.5) + max(0, t - 400) / 2000
    ),
    "Spikes": rows_of(
        800, lambda t: learned(t) + 1.5 * (t in (300, 310, 320, 600, 610, 620)), val=learned, fit=learned
    ),
    "Still falling fast when the time ran out": rows_of(100, lambda t: UNIFORM - 1.6 * t / 100),
    "Worse than counting pairs of tokens": rows_of(800, lambda t: 2.6 + (UNIFORM - 2.6) * math.exp(-t / 20)),
    "The data repeats itself": rows_of(400, lambda t: UNIFORM * math.exp(-t / 20)),
}  # fmt: skip


@pytest.mark.parametrize("name", CURVES)
def test_each_cause_is_named(name):
    assert cause(verdict(CURVES[name], FACTS_OF_TEXT)) == name, verdict(CURVES[name], FACTS_OF_TEXT)


@pytest.mark.parametrize("name", CURVES)
def test_no_cause_is_named_before_it_is_sure_and_none_is_confused_with_another(name):
    rows, said = CURVES[name], set()
    for i, row in enumerate(rows, 1):
        facts = FACTS_OF_TEXT._replace(done=row["step"] / rows[-1]["step"])
        said.add(cause(verdict(rows[:i], facts)))
    assert said <= {"", name}


def test_a_verdict_is_one_sentence_on_one_line_with_advice():
    for name, rows in CURVES.items():
        sentence = verdict(rows, FACTS_OF_TEXT)
        assert "\n" not in sentence and "nan" not in sentence and "inf" not in sentence
        assert bool(sentence) == bool(name) and (not name or sentence.endswith("."))


def test_overfitting_names_the_step_of_the_best_loss():
    rows = CURVES["Overfitting"]
    best = min((row for row in rows if row["val_loss"]), key=lambda row: row["val_loss"])["step"]
    assert verdict(rows, FACTS_OF_TEXT).startswith(f"Overfitting since step {best}:")


def test_a_short_text_is_named_instead_of_overfitting():
    rows = rows_of(400, lambda t: learned(t, 0.5), val=lambda t: learned(t, 2.3) + t / 600)
    sentence = verdict(rows, FACTS_OF_TEXT._replace(tokens=2700))
    assert cause(sentence) == "The text is too small for the model" and "2,700 tokens were read 148 times" in sentence


def test_a_forecast_is_compared_with_the_best_loss():
    rows = CURVES[""]
    best = min(row["val_loss"] for row in rows if row["val_loss"])
    for forecast, says in (
        ((best + 0.01, 0.03), "As predicted"), ((best + 0.1, 0.03), "Better than predicted"),
        ((best - 0.1, 0.03), "Worse than predicted"),
    ):  # fmt: skip
        facts = FACTS_OF_TEXT._replace(forecast=forecast)
        assert cause(verdict(rows, facts)) == says and f"{best:.2f}" in verdict(rows, facts)
        assert verdict(rows, facts._replace(done=0.9)) == ""  # not before the end
    predicted = FACTS_OF_TEXT._replace(forecast=(2.62, 0.05))  # a run that ends high, as it should
    assert cause(verdict(CURVES["Worse than counting pairs of tokens"], predicted)) == "As predicted"


def test_a_learning_rate_that_is_wild_is_named_even_where_the_loss_is_good():
    """The fast recipe bears a hundred times its rates, and ends 0.07 higher."""
    assert cause(verdict(rows_of(800, learned, lr=0.3), FACTS_OF_TEXT)) == "The learning rate is too high"
    muon = FACTS_OF_TEXT._replace(muon_lr=1.5)
    assert cause(verdict(CURVES[""], muon)) == "The learning rate is too high"
    assert verdict(CURVES[""], FACTS_OF_TEXT._replace(muon_lr=0.1)) == ""


def test_fine_tuning_starts_low_and_is_judged_by_what_it_does():
    assert verdict(rows_of(200, lambda t: 1.7 - 0.1 * t / 200 + noise(t)), FACTS_OF_TEXT) == ""
    worse = verdict(rows_of(200, lambda t: 1.7 + min(1.0, t / 40) + noise(t)), FACTS_OF_TEXT)
    assert cause(worse) == "The learning rate is too high"


@pytest.mark.parametrize("rows", [[], [{}], [{"step": 0}], rows_of(10, learned), [{"step": "x", "train_loss": None}]])
def test_a_log_with_hardly_a_row_has_no_verdict(rows):
    assert verdict(rows, FACTS_OF_TEXT) == ""


def healthy_curve(rng):
    """A random run that learns, of any size: steps, vocabulary, pace, noise, schedule, and odd batches."""
    V, steps = rng.choice([4, 65, 256, 4096, 50257]), 10 * rng.randint(12, 500)
    uniform = math.log(V)
    unigram = uniform * rng.uniform(0.7, 0.99)
    bigram = unigram * rng.uniform(0.7, 0.97)
    end, pace = bigram * rng.uniform(0.6, 0.95), rng.uniform(5, 20)
    sizes = {"loss": rng.uniform(0.005, 0.05) * uniform / 4, "val": rng.uniform(0, 0.008)}
    gap, odd = rng.uniform(0, 0.1), rng.uniform(0, 0.02)
    decay = rng.choice(["cosine", "linear", "constant"])

    def mean(step):
        shape = end + (uniform - end) / (1 + step / pace) ** rng_power
        return shape - (0.03 * uniform * (step / steps) ** 3 if decay != "constant" else 0)

    rng_power = rng.uniform(0.9, 1.5)
    rows = rows_of(
        steps,
        lambda t: mean(t) + rng.gauss(0, sizes["loss"]) + (rng.random() < odd) * rng.uniform(0, 1),
        val=lambda t: mean(t) + gap * t / steps + rng.gauss(0, sizes["val"]),
        fit=lambda t: mean(t) + rng.gauss(0, sizes["val"]),
        every=10 * max(1, steps // rng.choice([50, 100, 200, 400])),
        lr=10 ** rng.uniform(-4, -2.2),
    )
    return rows, Facts(1_000_000, 10_000_000, uniform, unigram, bigram)


@pytest.mark.slow
def test_of_a_thousand_healthy_curves_fewer_than_one_percent_get_a_complaint():
    rng, alarms = random.Random(0), Counter()
    for _ in range(1000):
        rows, facts = healthy_curve(rng)
        evaluations = [i for i, row in enumerate(rows, 1) if row["val_loss"] is not None]
        said = {
            cause(verdict(rows[:i], facts._replace(done=rows[i - 1]["step"] / rows[-1]["step"])))
            for i in {*rng.sample(evaluations, min(8, len(evaluations))), len(rows)}
        }
        alarms.update(said - {""})
    assert sum(alarms.values()) < 10, alarms


# ---------------------------------------------------------------------------------------- what a text alone says


def split(ids, vocab_size):
    return Split([np.array(ids, np.uint16)], [(len(ids), 1.0)], {"tokenizer": {"vocab_size": vocab_size}})


def test_baselines_are_those_of_counting_one_by_one():
    rng = random.Random(1)
    train_ids, val_ids = ([rng.choice([0, 0, 1, 2, 4]) for _ in range(n)] for n in (500, 200))
    found = baselines(split(train_ids, 6), split(val_ids, 6))
    singles, pairs, firsts = Counter(train_ids), Counter(pairwise(train_ids)), Counter(train_ids[:-1])
    followers = {i: len({b for a, b in pairs if a == i}) for i in range(6)}

    def p(j):
        return (singles[j] + 1) / (500 + 6)

    def p_after(i, j):
        k = max(1, followers[i])
        return (pairs[i, j] + k * p(j)) / (firsts[i] + k)

    assert found["uniform"] == pytest.approx(math.log(6))
    assert found["unigram"] == pytest.approx(-sum(math.log(p(j)) for j in val_ids) / 200)
    assert found["bigram"] == pytest.approx(-sum(math.log(p_after(i, j)) for i, j in pairwise(val_ids)) / 199)
    assert found["repeated"] == 0


def test_a_large_vocabulary_is_counted_token_by_token():
    found = baselines(split([1, 2, 3] * 50, 5000), split([1, 2, 3] * 9, 5000))
    assert found["bigram"] == found["unigram"] > 0


def test_a_large_text_is_read_in_part_and_fast(monkeypatch):
    ids = np.random.default_rng(0).integers(0, 65, 3_000_000)
    began = time.process_time()
    found = baselines(split(ids, 65), split(ids[:2_000_000], 65))
    assert time.process_time() - began < 1.0  # 0.2 on a quiet machine
    assert found["unigram"] == pytest.approx(math.log(65), abs=1e-3)
    monkeypatch.setattr(baseline, "TRAIN_TOKENS", 800)
    assert len(baseline.sample(split(ids, 65), 800)) == 800
    assert baseline.sample(split(np.arange(10_000), 65), 80)[[0, 10, -1]].tolist() == [0, 1427, 9999]


def test_spans_that_occur_in_both_texts_are_found():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, 5000), rng.integers(0, 3, 1000)
    assert repeated_share(a, b) == 0
    assert repeated_share(a, a[100:1100]) == 1
    half = np.concatenate((b[:532], a[:532]))  # of 1001 spans 469 are in a, and 469 in b alone
    assert repeated_share(a, half) == pytest.approx(469 / 1001)
    assert repeated_share(a[:10], b) == repeated_share(a, b[:10]) == 0


# ---------------------------------------------------------------------------------------- real runs

BASE = {
    "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 16, "gradient_accumulation_steps": 1,
    "dropout": 0.0, "max_iters": 400, "eval_interval": 80, "eval_iters": 5, "log_interval": 10, "warmup_iters": 20,
    "learning_rate": 3e-3, "dataset": "shakespeare",
}  # fmt: skip
FAST = {
    "optimizer": "muon", "muon_lr": 0.015, "pos": "rope", "norm": "rmsnorm", "qk_norm": "true",
    "tie": "false", "beta1": 0.8, "lr_schedule": "linear", "decay_fraction": 0.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory, shakespeare):
    """A folder with the datasets that causes are planted in."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(1)
    letters = list(shakespeare[:300_000])
    rng.shuffle(letters)
    chain = ["A"]
    weights = {"A": (4, 2, 2, 2), "C": (3, 3, 1, 3), "G": (2, 3, 3, 2), "T": (1, 2, 3, 4)}
    for _ in range(200_000):
        chain += rng.choices("ACGT", weights[chain[-1]])
    for name, text in {
        "shakespeare": shakespeare, "short": shakespeare[:3000], "shuffled": "".join(letters),
        "constant": "a" * 20_000, "repeated": shakespeare[:500] * 100, "dna": "".join(chain),
    }.items():  # fmt: skip
        end = len(text) * 9 // 10
        make_dataset(folder / "data" / name, char_tokenizer(text), text[:end], text[end:])
    end = len(shakespeare) * 9 // 10
    bpe = train_bpe([shakespeare[:200_000]], 512)
    make_dataset(folder / "data" / "bpe", bpe, shakespeare[:end], shakespeare[end:])
    return folder


def real_run(folder, **settings):
    done = run("train.py", *tiny(**BASE | settings), "--out_dir=run", "--overwrite", cwd=folder, seconds=1200)
    assert done.status == 0, done.output
    return done


PLANTED = {
    "rate x 100": ("The learning rate is too high", {"learning_rate": 0.3}),
    "rate x 100, Muon": ("The learning rate is too high", FAST | {"learning_rate": 0.3, "muon_lr": 1.5}),
    "rate / 100": ("The learning rate is too low", {"learning_rate": 3e-5}),
    "rate / 100, Muon": ("The learning rate is too low", FAST | {"learning_rate": 3e-5, "muon_lr": 1.5e-4}),
    "3 kB of text": ("The text is too small for the model", {"dataset": "short", "block_size": 32}),
    "shuffled": ("Nothing to learn", {"dataset": "shuffled"}),
    "constant": ("The data repeats itself", {"dataset": "constant", "max_iters": 20}),
    "repeated": ("The data repeats itself", {"dataset": "repeated", "max_iters": 20}),
    "too few steps": ("Still falling fast when the time ran out", {"max_iters": 60, "eval_interval": 20}),
}  # fmt: skip
HEALTHY = {
    "classic": {}, "another seed": {"seed": 7}, "fast": FAST, "fast, shorter": FAST | {"max_iters": 200},
    "dropout": {"dropout": 0.1, "learning_rate": 5e-3, "max_iters": 500}, "constant rate": {"lr_schedule": "constant"},
    "experts": FAST | {"n_expert": 4, "n_expert_active": 2}, "dna": {"dataset": "dna"},
    "bpe": FAST | {"dataset": "bpe"}, "n-grams": FAST | {"ngram": 3, "ngram_rows": 1024},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("planted", PLANTED)
def test_a_cause_that_was_planted_in_a_real_run_is_named(texts, planted):
    name, settings = PLANTED[planted]
    done = real_run(texts, **settings)
    sentences = [line for line in done.out.splitlines() if line.startswith("verdict: ")]
    assert {cause(line.removeprefix("verdict: ")) for line in sentences} == {name}, done.out
    shown = run("evaluate.py", "--out_dir=run", "--device=cpu", cwd=texts)
    assert sentences[-1] in shown.out, shown.output


@pytest.mark.slow
@pytest.mark.parametrize("recipe", HEALTHY)
def test_a_healthy_run_gets_no_complaint(texts, recipe):
    done = real_run(texts, **HEALTHY[recipe])
    assert "verdict" not in done.out, done.out
    assert "verdict" not in run("evaluate.py", "--out_dir=run", "--device=cpu", cwd=texts).output


@pytest.mark.slow
def test_a_healthy_run_that_was_resumed_gets_no_complaint(texts):
    real_run(texts, **FAST, max_iters=200)
    resumed = resume(texts, "run", "--max_iters=400")
    assert resumed.wait(1200) == 0 and "verdict" not in resumed.out, resumed.output


def test_a_run_writes_its_facts_and_its_verdict(data, tmp_path):
    """One distinct token: it is said at the first evaluation, again at the end, and by evaluate.py."""
    make_dataset(tmp_path / "data" / "small", char_tokenizer("a"), "a" * 2000, "a" * 500)
    training = train(tmp_path, "run", max_iters=10)
    assert training.wait() == 0, training.output
    sentence = "The data repeats itself: the text has only one distinct token."
    assert training.out.count(sentence) == 2
    facts = json.loads((tmp_path / "run" / FACTS).read_text())
    assert facts["tokens"] == 2000 and facts["uniform"] == 0 and facts["done"] == 1 and facts["repeated"] == 1
    evaluated = run("evaluate.py", "--out_dir=run", "--device=cpu", cwd=tmp_path)
    assert sentence in evaluated.out, evaluated.output


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tokens": "x"}', '{"evil": 1}', "[" * 99_999])
def test_facts_that_are_damaged_or_missing_are_no_verdict(tmp_path, text):
    assert verdict_of_run(tmp_path, CURVES["Overfitting"]) == ""
    (tmp_path / FACTS).write_text(text)
    assert verdict_of_run(tmp_path, CURVES["Overfitting"]) == ""
    whole = json.dumps(FACTS_OF_TEXT._asdict())
    (tmp_path / FACTS).write_text(whole)
    assert verdict_of_run(tmp_path, CURVES["Overfitting"]).startswith("Overfitting since step")
