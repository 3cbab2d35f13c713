"""Values of CSV and JSON files as they are written.

The readers of `datasets` guess types: 007 becomes 7, NA a null, "2024-05-01" a time stamp, an answer 3 beside an
answer 2.5 becomes 3.0; an open quote swallows the rows behind it, and a row with a field too many moves every column by
one. An answer is then compared with, or a hint taught as, what nobody wrote.
"""

import codecs
import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import fsspec
import pyarrow as pa
from datasets import Dataset, Json, Value

from dopd.errors import DataError

_BEGIN = 4096  # characters of a file that say how it begins
# What JSON has beside objects; a truth value is a number in Python, so it comes first.
_JSON_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "true or false"),
    ((int, float), "a number"),
    (str, "text"),
    (list, "a list"),
    (type(None), "null"),
)


def read_csv(files: Sequence[str], delimiter: str) -> Dataset:
    """The rows of CSV files. A column is of numbers or truth values only where each of its fields is written as Python
    writes that value; every other column is text, and an empty field is empty text.

    Raises:
        DataError: no header, two columns of one name, a row with another number of fields than the header, an open
            quote, or files of different columns; the message names file and line.
    """
    columns: dict[str, list[str]] = {}
    for file in files:
        rows = _csv_rows(file, delimiter)
        header = _header(file, next(rows, None))
        if not columns:
            columns = {name: [] for name in header}
        elif set(header) != set(columns):
            raise DataError(
                f"{file!r} has the columns {', '.join(header)}, and {files[0]!r} has {', '.join(columns)}: "
                "they must be the same"
            )
        in_order = [columns[name] for name in header]
        for row in rows:
            for values, value in zip(in_order, row, strict=True):
                values.append(value)
    return Dataset.from_dict({name: _typed(values) for name, values in columns.items()})


def _header(file: str, row: list[str] | None) -> list[str]:
    names = [name.strip() for name in row or ()]
    if not names:
        raise DataError(f"{file!r} has no rows")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{file!r} has the column {', '.join(map(repr, twice))} more than once: give each its own name")
    return names


