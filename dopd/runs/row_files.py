"""Files and folders of rows: which reader takes them, and what it makes of them."""

import glob
import json
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, List, concatenate_datasets, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.csv.csv import Csv, CsvConfig
from datasets.packaged_modules.json.json import Json, JsonConfig

from dopd.data.beside import beside, columns_of_paths
from dopd.data.column_names import Columns
from dopd.errors import DataError, first_line
from dopd.runs.written import broken_json, json_as_written, lines_of_rows, not_utf8, read_csv, refuse_null_first

# Readers of `datasets`, by the ending of a file.
READERS: dict[str, str] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
ONLY_SPLIT = "train"  # what `datasets` calls the rows of files that are of no split
_SAVED_ROWS, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # of `save_to_disk`
_DELIMITERS = {"csv": ",", "tsv": "\t"}


def reader_of(name: str) -> str | None:
    """Who reads a file, by its ending; compression does not count."""
    path = Path(name.lower())
    return READERS.get(Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix)


def names_files(name: str | Sequence[str]) -> bool:
    """Whether a dataset's name stands for files, and not for a folder or an id of the hub."""
    if not isinstance(name, str):
        return True
    path = Path(name).expanduser()
    return not path.is_dir() and (path.is_file() or reader_of(name) is not None or glob.has_magic(name))


