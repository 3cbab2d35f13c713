"""Evaluations of the same rows beside one another: what they differ in, prompt by prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from dopd.errors import ConfigError
from dopd.evaluation.kept import MODEL, ROWS, Evaluated
from dopd.statistics import Interval, paired_scores_interval

_JUDGED_BY = (ROWS, "verifier", "verifier_options")  # without which two scores of a prompt cannot be compared


@dataclass(frozen=True)
class PairedDifference:
    """How much better the second of two models is.

    Attributes:
        first, second (`str`): their names.
        measure (`str`): `greedy`, `sampled` (the mean over draws), `privileged`, `blank` or `pass@k`.
        interval (`Interval`): of `second - first`: 95%, over prompts, not corrected for the number of comparisons.
        num_prompts (`int`): pairs.
    """

    first: str
    second: str
    measure: str
    interval: Interval
    num_prompts: int

    @property
    def says(self) -> str:
        """Whether it excludes no difference, in a word."""
        return "better" if self.interval.low > 0 else "worse" if self.interval.high < 0 else "within chance"

    def to_json(self) -> dict[str, Any]:
        named = {"first": self.first, "second": self.second, "measure": self.measure, "num_prompts": self.num_prompts}
        return named | {"mean": self.interval.mean, "low": self.interval.low, "high": self.interval.high}


def named_apart(evaluations: Sequence[Evaluated], otherwise: Sequence[str]) -> list[Evaluated]:
    """The evaluations with names that differ: those of models, or else those that are given."""
    names = [one.name for one in evaluations]
    if len(set(names)) == len(names):
        return list(evaluations)
    apart = [f"{one.name} ({other})" for one, other in zip(evaluations, otherwise, strict=True)]
    return [replace(one, name=name) for name, one in zip(apart, evaluations, strict=True)]


def check_same_rows(evaluations: Sequence[Evaluated]) -> None:
    """Raise `ConfigError` unless all have answered the same rows, with the same judge."""
    first = evaluations[0]
    for other in evaluations[1:]:
        for name in _JUDGED_BY:
            mine, theirs = first.about.get(name), other.about.get(name)
            if mine != theirs:
                raise ConfigError(
                    f"{name} of {other.name!r} (={theirs!r}) is not that of {first.name!r} (={mine!r}): differences "
                    "are of answers to the same rows by the same verifier. Evaluate both on one task, or one "
                    "--dataset-name with one --verifier and the same --prompts"
                )


def settings_that_differ(evaluations: Sequence[Evaluated]) -> dict[str, list[Any]]:
    """What decided the answers otherwise than in the first, beside the models: by name, the value of each."""
    names = dict.fromkeys(name for one in evaluations for name in one.about)
    values = {name: [one.about.get(name) for one in evaluations] for name in names if not name.startswith(MODEL)}
    return {name: each for name, each in values.items() if any(one != each[0] for one in each)}


def paired_differences(evaluations: Sequence[Evaluated]) -> list[PairedDifference]:
    """Every model against every one before it, in each measure that both have for the same prompts.

    Raises:
        ConfigError: `check_same_rows`.
    """
    check_same_rows(evaluations)
    found = []
    for first, second in combinations(evaluations, 2):
        mine, theirs = _scores(first), _scores(second)
        for measure, before in mine.items():
            after = theirs.get(measure, [])
            if before and len(before) == len(after):
                interval = paired_scores_interval([b - a for a, b in zip(before, after, strict=True)])
                found.append(PairedDifference(first.name, second.name, measure, interval, len(before)))
    return found


def _scores(evaluated: Evaluated) -> dict[str, list[float]]:
    return evaluated.result.scores() | {f"pass@{k}": values for k, values in evaluated.result.passes().items()}


def comparison_json(evaluations: Sequence[Evaluated]) -> dict[str, Any]:
    """Models and their paired differences, as one JSON object."""
    differences = [difference.to_json() for difference in paired_differences(evaluations)]
    return {
        "models": [one.to_json() for one in evaluations],
        "differences": differences,
        "settings_that_differ": settings_that_differ(evaluations),
    }
