"""A model that is not finite takes no step, and is never saved as a success."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from dopd.errors import NotFiniteError
from dopd.trainer.host import HostTrainer


class FiniteGradients(TrainerCallback):
    """Stops before an optimizer step whose gradient holds NaN or infinity: it would make every weight so."""

    def __init__(self, trainer: HostTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # fp16 finds overflows itself, skips such a step and lowers its scale. DeepSpeed keeps gradients to itself.
        if self._trainer.accelerator.mixed_precision == "fp16" or self._trainer.is_deepspeed_enabled:
            return
        named = [(name, p.grad) for name, p in self._trainer.model.named_parameters() if p.grad is not None]
        found = first_not_finite(named, self._trainer.accelerator)
        if found is None:
            return
        raise NotFiniteError(
            f"the gradient is not finite (NaN or infinite) at step {state.global_step}"
            + (f", first in {found!r}" if found else " on another process")
            + f". No step was taken. {likely_cause(state.global_step, args.learning_rate)}",
            source=f"gradient of {found or 'a weight of another process'}",
        )


def check_loss(value: float, *, step: int, learning_rate: float) -> None:
    """Raise `NotFiniteError` unless a loss is finite."""
    if not math.isfinite(value):
        raise NotFiniteError(
            f"the loss is {value} at step {step}: a model gave NaN or infinite logits, or a target has probability 0 "
            f"where the student has some. {likely_cause(step, learning_rate)}",
            source="loss",
        )


def check_weights(model: nn.Module, accelerator: Any, *, step: int, learning_rate: float) -> None:
    """Raise `NotFiniteError` unless every weight is finite; called before anything is saved."""
    found = first_not_finite(list(model.named_parameters()), accelerator)
    if found is not None:
        raise NotFiniteError(
            f"the student's weights are not finite (NaN or infinite) after step {step}"
            + (f", first in {found!r}" if found else " on another process")
            + f": nothing was saved. {likely_cause(step, learning_rate)}",
            source=found or "a weight of another process",
        )


def likely_cause(step: int, learning_rate: float) -> str:
    """What to do about numbers that are not finite."""
    if step == 0:
        return "Nothing was trained yet: check the checkpoint of the student, its precision, and those of the targets"
    return (
        f"The student has probably diverged: lower learning_rate (={learning_rate:g}), set max_grad_norm, or go on "
        "from an earlier checkpoint with a lower rate"
    )


@contextmanager
def finite_rollouts(step: int, learning_rate: float) -> Iterator[None]:
    """What diverged in the last update is first seen when a token is drawn; say so instead of torch's words."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise NotFiniteError(
            f"the student's distribution is not finite (NaN or infinite logits) at step {step}. "
            + likely_cause(step, learning_rate),
            source="student",
        ) from error


@torch.no_grad()
def first_not_finite(named: Iterable[tuple[str, Tensor]], accelerator: Any) -> str | None:
    """Name of the first tensor with NaN or infinity, an empty text if it is on another process, `None` if all are
    finite. Every process must call it.
    """
    local = [(name, value.to_local() if isinstance(value, DTensor) else value) for name, value in named]
    local = [(name, value) for name, value in local if value.is_floating_point() and value.numel()]
    # One number for each tensor, and one wait for all of them.
    largest = [value.abs().amax().float().to(accelerator.device) for _, value in local]
    bad = torch.tensor(0.0, device=accelerator.device)
    if largest:
        bad = (~torch.isfinite(torch.stack(largest))).sum().float()
    if float(accelerator.reduce(bad, reduction="sum")) == 0.0:
        return None
    return next((name for name, value in local if not bool(torch.isfinite(value).all())), "")
