"""Several teachers of a run, of which each row of the dataset names one: where they wait, and what rows may name."""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from dopd.errors import ConfigError, DataError, ModelError, did_you_mean
from dopd.heads import Head
from dopd.sources import TEACHER_COLUMN
from dopd.trainer.config import DOPDConfig
from dopd.trainer.sharded_teacher import way_of_splitting

_SHOWN = 3  # names in a message


class ParkedTeachers:
    """Models that wait in the memory of the CPU and come to the device in turn; on a CPU they stay where they are.

    Quantised models and those that a `device_map` has spread over devices cannot be moved, and stay too.

    Args:
        models (`dict[str, PreTrainedModel]`): by the names that rows have for them; frozen, in evaluation mode.
        device (`torch.device`): where they compute.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel], device: torch.device) -> None:
        self.models, self._device = dict(models), device
        self.current: PreTrainedModel | None = None
        for model in self.models.values():
            model.eval().requires_grad_(False)
            self._move(model, torch.device("cpu"))

    @contextmanager
    def in_place(self, name: str) -> Iterator[PreTrainedModel]:
        """Inside, a teacher is on the device and `current`; it stays there if it was before."""
        model, before = self.models[name], self.current
        if model is before:
            yield model
            return
        self._move(model, self._device)
        self.current = model
        try:
            yield model
        finally:
            self.current = before
            self._move(model, torch.device("cpu"))

    def has(self, model: object) -> bool:
        """Whether a model is one of them."""
        return any(model is one for one in self.models.values())

    def _move(self, model: PreTrainedModel, device: torch.device) -> None:
        stays = getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None)
        if self._device.type != "cpu" and not stays:
            model.to(device)  # type: ignore[arg-type]


def field(name: str) -> str:
    """One of several teachers, in messages."""
    return f"teacher_models[{name!r}]"


def as_configured(
    teacher_models: Mapping[str, Any] | None, teacher_model: Any, args: DOPDConfig
) -> tuple[dict[str, Any], DOPDConfig]:
    """The teachers that a trainer was given or that its config names, and a config that names them.

    Raises:
        ConfigError: no mapping, one teacher beside several, or weights that are split over processes.
    """
    if teacher_models is not None:
        if not isinstance(teacher_models, Mapping) or not teacher_models:
            raise ConfigError(
                f"teacher_models (a {type(teacher_models).__name__}) must be a mapping from the names in column "
                f"{TEACHER_COLUMN!r} to models: teacher_models={{'math': MODEL, 'code': MODEL}}"
            )
        args = copy.copy(args)
        args.teacher_models = {str(name): _in_words(model) for name, model in teacher_models.items()}
        args.check_teachers()
    if args.teacher_models and teacher_model is not None:
        raise ConfigError("teacher_models and teacher_model both bring the teacher: leave one of them out")
    named = args.several_teachers
    if named:
        _check_whole(args)
    if not named:  # nothing reads a teacher
        return {}, args
    models = named if teacher_models is None else {str(name): model for name, model in teacher_models.items()}
    return {name: os.fspath(model) if isinstance(model, os.PathLike) else model for name, model in models.items()}, args


def _in_words(model: Any) -> str:
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def _check_whole(args: DOPDConfig) -> None:
    if way_of_splitting(args) != "whole":
        raise ConfigError(
            "teacher_models: teachers that wait on the CPU are whole, and FSDP and ZeRO-3 split models: use DDP or "
            "ZeRO-2, or put the teachers on servers (teacher_server: {NAME: URL})"
        )


def check_heads(models: Mapping[str, Any]) -> None:
    """Raise `ModelError` unless the heads of all teachers end alike: a batch reads several of them as one."""
    first, *others = models
    mine = Head.of_model(models[first])
    for name in others:
        theirs = Head.of_model(models[name])
        if theirs.vocab_size == mine.vocab_size and not mine.finishes_as(theirs):
            raise ModelError(
                f"{field(first)} and {field(name)} make logits of their products in different ways (scale, soft cap, "
                "bias, or ids of image tokens): teachers of one run must be of one kind"
            )


# --- Rows


def check_teacher_of(row: Mapping[str, Any], index: int, names: Sequence[str]) -> str:
    """The teacher that a row names.

    Raises:
        DataError: it names none, or one that is not there.
    """
    value = row.get(TEACHER_COLUMN)
    if value is None:
        raise DataError(
            f"row {index}, column {TEACHER_COLUMN!r}: it names no teacher; each row needs one of "
            f"{', '.join(map(repr, names))}"
        )
    if str(value) not in names:
        raise DataError(
            f"row {index}, column {TEACHER_COLUMN!r} (={value!r}): there is no such teacher, but "
            f"{', '.join(map(repr, names))}.{did_you_mean(str(value), names)}"
        )
    return str(value)


def check_teacher_column(columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise `DataError` where there are several teachers and rows do not say which is theirs."""
    if TEACHER_COLUMN not in columns:
        raise DataError(
            f"column {TEACHER_COLUMN!r} is missing: there are several teachers ({', '.join(map(repr, names))}), and "
            f"each row names the one that reads it; the dataset has {', '.join(columns)}. If another column has the "
            f"names, write columns: {{{TEACHER_COLUMN}: NAME}} in the config, or dataset.rename_column(NAME, "
            f"{TEACHER_COLUMN!r}) in Python"
        )


def check_teachers_of(dataset: Any, names: Sequence[str]) -> dict[str, int]:
    """How many rows of a dataset each teacher reads.

    Raises:
        DataError: see `check_teacher_column` and `check_teacher_of`.
    """
    check_teacher_column(dataset.column_names, names)
    counts = dict.fromkeys(names, 0)
    for index, value in enumerate(dataset[TEACHER_COLUMN]):
        counts[check_teacher_of({TEACHER_COLUMN: value}, index, names)] += 1
    return counts


def counted(counts: Mapping[str, int]) -> Iterable[str]:
    """What is worth saying of how many rows each teacher reads, a sentence each."""
    unused = [name for name, count in counts.items() if not count]
    if unused:
        yield (
            f"no row of train_dataset names the teacher(s) {', '.join(map(repr, unused[:_SHOWN]))} in column "
            f"{TEACHER_COLUMN!r}: nothing is learnt from them"
        )
    yield "rows of train_dataset by teacher: " + ", ".join(f"{name} {count}" for name, count in counts.items())
