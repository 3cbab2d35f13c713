"""Callbacks of a run: moving-average anchor, evaluation without privileged context, idle steps, metrics file."""

import logging
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from dopd.errors import ConfigError, DataError
from dopd.evaluation import privileged_drift
from dopd.evaluation.privileged_drift import PrivilegedStart
from dopd.evaluation.results import EvaluationResult
from dopd.evaluation.student import StudentEvaluator
from dopd.files import append_line, fingerprint
from dopd.guests import begin_step
from dopd.inspection.schema import METRICS_FILE, mend_lines, to_line
from dopd.progress import say
from dopd.report.ending import BEST_STEP, WAITED
from dopd.report.monitors import PRIVILEGED_KL
from dopd.scoring import evaluation_mode
from dopd.trainer.best import EarlyStop, has_stopped, student_metric
from dopd.trainer.continuing import ContinuingTrainer
from dopd.trainer.host import HostTrainer
from dopd.trainer.owned import begin_growing, own, seal_growing
from dopd.trainer.setup import shard_of
from dopd.trainer.trace import warn_of_torn_records

logger = logging.getLogger(__name__)

DRIFT_WARNING = 0.1  # a fall of accuracy WITH privileged context that is worth a warning, from the best seen


class AnchorUpdate(TrainerCallback):
    """Moves the privileged student's weights after every optimizer step."""

    def __init__(self, trainer: ContinuingTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.anchor.after_step(self._trainer.accelerator.unwrap_model(self._trainer.model))


class GuestNumbers(TrainerCallback):
    """Lets the random numbers of users' code depend on the step, so that a run that goes on has the same ones."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin_step(state.global_step)


class EndedStream(TrainerCallback):
    """Says that a stream gave no step's prompts when it was read through; the host would end the run as a whole one.

    Args:
        prompts_per_step (`int`): that one optimizer step takes.
    """

    def __init__(self, prompts_per_step: int) -> None:
        self._needed = prompts_per_step
        self._first = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > self._first:
            return
        if state.global_step == 0:
            raise DataError(
                f"train_dataset, a stream, ended before it gave the {self._needed} prompts of one optimizer step: "
                "nothing was trained. Add prompts, or lower per_device_train_batch_size or gradient_accumulation_steps"
            )
        if state.is_world_process_zero:
            logger.warning(
                f"train_dataset, a stream, gave nothing when it was read again: the run ends at step "
                f"{state.global_step} of {state.max_steps}. Give one that can be read more than once "
                "(IterableDataset.from_generator with a function that begins anew), or lower max_steps"
            )


_CLAMPED_SHARE = 0.01  # of a rule's tokens, from which its clamp is told


class IdleSteps(TrainerCallback):
    """Says that logged steps had no gradient: nothing was learned in them."""

    def __init__(self, is_judged: bool) -> None:
        self._reason = (
            "every prompt's answers had equal rewards, so none was better than another. Use easier or harder prompts, "
            "more num_generations, or rewards with more values"
            if is_judged
            else "targets and student agree, or every weight is 0"
        )
        self.count = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or logs.get("grad_norm") != 0.0:
            return
        self.count += 1
        if self.count == 1 and state.is_world_process_zero:
            logger.warning(f"step {state.global_step}: the gradient is 0, nothing was learned: {self._reason}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.count > 1 and state.is_world_process_zero:
            logger.warning(f"in {self.count} of the logged steps the gradient was 0 and nothing was learned")


class ClampedTokens(TrainerCallback):
    """Says once of each rule that its clamp bounds more than a few tokens."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for name, share in (logs or {}).items():
            if not name.startswith("clamped/") or share <= _CLAMPED_SHARE or name in self._seen:
                continue
            self._seen.add(name)
            if state.is_world_process_zero:
                logger.warning(
                    f"step {state.global_step}: the clamp of rule {name.removeprefix('clamped/')!r} bounds "
                    f"{share:.1%} of its tokens ({name}). A bounded outcome has no gradient of its own, and the "
                    "student's normalisation pushes it the other way (arXiv 2609.38995): train without it "
                    "(method_options: {clamp: null}), or with a higher one"
                )


class StudentEvaluation(TrainerCallback):
    """Evaluates the student without privileged context, before the first step, every N steps and after the last; has
    the best checkpoint kept, and the run stopped, where it was asked to.
    """

    def __init__(self, trainer: HostTrainer, evaluator: StudentEvaluator, every: int) -> None:
        self._trainer = trainer
        self._evaluator = evaluator
        self._every = every
        self._best_privileged = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._evaluate()
            self._stop_early(control)

    def _stop_early(self, control: Any) -> None:
        """End the run where it has stopped getting better, as it ends at its last step."""
        args, state = self._trainer.args, self._trainer.state
        if state.global_step == state.max_steps or not has_stopped(args, state.log_history, state.global_step):
            return
        control.should_training_stop = control.should_log = True
        if args.save_strategy != SaveStrategy.BEST:
            control.should_save = True
        if state.is_world_process_zero:
            say(f"step {state.global_step} of {state.max_steps}: early_stop ends the run")

    def _evaluate(self) -> None:
        trainer = self._trainer
        # In the precision of training: what is below the model's own forward is not wrapped in it.
        shard = shard_of(trainer)
        with trainer.whole_student() as model, trainer.accelerator.autocast():
            teacher, through = trainer.unwrapped_teacher, trainer.through_teacher
            mine = self._evaluator.evaluate(model, teacher=teacher, shard=shard, through=through)
            drift = self._drift_of_privileged(model, shard)
        result = mine if trainer.is_split else sum(gather_object([mine]), start=EvaluationResult())
        metrics = {f"eval_{name}": value for name, value in result.metrics().items()} | drift
        self._warn_of_drift(metrics)
        self._choose_checkpoint(metrics)
        # In evaluation mode the host logs these alone and leaves the training metrics of the step to their own record,
        # which is still to come: logging would tell the training loop that the step has been logged.
        should_log = trainer.control.should_log
        with evaluation_mode(trainer.model):
            trainer.log(metrics)
        trainer.control.should_log = should_log

    def _drift_of_privileged(self, model: Any, shard: tuple[int, int]) -> dict[str, float]:
        """How far the student with p is from its start, where the method learns from it."""
        trainer = self._trainer
        if not trainer.args.monitors or "privileged_student" not in trainer.table.sources:
            return {}
        if trainer.state.global_step == 0:
            mine = privileged_drift.start_answers(self._evaluator, model, shard)
            parts = [mine] if trainer.is_split else gather_object([mine])
            answers = tuple(answer for part in parts for answer in part)
            trainer.privileged_start = PrivilegedStart(privileged_drift.digest_of(self._evaluator), answers)
        start = trainer.privileged_start
        if start is None or not start.is_of(self._evaluator):
            return {}
        sums = privileged_drift.drift(self._evaluator, model, start.answers, shard)
        of_all = [sums] if trainer.is_split else gather_object([sums])
        return {PRIVILEGED_KL: sum(fallen for fallen, _ in of_all) / max(sum(count for _, count in of_all), 1)}

    def _choose_checkpoint(self, metrics: dict[str, float]) -> None:
        """Tell the host whether this step is the best so far, where it was asked to go by a metric of ours; adds which
        one is, and how long none was better.
        """
        trainer = self._trainer
        name = student_metric(trainer.args)
        if name is None:
            return
        if f"eval_{name}" not in metrics:
            raise ConfigError(
                f"metric_for_best_model (={trainer.args.metric_for_best_model!r}) is not measured on this "
                f"eval_dataset: it has {', '.join(metrics)}"
            )
        if trainer.state.global_step == 0:  # there is no checkpoint of the start
            return
        best = trainer.is_best(metrics)
        if trainer.args.save_strategy == SaveStrategy.BEST:
            trainer.control.should_save = best
        elif best and trainer.args.load_best_model_at_end:  # at this step, wherever the others are saved
            trainer.control.should_save = True
        metrics[BEST_STEP] = float(trainer.state.best_global_step or 0)
        stop = EarlyStop.of(trainer.args)
        if stop is not None:
            key = f"eval_{name}"
            values = [record[key] for record in trainer.state.log_history if key in record]
            metrics[WAITED] = float(stop.waited([*values, metrics[key]], greater=bool(trainer.args.greater_is_better)))

    def _warn_of_drift(self, metrics: dict[str, float]) -> None:
        privileged = metrics.get("eval_accuracy_privileged")
        if privileged is None:
            return
        self._best_privileged = max(self._best_privileged, privileged)
        if privileged < self._best_privileged - DRIFT_WARNING and "privileged_student" in self._trainer.table.sources:
            logger.warning(
                f"the student's accuracy WITH privileged context fell from {self._best_privileged:.2f} to "
                f"{privileged:.2f}: the privileged student is drifting and its targets get worse. Lower the learning "
                "rate, or set privileged_student='ema' or 'frozen'"
            )


class MetricsFile(TrainerCallback):
    """Appends every logged record to `metrics.jsonl` in the run folder; a resumed run drops what came after its
    start.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / METRICS_FILE
        self._ended = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        start = state.global_step

        def keep(record: dict[str, Any]) -> bool:
            # The summary of a part of the run is not one of its steps; the next part writes its own.
            return bool(start) and record["step"] <= start and "train_runtime" not in record

        self._ended = False
        own(self._path.parent, (), complete=False)
        begin_growing(self._path.parent, METRICS_FILE, start)
        warn_of_torn_records(self._path, mend_lines(self._path, keep))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            seal_growing(self._path.parent, ended=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._ended = True
            seal_growing(self._path.parent, ended=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            append_line(self._path, to_line({"step": state.global_step, **logs}))
            if self._ended:  # an evaluation after training
                own(self._path.parent, {METRICS_FILE: fingerprint(self._path)})
