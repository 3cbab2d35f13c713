"""Paths of pictures that are relative: in a file of rows they are meant from where that file is."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Json, LargeList, List, Value

from dopd.data.blocks import blocks_of, is_image
from dopd.data.column_names import Columns, paths_of, place_in_list, split_path
from dopd.data.images import COLUMNS, PRIVILEGED_COLUMN, path_in
from dopd.errors import DataError


@dataclass(frozen=True)
class PictureColumn:
    """Where pictures may be named by their paths.

    Attributes:
        column (`str`): of the dataset.
        steps (`list[str]`): the way to them inside of its values.
        has_turns (`bool`): whether conversations are there, of which blocks name pictures.
    """

    column: str
    steps: Sequence[str] = ()
    has_turns: bool = False


def columns_of_paths(dataset: Dataset, columns: Columns | None = None) -> list[PictureColumn]:
    """Where pictures may be named by their paths.

    Args:
        dataset (`Dataset`): rows of files, under their own names.
        columns (`dict`, *optional*): those that a run reads under other names, by the run's.
    """
    found = []
    for name in (*COLUMNS, PRIVILEGED_COLUMN, "prompt"):
        for path in paths_of((columns or {}).get(name, name)):
            column, steps = split_path(path, dataset.column_names)
            kind = None if column is None else _kind_at(dataset.features[column], steps)
            if column is not None and (_holds_blocks(kind) if name == "prompt" else _holds_text(kind)):
                found.append(PictureColumn(column, tuple(steps), name == "prompt"))
    return list(dict.fromkeys(found))


def beside(dataset: Dataset, *folders: Path, columns: Columns | None = None) -> Dataset:
    """The dataset with the relative paths of its pictures as whole ones.

    A picture is looked for in these folders and in the working directory. What is in none is named by its place in the
    first, where messages say that it is missing.

    Args:
        dataset (`Dataset`): rows of files; columns that hold pictures themselves are left as they are.
        folders (`Path`): where these files are, and where else paths may begin.
        columns (`dict`, *optional*): as `columns_of_paths`.

    Raises:
        DataError: a path names a picture in two of these places; the message has row and column.
    """
    named = columns_of_paths(dataset, columns)
    if not named:
        return dataset
    places = list(dict.fromkeys([*(folder.resolve() for folder in folders), Path.cwd()]))

    def whole(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        resolved: dict[str, Any] = {}
        for one in named:
            change = partial(_turns if one.has_turns else _whole, places=places)
            try:
                resolved[one.column] = _at(resolved.get(one.column, row[one.column]), one.steps, change)
            except DataError as error:
                raise DataError(f"row {index}, column {one.column!r}: {error}") from error
        return resolved

    options: dict[str, Any] = {"features": dataset.features, "desc": "reading rows"}
    # What is where may have changed since the last run, which a cached result would not see.
    return dataset.map(whole, with_indices=True, load_from_cache_file=False, **options)


def _kind_at(kind: Any, steps: Sequence[str]) -> Any:
    """The type at the end of a path; that of JSON where nothing is declared."""
    left = list(steps)
    while left:
        if isinstance(kind, dict):
            key, left = split_path(".".join(left), list(kind))
            kind = None if key is None else kind[key]
        elif isinstance(kind, List | LargeList):
            kind, left = kind.feature, left[1:]
        else:
            return Json() if isinstance(kind, Json | Value) else None
    return kind


def _at(value: Any, steps: Sequence[str], change: Callable[[Any], Any]) -> Any:
    """The value with what is at the end of a path in it changed."""
    if not steps:
        return change(value)
    if isinstance(value, str):
        try:
            return json.dumps(_at(json.loads(value), steps, change), ensure_ascii=False)
        except ValueError:
            return value
    if isinstance(value, Mapping):
        key, rest = split_path(".".join(steps), list(value))
        return value if key is None else {**value, key: _at(value[key], rest, change)}
    place = place_in_list(steps[0])
    if isinstance(value, list) and place is not None and -len(value) <= place < len(value):
        value = list(value)
        value[place] = _at(value[place], steps[1:], change)
    return value


def _holds_text(kind: Any) -> bool:
    if isinstance(kind, List | LargeList):
        return _holds_text(kind.feature)
    if isinstance(kind, dict):
        stored = kind.get("bytes")  # pictures themselves, with what their files were called
        return not (isinstance(stored, Value) and "binary" in stored.dtype) and any(map(_holds_text, kind.values()))
    return isinstance(kind, Json) or (isinstance(kind, Value) and "string" in kind.dtype)


def _holds_blocks(kind: Any) -> bool:
    turn = kind.feature if isinstance(kind, List | LargeList) else kind
    content = turn.get("content") if isinstance(turn, dict) else turn
    return content is not None and not isinstance(content, Value)


def _turns(prompt: Any, places: list[Path]) -> Any:
    if not isinstance(prompt, list):
        return prompt  # text
    return [_turn(turn, places) for turn in prompt]


def _turn(turn: Any, places: list[Path]) -> Any:
    if not isinstance(turn, Mapping) or not blocks_of(turn):
        return turn  # text; or something else, which the checks of rows name
    return {**turn, "content": [_block(block, places) for block in blocks_of(turn)]}


def _block(block: Any, places: list[Path]) -> Any:
    if not isinstance(block, Mapping) or not is_image(block):
        return block
    return {name: value if name == "type" else _whole(value, places) for name, value in block.items()}


def _whole(value: Any, places: list[Path]) -> Any:
    """What a column or a block holds, with every relative path in it as a whole one."""
    if isinstance(value, list):
        return [_whole(entry, places) for entry in value]
    if isinstance(value, Mapping):
        return {name: entry if name == "detail" else _whole(entry, places) for name, entry in value.items()}
    path = path_in(value)
    if path is None or path.is_absolute():
        return value
    found = list(dict.fromkeys((place / path).resolve() for place in places if (place / path).is_file()))
    if len(found) > 1:
        raise DataError(
            f"{str(path)!r} is there twice: {' and '.join(map(repr, map(str, found)))}. Give whole paths, or run from "
            "another directory"
        )
    return str(found[0] if found else places[0] / path)
