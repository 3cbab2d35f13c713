"""Embedded tasks: problems made in code, with verifiers and privileged text. Needs no torch."""

from __future__ import annotations

from dopd.tasks.base import (
    PRIVILEGED_KINDS,
    SPLITS,
    AbstractTask,
    Example,
    TaskValidationError,
)
from dopd.tasks.dag import DagTask
from dopd.tasks.graph import GraphTask
from dopd.tasks.program import ProgramTask
from dopd.tasks.registry import TASKS, get_task
from dopd.tasks.scenes import ScenesTask
from dopd.tasks.text import TextTask

__all__ = [
    "PRIVILEGED_KINDS",
    "SPLITS",
    "TASKS",
    "AbstractTask",
    "DagTask",
    "Example",
    "GraphTask",
    "ProgramTask",
    "ScenesTask",
    "TaskValidationError",
    "TextTask",
    "get_task",
]
