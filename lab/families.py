"""The text families of the tiny scale: problems at the difficulty that the tiny models were made for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dopd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of problems.

    Attributes:
        task (`str`): name of the embedded task.
        stands_for (`str`): what it stands for in the paper's Table 1.
        options (`Mapping`): difficulty knobs.
        gold_tokens (`int`): tokens of a gold solution with its end-of-sequence token; a run's budget is counted in it.
        max_tokens (`int`): most tokens of an answer.
    """

    task: str
    stands_for: str
    options: Mapping[str, Any]
    gold_tokens: int
    max_tokens: int


FAMILIES: Mapping[str, Family] = {
    "dag": Family(
        task="dag",
        stands_for="reasoning",
        options={"num_needed": 3, "num_variables": 5},
        gold_tokens=19,
        max_tokens=25,
    ),
    "graph": Family(
        task="graph",
        stands_for="general",
        options={"path_length": 4, "num_forks": 2, "dead_end_depth": 3},
        gold_tokens=9,
        max_tokens=12,
    ),
    "program": Family(
        task="program",
        stands_for="coding",
        options={"num_ops": 2},
        gold_tokens=23,
        max_tokens=29,
    ),
}


def get_family(name: str) -> Family:
    """The family called `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in FAMILIES:
        raise ConfigError(f"family (={name!r}) must be one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
