"""Paths of pictures that are relative: in a file of rows they are meant from where that file is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Json, LargeList, List, Value

from dopd.data.blocks import blocks_of, is_image
from dopd.data.images import COLUMNS, PRIVILEGED_COLUMN, path_in
from dopd.errors import DataError


def columns_of_paths(dataset: Dataset) -> list[str]:
    """Columns in which pictures may be named by their paths."""
    features = dataset.features
    columns = [name for name in (*COLUMNS, PRIVILEGED_COLUMN) if _holds_text(features.get(name))]
    return [*columns, "prompt"] if _holds_blocks(features.get("prompt")) else columns


def beside(dataset: Dataset, *folders: Path) -> Dataset:
    """The dataset with the relative paths of its pictures as whole ones.

    A picture is looked for in these folders and in the working directory. What is in none is named by its place in the
    first, where messages say that it is missing.

    Args:
        dataset (`Dataset`): rows of files; columns that hold pictures themselves are left as they are.
        folders (`Path`): where these files are, and where else paths may begin.

    Raises:
        DataError: a path names a picture in two of these places; the message has row and column.
    """
    columns = columns_of_paths(dataset)
    if not columns:
        return dataset
    places = list(dict.fromkeys([*(folder.resolve() for folder in folders), Path.cwd()]))

    def whole(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        resolved = {}
        for name in columns:
            try:
                resolved[name] = _turns(row[name], places) if name == "prompt" else _whole(row[name], places)
            except DataError as error:
                raise DataError(f"row {index}, column {name!r}: {error}") from error
        return resolved

    options: dict[str, Any] = {"features": dataset.features, "desc": "reading rows"}
    # What is where may have changed since the last run, which a cached result would not see.
    return dataset.map(whole, with_indices=True, load_from_cache_file=False, **options)


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
