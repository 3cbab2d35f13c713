"""Intervals and paired tests against tables and hand-computed values."""

import math
from random import Random

import pytest

from dopd.statistics import (
    _T95,
    holm,
    mean_interval,
    paired_comparison,
    paired_scores_interval,
    two_sided_p,
)


@pytest.mark.parametrize("freedom", range(1, 31))
def test_the_95_percent_quantile_of_t_has_p_005(freedom: int) -> None:
    assert two_sided_p(_T95[freedom - 1], freedom) == pytest.approx(0.05, abs=1e-4)


def test_p_of_t_at_known_points() -> None:
    assert two_sided_p(0.0, 4) == 1.0
    assert two_sided_p(1.0, 1) == pytest.approx(0.5)  # the Cauchy distribution's quartile
    assert two_sided_p(-2.0, 2) == pytest.approx(1 - 2 / math.sqrt(6))  # closed form for two degrees of freedom


def test_paired_comparison_takes_differences_pair_by_pair() -> None:
    result = paired_comparison([3.0, 5.0, 10.0], [1.0, 4.0, 7.0])  # differences 2, 1, 3
    assert result.difference == mean_interval([2.0, 1.0, 3.0])
    assert result.p == pytest.approx(two_sided_p(2 / math.sqrt(1 / 3), 2))


def test_equal_runs_and_single_pairs_show_nothing() -> None:
    assert paired_comparison([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired_comparison([5.0], [1.0]).p == 1.0
    assert paired_comparison([2.0, 3.0], [1.0, 2.0]).p == 0.0
    assert paired_comparison([0.1 + 0.2] * 3, [0.3] * 3).p == 1.0  # 6e-17 apart, by rounding alone
    with pytest.raises(ValueError):
        paired_comparison([1.0], [1.0, 2.0])


def test_holm_by_hand() -> None:
    # Sorted 0.01 x 3, 0.03 x 2 = 0.06, then max(0.06, 0.04 x 1).
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("spread", [0.2, 0.5, 1.0, 3.0])  # of the runs, in prompts
def test_a_spread_below_a_prompt_is_no_certainty(spread: float) -> None:
    """Three runs over 16 prompts, of a known mean: at most 5% of intervals miss it, however little they vary."""
    random, prompts, missed, trials = Random(0), 16, 0, 2000
    for _ in range(trials):
        truth = random.uniform(-3, 3)
        runs = [round(random.gauss(truth, spread)) / prompts for _ in range(3)]
        interval = mean_interval(runs, 1 / prompts)
        missed += not interval.low <= truth / prompts <= interval.high
    assert missed / trials < 0.065


def test_paired_scores_by_hand() -> None:
    # 4 of 16 lost, none won: (0 - 4) / 18 +- 1.96 sqrt(4.5 + 0.5 - 16 / 18) / 18, by Agresti and Min with half a pair
    # more in each of the four cells.
    lost = paired_scores_interval([-1.0] * 4 + [0.0] * 12)
    half = 1.959964 * math.sqrt(5 - 16 / 18) / 18
    assert (lost.mean, lost.low, lost.high) == pytest.approx((-0.25, -4 / 18 - half, -4 / 18 + half), abs=1e-6)
    same = paired_scores_interval([0.0] * 16)
    assert (same.mean, same.low, same.high) == pytest.approx((0.0, -1.959964 / 18, 1.959964 / 18))
    assert math.isnan(paired_scores_interval([]).mean)
