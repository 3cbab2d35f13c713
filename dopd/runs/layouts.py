"""Datasets that are read by name: which columns are ours, and which rows are kept. The files are in `dopd/layouts`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dopd.data.column_names import split_path
from dopd.errors import ConfigError, DataError, did_you_mean
from dopd.runs.layout_names import FOLDER, layout_names
from dopd.runs.row_filters import Keep
from dopd.settings import read_yaml_file


@dataclass(frozen=True)
class Layout:
    """A dataset of the field.

    Attributes:
        name (`str`): of the layout.
        dataset_name, split (`str`): of the hub.
        columns (`dict[str, list[str]]`): its names by ours, the likeliest first: copies differ.
        keep (`Keep`): the rows that are kept.
    """

    name: str
    dataset_name: str
    split: str
    columns: Mapping[str, Sequence[str]]
    keep: Keep

    def columns_of(self, there: Sequence[str], where: str) -> dict[str, str]:
        """The mapping for a copy with these columns.

        Raises:
            DataError: it has none of the names of a column.
        """
        found = {}
        for name, names in self.columns.items():
            theirs = next((one for one in names if split_path(one, there)[0]), None)
            if theirs is None:
                raise DataError(
                    f"--layout {self.name}: {where} has no column {' or '.join(names)} for {name}; it has "
                    f"{', '.join(there)}. Say which it is: --columns '{{{name}: NAME}}'"
                )
            if theirs != name:
                found[name] = theirs
        return found


def read_layout(name: str) -> Layout:
    """The layout of a name.

    Raises:
        ConfigError: there is none.
    """
    names = layout_names()
    if name not in names:
        raise ConfigError(f"--layout (={name!r}) must be one of {', '.join(names)}.{did_you_mean(name, names)}")
    values = read_yaml_file(FOLDER / f"{name}.yaml")
    return Layout(
        name, values["dataset_name"], values["split"], values["columns"], Keep.from_mapping(values.get("keep", {}))
    )
