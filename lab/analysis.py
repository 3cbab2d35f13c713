"""From runs to a verdict, by rules that were fixed before any run (experiments/PROTOCOL.md).

A claim "first above second" (or below) is tested on each of its metrics by a paired comparison: runs with equal seeds
start from the same student and meet the same problems. All tests of an experiment are corrected together (Holm). The
claim is
  supported      if every difference has the claimed sign and one at least is significant;
  contradicted   if every difference has the other sign and one at least is significant;
  undecided      otherwise.
A claim "first near second" is supported if every 95% interval lies within the margin, contradicted if one lies wholly
outside, and undecided otherwise; it makes no test. An experiment is
  replicated     if every claim is supported,
  partly         if some are,
  refuted        if none is and at least one is contradicted,
  not            if none is and none is contradicted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dopd.statistics import Comparison, Interval, holm, mean_interval, paired_comparison
from lab.spec import Claim, Experiment

SIGNIFICANT = 0.05
NO_CLAIM = "nothing claimed"
Seeds = tuple[int, int]  # pretraining seed, run seed
Values = Mapping[str, Mapping[Seeds, Mapping[str, float]]]  # by condition, seeds and metric


@dataclass(frozen=True)
class Test:
    """One claim on one metric; `p` is Holm's adjusted value, `nan` for a claim of nearness."""

    metric: str
    comparison: Comparison
    p: float
    pairs: int


@dataclass(frozen=True)
class Judgement:
    """A claim, its tests and the outcome: `supported`, `contradicted` or `undecided`."""

    claim: Claim
    tests: tuple[Test, ...]
    outcome: str


def collect(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, dict[Seeds, dict[str, float]]]:
    """Metrics of (label, record) pairs, with those derived from curves; see `derived`."""
    values: dict[str, dict[Seeds, dict[str, float]]] = {}
    for label, record in runs:
        seeds = (record["run"]["pretraining_seed"], record["run"]["run_seed"])
        values.setdefault(label, {})[seeds] = {**record["metrics"], **derived(record)}
    return values


def derived(record: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a run that its curves or stages give.

    `early_gain`: accuracy of the rollouts in steps 21 to 30 less that in steps 1 to 10. `late_change`: that of the last
    part less that in steps 21 to 30. `entropy_ratio`: entropy of the last part over that of steps 1 to 10. `tokens`:
    completion tokens seen. Of several stages: `learned`, the mean over stages of the accuracy (greedy) on the stage's
    family right after it, and `kept`, the mean over earlier families of the accuracy at the end less that right after
    their own stage.
    """
    found: dict[str, float] = {"tokens": float(record["tokens"])}
    accuracy, entropy = record["curves"].get("rollout/accuracy", []), record["curves"].get("entropy", [])
    families = record["run"]["families"]
    if len(accuracy) >= 4 and len(families) == 1:
        found["early_gain"] = accuracy[2] - accuracy[0]
        found["late_change"] = accuracy[-1] - accuracy[2]
        found["entropy_ratio"] = entropy[-1] / entropy[0] if entropy[0] else math.nan
    if len(families) > 1 and record["status"] == "finished":
        metrics = record["metrics"]
        after = {f: metrics[f"stage{number}/greedy"] for number, f in enumerate(families, 1)}
        found["learned"] = sum(after.values()) / len(after)
        ends = [metrics[f"{family}:test/greedy"] - after[family] for family in families[:-1]]
        found["kept"] = sum(ends) / len(ends)
    return found


def summarise(values: Values, label: str, metric: str) -> Interval | None:
    """Mean over the runs of a condition; `None` where no run has the metric."""
    found = [metrics[metric] for metrics in values.get(label, {}).values() if metric in metrics]
    return mean_interval(found) if found else None


def judge(experiment: Experiment, values: Values) -> list[Judgement]:
    """Every claim with its tests, corrected together.

    Raises:
        KeyError: a run lacks a metric that a claim compares.
    """
    raw = {id(claim): [_compare(claim, metric, values) for metric in claim.metrics] for claim in experiment.claims}
    tested = [claim for claim in experiment.claims if claim.kind != "near"]
    adjusted = iter(holm([test.comparison.p for claim in tested for test in raw[id(claim)]]))
    judgements = []
    for claim in experiment.claims:
        if claim.kind != "near":
            tests = tuple(Test(t.metric, t.comparison, next(adjusted), t.pairs) for t in raw[id(claim)])
            outcome = _ordered(tests, 1.0 if claim.kind == "above" else -1.0)
        else:
            tests = tuple(raw[id(claim)])
            outcome = _near(tests, claim.margin)
        judgements.append(Judgement(claim, tests, outcome))
    return judgements


def verdict(judgements: Sequence[Judgement]) -> str:
    """`replicated`, `partly`, `not` or `refuted`; see the head of this module. `NO_CLAIM` where nothing is claimed."""
    if not judgements:
        return NO_CLAIM
    outcomes = [judgement.outcome for judgement in judgements]
    if all(outcome == "supported" for outcome in outcomes):
        return "replicated"
    if "supported" in outcomes:
        return "partly"
    return "refuted" if "contradicted" in outcomes else "not"


def _compare(claim: Claim, metric: str, values: Values) -> Test:
    first, second = values[claim.first], values.get(claim.second, {})
    seeds = sorted(set(first) & set(second)) if claim.second else sorted(first)
    a = [first[key][metric] for key in seeds]
    b = [second[key][metric] if claim.second else 0.0 for key in seeds]
    return Test(metric, paired_comparison(a, b), math.nan, len(seeds))


def _ordered(tests: Sequence[Test], sign: float) -> str:
    means = [sign * test.comparison.difference.mean for test in tests]
    if any(test.p < SIGNIFICANT for test in tests):
        if all(mean > 0 for mean in means):
            return "supported"
        if all(mean < 0 for mean in means):
            return "contradicted"
    return "undecided"


def _near(tests: Sequence[Test], margin: float) -> str:
    intervals = [test.comparison.difference for test in tests]
    if all(-margin < i.low and i.high < margin for i in intervals):
        return "supported"
    if any(i.low > margin or i.high < -margin for i in intervals):
        return "contradicted"
    return "undecided"
