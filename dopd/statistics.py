"""Intervals for reports, of a proportion within one evaluation and of a mean over seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054
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


def wilson_interval(successes: float, trials: int) -> Interval:
    """Wilson's 95% interval of a proportion; `nan` without trials."""
    if trials == 0:
        return Interval(math.nan, math.nan, math.nan)
    share = successes / trials
    spread = Z95 * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    denominator = 1 + Z95**2 / trials
    centre = share + Z95**2 / (2 * trials)
    return Interval(share, max(0.0, (centre - spread) / denominator), min(1.0, (centre + spread) / denominator))


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent runs with Student's 95% interval; infinitely wide for a single run."""
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    freedom = len(values) - 1
    quantile = _T95[freedom - 1] if freedom <= len(_T95) else Z95
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)
