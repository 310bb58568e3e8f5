"""Is a change better, or luck? The statistics of ablate.py, for pairs of runs that share a seed.

judge([-0.011, -0.013, -0.012, -0.010], n_variants=1, plan=[6])["verdict"]  # "better by 0.0115 ± 0.0045"

Two runs of one seed read the same batches, so their difference has far less noise than either loss. For each variant
and after each seed there is an interval for the mean difference: Student's t over the differences. Looking after
every seed, at several variants, is many chances to be wrong, so the error of 5% is divided among them:

- each variant gets an equal share (Bonferroni);
- the look after n of N planned seeds spends (n/N)^4 - ((n-1)/N)^4 of that share: little while there are few pairs,
  most at the end (alpha spending: Lan and DeMets 1983, Biometrika 70:659; powers of n/N: Kim and DeMets 1987,
  Biometrika 74:149);
- a tenth is kept for the time after N, so that a plan may be extended: [6, 12] is 6 seeds and then up to 12.

All errors add up to 5% at most, however the looks and the variants depend on each other. So, with 95%
probability, all the intervals contain the true differences at all looks ("repeated confidence intervals": Jennison
and Turnbull 1989, J. R. Stat. Soc. B 51:305). Each verdict follows from its interval alone, so that is its error too,
whenever the runs stop. Assumed: seeds are independent, and a difference is roughly normal.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

ERROR = 0.05  # probability of one wrong statement or more, over all looks and variants
RESERVE = 0.1  # share of the error that is left for an extension of the plan
POWER = 4  # of n/N in what is spent up to the look n: found by simulation, 6 seeds, see tests/test_paired.py
MOST_SEEDS = 60  # no forecast of needed seeds goes further


def t_tail(t: float, df: int) -> float:
    """P(|T| > t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan2(t, math.sqrt(df))
    sin, cos = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = cos if odd else 1.0, 0.0
    for j in range(1 + odd, df, 2):
        total += term
        term *= cos * cos * j / (j + 1)
    return 1 - (angle + sin * total) * 2 / math.pi if odd else 1 - sin * total


def t_quantile(error: float, df: int) -> float:
    """The t with P(|T| > t) = error, by bisection.

    >>> round(t_quantile(0.05, df=5), 3)
    2.571
    """
    low, high = 0.0, 1.0
    while t_tail(high, df) > error:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > error else (low, middle)
    return high


def error_at(n: int, plan: Sequence[int], n_variants: int = 1) -> float:
    """The error that the look after n seeds may spend on one variant. plan: the seeds planned first, then extensions.

    >>> [round(error_at(n, [6]), 4) for n in (2, 3, 4, 5, 6)]
    [0.0005, 0.0023, 0.0061, 0.0128, 0.0233]
    """
    left, start = ERROR / n_variants, 0
    for stop in plan:
        if n <= stop:
            before, after = (n - 1 - start) / (stop - start), (n - start) / (stop - start)
            return left * (1 - RESERVE) * (after**POWER - before**POWER)
        left, start = left * RESERVE, stop
    raise ValueError(f"the look after {n} seeds is not in the plan {list(plan)}")


def interval(differences: np.ndarray, error: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half width of the t interval over the last axis: (..., n) -> (...), (...); n is 2 at least."""
    n = differences.shape[-1]
    spread = differences.std(-1, ddof=1) / math.sqrt(n)
    return differences.mean(-1), t_quantile(error, n - 1) * spread


KINDS = ("undecided", "worse", "same", "better")  # by outcome(); better is a lower loss, and -1


def outcome(mean: Any, half: Any, margin: float) -> np.ndarray:
    """-1 better, 1 worse, 2 no difference larger than the margin, 0 not decided; of numbers or arrays (...)."""
    decided = np.where(np.abs(mean) + half <= margin, 2, 0)
    return np.where(np.abs(mean) > half, np.sign(mean), decided).astype(int)


def sign_test(differences: Sequence[float]) -> tuple[int, int, float]:
    """How many are negative, how many are not 0, and the exact probability of a count at least as one-sided.

    >>> sign_test([-0.1, -0.2, -0.1, 0.3])
    (3, 4, 0.625)
    """
    n = sum(d != 0 for d in differences)
    negative = sum(d < 0 for d in differences)
    tail = sum(math.comb(n, k) for k in range(min(negative, n - negative) + 1))
    return negative, n, min(1.0, 2 * tail / 2**n)


def more_seeds(mean: float, spread: float, n: int, plan: Sequence[int], n_variants: int, margin: float) -> int:
    """How many more seeds decide, if mean and standard deviation stay as they are; 0 for more than MOST_SEEDS."""
    for m in range(n + 1, MOST_SEEDS + 1):
        extended = plan if m <= plan[-1] else [*plan, m]
        half = t_quantile(error_at(m, extended, n_variants), m - 1) * spread / math.sqrt(m)
        if outcome(mean, half, margin):
            return m - n
    return 0


def judge(
    differences: Sequence[float], n_variants: int = 1, plan: Sequence[int] = (6,), margin: float = 0.01
) -> dict[str, Any]:
    """What the differences loss(variant) - loss(baseline), one per seed, say of one of n_variants.

    mean, half_width (None before the second seed), standard_deviation; better_seeds of untied_seeds with the sign
    test's sign_p; decided; verdict, in words.
    """
    d = np.asarray(differences, np.float64)
    n = len(d)
    negative, untied, sign_p = sign_test(d.tolist())
    result: dict[str, Any] = {
        "seeds": n, "mean": float(d.mean()) if n else None, "half_width": None, "standard_deviation": None,
        "better_seeds": negative, "untied_seeds": untied, "sign_p": sign_p,
        "decided": False, "kind": "undecided", "verdict": "not decided: 2 seeds at least",
    }  # fmt: skip
    if n < 2:
        return result
    mean, half = (float(x) for x in interval(d, error_at(n, plan, n_variants)))
    spread = float(d.std(ddof=1))
    kind = KINDS[int(outcome(mean, half, margin))]
    if kind in ("better", "worse"):
        verdict = f"{kind} by {abs(mean):.4f} ± {half:.4f}"
    elif not d.any():
        verdict = "no difference: the same losses"
    elif kind == "same":
        verdict = f"no difference larger than {math.ceil(1e4 * (abs(mean) + half)) / 1e4:.4f}"
    else:
        more = more_seeds(mean, spread, n, plan, n_variants, margin)
        wanted = f"about {more} more seed{'s' * (more > 1)}" if more else f"more than {MOST_SEEDS - n} more seeds"
        verdict = f"not decided: {wanted}"
    return result | {"half_width": half, "standard_deviation": spread, "decided": kind != "undecided",
                     "kind": kind, "verdict": verdict}  # fmt: skip


def below(losses: Sequence[float], bar: float) -> float:
    """The probability of a mean this far below the bar, were the true mean at the bar: a t test, one-sided."""
    x = np.asarray(losses, np.float64)
    spread = float(x.std(ddof=1)) / math.sqrt(len(x))
    if spread == 0:
        return 0.0 if x.mean() < bar else 1.0
    t = (bar - float(x.mean())) / spread
    tail = t_tail(abs(t), len(x) - 1) / 2
    return tail if t > 0 else 1 - tail
