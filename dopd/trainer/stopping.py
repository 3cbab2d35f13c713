"""How a run stops before its end, so that it can be gone on with: after a signal, and where a server was lost."""

from typing import Any

from transformers import TrainerCallback

from dopd.random_states import RandomStates
from dopd.trainer.continuing import ContinuingTrainer


class StopWhereAsked(TrainerCallback):
    """Saves and stops after the step in which a signal came; comes behind what decides whether to save."""

    def __init__(self, trainer: ContinuingTrainer) -> None:
        self._trainer = trainer
        self._asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._asked = bool(self._trainer.requests_of_all())
        if self._asked:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked:
            raise self._trainer.stopped()


class KeepStart(TrainerCallback):
    """Remembers the random states at the start of a step, for a checkpoint of a step that could not be finished: the
    run that goes on from it draws the answers that this one drew.
    """

    def __init__(self, trainer: ContinuingTrainer) -> None:
        self._trainer = trainer
        self._new_epoch = False

    def _keep(self) -> None:
        self._trainer.at_start = RandomStates.now(self._trainer.accelerator.device)

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
