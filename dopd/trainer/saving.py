"""The part of the trainer that saves: checkpoints that are whole or not there, and files of the run beside a user's."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dopd.bases import marks_of_base, write_base
from dopd.errors import FileError
from dopd.files import fingerprint, finish, not_written
from dopd.trainer import whole
from dopd.trainer.beginnings import first_weights, teacher_weights
from dopd.trainer.best import student_metric
from dopd.trainer.finite import check_weights
from dopd.trainer.host import HostTrainer
from dopd.trainer.identity import NOT_SAVED, identity_of
from dopd.trainer.owned import clear_way, move_in, own, users, write_own
from dopd.trainer.resuming import STATE_FILE
from dopd.trainer.room import way_of_previous
from dopd.trainer.sharded_anchor import ShardedAnchor

# What a checkpoint has beside the model.
_STATE = (STATE_FILE, whole.MANIFEST_FILE, "optimizer", "scheduler", "rng_state", "scaler")


class SavingTrainer(HostTrainer):
    """Saves checkpoints that are whole or not there.

    The host writes into a folder of another name, sealed and renamed when all is on the disk; then older ones go.
    """

    _writing = False  # a checkpoint, whose folder has not its name yet
    _waits_for_hub = False
    _sealed_step: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # FSDP splits them here.
        self.teacher_weights = teacher_weights([kwargs.get("teacher_model"), *self.parked.models.values()])
        super().__init__(*args, **kwargs)  # and the student's when the training begins
        self.base_marks = marks_of_base(self.unwrapped_student)
        self.first_weights = first_weights(self.unwrapped_student)

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
                finish(unfinished)
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
        if self.privileged_start is not None and self.accelerator.is_main_process:
            self.privileged_start.save(unfinished)
        for anchor in (self.anchor, self.initial):
            if self.accelerator.is_main_process or isinstance(anchor, ShardedAnchor):
                anchor.save(unfinished)

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
        finish(unfinished)
        whole.seal(unfinished, self.state.global_step, identity_of(self) | saved)
        whole.put_in_place(unfinished, folder)
        whole.remove_empty(unfinished.parent)
