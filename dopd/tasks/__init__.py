"""Embedded tasks: problems made in code, with verifiers and privileged text. Needs no torch."""

from __future__ import annotations

from dopd.tasks.base import (
    PRIVILEGED_KINDS,
    SPLITS,
    AbstractTask,
    Example,
    TaskValidationError,
)
from dopd.tasks.registry import TASKS, get_source, get_task, register_task, resolve_kind, rows_of_task
from dopd.tasks.text import TextTask

# isort: split
# In the order in which tasks are listed.
from dopd.tasks.dag import DagTask
from dopd.tasks.graph import GraphTask
from dopd.tasks.program import ProgramTask
from dopd.tasks.scenes import ScenesTask

# isort: split
from dopd.tasks.gsm_symbolic import GsmSymbolic

__all__ = [
    "PRIVILEGED_KINDS",
    "SPLITS",
    "TASKS",
    "AbstractTask",
    "DagTask",
    "Example",
    "GraphTask",
    "GsmSymbolic",
    "ProgramTask",
    "ScenesTask",
    "TaskValidationError",
    "TextTask",
    "get_source",
    "get_task",
    "register_task",
    "resolve_kind",
    "rows_of_task",
]
