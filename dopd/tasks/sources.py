"""Every generator of problems by name: the embedded tasks, and generators of other packages in the same shape."""

import difflib
from collections.abc import Mapping
from typing import Any, Protocol

from dopd.errors import ConfigError
from dopd.tasks.gsm_symbolic import GsmSymbolic, same_number_or_formula
from dopd.tasks.registry import TASKS, get_task

__all__ = ["SOURCES", "ProblemSource", "get_source", "same_number_or_formula"]


class ProblemSource(Protocol):
    """Rows with `prompt`, `privileged_context`, `answer`, and a verifier that reads them."""

    def rows(self, split: str, count: int, privileged_kind: str) -> list[dict[str, Any]]: ...

    def verify(self, completion: str, row: Mapping[str, Any]) -> float: ...


EXTERNAL: dict[str, type] = {GsmSymbolic.name: GsmSymbolic}
SOURCES: dict[str, type] = {**TASKS, **EXTERNAL}


def get_source(name: str, **options: Any) -> ProblemSource:
    """The generator called `name`.

    Raises:
        ConfigError: an unknown name (with the closest known one) or option.
    """
    if name in TASKS:
        return get_task(name, **options)
    if name not in SOURCES:
        close = difflib.get_close_matches(str(name), SOURCES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"task (={name!r}) must be one of {', '.join(SOURCES)}.{hint}")
    try:
        return EXTERNAL[name](**options)
    except TypeError as error:
        raise ConfigError(f"task_options of {name}: {error}") from None