def _csv_rows(file: str, delimiter: str) -> Iterator[list[str]]:
    """The rows of a file, its header first, each with as many fields as the header."""
    with _fields_of_any_length(), _text(file) as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        width: int | None = None
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"{file!r}, line {line}: {error}. A field that holds a quote, the delimiter or a new line stands "
                    'in quotes, and a quote inside it is written twice: "a ""b"" c"'
                ) from error
            if row is None:
                return
            if not row:  # a blank line is no row
                continue
            width = len(row) if width is None else width
            if len(row) != width:
                raise DataError(
                    f"{file!r}, line {line}: {len(row)} fields where the header has {width}. A field that holds the "
                    "delimiter stands in quotes"
                )
            yield row


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """`csv` takes fields of 128 KiB at most; its limit is the process's."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _typed(values: list[str]) -> list[Any]:
    for kind in (_whole_number, _number, _truth):
        try:
            typed = list(map(kind, values))
        except ValueError:
            continue
        if list(map(str, typed)) == values:
            return typed
    return values


def _whole_number(text: str) -> int:
    if not -(2**63) <= (value := int(text)) < 2**63:
        raise ValueError(f"{text} needs more than 64 bits")
    return value


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} may be a word")
    return value


def _truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(f"{text} is not a truth value")
    return text == "True"


def json_as_written(rows: Dataset, files: Sequence[str]) -> Dataset:
    """Rows that `datasets` read from JSON files, with the files' own values where it made time stamps or numbers of
    text, or fractions of whole numbers.

    Args:
        rows: all rows of `files`, in their order.

    Raises:
        pyarrow.ArrowInvalid: text that is not UTF-8, which the reader of JSON lets through.
    """
    rows.data.table.validate(full=True)
    doubtful = [name for name in rows.column_names if _may_be_guessed(rows.data.schema.field(name).type)]
    if not doubtful:
        return rows
    written = [value for file in files for value in _json_rows(file)]
    order = rows.column_names
    for name in doubtful:
        values = [row.get(name) for row in written]
        if all(map(_same, rows[name], values)):
            continue
        text, feature = _as_text(values)
        rows = rows.remove_columns(name).add_column(name, text, feature=feature)
    return rows.select_columns(order)


def _may_be_guessed(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_may_be_guessed(kind.field(place).type) for place in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _may_be_guessed(kind.value_type)
    return not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def lines_of_rows(file: str) -> list[int] | None:
    """The number of the line of each row of a JSON lines file; `None` where a row is not a line."""
    with _text(file) as stream:
        filled = [(number, line) for number, line in enumerate(stream, 1) if line.strip()]
    return [number for number, _ in filled] if all(line.lstrip()[:1] == "{" for _, line in filled) else None


def refuse_null_first(file: str) -> None:
    """A file of JSON that begins with null ends the process in the reader of `datasets`, so it is not given to it.

    Raises:
        DataError: it is one; the message names file and line.
    """
    try:
        with _text(file) as stream:
            begin = stream.read(_BEGIN)
    except (OSError, UnicodeError):  # which the reader says in its own words
        return
    if begin.lstrip().startswith("null"):
        line = 1 + begin[: begin.index("null")].count("\n")
        raise DataError(_no_object(file, line, None))


def _no_object(file: str, line: int, value: Any) -> str:
    kind = next(name for kinds, name in _JSON_KINDS if isinstance(value, kinds))
    return f'{file!r}, line {line}: a row must be a JSON object, and this is {kind}: write {{"prompt": ...}}'


def not_utf8(file: str) -> str | None:
    """Where a file of text is not UTF-8, as `FILE, line N: reason`; `None` where it is."""
    with fsspec.open(file, "rb", compression="infer") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                utf_16 = line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                own = "UTF-16" if utf_16 else "LATIN1"
                return (
                    f"{file!r}, line {number}: the byte {line[error.start]:#04x} is no UTF-8"
                    f"{': the file is UTF-16' if utf_16 else ''}. Save the file as UTF-8, for example with "
                    f"iconv -f {own} -t UTF-8"
                )
    return None


def broken_json(file: str) -> str | None:
    """Where a file of JSON rows is no JSON, or has a row that is no object, as `FILE, line N: reason`; `None` where it
    is not.
    """
    with _text(file) as stream:
        text = stream.read()
    if text.lstrip()[:1] == "[":
        return _first_fault(file, text, 1, whole=True)
    lines = text.split("\n")
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if filled and _first_fault(file, filled[0][1], filled[0][0]) and not _first_fault(file, text, 1):
        return None  # one object over several lines
    return next((fault for number, line in filled if (fault := _first_fault(file, line, number))), None)


def _first_fault(file: str, text: str, line: int, *, whole: bool = False) -> str | None:
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        where = f"{file!r}, line {line + error.lineno - 1}, character {error.colno}"
        return f'{where}: {error.msg}. A line is one JSON object, for example {{"prompt": "1 + 1 = ?"}}'
    except (ValueError, RecursionError) as error:
        return f"{file!r}, line {line}: {error}"
    return next(
        (_no_object(file, line, row) for row in (value if whole else [value]) if not isinstance(row, dict)), None
    )


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object: leave one of them out")
    return mapping


def _json_rows(file: str) -> Iterator[dict[str, Any]]:
    """Objects one after the other, or one list of them."""
    with _text(file) as stream:
        text = stream.read()
    decode = json.JSONDecoder().raw_decode
    place = 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        value, place = decode(text, place)
        yield from value if isinstance(value, list) else [value]


def _same(read: Any, written: Any) -> bool:
    """Whether a value was kept; a key that a row does not have is read as null."""
    if isinstance(written, dict) and isinstance(read, dict):
        return all(_same(value, written.get(key)) for key, value in read.items())
    if isinstance(written, list) and isinstance(read, list):
        return len(read) == len(written) and all(map(_same, read, written))
    return type(read) is type(written) and (read == written or read != read)  # the last: not a number


def _as_text(values: list[Any]) -> tuple[list[str | None], Value | Json]:
    """A column that keeps values of several kinds: text as text, others as JSON."""
    if all(value is None or isinstance(value, str) for value in values):
        return values, Value("string")
    if any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in values):  # no reader of JSON takes it
        return [None if value is None else str(value) for value in values], Value("string")
    return [None if value is None else json.dumps(value) for value in values], Json()


@contextmanager
def _text(file: str) -> Iterator[TextIO]:
    with fsspec.open(file, "rt", compression="infer", encoding="utf-8-sig", newline="") as stream:
        yield stream
