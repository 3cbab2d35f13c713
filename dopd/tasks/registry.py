"""Tasks by name: the embedded ones, a generator of another package, and those that a user registers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from dopd.errors import ConfigError, DataError, DopdError, did_you_mean, first_line
from dopd.guests import as_guest
from dopd.interrupts import Stopped
from dopd.registry import Registry, place_of
from dopd.settings import SettingsError, check, settings_of_call
from dopd.tasks.base import AbstractTask

_ASKED = ("privileged_kinds", "default_kind", "rows", "verify")


class ProblemSource(Protocol):
    """What a run needs of a task: rows with `prompt`, `privileged_context`, `answer`, and a verifier that reads them.

    Attributes:
        privileged_kinds (`tuple[str]`): which texts it has as p, `"none"` first.
        default_kind (`str`): the one that is taken where none is named.
    """

    privileged_kinds: ClassVar[tuple[str, ...]]
    default_kind: ClassVar[str]

    def rows(self, split: str, count: int, privileged_kind: str | None = None) -> list[dict[str, Any]]: ...

    def verify(self, completion: str, row: Mapping[str, Any]) -> float: ...


Task = TypeVar("Task", bound=type[ProblemSource])
TASKS: Registry[type[ProblemSource]] = Registry("task", lambda name, cls: TASKS.register(name, _checked(cls), cls))


def register_task(cls: Task) -> Task:
    """Register a task under its `name`: a subclass of `dopd.tasks.AbstractTask`, or a class like `ProblemSource`.

    The arguments of the class are the task's options (`task_options`).

    Raises:
        ConfigError: a class that is no task, or a name that other code has.
    """
    name = getattr(_checked(cls), "name", None)
    if not isinstance(name, str):
        raise ConfigError(f"task {place_of(cls)} has no name: write name = 'my_task' into the class")
    TASKS.register(name, cls, cls)
    return cls


def _checked(cls: Any) -> Any:
    missing = [name for name in _ASKED if not hasattr(cls, name)]
    missing += sorted(getattr(cls, "__abstractmethods__", ()))
    if not isinstance(cls, type) or missing:
        what = f"has no {', '.join(missing)}" if missing else "is no class"
        raise ConfigError(
            f"task {place_of(cls)} {what}: derive it from dopd.tasks.AbstractTask, or write what is missing"
        )
    return cls


def get_source(name: str, /, **options: Any) -> ProblemSource:
    """The task of a name, or of `package.module:Class` or `./file.py:Class`, with the given options.

    Raises:
        ConfigError: no task or option has that name, or an option's value is not allowed.
    """
    cls = TASKS.find(name)
    read, problems = check(options, settings_of_call(cls), f"task_options of {name}")
    if problems:
        raise SettingsError(problems)
    try:
        with as_guest(f"task {name!r}"):
            return cls(**read)
    except (DopdError, Stopped):
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"task (={name!r}), {place_of(cls)}, raises {type(error).__name__}: {first_line(error)}"
        ) from error


def get_task(name: str, /, **options: Any) -> AbstractTask:
    """The same for a task that makes every problem from its number: a subclass of `AbstractTask`."""
    source = get_source(name, **options)
    if not isinstance(source, AbstractTask):
        raise ConfigError(f"task (={name!r}) is no dopd.tasks.AbstractTask: its problems are not made one by one")
    return source


def rows_of_task(source: ProblemSource, split: str, count: int, privileged_kind: str | None) -> list[dict[str, Any]]:
    """Rows of a task.

    Raises:
        DataError: its code raises, or returns no list of mappings.
    """
    call = f"task {place_of(type(source))}: rows({split!r}, {count}, {privileged_kind!r})"
    try:
        with as_guest(call):
            rows = source.rows(split, count, privileged_kind)
    except (DopdError, Stopped):
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"{call} raises {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise DataError(f"{call} returns {type(rows).__name__}: it must return a list of mappings")
    return rows


def resolve_kind(name: str, privileged_kind: str | None) -> str:
    """The kind of p to take from a task: the given one, or its default.

    Raises:
        ConfigError: an unknown task, or a kind that it does not have.
    """
    task = TASKS.find(name)
    kind = task.default_kind if privileged_kind is None else privileged_kind
    if kind not in task.privileged_kinds:
        kinds, hint = ", ".join(task.privileged_kinds), did_you_mean(kind, task.privileged_kinds)
        raise ConfigError(f"privileged_kind (={kind!r}) of task {name!r} must be one of {kinds}.{hint}")
    return kind
