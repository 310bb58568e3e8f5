"""The statistics of ablate.py: against tables, enumeration, and simulated series whose truth is known."""

import itertools
import math

import numpy as np
import pytest

from minutegpt.paired import (
    ERROR,
    below,
    error_at,
    interval,
    judge,
    more_seeds,
    outcome,
    sign_test,
    t_quantile,
    t_tail,
)

# Student's t as printed in tables: degrees of freedom -> two-sided 10%, 5%, 1%, 0.1%
TABLE = {
    1: (6.314, 12.706, 63.657, 636.619), 2: (2.920, 4.303, 9.925, 31.599), 3: (2.353, 3.182, 5.841, 12.924),
    4: (2.132, 2.776, 4.604, 8.610), 5: (2.015, 2.571, 4.032, 6.869), 7: (1.895, 2.365, 3.499, 5.408),
    10: (1.812, 2.228, 3.169, 4.587), 30: (1.697, 2.042, 2.750, 3.646), 60: (1.671, 2.000, 2.660, 3.460),
}  # fmt: skip


@pytest.mark.parametrize("df", TABLE)
def test_t_quantiles_are_those_of_the_table(df):
    found = [t_quantile(error, df) for error in (0.1, 0.05, 0.01, 0.001)]
    assert found == pytest.approx(TABLE[df], abs=6e-4)


@pytest.mark.parametrize("df", [1, 2, 3, 6, 11])
def test_the_tail_is_the_integral_of_the_density(df):
    constant = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    for t in (0.0, 0.3, 2.0, 9.0):
        x = np.linspace(-t, t, 200_001)
        y = constant * (1 + x * x / df) ** (-(df + 1) / 2)
        middle = float(((y[1:] + y[:-1]) / 2).sum() * (x[1] - x[0]))
        assert t_tail(t, df) == pytest.approx(1 - middle, abs=1e-8)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_sign_test_counts_all_sign_patterns(n):
    patterns = list(itertools.product((-1, 1), repeat=n))
    for signs in patterns:
        extreme = sum(abs(sum(other)) >= abs(sum(signs)) for other in patterns)
        negative, untied, p = sign_test([0.01 * s for s in signs] + [0.0])
        assert (negative, untied) == (signs.count(-1), n)
        assert p == pytest.approx(extreme / 2**n)
    assert sign_test([0.0, 0.0]) == (0, 0, 1.0)


@pytest.mark.parametrize("plan", [[2], [6], [6, 12], [4, 5, 20]])
def test_the_errors_of_all_looks_add_up_to_five_percent_at_most(plan):
    spent = [error_at(n, plan, n_variants=3) for n in range(2, plan[-1] + 1)]
    assert all(error > 0 for error in spent)
    assert 0.8 * ERROR < 3 * sum(spent) <= ERROR
    with pytest.raises(ValueError):
        error_at(plan[-1] + 1, plan)


def test_an_extension_leaves_the_looks_before_it_as_they_were():
    assert [error_at(n, [6, 9]) for n in range(1, 7)] == [error_at(n, [6]) for n in range(1, 7)]


# -- whole series, simulated: differences (R, K, N) with a shared baseline, as ablate.py makes them


def series(truth: float, noise: float, repeats: int, n_variants: int, n_seeds: int) -> np.ndarray:
    """Differences with that mean and standard deviation; half of their variance is the baseline's, in all variants."""
    random = np.random.default_rng(1)
    own = random.normal(0, noise / math.sqrt(2), (repeats, n_variants, n_seeds))
    return truth + own - random.normal(0, noise / math.sqrt(2), (repeats, 1, n_seeds))


def first_outcomes(d: np.ndarray, plan: list[int], margin: float, n_planned: int | None = None) -> np.ndarray:
    """What each variant is decided as, looking after every seed, and stopping it there: (R, K, N) -> (R, K)."""
    decided = np.zeros(d.shape[:2], int)
    for n in range(2, d.shape[2] + 1):
        error = error_at(n, plan, n_planned or d.shape[1])
        found = outcome(*interval(d[..., :n], error), margin)
        decided = np.where(decided == 0, found, decided)
    return decided


def naive_outcomes(d: np.ndarray) -> np.ndarray:
    """The same with an ordinary 95% interval at each look."""
    decided = np.zeros(d.shape[:2], int)
    for n in range(2, d.shape[2] + 1):
        found = outcome(*interval(d[..., :n], 0.05), 0.0)
        decided = np.where(decided == 0, found, decided)
    return decided


