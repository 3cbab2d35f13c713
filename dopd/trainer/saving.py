"""The part of the trainer that saves and goes on: whole checkpoints, one run at a time in a folder, signals."""

import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from dopd.bases import marks_of_base, write_base
from dopd.errors import ConfigError, FileError, NotFiniteError, ServerLostError
from dopd.files import fingerprint, leave_out_tokens, not_written
from dopd.inspection.schema import METRICS_FILE, TRACE_FILE
from dopd.interrupts import Stopped, StopRequests, noted
from dopd.random_states import RandomStates
from dopd.report.records import CONFIG_FILE, TABLE_FILE
from dopd.trainer import whole
from dopd.trainer.beginnings import first_weights, teacher_weights
from dopd.trainer.best import student_metric
from dopd.trainer.evidence import NON_FINITE_FILE, Evidence
from dopd.trainer.finite import check_weights
from dopd.trainer.host import HostTrainer
from dopd.trainer.identity import NOT_SAVED, check_resumed, identity_of
from dopd.trainer.lock import FolderLock, main_decides
from dopd.trainer.owned import check_free, clear_way, move_in, own, users, write_own
from dopd.trainer.resuming import STATE_FILE, checkpoint_to_resume, is_complete
from dopd.trainer.room import tell_room, way_of_previous
from dopd.weights import read_weights

logger = logging.getLogger(__name__)

# What a checkpoint has beside the model.
_STATE = (STATE_FILE, whole.MANIFEST_FILE, "optimizer", "scheduler", "rng_state", "scaler")


