"""Paired differences between methods, and from the start: the same for the page, the terminal and `summary.md`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dopd.report.roles import reference_of
from dopd.statistics import (
    Comparison,
    Interval,
    difference_interval,
    holm,
    mean_interval,
    paired_comparison,
    paired_scores_interval,
    wilson_interval,
)

START = "the start"
MEASURES = ("greedy", "sampled")
MIN_PAIRS = 3  # two differences say next to nothing about their spread
SIGNIFICANT = 0.05

Result = Mapping[str, Any]  # an evaluation, as `result.json` has it
BySeed = Mapping[int, Result]


@dataclass(frozen=True)
class Difference:
    """How much more accurate a method is than what it is compared with, without p.

    Attributes:
        method, against (`str`): labels; `against` may be `START`.
        measure (`str`): `"greedy"` or `"sampled"`.
        first, second (`float`): mean accuracies of `against` and of `method` in the pairs, in [0, 1].
        interval (`Interval`): of `second - first`, 95%, not corrected for the number of comparisons.
        pairs (`int`): seeds that both have; 0 where it is one run each with seeds of their own.
        prompts (`int`): held-out prompts of one evaluation; 0 if unknown.
        p (`float`, *optional*): of Student's paired test over seeds, after Holm's correction across the methods that
            are compared with `against` in this measure; `None` with fewer than `MIN_PAIRS` pairs.
        family (`int`): how many methods were.
    """

    method: str
    against: str
    measure: str
    first: float
    second: float
    interval: Interval
    pairs: int
    prompts: int
    p: float | None = None
    family: int = 1

    @property
    def verdict(self) -> str:
        """`"better"`, `"worse"`, `"undecided"`, or `"untested"` (`why_untested`).

        One pair is judged by its interval over prompts, which says nothing about other seeds.
        """
        if self.why_untested:
            return "untested"
        decided = self._excludes_zero if self.p is None else self.p < SIGNIFICANT
        if not decided:
            return "undecided"
        return "better" if self.interval.mean > 0 else "worse"

    @property
    def why_untested(self) -> str:
        """What is missing for a judgement; empty if nothing is."""
        if self.pairs > 1:
            return "" if self.p is not None else f"{self.pairs} seeds are too few"
        return "" if math.isfinite(self.interval.low) else "the number of prompts is unknown"

    @property
    def _excludes_zero(self) -> bool:
        return self.interval.low > 0 or self.interval.high < 0

    def points(self, unit: str = "") -> str:
        """`+3.5 [-1.0, +8.0]`, in percentage points; `unit` follows the first number."""
        mean, low, high = (100 * value for value in (self.interval.mean, self.interval.low, self.interval.high))
        return f"{mean:+.1f}{unit} [{low:+.1f}, {high:+.1f}]" if math.isfinite(low) else f"{mean:+.1f}{unit}"

    @property
    def limits(self) -> str:
        """What a clause about the verdict must add, so that it says no more than was tested; empty if nothing."""
        if self.verdict == "untested":
            return ""
        if self.pairs < 2:
            return " on these prompts"
        return " after correction" if self.verdict == "undecided" and self._excludes_zero else ""

    def words(self) -> str:
        """What it says, for a table."""
        if self.verdict == "untested":
            return f"not tested: {self.why_untested}"
        if self.pairs < 2:
            words = {"better": "better", "worse": "worse"}.get(self.verdict, "no difference")
            return f"{words}{self.limits}; one seed says nothing about others"
        return f"no difference beyond chance{self.limits}" if self.verdict == "undecided" else self.verdict


def compare(
    methods: Mapping[str, BySeed], starts: Mapping[str, BySeed], afterwards: Mapping[str, BySeed]
) -> list[Difference]:
    """Every method against its start, then every method against the reference; in the order of `methods`.

    Args:
        methods (`dict[str, dict[int, dict]]`): evaluations after training, by method and seed.
        starts, afterwards (`dict[str, dict[int, dict]]`): evaluations of the same prompts before and after training.
            They may be of other prompts than those of `methods`.
    """
    labels = list(methods)
    reference = reference_of(labels) if labels else None
    found = []
    for measure in MEASURES:
        found += _family(START, measure, {label: (starts[label], afterwards[label]) for label in labels})
        if reference is not None:
            others = {label: (methods[reference], methods[label]) for label in labels if label != reference}
            found += _family(reference, measure, others)
    return sorted(found, key=lambda difference: (difference.against != START, labels.index(difference.method)))


def _family(against: str, measure: str, sides: Mapping[str, tuple[BySeed, BySeed]]) -> list[Difference]:
    """Comparisons with one thing in one measure, corrected for their number."""
    differences = [_difference(label, against, measure, first, second) for label, (first, second) in sides.items()]
    found = [difference for difference in differences if difference is not None]
    tested = [difference for difference in found if difference.p is not None]
    corrected = dict(zip(map(id, tested), holm([d.p for d in tested if d.p is not None]), strict=True))
    return [replace(d, p=corrected.get(id(d)), family=max(len(tested), 1)) for d in found]


def _difference(method: str, against: str, measure: str, first: BySeed, second: BySeed) -> Difference | None:
    key = f"accuracy_{measure}"
    first = {seed: result for seed, result in first.items() if key in result["metrics"]}
    second = {seed: result for seed, result in second.items() if key in result["metrics"]}
    seeds = sorted(first.keys() & second.keys())
    if not seeds and len(first) == len(second) == 1:
        return _of_one_pair(method, against, measure, *first.values(), *second.values(), pairs=0)
    if not seeds:
        return None
    if len(seeds) == 1:
        return _of_one_pair(method, against, measure, first[seeds[0]], second[seeds[0]], pairs=1)
    if any(_prompts(first[seed]) != _prompts(second[seed]) for seed in seeds):
        return None  # of other prompts: what they differ in would look like a difference between methods
    before, after = ([side[seed]["metrics"][key] for seed in seeds] for side in (first, second))
    prompts = _prompts(second[seeds[0]])
    tested: Comparison = paired_comparison(after, before, _step(prompts))
    return Difference(
        method,
        against,
        measure,
        math.fsum(before) / len(before),
        math.fsum(after) / len(after),
        _possible(tested.difference),
        len(seeds),
        prompts,
        tested.p if len(seeds) >= MIN_PAIRS else None,
    )


def _of_one_pair(method: str, against: str, measure: str, first: Result, second: Result, *, pairs: int) -> Difference:
    """One run beside another (or its start): the interval is over prompts, paired where every prompt's score is known.

    Equal prompts are taken for granted with equal numbers of scores; otherwise the two count as independent, which is
    on the safe side where they share prompts.
    """
    key = f"accuracy_{measure}"
    before, after = (result["metrics"][key] for result in (first, second))
    scores = [result.get("scores", {}).get(measure, []) for result in (first, second)]
    if scores[0] and len(scores[0]) == len(scores[1]):
        interval = paired_scores_interval([b - a for a, b in zip(*scores, strict=True)])
    else:
        shares = [
            wilson_interval(result["metrics"][key] * _prompts(result), _prompts(result)) for result in (first, second)
        ]
        interval = difference_interval(*shares)
    if not math.isfinite(interval.low):  # nothing says over how many prompts
        interval = Interval(after - before, -math.inf, math.inf)
    return Difference(method, against, measure, before, after, interval, pairs, _prompts(second))


def over_seeds(results: Sequence[Result], metric: str) -> Interval | None:
    """The mean of an accuracy over runs that differ in the seed, with its interval; `None` where none has it."""
    having = [result for result in results if metric in result["metrics"]]
    if not having:
        return None
    return mean_interval([result["metrics"][metric] for result in having], _step(_prompts(having[0])))


def _step(prompts: int) -> float:
    """What two accuracies over so many prompts differ by at least, if they differ; 0 where the number is unknown."""
    return 1 / prompts if prompts else 0.0


def _possible(interval: Interval) -> Interval:
    """Without differences of more than 100 points."""
    return replace(interval, low=max(-1.0, interval.low), high=min(1.0, interval.high))


def _prompts(result: Result) -> int:
    return int(result["metrics"].get("num_prompts", 0))
