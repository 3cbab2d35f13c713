"""Columns of a dataset, and what is inside them, under the names that a run reads them by."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, Json, LargeList, List, Value

from dopd.data.column_names import SYSTEM, Columns, paths_of, place_in_list, split_path
from dopd.data.images import COLUMNS, PRIVILEGED_COLUMN
from dopd.data.turns import ROLES, as_turns, asked_turns, has_blocks, has_marks, joined, with_places, with_system
from dopd.data.views import images_of
from dopd.errors import DataError, did_you_mean
from dopd.sources import REFERENCE_COLUMN
from dopd.trainer.images import undecoded

logger = logging.getLogger(__name__)

_PROMPT = "prompt"
_DEEPEST = 4  # names of a path that are looked for
_LAST = -1
_ANSWERS = ("answer", REFERENCE_COLUMN)


def with_columns(rows: Dataset, columns: Columns, where: str) -> Dataset:
    """Rows in which each column has its name of a run; one that is read by several names is there under each.

    Several columns are put together: texts as one, a blank line between them, and pictures as a list. `system` is no
    column, but the first turn of the prompt. A conversation that is mapped to `prompt` is asked: turns with `from` and
    `value`, and turns that are written as text, become turns with `role` and `content`, and the assistant's turns at
    its end are left out; in rows with pictures, `<image>` is the place of one.

    Args:
        rows (`Dataset`): as they were read.
        columns (`dict[str, str or list[str]]`): the dataset's name of a column by the run's, as `{"prompt":
            "question"}`, or several of them; of a value inside a column its path, as `{"answer":
            "reward_model.ground_truth"}` or, of a list, `{"answer": "messages.-1.content"}`.
        where (`str`): the dataset, for messages.

    Raises:
        DataError: the dataset has no such column, or has another one of the run's name; a path leads nowhere, a
            turn is of somebody unknown, or what is to be put together is no text.
    """
    check_names(rows.column_names, columns, where)
    whole: dict[str, str] = {}  # columns that are there, by the run's names
    composed: dict[str, tuple[list[Any], Any]] = {}
    taken: set[str] = set()  # columns that are read, and not only something inside of them
    for name, theirs in columns.items():
        paths = {path: split_path(path, rows.column_names) for path in paths_of(theirs)}
        taken |= {str(column) for column, steps in paths.values() if not steps}
        (column, steps), several = next(iter(paths.values())), not isinstance(theirs, str)
        if steps or several or name == SYSTEM:
            found = {path: _values(rows, name, path, place, where) for path, place in paths.items()}
            composed[name] = _together(found, name, where) if several else found[str(theirs)]
        else:
            whole[name] = str(column)
    systems, _ = composed.pop(SYSTEM, (None, None))
    first: dict[str, str] = {}
    for name, column in whole.items():
        first.setdefault(column, name)
    # A dataset without columns would have no rows, so these come first.
    for name, (values, feature) in composed.items():
        rows = rows.add_column(_beside(name), values, feature=feature)
    replaced = {name for name in rows.column_names if name in composed or name in taken}
    rows = rows.remove_columns([name for name in replaced if name not in first])
    renamed = {theirs: name for theirs, name in first.items() if theirs != name}
    rows = rows.rename_columns(renamed | {_beside(name): name for name in composed})
    for name, column in whole.items():
        if name != first[column]:
            rows = rows.add_column(name, rows[first[column]], feature=rows.features[first[column]])
    if _PROMPT not in rows.column_names or not {_PROMPT, SYSTEM} & set(columns):
        return rows
    return _asked(rows, systems, paths_of(columns.get(_PROMPT, _PROMPT)), where)


def check_names(there: Sequence[str], columns: Columns, where: str) -> None:
    """Raise `DataError` as `with_columns` does, by the names of columns alone."""
    read = {split_path(path, there)[0] for theirs in columns.values() for path in paths_of(theirs)}
    for name, theirs in columns.items():
        for path in paths_of(theirs):
            if split_path(path, there)[0] is None:
                raise DataError(
                    f"columns: {name} (={path!r}) is not a column of {where}.{did_you_mean(path, there)} It has "
                    f"{', '.join(there) or 'no columns'}"
                )
        if name in there and name not in read:
            raise DataError(
                f"columns: {name} (={theirs!r}): {where} has a column {name!r} already. Leave {name} out of columns, "
                "or rename that column in the dataset"
            )


def all_paths(features: Mapping[str, Any]) -> list[str]:
    """The names of columns, and the paths of the values in those that are mappings."""
    return [path for name, kind in features.items() for path in _paths(name, kind, _DEEPEST)]


def _paths(path: str, kind: Any, depth: int) -> Iterator[str]:
    yield path
    if isinstance(kind, dict) and depth > 1:
        for name, one in kind.items():
            yield from _paths(f"{path}.{name}", one, depth - 1)


def _together(found: Mapping[str, tuple[list[Any], Any]], name: str, where: str) -> tuple[list[Any], Any]:
    """Values of several columns as those of one, and its type where it is declared."""
    columns = [values for values, _ in found.values()]
    if name in (*COLUMNS, PRIVILEGED_COLUMN):
        kinds = [kind.feature if isinstance(kind, List) else kind for _, kind in found.values()]
        alike = kinds[0] is not None and all(kind == kinds[0] for kind in kinds)
        pictures = [images_of({COLUMNS[0]: _flat(values)}) for values in zip(*columns, strict=True)]
        return pictures, List(kinds[0]) if alike else None
    texts = []
    for index, values in enumerate(zip(*columns, strict=True)):
        try:
            texts.append(joined(dict(zip(found, values, strict=True))))
        except DataError as error:
            raise DataError(f"{where}: row {index}, columns: {name} (={list(found)!r}): {error}") from None
    return texts, Value("string")


def _flat(values: Iterable[Any]) -> list[Any]:
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def _values(
    rows: Dataset, name: str, theirs: str, path: tuple[str | None, list[str]], where: str
) -> tuple[list[Any], Any]:
    """What is at the end of a path in every row, `None` where a row has nothing there; and its type, where that is
    declared.

    Raises:
        DataError: no row has it, or a text on the way is no JSON.
    """
    column, steps = str(path[0]), path[1]
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
        elif place_in_list(step) is None:
            raise DataError(
                f"columns: {name} (={theirs!r}): {step!r} must be a whole number, for there is a list in column "
                f"{column!r} of {where}: 0 is its first value, and -1 its last one"
            )
        else:
            feature, rest = feature.feature, rest[1:]
    values, num_questions = [], 0
    for index, value in enumerate(rows[column]):
        try:
            if name in _ANSWERS and steps and _is_question(_inside(value, steps[:-1])):
                num_questions += 1
                value = None
            values.append(_inside(value, steps))
        except ValueError as error:
            raise DataError(
                f"{where}: row {index}, column {column!r}: columns: {name} (={theirs!r}): {error}"
            ) from None
    if num_questions:
        logger.warning(
            f"{where}: columns: {name} (={theirs!r}) leads to a turn of the user's in {num_questions} of "
            f"{len(values)} rows, which is no answer: they have no {name}"
        )
    if steps and all(value is None for value in values):
        raise DataError(f"columns: {name} (={theirs!r}) leads to nothing in any row of {where}")
    # Behind text that is JSON, and in columns of JSON, nothing is declared.
    return values, None if rest or isinstance(feature, Json) else feature


def _is_question(turn: Any) -> bool:
    return isinstance(turn, Mapping) and ROLES.get(str(turn.get("role", turn.get("from")))) == "user"


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
        elif isinstance(value, list) and (place := place_in_list(left[0])) is not None:
            value, left = value[place] if -len(value) <= place < len(value) else None, left[1:]
        else:
            return None
    return value


def _asked(rows: Dataset, systems: Sequence[Any] | None, theirs: Sequence[str], where: str) -> Dataset:
    """The rows with their prompts as they are asked, behind their system prompts."""
    prompts = undecoded(rows.select_columns([_PROMPT]))
    pictures = undecoded(rows.select_columns([name for name in COLUMNS if name in rows.column_names]))
    asked, num_answered, with_blocks = [], 0, False
    shown = theirs[0] if len(theirs) == 1 else list(theirs)
    for index, prompt in enumerate(prompts[_PROMPT]):
        try:
            turns = asked_turns(prompt)
            num_answered += isinstance(prompt, list) and len(turns) < len(prompt)
            turns = with_system(turns, None if systems is None else systems[index])
            if has_marks(turns) and pictures.column_names and images_of(pictures[index]):
                turns, with_blocks = with_places(turns), True
        except DataError as error:
            raise DataError(f"{where}: row {index}, columns: prompt (={shown!r}): {error}") from None
        asked.append(turns)
    # A column has either texts or conversations, whose contents are either texts or blocks.
    if with_blocks or (systems is not None and any(map(has_blocks, asked))):
        asked, with_blocks = [with_places(turns, marks=False) for turns in asked], True
    elif systems is not None and any(isinstance(turns, list) for turns in asked):
        asked = list(map(as_turns, asked))
    if asked == list(prompts[_PROMPT]):
        return rows
    if num_answered:
        logger.warning(
            f"columns: prompt (={shown!r}): the assistant's turns at the end of {num_answered} of {len(rows)} "
            f"conversations are no part of the prompt; the last one's text is '{theirs[0]}.{_LAST}.content' (or .value)"
        )
    kind = prompts.features[_PROMPT]
    turn = kind.feature if isinstance(kind, List | LargeList) else None
    has_roles = isinstance(turn, dict) and "role" in turn and "from" not in turn
    same = isinstance(kind, Json) or (has_roles and not with_blocks)
    rows = rows.add_column(_beside(_PROMPT), asked, feature=kind if same else None)
    return rows.remove_columns(_PROMPT).rename_column(_beside(_PROMPT), _PROMPT)


def _beside(name: str) -> str:
    """A name that no dataset has, for a column that is there under its own one."""
    return f"{name} of dopd"
