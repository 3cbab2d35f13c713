"""How a run stops before its end, so that it can be gone on with: after a signal, and where a server was lost."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from dopd.trainer.saving import SavingTrainer


class StopWhereAsked(TrainerCallback):
    """Saves and stops after the step in which a signal came; comes behind what decides whether to save."""

    def __init__(self, trainer: SavingTrainer) -> None:
        self._trainer = trainer
        self._asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._asked = bool(self._trainer.requests_of_all())
        if self._asked:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked:
            raise self._trainer.stopped()


@dataclass(frozen=True)
class RandomStates:
    """The random states of this process and of its device.

    Attributes:
        python, numpy: of those modules.
        cpu (`Tensor`), accelerator (`Tensor`, *optional*): of torch.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    accelerator: torch.Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> "RandomStates":
        """As they are now."""
        there = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), there)

    def restore(self, device: torch.device) -> None:
        """Make them what they were."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(device).set_rng_state(self.accelerator, device)


class KeepStart(TrainerCallback):
    """Remembers the random states at the start of a step, for a checkpoint of a step that could not be finished: the
    run that goes on from it draws the answers that this one drew.
    """

    def __init__(self, trainer: SavingTrainer) -> None:
        self._trainer = trainer
        self._new_epoch = False

    def _keep(self) -> None:
        self._trainer.at_start = RandomStates.of(self._trainer.accelerator.device)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._new_epoch = True
        self._keep()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A run that goes on at the start of an epoch reads them before the order of its rows is drawn, else behind.
        if not self._new_epoch:
            self._keep()
        self._new_epoch = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep()
