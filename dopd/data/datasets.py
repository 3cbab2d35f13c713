"""Datasets of users: rows of Python's own values, or an error that says what is meant."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from dopd.errors import ConfigError


def as_rows(name: str, dataset: Any) -> Any:
    """A dataset whose rows hold Python's own values; `None` stays `None`.

    A format of tensors, arrays or tables (`with_format("numpy")`) would make lists of turns something else, and
    numbers that a verifier compares. A transform (`with_transform`) is left as it is.

    Args:
        name (`str`): the argument, for messages.
        dataset (`Dataset` or `IterableDataset`, *optional*): the rows.

    Raises:
        ConfigError: it is something else.
    """
    if dataset is None:
        return None
    if isinstance(dataset, Dataset):
        kind = dataset.format["type"]
        if kind is None or kind == "custom":
            return dataset
        shown = {key: dataset.format[key] for key in ("columns", "output_all_columns")}
        return dataset.with_format(None, **shown)
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    if hasattr(dataset, "column_names") and not isinstance(dataset, Mapping):  # of another make, with rows and columns
        return dataset
    advice = "make one with Dataset.from_list(rows) or Dataset.from_generator(function)"
    if isinstance(dataset, Mapping) and dataset and all(isinstance(n, str) for n in dataset):
        advice = f"choose one of {', '.join(map(repr, dataset))}, for example {name}={name}[{next(iter(dataset))!r}]"
    raise ConfigError(
        f"{name} (a {type(dataset).__name__}) must be a Dataset or an IterableDataset of the package datasets: {advice}"
    )


def held_out_as_rows(dataset: Any) -> Any:
    """Held-out rows: one dataset, or several by name, as `as_rows`."""
    if not isinstance(dataset, Mapping):
        return as_rows("eval_dataset", dataset)
    return {name: as_rows(f"eval_dataset[{name!r}]", part) for name, part in dataset.items()}
