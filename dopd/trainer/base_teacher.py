"""Teacher `base`: the student's own base weights, with its adapters off. No second model is loaded."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dopd.adapters import has_adapters, layer_change, tuned_layers
from dopd.bases import leaves_base_alone
from dopd.errors import ConfigError, ModelError
from dopd.tables import RoutingTable
from dopd.trainer.adapting import named_adapter
from dopd.trainer.config import BASE, DOPDConfig


def as_configured(teacher_model: Any, args: DOPDConfig) -> tuple[Any, DOPDConfig]:
    """The teacher that a trainer was given or that its config names, and a config that says so where it is `base`."""
    if isinstance(teacher_model, str) and teacher_model == BASE and args.teacher_model_name_or_path != BASE:
        args = copy.copy(args)
        args.teacher_model_name_or_path = BASE
    return (args.teacher_model_name_or_path if teacher_model is None else teacher_model), args


def check_has_base(model: Any, peft_config: Any, args: DOPDConfig) -> None:
    """Refuse teacher `base` of a student without adapters, before anything is loaded.

    Args:
        model: what the trainer was given as the student.
        peft_config: a new adapter for it, if any.
        args (`DOPDConfig`): the config.
    """
    if args.teacher_is_base and peft_config is None and not has_adapters(model) and named_adapter(model, args) is None:
        raise ConfigError(
            f"teacher_model_name_or_path (={BASE!r}) is the student's base with its adapter off, and the student has "
            "no adapter: set use_peft (peft_config), or name an adapter's folder as the student. A folder or a hub id "
            f"of that name is ./{BASE} or owner/{BASE}; the initial weights of a whole student are a method's "
            "'reference'"
        )


def check_base(student: Any, table: RoutingTable) -> None:
    """Refuse teacher `base` where it cannot be had, or where it teaches nothing.

    Args:
        student: unwrapped, with its adapters.
        table (`RoutingTable`): the method.

    Raises:
        ConfigError: adapters that change the weights below them, or ones that still change nothing with a method that
            compares teacher and student in the same context.
    """
    if not leaves_base_alone(student):
        raise ConfigError(
            f"teacher_model_name_or_path (={BASE!r}): the adapter changes the weights below it when it starts "
            "(init_lora_weights), so that with the adapter off the student is no checkpoint. Load the teacher, or "
            "start the adapter with init_lora_weights=True"
        )
    if ("teacher" in table.target_sources or table.routed) and not _changes_anything(student):
        raise ConfigError(
            f"teacher_model_name_or_path (={BASE!r}): the student's adapter is new and changes nothing, so teacher and "
            f"student are one model, and method {table.name!r} compares them in the same context: every gap and every "
            "target would be the student's own. Go on from a trained adapter, or choose method='privileged_student'"
        )


@torch.no_grad()
def _changes_anything(student: Any) -> bool:
    """Whether the adapters of a student change any weight; where nobody can say it, they count as if they did."""
    try:
        changes = (change for layer in tuned_layers(student).values() for change in layer_change(layer).values())
        return any(bool(change.any()) for change in changes) or not tuned_layers(student)
    except ModelError:
        return True


@contextmanager
def adapters_off(wrapped: Any, student: Any) -> Iterator[Any]:
    """Inside, the student computes without its adapters.

    Args:
        wrapped: the student as it is trained, which is what is yielded.
        student: unwrapped.
    """
    # PEFT freezes adapters that are off, and trains all active ones again afterwards.
    before = [(weight, weight.requires_grad) for weight in student.parameters()]
    try:
        with student.disable_adapter():
            yield wrapped
    finally:
        for weight, trains in before:
            weight.requires_grad_(trains)
