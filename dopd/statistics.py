"""Intervals of scores within one evaluation and of a mean over seeds; paired tests and their correction; pass@k."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054
_ROUNDING = 1e-12  # of sums of floats: a mean below it is none
# Two-sided 95% quantiles of Student's t by degrees of freedom; the normal's beyond the table.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval, in the unit of what was averaged."""

    mean: float
    low: float
    high: float

    def percent(self) -> str:
        """`61.3 [56.9, 65.6]`."""
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson_interval(successes: float, trials: float) -> Interval:
    """Wilson's 95% interval of a proportion; `nan` without trials, of which clustered ones count as a part."""
    if trials == 0:
        return Interval(math.nan, math.nan, math.nan)
    share = successes / trials
    spread = Z95 * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    denominator = 1 + Z95**2 / trials
    centre = share + Z95**2 / (2 * trials)
    return Interval(share, max(0.0, (centre - spread) / denominator), min(1.0, (centre + spread) / denominator))


def prompts_interval(scores: Sequence[float], draws: int = 1) -> Interval:
    """Mean over prompts of scores in [0, 1] with its 95% interval; `nan` without prompts.

    It is Wilson's, of as many independent answers as the spread between prompts shows (Kish's effective sample size,
    mean * (1 - mean) / variance for each prompt): one for each prompt where they are all right or all wrong, and at
    most `draws`. Draws of one prompt depend on one another, so they never count as prompts.

    Args:
        scores (`list[float]`): one of each prompt: of its answer, or the mean over its answers.
        draws (`int`): answers that a score is a mean of.
    """
    if not scores:
        return wilson_interval(0, 0)
    mean = statistics.fmean(scores)
    variance, whole = statistics.pvariance(scores, mean), mean * (1 - mean)
    worth = 1.0 if whole <= 0 else draws if variance <= 0 else min(draws, max(1.0, whole / variance))
    return wilson_interval(mean * len(scores) * worth, len(scores) * worth)


def pass_at(k: int, scores: Sequence[float]) -> float:
    """The mean, over all sets of `k` of a prompt's n scored answers, of the best score in the set.

    Of scores of 0 and 1, of which c are 1, it is the unbiased estimate 1 - C(n - c, k) / C(n, k) of pass@k (Chen et
    al., 2021, equation 1).

    Raises:
        ValueError: there are fewer scores than `k`, or `k` is below 1.
    """
    if not 1 <= k <= len(scores):
        raise ValueError(f"k (={k}) must be from 1 to the number of scores, {len(scores)}")
    best_first = sorted(scores, reverse=True)
    total, share = 0.0, k / len(scores)  # of the sets, those in which the best of all scores is
    for below, score in zip(range(len(scores) - 1, k - 2, -1), best_first, strict=False):
        total += share * score  # the best of a set, where it has `below` others below it
        share *= (below - k + 1) / max(below, 1)
    return total


def mean_interval(values: Sequence[float], step: float = 0.0) -> Interval:
    """Mean of independent runs with Student's 95% interval; infinitely wide for a single run.

    Args:
        values (`list[float]`): one of each run.
        step (`float`): what neighbouring values differ by, such as 1 / n of accuracies over n prompts; 0 if any value
            can occur. Runs that agree to the prompt may differ by what a step hides, so their standard deviation
            counts as at least that of rounding to it, step / sqrt(12). Without it, three runs of a spread below a
            step are wrong about zero in a quarter of all cases; with it, in at most 5%.
    """
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    freedom = len(values) - 1
    quantile = _T95[freedom - 1] if freedom <= len(_T95) else Z95
    half = quantile * _standard_error(values, step)
    return Interval(mean, mean - half, mean + half)


def _standard_error(values: Sequence[float], step: float) -> float:
    return max(statistics.stdev(values), step / math.sqrt(12)) / math.sqrt(len(values))


def paired_scores_interval(differences: Sequence[float]) -> Interval:
    """Mean of the paired differences of scores in [0, 1], of two answers to each prompt, with its 95% interval over
    prompts; `nan` without any.

    Agresti and Min's (2005): half a pair more of each outcome, so that prompts that all agree leave an interval.
    """
    if not differences:
        return Interval(math.nan, math.nan, math.nan)
    pairs = len(differences) + 2
    total, squares = math.fsum(differences), math.fsum(value * value for value in differences) + 1
    centre, half = total / pairs, Z95 * math.sqrt(squares - total**2 / pairs) / pairs
    return Interval(total / len(differences), max(-1.0, centre - half), min(1.0, centre + half))


def difference_interval(first: Interval, second: Interval) -> Interval:
    """Newcombe's 95% interval of `second - first` for two independent proportions with their Wilson intervals."""
    difference = second.mean - first.mean
    down = math.hypot(second.mean - second.low, first.high - first.mean)
    up = math.hypot(second.high - second.mean, first.mean - first.low)
    return Interval(difference, difference - down, difference + up)


@dataclass(frozen=True)
class Comparison:
    """A mean paired difference with its 95% interval, and the two-sided p of Student's paired test."""

    difference: Interval
    p: float


def paired_comparison(first: Sequence[float], second: Sequence[float], step: float = 0.0) -> Comparison:
    """`first - second`, pair by pair; p is 1 for fewer than two pairs, which show no spread.

    `step` is that of the values, as in [`mean_interval`].

    Raises:
        ValueError: the two have different lengths.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    interval = mean_interval(differences, step)
    if len(differences) < 2 or math.isclose(interval.mean, 0.0, abs_tol=_ROUNDING):
        return Comparison(interval, 1.0)
    error = _standard_error(differences, step)
    return Comparison(interval, two_sided_p(interval.mean / error, len(differences) - 1) if error else 0.0)


def two_sided_p(t: float, freedom: int) -> float:
    """Probability of a value of Student's t at least as far from 0, in the closed form for whole degrees of freedom.

    With theta = atan(t / sqrt(freedom)), the mass between -t and t is a finite sum of powers of cos(theta)
    (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    theta = math.atan(abs(t) / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(theta) ** 2 * power / (power + 1)
    inside = math.sin(theta) * total
    if odd:
        inside = 2 / math.pi * (theta + inside)
    return min(1.0, max(0.0, 1.0 - inside))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: their rejection at 0.05 keeps the family-wise error below 0.05."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