def found_files(names: Sequence[str]) -> list[str]:
    """The files that names and patterns stand for, in the order given; those of a pattern in alphabetical order.

    Raises:
        DataError: a name or pattern without a file, or files that cannot be read together.
    """
    files: list[str] = []
    for name in map(str, names):
        path = Path(name).expanduser()
        if path.is_file():
            files.append(str(path))
            continue
        matches = [match for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        if not glob.has_magic(name):
            raise DataError(f"{name!r} is not a file")
        if not matches:
            raise DataError(f"no file matches {name!r}")
        files += matches
    if not files:
        raise DataError("it names no file")
    for file in files:
        if reader_of(file) is None:
            raise DataError(f"{file!r} must end in {', '.join(READERS)}, compressed ({', '.join(COMPRESSIONS)}) or not")
    if len(kinds := sorted({str(reader_of(file)) for file in files})) > 1:
        raise DataError(f"it mixes files of the kinds {', '.join(kinds)}: they must all be of one kind")
    return list(dict.fromkeys(files))


def read_files(files: Sequence[str], columns: Columns | None = None) -> Dataset:
    """The rows of files of one kind, in order; a column that some files do not have is null in theirs. Relative paths
    of pictures are made whole, also in `columns` that a run reads as pictures or prompts.

    Raises:
        DataError: a file that cannot be read, or files whose columns are of different types; the message names them.
    """
    folders = {Path(file).parent for file in files}
    try:
        rows = _read(files)
        if len(folders) == 1 or not columns_of_paths(rows, columns):
            return beside(rows, *folders, columns=columns)
    except DataError:
        raise
    except Exception as error:  # readers fail in many ways
        if len(files) == 1:
            if fault := _fault_of_text(files[0]):
                raise DataError(fault) from error
            raise DataError(f"{files[0]!r} cannot be read: {reason_of(error)}") from error
    parts = [read_files([file], columns) for file in files]
    try:
        return concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        raise DataError(_other_types(files, parts) or f"its files do not fit together: {reason_of(error)}") from error


def line_of(names: Sequence[str], row: int, split: str | None) -> str | None:
    """`FILE, line N` of a row of whole JSON lines files; `None` where rows are not lines, or a split cuts them."""
    if split not in (None, ONLY_SPLIT):
        return None
    for file in found_files(names):
        numbers = lines_of_rows(file) if reader_of(file) == "json" else None
        if numbers is None:
            return None
        if row < len(numbers):
            return f"{file!r}, line {numbers[row]}"
        row -= len(numbers)
    return None


def _fault_of_text(file: str) -> str | None:
    """Where a file of text has bytes that are none, or JSON that is broken; `None` where it is sound, or no text."""
    reader = reader_of(file)
    if reader != "json" and reader not in _DELIMITERS:
        return None
    try:
        return not_utf8(file) or (broken_json(file) if reader == "json" else None)
    except (OSError, UnicodeError):
        return None


def _read(files: Sequence[str]) -> Dataset:
    reader = str(reader_of(files[0]))
    if reader in _DELIMITERS:
        return read_csv(files, _DELIMITERS[reader])
    if reader == "json":
        for file in files:
            refuse_null_first(file)
    # Each is there: a bracket in its name is no pattern, which could name another file.
    rows = load_dataset(reader, data_files=list(map(glob.escape, files)), split=ONLY_SPLIT)
    if reader == "json":
        _check_is_of_rows(rows, files)
        return json_as_written(rows, files)
    return rows


def _check_is_of_rows(rows: Dataset, files: Sequence[str]) -> None:
    """A JSON object of lists (of splits, or of columns) is read as one row."""
    features = rows.features
    has_turns = any(isinstance(kind, List) and _is_turn(kind.feature) for kind in features.values())
    if len(rows) == 1 and not has_turns and all(isinstance(kind, List) for kind in features.values()):
        raise DataError(
            f"{files[0]!r} is one object of lists ({', '.join(features)}) and no rows: write a list of rows, or a row "
            "a line, and each split to a file of its own"
        )


def _is_turn(kind: Any) -> bool:
    return isinstance(kind, dict) and bool({"role", "from"} & set(kind))


def _other_types(files: Sequence[str], parts: Sequence[Dataset]) -> str | None:
    first: dict[str, tuple[str, Any]] = {}
    for file, part in zip(files, parts, strict=True):
        for name, feature in part.features.items():
            before, kind = first.setdefault(name, (file, feature))
            if kind != feature:
                return (
                    f"column {name!r} is {feature} in {file!r} and {kind} in {before!r}: write it as one type in both"
                )
    return None


def read_folder(path: Path, config: str | None, columns: Columns | None = None) -> Dataset | DatasetDict:
    """The splits of a folder as `datasets` finds them; values of CSV and JSON as they are written, paths of pictures as
    whole ones, as `read_files` does.
    """
    builder = load_dataset_builder(str(path), config)
    files: Mapping[str, Sequence[str]] = builder.config.data_files or {}
    if isinstance(builder, Csv) and _is_plain(builder.config, CsvConfig(sep=builder.config.sep)):
        splits = DatasetDict({str(split): read_csv(names, builder.config.sep) for split, names in files.items()})
    else:
        if isinstance(builder, Json):
            for name in chain.from_iterable(files.values()):
                refuse_null_first(name)
        splits = load_dataset(str(path), config)
        if isinstance(builder, Json) and _is_plain(builder.config, JsonConfig()):
            splits = DatasetDict({split: json_as_written(rows, files[split]) for split, rows in splits.items()})
    return DatasetDict(
        {
            split: beside(rows, _folder_of(files.get(split), path), path, columns=columns)
            for split, rows in splits.items()
        }
    )


def is_saved(path: Path) -> bool:
    """Whether a folder is one of `save_to_disk`."""
    return any((path / file).is_file() for file in (_SAVED_ROWS, _SAVED_SPLITS))


def splits_of_folder(path: Path, config: str | None) -> list[str]:
    """The names of a folder's splits, without reading them."""
    if is_saved(path):
        splits = path / _SAVED_SPLITS
        return list(json.loads(splits.read_text())["splits"]) if splits.is_file() else [ONLY_SPLIT]
    return list(map(str, load_dataset_builder(str(path), config).config.data_files or ()))


def _folder_of(files: Sequence[str] | None, otherwise: Path) -> Path:
    """The folder that all these files are in."""
    return Path(os.path.commonpath([Path(file).parent for file in files])) if files else otherwise


def _is_plain(config: CsvConfig | JsonConfig, plain: CsvConfig | JsonConfig) -> bool:
    """Whether nothing but the files is configured: types that a dataset's card declares are its author's word."""
    own = set(vars(plain)) - {"name", "version", "data_dir", "data_files", "description"}
    return all(getattr(config, name) == getattr(plain, name) for name in own)


def reason_of(error: BaseException) -> str:
    """What a reader raised: `datasets` wraps it."""
    while isinstance(error, DatasetsError) and (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if isinstance(error, StopIteration):  # of a file without a line
        return "it has no rows"
    encoding = any(word in str(error).lower() for word in ("codec can't decode", "invalid utf"))
    return f"{type(error).__name__}: {first_line(error)}{'. Save it as UTF-8' if encoding else ''}"
