"""The weights that a run begins with: a resumed run must begin with the same, wherever they are now."""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dopd.adapters import has_adapters
from dopd.trainer.anchor import FrozenAnchor
from dopd.trainer.host import HostTrainer

logger = logging.getLogger(__name__)

WEIGHTS = "model_name_or_path (its weights)"
TEACHER_WEIGHTS = "teacher_model_name_or_path (its weights)"
_VALUES = 64  # of each tensor
_NOTHING = hashlib.sha256().hexdigest()[:12]  # the digest of no weights


def weights_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """A short text that differs where weights differ: of names, sizes, and some values of each tensor held here."""
    digest = hashlib.sha256()
    for name, weight in named:
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if isinstance(weight, DTensor) or weight.device.type == "meta" or not weight.numel():
            continue
        flat = weight.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES]
        digest.update(picked.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:12]


def teacher_weights(teachers: Iterable[Any]) -> str:
    """A digest of the weights of all teachers of this process; where there is none, of nothing."""
    return weights_digest(
        named for teacher in teachers if isinstance(teacher, nn.Module) for named in teacher.named_parameters()
    )


def first_weights(student: Any) -> str:
    """A digest of the weights that a run begins with: of a whole model, or of what an adapter is put on."""
    adapted = has_adapters(student)
    return weights_digest(
        (name, weight) for name, weight in student.named_parameters() if not (adapted and weight.requires_grad)
    )


def same_beginning(checkpoint: str, saved: Mapping[str, Any], trainer: HostTrainer) -> str:
    """The digest of the weights that a run began with, of which a resumed one is a part.

    A resumed run that is given a checkpoint of its own folder as its student began with what that run began with,
    unless a privileged student of an earlier time is made of the weights that it is given.

    Args:
        checkpoint (`str`): the folder that is gone on from.
        saved (`dict`): what it says of the run, see `identity_of`.
        trainer: of the resumed run.
    """
    before, student = str(saved.get(WEIGHTS, _NOTHING)), trainer.unwrapped_student
    if before == _NOTHING:
        logger.warning(
            f"{checkpoint} was saved by an earlier version of dopd, which did not note what weights a run began with: "
            "nothing says whether model_name_or_path is still the same"
        )
        return before
    held = [one for one in (trainer.anchor, trainer.initial) if isinstance(one, FrozenAnchor) and not one.saves]
    source = str(getattr(getattr(student, "config", None), "_name_or_path", None) or "")
    if held or has_adapters(student) or not os.path.isdir(source):
        return trainer.first_weights
    run, place = Path(trainer.run_folder).resolve(), Path(source).resolve()
    return before if place == Path(checkpoint).resolve() or place.is_relative_to(run) else trainer.first_weights
