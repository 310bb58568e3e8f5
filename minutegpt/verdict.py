"""What a run's losses say about it: one sentence, or "" where there is nothing to complain about.

verdict(rows, facts)  # "Overfitting since step 800: the validation loss rose from 1.47 to 1.61 while ..."

A sentence comes when it is sure, so most causes need a part of the run to be over. The thresholds are those that
separate planted causes from healthy runs in tests/test_verdict.py.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FACTS = "facts.json"  # in the run's folder
HIGH_RATE = 0.02  # AdamW's learning rate: above it few transformers learn
WILD_RATE, WILD_MUON_RATE = 0.05, 0.3  # above these a tenth ends lower, even where the loss looks well
SLOW = 150  # steps at the full learning rate that a healthy run never needs to learn the tokens' frequencies
SMALL_TEXT = 50_000  # tokens


class Facts(NamedTuple):
    """What the verdict needs next to log.jsonl. Losses in nats per token.

    tokens: of the training split. uniform, unigram, bigram, repeated: of baseline.baselines(). forecast: expected
    validation loss and its margin. muon_lr: Muon's peak learning rate, 0 without it. done: share of the run, 0 to 1.
    """

    tokens: int
    parameters: int
    uniform: float
    unigram: float
    bigram: float
    repeated: float = 0.0
    forecast: tuple[float, float] | None = None
    muon_lr: float = 0.0
    done: float = 1.0

    @property
    def baseline_name(self) -> str:
        return "token frequencies" if self.bigram == self.unigram else "bigrams"

    @property
    def counting(self) -> str:
        """What `bigram` is the loss of: with a large vocabulary, of counting single tokens."""
        return "counting tokens" if self.bigram == self.unigram else "counting pairs of tokens"


class Curve(NamedTuple):
    """steps, losses, lr (n,): of the training steps that were logged. eval_steps, val, fit (m,): evaluations, with
    the losses on validation and training text.
    """

    steps: np.ndarray
    losses: np.ndarray
    lr: np.ndarray
    eval_steps: np.ndarray
    val: np.ndarray
    fit: np.ndarray
    tokens_per_step: float

    def between(self, start: float, stop: float) -> np.ndarray:
        """The training losses between two shares of the steps so far."""
        return self.losses[(self.steps > start * self.steps[-1]) & (self.steps <= stop * self.steps[-1])]

    def level(self, start: float, stop: float) -> float:
        """Their mean; NaN where no step was logged."""
        losses = self.between(start, stop)
        return float(losses.mean()) if len(losses) else math.nan


def verdict(rows: Iterable[dict[str, Any]], facts: Facts) -> str:
    """The sentence for these rows of log.jsonl. Its words up to the colon name the cause."""
    curve = read_curve(rows)
    if sentence := repeats(curve, facts):
        return sentence
    if len(curve.steps) < 5 or not len(curve.val):
        return ""
    causes = (rate_too_high, rate_too_low, nothing_to_learn, text_too_small, overfits, spikes, as_predicted, falling,
              worse_than_counting)  # fmt: skip
    return next((sentence for cause in causes if (sentence := cause(curve, facts))), "")


def verdict_of_run(folder: str | Path, rows: Iterable[dict[str, Any]]) -> str:
    """The sentence for a run's folder, whose rows of log.jsonl are given; "" where its facts were not written."""
    try:
        return verdict(rows, Facts(**json.loads((Path(folder) / FACTS).read_bytes())))
    except (OSError, ValueError, TypeError, RecursionError, ArithmeticError):  # of an older version, or damaged
        return ""


def read_curve(rows: Iterable[dict[str, Any]]) -> Curve:
    rows = [row for row in rows if _finite(row, "step")]
    steps = [row for row in rows if _finite(row, "train_loss")]
    evals = [row for row in rows if _finite(row, "val_loss", "eval_train_loss")]
    last = rows[-1] if rows else {}
    return Curve(
        _column(steps, "step"), _column(steps, "train_loss"), _column(steps, "lr"),
        _column(evals, "step"), _column(evals, "val_loss"), _column(evals, "eval_train_loss"),
        (last.get("tokens") or 0) / max(1, last.get("step", 0)),
    )  # fmt: skip


def _finite(row: dict[str, Any], *keys: str) -> bool:
    return all(isinstance(row.get(key), int | float) and math.isfinite(row[key]) for key in keys)


