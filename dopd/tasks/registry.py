"""Tasks by name. A new task is one file and one entry here."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dopd.errors import ConfigError
from dopd.settings import SettingsError, check, settings_of
from dopd.tasks.base import AbstractTask
from dopd.tasks.dag import DagTask
from dopd.tasks.graph import GraphTask
from dopd.tasks.program import ProgramTask
from dopd.tasks.scenes import ScenesTask

_CLASSES: tuple[type[AbstractTask], ...] = (DagTask, GraphTask, ProgramTask, ScenesTask)

TASKS: Mapping[str, type[AbstractTask]] = MappingProxyType({task.name: task for task in _CLASSES})


def get_task(name: str, /, **knobs: Any) -> AbstractTask:
    """The task called `name` with the given difficulty knobs (fields of its class).

    Raises:
        ConfigError: if no task or no knob has that name, or a knob's value is not allowed.
    """
    if name not in TASKS:
        raise ConfigError(f"task: got {name!r}, allowed: {', '.join(TASKS)}.{_suggest(name, TASKS)}")
    fields = [field.name for field in dataclasses.fields(TASKS[name])]
    for knob in knobs:
        if knob not in fields:
            raise ConfigError(f"{name} knob: got {knob!r}, allowed: {', '.join(fields)}.{_suggest(knob, fields)}")
    problems = check(knobs, settings_of(TASKS[name]), f"task_options of {name}")[1]
    if problems:
        raise SettingsError(problems)
    return TASKS[name](**knobs)


def _suggest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else " Choose one of these."
