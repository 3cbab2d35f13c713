"""Every generator of problems by name: the embedded tasks, and generators of other packages in the same shape."""

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from dopd.errors import ConfigError
from dopd.tasks.gsm_symbolic import GsmSymbolic, same_number_or_formula
from dopd.tasks.registry import TASKS, get_task

__all__ = ["SOURCES", "ProblemSource", "get_source", "resolve_kind", "same_number_or_formula"]


class ProblemSource(Protocol):
    """Rows with `prompt`, `privileged_context`, `answer`, and a verifier that reads them.

    Attributes:
        privileged_kinds (`tuple[str]`): which texts it has as p, `"none"` first.
        default_kind (`str`): the one that is taken where none is named.
    """

    privileged_kinds: ClassVar[tuple[str, ...]]
    default_kind: ClassVar[str]

    def rows(self, split: str, count: int, privileged_kind: str | None = None) -> list[dict[str, Any]]: ...

    def verify(self, completion: str, row: Mapping[str, Any]) -> float: ...


EXTERNAL: dict[str, Any] = {GsmSymbolic.name: GsmSymbolic}
SOURCES: dict[str, Any] = {**TASKS, **EXTERNAL}


def get_source(name: str, /, **options: Any) -> ProblemSource:
    """The generator called `name`.

    Raises:
        ConfigError: an unknown name (with the closest known one) or option.
    """
    _check_known(name)
    if name in TASKS:
        return get_task(name, **options)
    try:
        return EXTERNAL[name](**options)
    except TypeError as error:
        raise ConfigError(f"task_options of {name}: {error}") from None


def resolve_kind(name: str, privileged_kind: str | None) -> str:
    """The kind of p to take from the generator called `name`: the given one, or its default.

    Raises:
        ConfigError: an unknown generator, or a kind that it does not have.
    """
    _check_known(name)
    kinds = SOURCES[name].privileged_kinds
    kind = SOURCES[name].default_kind if privileged_kind is None else privileged_kind
    if kind not in kinds:
        raise ConfigError(f"privileged_kind (={kind!r}) of task {name!r} must be one of {', '.join(kinds)}")
    return kind


def _check_known(name: str) -> None:
    if name not in SOURCES:
        close = difflib.get_close_matches(str(name), SOURCES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"task (={name!r}) must be one of {', '.join(SOURCES)}.{hint}")
