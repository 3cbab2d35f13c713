"""Columns of a dataset under the names that a run reads them by."""

from collections.abc import Mapping, Sequence

from datasets import Dataset

from dopd.errors import DataError, did_you_mean


def with_columns(rows: Dataset, columns: Mapping[str, str], where: str) -> Dataset:
    """Rows in which each column has its name of a run; one that is read by several names is there under each.

    Args:
        rows (`Dataset`): as they were read.
        columns (`dict[str, str]`): the dataset's name of a column by the run's, as `{"prompt": "question"}`.
        where (`str`): the dataset, for messages.

    Raises:
        DataError: the dataset has no such column, or has another one of the run's name.
    """
    check_names(rows.column_names, columns, where)
    first: dict[str, str] = {}
    for name, theirs in columns.items():
        first.setdefault(theirs, name)
    rows = rows.rename_columns({theirs: name for theirs, name in first.items() if theirs != name})
    for name, theirs in columns.items():
        if name != first[theirs]:
            rows = rows.add_column(name, rows[first[theirs]], feature=rows.features[first[theirs]])
    return rows


def check_names(there: Sequence[str], columns: Mapping[str, str], where: str) -> None:
    """Raise `DataError` as `with_columns` does, by the names alone."""
    for name, theirs in columns.items():
        if theirs not in there:
            raise DataError(
                f"columns: {name} (={theirs!r}) is not a column of {where}.{did_you_mean(theirs, there)} It has "
                f"{', '.join(there) or 'no columns'}"
            )
        if name in there and name != theirs and name not in columns.values():
            raise DataError(
                f"columns: {name} (={theirs!r}): {where} has a column {name!r} already. Leave {name} out of columns, "
                "or rename that column in the dataset"
            )
