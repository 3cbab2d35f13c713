"""Paired comparisons of runs, and what many of them need."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dopd.statistics import Interval, mean_interval


@dataclass(frozen=True)
class Comparison:
    """A mean paired difference with its 95% interval, and the two-sided p of Student's paired test."""

    difference: Interval
    p: float


def paired_comparison(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """`first - second`, pair by pair; p is 1 for fewer than two pairs, which show no spread.

    Raises:
        ValueError: the two have different lengths.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    interval = mean_interval(differences)
    if len(differences) < 2:
        return Comparison(interval, 1.0)
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    if spread == 0:
        return Comparison(interval, 1.0 if interval.mean == 0 else 0.0)
    return Comparison(interval, two_sided_p(interval.mean / spread, len(differences) - 1))


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
