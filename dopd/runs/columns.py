"""Columns of a dataset, and what is inside them, under the names that a run reads them by."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, Json, LargeList, List

from dopd.data.turns import asked_turns
from dopd.errors import DataError, did_you_mean
from dopd.trainer.images import undecoded

logger = logging.getLogger(__name__)

_PROMPT = "prompt"
_DEEPEST = 4  # names of a path that are looked for
_LAST = -1


def with_columns(rows: Dataset, columns: Mapping[str, str], where: str) -> Dataset:
    """Rows in which each column has its name of a run; one that is read by several names is there under each.

    A conversation that is mapped to `prompt` is asked: turns with `from` and `value`, and turns that are written as
    text, become turns with `role` and `content`, and the assistant's turns at its end are left out.

    Args:
        rows (`Dataset`): as they were read.
        columns (`dict[str, str]`): the dataset's name of a column by the run's, as `{"prompt": "question"}`; of a
            value inside a column its path, as `{"answer": "reward_model.ground_truth"}` or, of a list,
            `{"answer": "messages.-1.content"}`.
        where (`str`): the dataset, for messages.

    Raises:
        DataError: the dataset has no such column, or has another one of the run's name; a path leads nowhere, or a
            turn is of somebody unknown.
    """
    check_names(rows.column_names, columns, where)
    paths: dict[str, tuple[str, list[str]]] = {}
    for name, theirs in columns.items():
        column, steps = split_path(theirs, rows.column_names)
        paths[name] = (str(column), steps)
    inner = {name: _values(rows, name, columns[name], path, where) for name, path in paths.items() if path[1]}
    first: dict[str, str] = {}
    for name, (column, steps) in paths.items():
        if not steps:
            first.setdefault(column, name)
    for name, (values, feature) in inner.items():  # a dataset without columns would have no rows, so these come first
        rows = rows.add_column(_beside(name), values, feature=feature)
    rows = rows.remove_columns([name for name in inner if name in rows.column_names and name not in first])
    renamed = {theirs: name for theirs, name in first.items() if theirs != name}
    rows = rows.rename_columns(renamed | {_beside(name): name for name in inner})
    for name, (column, steps) in paths.items():
        if not steps and name != first[column]:
            rows = rows.add_column(name, rows[first[column]], feature=rows.features[first[column]])
    return _asked(rows, columns[_PROMPT], where) if _PROMPT in columns else rows


def check_names(there: Sequence[str], columns: Mapping[str, str], where: str) -> None:
    """Raise `DataError` as `with_columns` does, by the names of columns alone."""
    read = {column for theirs in columns.values() if (column := split_path(theirs, there)[0])}
    for name, theirs in columns.items():
        if split_path(theirs, there)[0] is None:
            raise DataError(
                f"columns: {name} (={theirs!r}) is not a column of {where}.{did_you_mean(theirs, there)} It has "
                f"{', '.join(there) or 'no columns'}"
            )
        if name in there and name != theirs and name not in read:
            raise DataError(
                f"columns: {name} (={theirs!r}): {where} has a column {name!r} already. Leave {name} out of columns, "
                "or rename that column in the dataset"
            )


def split_path(theirs: str, there: Sequence[str]) -> tuple[str | None, list[str]]:
    """The column that a path begins with, `None` if there is none, and the steps into its values.

    A column whose own name has dots in it comes first.
    """
    parts = theirs.split(".")
    for count in range(len(parts), 0, -1):
        column = ".".join(parts[:count])
        if column in there:
            return column, parts[count:]
    return None, []


def all_paths(features: Mapping[str, Any]) -> list[str]:
    """The names of columns, and the paths of the values in those that are mappings."""
    return [path for name, kind in features.items() for path in _paths(name, kind, _DEEPEST)]


def _paths(path: str, kind: Any, depth: int) -> Iterator[str]:
    yield path
    if isinstance(kind, dict) and depth > 1:
        for name, one in kind.items():
            yield from _paths(f"{path}.{name}", one, depth - 1)


def _values(rows: Dataset, name: str, theirs: str, path: tuple[str, list[str]], where: str) -> tuple[list[Any], Any]:
    """What is at the end of a path in every row, `None` where a row has nothing there; and its type, where that is
    declared.

    Raises:
        DataError: no row has it, or a text on the way is no JSON.
    """
    column, steps = path
    rows = undecoded(rows.select_columns([column]))
    feature, rest = rows.features[column], list(steps)
    while rest and isinstance(feature, dict | List | LargeList):
        step = rest[0]
        if isinstance(feature, dict):
            key, rest = split_path(".".join(rest), list(feature))
            if key is None:
                raise DataError(
                    f"columns: {name} (={theirs!r}): {step!r} is not in column {column!r} of {where}."
                    f"{did_you_mean(step, list(feature))} It has {', '.join(feature)}"
                )
            feature = feature[key]
        elif _index(step) is None:
            raise DataError(
                f"columns: {name} (={theirs!r}): {step!r} must be a whole number, for there is a list in column "
                f"{column!r} of {where}: 0 is its first value, and -1 its last one"
            )
        else:
            feature, rest = feature.feature, rest[1:]
    values = []
    for index, value in enumerate(rows[column]):
        try:
            values.append(_inside(value, steps))
        except ValueError as error:
            raise DataError(
                f"{where}: row {index}, column {column!r}: columns: {name} (={theirs!r}): {error}"
            ) from None
    if all(value is None for value in values):
        raise DataError(f"columns: {name} (={theirs!r}) leads to nothing in any row of {where}")
    # Behind text that is JSON, and in columns of JSON, nothing is declared.
    return values, None if rest or isinstance(feature, Json) else feature


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """What a row has in a column, or at the end of a path into one; `None` where there is nothing."""
    column, steps = split_path(path, list(row))
    try:
        return None if column is None else _inside(row[column], steps)
    except ValueError:
        return None


def _inside(value: Any, steps: Sequence[str]) -> Any:
    left = list(steps)
    while left:
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(f"{left[0]!r} is looked for in text that is not JSON ({error})") from None
        if isinstance(value, Mapping):
            key, left = split_path(".".join(left), list(value))  # keys may have dots in them
            value = None if key is None else value[key]
        elif isinstance(value, list) and (place := _index(left[0])) is not None:
            value, left = value[place] if -len(value) <= place < len(value) else None, left[1:]
        else:
            return None
    return value


def _index(step: str) -> int | None:
    return int(step) if step.removeprefix("-").isascii() and step.removeprefix("-").isdigit() else None


def _asked(rows: Dataset, theirs: str, where: str) -> Dataset:
    """The rows with their prompts as they are asked."""
    prompts = undecoded(rows.select_columns([_PROMPT]))
    asked, num_answered = [], 0
    changed = False
    for index, prompt in enumerate(prompts[_PROMPT]):
        try:
            turns = asked_turns(prompt)
        except DataError as error:
            raise DataError(f"{where}: row {index}, columns: prompt (={theirs!r}): {error}") from None
        changed = changed or turns != prompt
        num_answered += isinstance(prompt, list) and len(turns) < len(prompt)
        asked.append(turns)
    if not changed:
        return rows
    if num_answered:
        logger.warning(
            f"columns: prompt (={theirs!r}): the assistant's turns at the end of {num_answered} of {len(rows)} "
            f"conversations are no part of the prompt; the last one's text is '{theirs}.{_LAST}.content' (or .value)"
        )
    kind = prompts.features[_PROMPT]
    turn = kind.feature if isinstance(kind, List | LargeList) else None
    same = isinstance(kind, Json) or (isinstance(turn, dict) and "role" in turn and "from" not in turn)
    rows = rows.add_column(_beside(_PROMPT), asked, feature=kind if same else None)
    return rows.remove_columns(_PROMPT).rename_column(_beside(_PROMPT), _PROMPT)


def _beside(name: str) -> str:
    """A name that no dataset has, for a column that is there under its own one."""
    return f"{name} of dopd"