@pytest.mark.parametrize(("n_variants", "plan"), [(1, [6]), (3, [6]), (10, [8]), (1, [6, 12])])
def test_changes_that_do_nothing_rarely_pass(n_variants, plan):
    """All looks and all variants count: one wrong "better" or "worse" makes the whole series wrong."""
    d = series(0.0, 0.005, 20_000, n_variants, plan[-1])
    wrong = np.isin(first_outcomes(d, plan, margin=0.0), (-1, 1)).any(1).mean()
    assert 0.015 < wrong < 0.05  # below: the procedure would be far too careful
    assert np.isin(naive_outcomes(d), (-1, 1)).any(1).mean() > 0.1  # the simulation can tell


@pytest.mark.parametrize("noise", [0.001, 0.005, 0.02])
def test_a_difference_at_the_margin_is_rarely_called_none(noise):
    d = series(0.010001, noise, 20_000, 2, 8)
    assert (first_outcomes(d, [8], margin=0.01) == 2).any(1).mean() < 0.05


def test_the_intervals_of_all_looks_contain_the_truth():
    d = series(0.007, 0.005, 20_000, 3, 6)
    missed = np.zeros(len(d), bool)
    for n in range(2, 7):
        mean, half = interval(d[..., :n], error_at(n, [6], 3))
        missed |= (np.abs(mean - 0.007) > half).any(1)
    assert 0.015 < missed.mean() < 0.05


def test_a_true_difference_of_one_hundredth_is_found_within_six_seeds():
    """At the paired noise of the small config (docs/results.md) and at twice that."""
    for noise, power in ((0.005, 0.88), (0.0025, 0.995)):
        found = first_outcomes(series(-0.01, noise, 20_000, 1, 6), [6], margin=0.01)
        assert (found == -1).mean() > power
    three = first_outcomes(series(-0.01, 0.0025, 20_000, 3, 6), [6], margin=0.01)
    assert (three == -1).mean() > 0.98


def test_six_seeds_show_that_nothing_is_there():
    found = first_outcomes(series(0.0, 0.004, 20_000, 1, 6), [6], margin=0.01)
    assert (found == 2).mean() > 0.9


def test_heavy_tails_do_not_add_false_results():
    random = np.random.default_rng(2)
    d = 0.005 * random.standard_t(3, (20_000, 3, 6))
    assert np.isin(first_outcomes(d, [6], margin=0.0), (-1, 1)).any(1).mean() < 0.05


# -- in words


def test_the_verdicts():
    better = judge([-0.011, -0.013, -0.012, -0.010])
    assert (better["verdict"], better["decided"]) == ("better by 0.0115 ± 0.0045", True)
    assert (better["better_seeds"], better["untied_seeds"], better["sign_p"]) == (4, 4, 0.125)
    assert judge([0.011, 0.013, 0.012, 0.010])["verdict"] == "worse by 0.0115 ± 0.0045"
    none = judge([0.001, -0.001, 0.0005, -0.002])
    assert none["verdict"] == "no difference larger than 0.0052" and none["decided"]
    assert abs(none["mean"]) + none["half_width"] <= 0.0052
    assert judge([0.0, 0.0])["verdict"] == "no difference: the same losses"
    for few in ([], [-0.5]):
        assert judge(few)["verdict"] == "not decided: 2 seeds at least" and not judge(few)["decided"]


def test_what_is_not_decided_says_how_many_seeds_would_do():
    result = judge([0.01, -0.004, 0.012, 0.0])
    assert result["kind"] == "undecided" and not result["decided"]
    d = np.array([0.01, -0.004, 0.012, 0.0])
    more = more_seeds(float(d.mean()), float(d.std(ddof=1)), 4, [6], 1, 0.01)
    assert result["verdict"] == f"not decided: about {more} more seeds"
    # so many more, of the same mean and spread, are decided; one fewer are not
    for extra, decided in ((more, True), (more - 1, False)):
        n = 4 + extra
        z = np.linspace(-1, 1, n)
        made = d.mean() + d.std(ddof=1) * z / z.std(ddof=1)
        assert judge(made.tolist(), plan=[6, n])["decided"] is decided
    assert judge([1.0, -1.0, 0.9, -0.9])["verdict"] == "not decided: more than 56 more seeds"


def test_more_variants_make_an_interval_wider():
    d = [-0.011, -0.013, -0.012, -0.010]
    assert judge(d, n_variants=5)["half_width"] > judge(d)["half_width"]


def test_below_a_bar():
    assert below([1.460, 1.459, 1.461], 1.4697) < 0.01 < below([1.46, 1.45, 1.47], 1.4697)
    assert below([1.48, 1.481, 1.479], 1.4697) > 0.99
    assert below([1.4, 1.4], 1.5) == 0 and below([1.5, 1.5], 1.5) == 1
    random = np.random.default_rng(3)
    wrong = [below(x, 1.0) < 0.05 for x in random.normal(1.0, 0.01, (4000, 3))]
    assert 0.035 < np.mean(wrong) < 0.065
