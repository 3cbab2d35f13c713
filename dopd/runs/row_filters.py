"""Which rows of a dataset are kept, and how many are not, by what is wrong with them."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from dopd.data.overlap import prompt_key
from dopd.data.views import is_blank
from dopd.errors import ConfigError, DataError, did_you_mean
from dopd.progress import tracked
from dopd.runs.columns import value_at
from dopd.trainer.images import undecoded


@dataclass(frozen=True)
class Keep:
    """What rows need to be kept.

    Attributes:
        distinct (`bool`): no earlier row asks the same.
        filled (`list[str]`): columns, or paths into them, that have something.
        between (`dict[str, list[float]]`): the least and the most of a number, by column or path; a row without the
            number is not kept.
        without (`dict[str, list[str]]`): texts that are taken out of a column, such as marks of pictures' places.
    """

    distinct: bool = False
    filled: list[str] = field(default_factory=list)
    between: dict[str, list[float]] = field(default_factory=dict)
    without: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Keep":
        """Of `{distinct: true, filled: [answer], between: {difficulty: [1, 15]}}`.

        Raises:
            ConfigError: a name or a value that there is none of.
        """
        kinds = {"distinct": bool, "filled": list, "between": dict, "without": dict}
        for name, value in values.items():
            if name not in kinds:
                raise ConfigError(
                    f"keep: {name!r} must be one of {', '.join(kinds)}.{did_you_mean(str(name), list(kinds))}"
                )
            if not isinstance(value, kinds[name]):
                raise ConfigError(f"keep: {name} (={value!r}) must be a {kinds[name].__name__}")
        for name, limits in values.get("between", {}).items():
            numbers = isinstance(limits, list) and all(type(one) in (int, float) for one in limits)
            if not numbers or len(limits) != 2 or limits[0] > limits[1]:
                raise ConfigError(f"keep: between: {name} (={limits!r}) must be the least and the most: [1, 15]")
        return cls(**values)


def kept_rows(rows: Dataset, keep: Keep, where: str) -> tuple[Dataset, dict[str, int]]:
    """The rows that are kept, and how many are not, by the first reason.

    Args:
        rows (`Dataset`): under a run's names.
        keep (`Keep`): what they need.
        where (`str`): the dataset, for messages.

    Raises:
        DataError: a column that there is none of, or no row is kept.
    """
    for name in (*keep.filled, *keep.between, *keep.without):
        if name.split(".")[0] not in rows.column_names and name not in rows.column_names:
            raise DataError(f"keep: {name!r} is not a column of {where}: it has {', '.join(rows.column_names)}")
    for name, texts in keep.without.items():
        marks = re.compile("|".join(map(re.escape, texts)))
        rows = rows.map(lambda row, name=name, marks=marks: {name: _cut(row[name], marks)}, load_from_cache_file=False)
    kept, reasons, asked = [], Counter[str](), set()
    for index, row in enumerate(tracked("filtering rows", "row", undecoded(rows))):
        reason = _reason(row, keep)
        if reason is None and keep.distinct:
            try:
                key = prompt_key(row)
            except DataError:
                reason = "its prompt cannot be read"
            else:
                reason = "an earlier row asks the same" if key in asked else None
                asked.add(key)
        if reason is None:
            kept.append(index)
        else:
            reasons[reason] += 1
    if not kept:
        raise DataError(f"keep: no row of {where} is kept: {dict(reasons)}")
    return (rows if len(kept) == len(rows) else rows.select(kept)), dict(reasons)


def _reason(row: Mapping[str, Any], keep: Keep) -> str | None:
    for name in keep.filled:
        if _is_empty(value_at(row, name)):
            return f"{name} is empty"
    for name, (low, high) in keep.between.items():
        value = value_at(row, name)
        if not isinstance(value, int | float) or not low <= value <= high:
            return f"{name} is not between {low} and {high}"
    return None


def _is_empty(value: Any) -> bool:
    return is_blank(value) if value is None or isinstance(value, str) else value in ([], {})


def _cut(value: Any, marks: re.Pattern[str]) -> Any:
    """A text, or the texts of a conversation, without the marks."""
    if isinstance(value, str):
        return marks.sub("", value).strip()
    if isinstance(value, list):
        return [_cut(one, marks) if not isinstance(one, str) else one for one in value]
    if isinstance(value, Mapping):
        return {name: _cut(one, marks) if name in ("content", "text") else one for name, one in value.items()}
    return value