def _column(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([row.get(key) or 0.0 for row in rows], float)


# ---------------------------------------------------------------------------------------------- causes


def repeats(curve: Curve, facts: Facts) -> str:
    """Most of the validation text is in the training text, or the loss is lower than that of any text."""
    low = len(curve.val) and max(curve.val[-1], curve.fit[-1]) < min(0.15, 0.05 * facts.uniform)
    if facts.uniform and facts.repeated < 0.5 and not low:
        return ""
    share = f"{facts.repeated:.0%} of the validation text is in the training text word for word"
    if facts.repeated < 0.5:
        share = f"a validation loss of {curve.val[-1]:.2f} means that the model knows what comes next"
    if not facts.uniform:
        share = "the text has only one distinct token"
    return f"The data repeats itself: {share}. Remove the repetitions, or train on another text."


def rate_too_high(curve: Curve, facts: Facts) -> str:
    """The loss rose far above its start and stayed high, or is flat above the bigram baseline at a huge rate."""
    if facts.done < 0.1 or len(curve.steps) < 8:
        return ""
    start, now = curve.val[0], curve.level(0.7, 1.0)
    rose = max(curve.losses.max(), curve.val.max()) > max(start, facts.uniform) + 0.7 and now > facts.bigram + 0.1
    rose |= min(now, curve.val[-1], curve.fit[-1]) > min(start, curve.losses[0]) + 0.3
    wild = curve.lr.max() > WILD_RATE or facts.muon_lr > WILD_MUON_RATE
    poor = min(now, curve.val[-1]) > facts.bigram + 0.1 and _steps_at_full_rate(curve)[-1] > 60
    muon = f" ({facts.muon_lr:.2g} for Muon)" if facts.muon_lr else ""
    if not (rose or wild or (poor and curve.lr.max() > HIGH_RATE)):
        return ""
    return (
        f"The learning rate is too high: it is {curve.lr.max():.2g}{muon}, and the loss is {now:.2f}; "
        f"{facts.counting} gives {facts.bigram:.2f}. Train again with a tenth of it."
    )


def rate_too_low(curve: Curve, facts: Facts) -> str:
    """After many steps the loss is above that of the tokens' frequencies, which a model learns first."""
    frequencies = facts.unigram + 0.1 * (facts.uniform - facts.unigram)
    full = _steps_at_full_rate(curve)
    early = curve.losses[full < SLOW]
    smooth = early.max(initial=-math.inf) < facts.uniform + 0.5 and curve.val[-1] < curve.val[0] - 0.02
    learned = min(early[-3:].mean(), curve.val.min(initial=math.inf, where=curve.eval_steps < 1)) if len(early) else 0.0
    if facts.uniform - facts.unigram < 0.2 or full[-1] < SLOW or learned < frequencies or not smooth:
        return ""
    if curve.level(0.8, 1.0) < facts.bigram:
        return ""
    return (
        f"The learning rate is too low: after {curve.steps[-1]:.0f} steps the loss is {curve.level(0.8, 1.0):.2f}, "
        f"where counting single tokens gives {facts.unigram:.2f}. Train again with ten times the learning rate."
    )


def _steps_at_full_rate(curve: Curve) -> np.ndarray:
    """For each logged step, the sum of the learning rates so far, in units of the highest: (n,)."""
    peak = curve.lr.max() or 1.0
    return np.cumsum(np.diff(curve.steps, prepend=0) * (curve.lr / peak if curve.lr.any() else 1.0))


def nothing_to_learn(curve: Curve, facts: Facts) -> str:
    """The loss is flat at that of counting single tokens: what comes before says nothing about the next token."""
    if facts.done < 0.4 or _steps_at_full_rate(curve)[-1] < 60:
        return ""
    now, before = curve.level(0.7, 1.0), curve.level(0.3, 0.7)
    random_text = facts.bigram > facts.unigram - 0.01
    near = abs(now - facts.unigram) < (0.05 if random_text else 0.15)
    better = min(curve.val[-1], curve.fit[-1]) < facts.unigram - (0.03 if random_text else 0.15)
    if not near or better or before - now > 0.05 or (not random_text and now < facts.bigram + 0.15):
        return ""
    return (
        f"Nothing to learn: the loss stays at {now:.2f}, the same as counting single tokens ({facts.unigram:.2f}). "
        "Check whether the text or the targets are shuffled."
    )


def text_too_small(curve: Curve, facts: Facts) -> str:
    """A short text was read many times, and the model knows it far better than the validation text."""
    epochs = curve.steps[-1] * curve.tokens_per_step / max(1, facts.tokens)
    small = facts.tokens < SMALL_TEXT or facts.parameters > 100 * facts.tokens
    gap = curve.val[-1] - curve.fit[-1]
    if not small or epochs < 4 or gap < 0.3 or curve.val[-1] < curve.val.min() + 0.05:
        return ""
    return (
        f"The text is too small for the model: {facts.tokens:,} tokens were read {epochs:.0f} times by "
        f"{facts.parameters:,} parameters. The loss is {curve.fit[-1]:.2f} on them and {curve.val[-1]:.2f} on "
        "validation text. Add text, or make the model smaller (--n_layer, --n_embd)."
    )


def overfits(curve: Curve, facts: Facts) -> str:
    """The validation loss has risen in at least two evaluations while the loss on training text fell."""
    best = int(curve.val.argmin())
    later, rise = curve.val[best + 1 :], curve.val[-1] - curve.val[best]
    fell = curve.fit[best] - curve.fit[-1]
    if len(later) < 2 or min(later[-2:]) < curve.val[best] + 0.04 or rise < 0.05 or fell < 0.03:
        return ""
    return (
        f"Overfitting since step {curve.eval_steps[best]:.0f}: the validation loss rose from {curve.val[best]:.2f} to "
        f"{curve.val[-1]:.2f} while the loss on training text fell to {curve.fit[-1]:.2f}. More text, more --dropout, "
        "a smaller model or fewer steps would help; the best checkpoint is kept."
    )


def spikes(curve: Curve, facts: Facts) -> str:
    """The loss jumped at least twice, and each time stayed high for two logged steps or more."""
    losses, found, i = curve.losses, [], 8
    while i < len(losses) - 1:
        before = losses[max(0, i - 12) : i]
        usual, noise = float(np.median(before)), 1.5 * float(np.median(np.abs(np.diff(before))))
        if min(losses[i], losses[i + 1]) > usual + max(0.5, 8 * noise):
            found.append(int(curve.steps[i]))
            i += 12
        i += 1
    if len(found) < 2:
        return ""
    return (
        f"Spikes: the loss jumped {len(found)} times, the last time near step {found[-1]}. A lower learning rate, a "
        "longer --warmup_iters or a smaller --grad_clip would help."
    )


def as_predicted(curve: Curve, facts: Facts) -> str:
    if facts.forecast is None or facts.done < 0.999:
        return ""
    expected, margin = facts.forecast
    loss = curve.val.min()
    predicted = f"the validation loss is {loss:.2f}, expected was {expected:.2f} ± {margin:.2f}"
    if abs(loss - expected) <= margin:
        return f"As predicted: {predicted}."
    return f"Better than predicted: {predicted}." if loss < expected else f"Worse than predicted: {predicted}."


def falling(curve: Curve, facts: Facts) -> str:
    """The last half of the steps brought so much that a run of this length is too short."""
    if facts.done < 0.999:
        return ""
    before, after = curve.between(0.4, 0.6), curve.between(0.9, 1.0)
    if min(len(before), len(after)) < 2:  # few steps were logged
        before, after = curve.between(0.3, 0.6), curve.between(0.7, 1.0)
    if not len(before) or not len(after):
        return ""
    fall, error = float(before.mean() - after.mean()), math.sqrt(before.var() / len(before) + after.var() / len(after))
    share = fall / max(facts.uniform - after.mean(), 0.1)
    needed, sure = (0.04, 2) if curve.val[-1] > facts.bigram else (0.14, 3)  # share of the fall, standard errors
    if share < needed or fall < max(sure * error, 0.02 * facts.uniform):
        return ""
    return (
        f"Still falling fast when the time ran out: the training loss fell by {fall:.2f} in the last half of the run, "
        f"to {after.mean():.2f}. Train for twice as long."
    )


def worse_than_counting(curve: Curve, facts: Facts) -> str:
    if facts.done < 0.999 or curve.val.min() < facts.bigram + 0.03:
        return ""
    return (
        f"Worse than {facts.counting}: the validation loss is {curve.val.min():.2f}, and {facts.counting} gives "
        f"{facts.bigram:.2f}. Train for longer, or with a larger model."
    )