class SavingTrainer(HostTrainer):
    """Saves checkpoints that are whole or not there, and goes on from them.

    The host writes into a folder of another name, sealed and renamed when all is on the disk; then older ones go.
    """

    evidence: Evidence
    trace: Any

    _requests: StopRequests
    _writing = False  # a checkpoint, whose folder has not its name yet
    _waits_for_hub = False
    _changes: tuple[str, ...] = ()
    _sealed_step: int | None = None
    at_start: RandomStates | None = None  # of the step that is under way, where it may have to be left

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.teacher_weights = teacher_weights(kwargs.get("teacher_model"))  # FSDP splits them here
        super().__init__(*args, **kwargs)  # and the student's when the training begins
        self.base_marks = marks_of_base(self.unwrapped_student)
        self.first_weights = first_weights(self.unwrapped_student)

    # --- Going on

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the host's; `resume_from_checkpoint` is that of the configuration if it is not given.

        A run whose last checkpoint is at its last step is given that checkpoint's weights (or, where it was to end with
        them, those of the best), and nothing is trained.
        SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 finish the step, save a checkpoint and raise `Stopped`, a `SystemExit`.

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

    # --- Saving

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = student_metric(self.args)
        if name is not None and f"eval_{name}" not in metrics:  # the host's own evaluation; the student's was before
            return self.state.best_global_step == self.state.global_step
        return super()._determine_best_metric(metrics, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the host's, but files are written beside and renamed; a user's files in `args.output_dir` are kept."""
        if self._writing:  # a checkpoint, which has been looked at, in a folder of its own
            self._save_model(Path(output_dir or self.run_folder))
            return
        self._check_weights()
        folder = Path(output_dir or self.run_folder)
        try:
            with self._written_beside(folder) as unfinished:
                self._save_model(unfinished)
        except OSError as error:
            raise self._not_written(error) from error
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_model(self, folder: Path) -> None:
        super().save_model(str(folder), _internal_call=True)
        if self.is_world_process_zero():
            write_base(folder, self.base_marks)

    @contextmanager
    def _written_beside(self, folder: Path) -> Iterator[Path]:
        """A folder for files of this run, which get their places in `folder` afterwards; on all processes together."""
        main = self.is_world_process_zero()
        if main:
            whole.begin_unfinished(folder)
        unfinished = folder / whole.UNFINISHED / "model"
        try:
            yield unfinished
            self.accelerator.wait_for_everyone()
            if main and unfinished.is_dir():
                leave_out_tokens(unfinished)
                move_in(unfinished, folder)
        finally:
            if main:
                whole.clear_unfinished(folder)

    def save_state(self) -> None:
        """As the host's; a `trainer_state.json` that a user has written, or edited, is moved to `_kept`."""
        self.write_own_files(super().save_state)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As the host's; files of these names that a user has written, or edited, are moved to `_kept`."""
        earlier = ["all_results.json"] if combined else []
        self.write_own_files(lambda: super(SavingTrainer, self).save_metrics(split, metrics, combined), earlier)

    def write_own_files(self, write: Callable[[], object], earlier: Sequence[str] = ()) -> None:
        """Have the host write files into `args.output_dir`, on the main process.

        Args:
            write: the host's method.
            earlier (`list[str]`): names of files that it adds to, where they are the run's own.
        """
        if not self.is_world_process_zero():
            return
        output_dir, run = self.args.output_dir, self.run_folder
        with tempfile.TemporaryDirectory() as temporary:
            theirs = users(run, earlier)
            for name in earlier:
                if name not in theirs and (run / name).is_file():
                    shutil.copyfile(run / name, Path(temporary) / name)
            self.args.output_dir = temporary
            try:
                write()
            finally:
                self.args.output_dir = output_dir
            for path in sorted(Path(temporary).iterdir()):
                write_own(run, path.name, path.read_bytes())

    def _check_weights(self) -> None:
        check_weights(self.model, self.accelerator, step=self.state.global_step, learning_rate=self.args.learning_rate)

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / whole.UNFINISHED) if self._writing else run

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._writing:  # hubs are sent it from its own place
            self._waits_for_hub = True
        else:
            if self.is_world_process_zero():  # the host copies the model from there into the run folder
                names = [path.name for path in Path(checkpoint_folder).iterdir() if path.is_file()]
                copied = [name for name in names if not name.startswith(_STATE)]
                clear_way(self.run_folder, copied)
            super()._push_from_checkpoint(checkpoint_folder)
            if self.is_world_process_zero():
                there = [name for name in copied if (self.run_folder / name).is_file()]
                own(self.run_folder, {name: fingerprint(self.run_folder / name) for name in there})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        if step == self._sealed_step:
            return
        self._check_weights()
        run = Path(self._get_output_dir(trial))
        unfinished, folder = run / whole.UNFINISHED / f"checkpoint-{step}", run / f"checkpoint-{step}"
        try:
            if self.accelerator.is_main_process:
                whole.begin_unfinished(run)
            self._write(model, trial, unfinished)
            self._put_in_place(unfinished, folder)
        except Exception as error:
            whole.clear_unfinished(run)
            raise self._not_written(error) from error
        self._sealed_step = step
        if self._waits_for_hub:
            self._waits_for_hub = False
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            whole.rotate(run, self.args.save_total_limit, None if best is None else Path(best))

    def _not_written(self, error: Exception) -> Exception:
        """What to raise for an error of writing: one line, with the checkpoint that can be gone on from."""
        run = self.run_folder
        found = not_written(error, run, choose="another output_dir")
        if found is None:
            return error
        last = whole.newest_whole(run, checksums=False)
        kept = f"; {last} is whole, and resume_from_checkpoint=true goes on from it" if last else ""
        return FileError(f"{found}{way_of_previous(run, str(found))}{kept}")

    def _write(self, model: nn.Module, trial: Any, unfinished: Path) -> None:
        self._writing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing = False
        if self.state.best_model_checkpoint == str(unfinished):
            self.state.best_model_checkpoint = str(unfinished.parent.parent / unfinished.name)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / STATE_FILE))
        if self.accelerator.is_main_process:
            self.anchor.save(unfinished)
            self.initial.save(unfinished)

    def _put_in_place(self, unfinished: Path, folder: Path) -> None:
        """Seal and rename what all processes have written; on file systems of their own, each node its part."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._publish(unfinished, folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process and not self.accelerator.is_main_process and unfinished.is_dir():
            self._publish(unfinished, folder)

    def _publish(self, unfinished: Path, folder: Path) -> None:
        saved = NOT_SAVED if self.args.save_only_model else {}
        leave_out_tokens(unfinished)
        whole.seal(unfinished, self.state.global_step, identity_of(self) | saved)
        whole.put_in_place(unfinished, folder)
        whole.remove_empty(unfinished.parent)


def _find_best(state: TrainerState, run: Path) -> None:
    """Have the best checkpoint where the run's folder is now."""
    best = state.best_model_checkpoint
    if best is not None and (run / Path(best).name).is_dir():
        state.best_model_checkpoint = str(run / Path(best).name)


class OneRun(TrainerCallback):
    """Keeps the checkpoints of a folder those of one run; comes before whatever else changes the folder."""

    def __init__(self, trainer: SavingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            run = Path(args.output_dir)
            whole.clear_unfinished(run)
            whole.set_aside_after(run, state.global_step)
            _find_best(state, run)
        if state.is_world_process_zero:
            tell_room(self._trainer)
