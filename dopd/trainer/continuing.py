"""The part of the trainer that begins, goes on and stops: one run at a time in a folder, checkpoints read, signals."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from dopd.errors import ConfigError, NotFiniteError, ServerLostError
from dopd.evaluation.privileged_drift import PrivilegedStart
from dopd.inspection.schema import METRICS_FILE, TRACE_FILE
from dopd.interrupts import Stopped, StopRequests, noted
from dopd.random_states import RandomStates
from dopd.report.records import CONFIG_FILE, TABLE_FILE
from dopd.trainer import whole
from dopd.trainer.evidence import NON_FINITE_FILE, Evidence
from dopd.trainer.identity import check_resumed
from dopd.trainer.lock import FolderLock, main_decides
from dopd.trainer.owned import check_free
from dopd.trainer.resuming import STATE_FILE, checkpoint_to_resume, is_complete
from dopd.trainer.room import tell_room
from dopd.trainer.saving import SavingTrainer
from dopd.trainer.trace import TraceWriter
from dopd.weights import read_weights

logger = logging.getLogger(__name__)


class ContinuingTrainer(SavingTrainer):
    """Goes on from whole checkpoints, and stops where a signal or a lost server asks for it."""

    evidence: Evidence
    trace: TraceWriter | None

    _requests: StopRequests
    _changes: tuple[str, ...] = ()
    at_start: RandomStates | None = None  # of the step that is under way, where it may have to be left

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the host's; `resume_from_checkpoint` is that of the configuration if it is not given.

        A run whose last checkpoint is at its last step is given that checkpoint's weights (or, where it was to end with
        them, those of the best), and nothing is trained.
        SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP finish the step, save a checkpoint and raise `Stopped`, a
        `SystemExit`.

        Raises:
            ConfigError: there is no such checkpoint, it is of another run, or another process is at this folder.
        """
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        with self._alone(), noted() as self._requests:
            folder = self.run_folder
            is_named = resume_from_checkpoint is not None  # the configuration has read its own whole
            checkpoint = main_decides(lambda: checkpoint_to_resume(wanted, folder, checksums=is_named), folder)
            self._sealed_step = None
            main_decides(lambda: self._check_folder(fresh=checkpoint is None), folder)
            if checkpoint is not None:
                self._changes = check_resumed(self, checkpoint)
                if is_complete(checkpoint, self.args):
                    return self._as_it_ended(checkpoint)
            try:
                result = super().train(checkpoint, *args, **kwargs)
            except Stopped:
                self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
                raise
            except ServerLostError as error:
                raise self._kept_for_later(error) from error
            except NotFiniteError as error:
                raise self.evidence.with_evidence(error, self.state.global_step) from error
            except OSError as error:
                raise self._not_written(error) from error
            if self.requests_of_all():  # the host's evaluation had the last word about saving
                self._save_checkpoint(self.model, None)
                raise self.stopped()
            return result

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no other process trains into this folder; all processes of this run fail together."""
        lock = FolderLock(self.run_folder)
        main_decides(lock.take, self.run_folder)
        try:
            yield
        finally:
            if self.accelerator.is_main_process:
                lock.release()

    def _check_folder(self, *, fresh: bool) -> None:
        """Raise `ConfigError` where the run would write over what no run of ours has written."""
        run = self.run_folder
        steps = (self.args.max_steps if self.args.max_steps > 0 else sys.maxsize) if fresh else None
        whole.check_places(run, steps)
        names = [METRICS_FILE, NON_FINITE_FILE, CONFIG_FILE, TABLE_FILE]
        check_free(run, [*names, *([] if self.trace is None else [TRACE_FILE])])

    def _as_it_ended(self, checkpoint: str) -> TrainOutput:
        """The state and the weights that a complete run left; nothing is trained."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                f"resume_from_checkpoint (={checkpoint!r}): the run is complete, and sharded weights are only read to "
                "be trained. Set max_steps higher to go on"
            )
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
        _find_best(self.state, self.run_folder)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        logger.warning(
            f"the run is complete: {checkpoint} is at step {self.state.global_step}, the last. Nothing is trained"
        )
        return TrainOutput(self.state.global_step, 0.0, {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            read_weights(resume_from_checkpoint, self.unwrapped_student)
        self.privileged_start = PrivilegedStart.load(Path(resume_from_checkpoint))
        self.anchor.load(Path(resume_from_checkpoint))
        self.initial.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            read_weights(str(self.state.best_model_checkpoint), self.unwrapped_student)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        fresh = [] if self.optimizer is None else [dict(group) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # A checkpoint brings the old rates and factors along; where new ones are meant, they are to act.
        named = {"weight_decay": "weight_decay", "adam_epsilon": "eps", "adam_beta1": "betas", "adam_beta2": "betas"}
        for group, new in zip(self.optimizer.param_groups, fresh, strict=True):
            for name, key in named.items():
                if name in self._changes and key in new:
                    group[key] = new[key]
        if "learning_rate" in self._changes and hasattr(self.lr_scheduler, "lr_lambdas"):
            self.lr_scheduler.base_lrs = [new.get("initial_lr", new["lr"]) for new in fresh]
        if {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"} & set(self._changes):
            self._set_rates()

    def _set_rates(self) -> None:
        """Give the optimizer the rates of the step that comes next."""
        scheduler = self.lr_scheduler
        if not hasattr(scheduler, "lr_lambdas"):
            raise ConfigError(
                f"resume_with_changes: the rate of lr_scheduler_type (={self.args.lr_scheduler_type!s}) cannot be "
                "changed in the middle of a run: start a new run from the checkpoint's weights"
            )
        rates = [
            base * rule(scheduler.last_epoch)
            for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, base, rate in zip(self.optimizer.param_groups, scheduler.base_lrs, rates, strict=True):
            group["initial_lr"], group["lr"] = base, rate
        scheduler._last_lr = rates

    # --- Signals

    def requests_of_all(self) -> int:
        """The number of a signal that any process was sent; 0 if there was none."""
        if self.accelerator.num_processes == 1:
            return self._requests.number
        mine = torch.tensor(self._requests.number, device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def _kept_for_later(self, error: ServerLostError) -> ServerLostError:
        """Save the last whole step; the error says how to go on from it."""
        step, folder = self.state.global_step, self.run_folder / f"checkpoint-{self.state.global_step}"
        if step and not folder.is_dir():
            if self.at_start is not None:
                self.at_start.restore()
            self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        way = (
            f"Stopped after step {step} of {self.state.max_steps}, saved as {folder}. When the server is back: the "
            "same again with resume_from_checkpoint=true"
        )
        return ServerLostError(f"{error}. {way if step else 'Nothing was trained: start it again when it is back'}")

    def stopped(self) -> Stopped:
        """What is raised once a checkpoint was saved for a signal."""
        step, number = self.state.global_step, self.requests_of_all()
        folder = self.run_folder / f"checkpoint-{step}"
        return Stopped(
            number,
            f"stopped after step {step} of {self.state.max_steps}, saved as {folder}. To go on: the same again with "
            "resume_from_checkpoint=true (dopd train ... --resume_from_checkpoint true)",
        )


def _find_best(state: TrainerState, run: Path) -> None:
    """Have the best checkpoint where the run's folder is now."""
    best = state.best_model_checkpoint
    if best is not None and (run / Path(best).name).is_dir():
        state.best_model_checkpoint = str(run / Path(best).name)


class OneRun(TrainerCallback):
    """Keeps the checkpoints of a folder those of one run; comes before whatever else changes the folder."""

    def __init__(self, trainer: ContinuingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            run = Path(args.output_dir)
            whole.clear_unfinished(run)
            whole.set_aside_after(run, state.global_step)
            _find_best(state, run)
        if state.is_world_process_zero:
            tell_room(self._trainer)
