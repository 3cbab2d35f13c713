"""Datasets as they are brought: rows of Python's own values, or a word about what is meant."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from dopd.errors import ConfigError


def as_rows(name: str, given: Any) -> Any:
    """A dataset whose rows hold Python's own values; `None` stays `None`.

    A format of tensors, arrays or tables (`with_format("numpy")`) would make lists of turns something else, and
    numbers that a verifier compares. A transform (`with_transform`) is left as it is.

    Args:
        name (`str`): the argument, for messages.
        given (`Dataset` or `IterableDataset`, *optional*): what was brought.

    Raises:
        ConfigError: it is something else.
    """
    if given is None:
        return None
    if isinstance(given, Dataset):
        kind = given.format["type"]
        if kind is None or kind == "custom":
            return given
        shown = {key: given.format[key] for key in ("columns", "output_all_columns")}
        return given.with_format(None, **shown)
    if isinstance(given, IterableDataset):
        return given.with_format(None)
    if hasattr(given, "column_names") and not isinstance(given, Mapping):  # of another make, with rows and columns
        return given
    advice = "make one with Dataset.from_list(rows) or Dataset.from_generator(function)"
    if isinstance(given, Mapping) and given and all(isinstance(n, str) for n in given):
        advice = f"choose one of {', '.join(map(repr, given))}, for example {name}={name}[{next(iter(given))!r}]"
    raise ConfigError(
        f"{name} (a {type(given).__name__}) must be a Dataset or an IterableDataset of the package datasets: {advice}"
    )


def held_out_as_rows(given: Any) -> Any:
    """Held-out rows: one dataset, or several by name, as `as_rows`."""
    if not isinstance(given, Mapping):
        return as_rows("eval_dataset", given)
    return {name: as_rows(f"eval_dataset[{name!r}]", part) for name, part in given.items()}
