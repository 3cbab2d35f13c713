"""Which checkpoint is the best, by the evaluation of the student: `metric_for_best_model` in the host's words; and when
none better is waited for any more: `early_stop`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from transformers import SchedulerType

from dopd.errors import ConfigError, did_you_mean
from dopd.report.ending import WAITED
from dopd.settings import Count, NotNegative, as_mapping, check, settings_of
from dopd.trainer.host_optimizer import BY_A_METRIC

if TYPE_CHECKING:
    from dopd.trainer.config import DOPDConfig

# Metrics of `EvaluationResult`, and whether more is better; `None` where neither side is.
STUDENT_METRICS: dict[str, bool | None] = {
    "accuracy_greedy": True,
    "accuracy_sampled": True,
    "accuracy_privileged": True,
    "accuracy_blank": None,
    "divergence_to_teacher": False,
    "entropy": None,
    "eos_ratio": True,
    "length": None,
}
_DIVERGENCE = "divergence_to_teacher"


@dataclass(frozen=True)
class EarlyStop:
    """`early_stop`: end a run that has stopped getting better.

    transformers' `EarlyStoppingCallback` measures a gain from the best value so far, however small the gains were that
    led there, and forgets its patience in a run that goes on; here a gain is measured from the last one that counted,
    and the patience follows from the evaluations that a checkpoint remembers.

    Attributes:
        metric (`str`): of the student's evaluation.
        patience (`int`): evaluations in a row without a gain after which the run ends.
        min_delta (`float`): a gain is more than this, in the metric's unit (accuracies: shares).
    """

    metric: Literal[tuple(STUDENT_METRICS)] = "accuracy_greedy"  # type: ignore[valid-type]
    patience: Count = 3
    min_delta: NotNegative = 0.0

    @classmethod
    def of(cls, args: "DOPDConfig") -> "EarlyStop | None":
        """What a configuration that has been checked asks for."""
        return None if args.early_stop is None else cls(**as_mapping(args.early_stop))

    def waited(self, values: Iterable[float], *, greater: bool) -> int:
        """Evaluations since the last gain, or since the first one where there was none.

        Args:
            values: of the metric, in the order of evaluations, from the one before the first step on.
            greater (`bool`): whether more is better.
        """
        mark, waited = None, 0
        for value in values:
            if mark is None or (value - mark if greater else mark - value) > self.min_delta:
                mark, waited = value, 0
            else:
                waited += 1
        return waited


def read_early_stop(args: "DOPDConfig") -> list[str]:
    """Have `early_stop` as it is meant, and the host choose and load the best checkpoint by its metric.

    Returns:
        What is wrong with it.
    """
    if args.early_stop is None:
        return []
    asked = as_mapping(args.early_stop)
    if isinstance(metric := asked.get("metric"), str):
        asked["metric"] = metric.removeprefix("eval_")
    read, problems = check(asked, settings_of(EarlyStop), "early_stop")
    stop = EarlyStop(**read) if not problems else EarlyStop()
    args.load_best_model_at_end = True
    if args.metric_for_best_model is None:
        args.metric_for_best_model = stop.metric
    elif not problems and args.metric_for_best_model.removeprefix("eval_") != stop.metric:
        problems.append(
            f"early_stop: metric (={stop.metric!r}) is not metric_for_best_model (={args.metric_for_best_model!r}), "
            "but one metric says which checkpoint is the best and when to stop: leave metric_for_best_model out"
        )
    if not problems:
        args.early_stop = asdict(stop)
    return problems


def has_stopped(args: "DOPDConfig", history: Iterable[Mapping[str, Any]], step: int) -> bool:
    """Whether the evaluation at a step was the last that a run was to wait for.

    Args:
        args (`DOPDConfig`): the configuration.
        history (`list[dict]`): what was logged, as `trainer_state.json` has it.
        step (`int`): optimizer steps made.
    """
    stop = EarlyStop.of(args)
    waited = [record[WAITED] for record in history if WAITED in record and record["step"] == step]
    return stop is not None and bool(waited) and waited[-1] >= stop.patience


def student_metric(args: "DOPDConfig") -> str | None:
    """`metric_for_best_model` without `eval_`, if it is one that the student's evaluation measures."""
    name = (args.metric_for_best_model or "").removeprefix("eval_")
    return name if name in STUDENT_METRICS else None


def check_choice_of_checkpoint(args: "DOPDConfig") -> None:
    """Give `greater_is_better` its default for one of our metrics.

    Raises:
        ConfigError: it is not measured, or not where checkpoints are saved.
    """
    _check_evaluations(args)
    _check_scheduler(args)
    name = student_metric(args)
    if name is None:
        _check_spelling(args.metric_for_best_model)
        return
    asked_by = "metric_for_best_model" if args.early_stop is None else "early_stop: metric"
    subject = f"{asked_by} (={args.metric_for_best_model!r})"
    if not args.student_eval_steps:
        raise ConfigError(
            f"{subject} is measured by the student's evaluation: set student_eval_steps, with held-out rows and a "
            "verifier"
        )
    if name == _DIVERGENCE and not args.loads_teacher:
        raise ConfigError(
            f"{subject} needs a teacher that is loaded, and method {args.method!r} reads none here: take another metric"
        )
    if args.greater_is_better is None:
        args.greater_is_better = STUDENT_METRICS[name]
    if args.greater_is_better is None:
        raise ConfigError(f"{subject} is good neither high nor low: set greater_is_better to true or false")
    if args.load_best_model_at_end:
        _check_saving(args, subject)


def _check_evaluations(args: "DOPDConfig") -> None:
    """Refuse steps of evaluation that nothing is evaluated at, and a best checkpoint that is never looked for."""
    subject = f"eval_steps (={args.eval_steps or 0:g})"
    host_evaluates = _value(args.eval_strategy) != "no"
    if student_metric(args) is None:
        if _value(args.save_strategy) == "best" and args.metric_for_best_model and not host_evaluates:
            raise ConfigError(
                f"save_strategy='best' with metric_for_best_model (={args.metric_for_best_model!r}) would save "
                "nothing: set eval_strategy, or take a metric of the student's evaluation, such as accuracy_greedy"
            )
    elif args.eval_steps is not None and args.student_eval_steps and args.eval_steps != args.student_eval_steps:
        raise ConfigError(
            f"{subject} is not student_eval_steps (={args.student_eval_steps}), at which metric_for_best_model "
            f"(={args.metric_for_best_model!r}) is measured: set student_eval_steps alone"
        )
    if args.eval_steps is not None and not host_evaluates and args.eval_steps != args.student_eval_steps:
        raise ConfigError(
            f"{subject} does nothing without eval_strategy='steps'. The student is evaluated at student_eval_steps "
            f"(={args.student_eval_steps})"
        )


def _check_scheduler(args: "DOPDConfig") -> None:
    """Refuse a scheduler that waits for a metric which the host's own evaluation does not measure."""
    if SchedulerType(args.lr_scheduler_type) not in BY_A_METRIC:
        return
    subject = f"lr_scheduler_type (={_value(args.lr_scheduler_type)!r}) goes on by what the host's evaluation measures"
    if _value(args.eval_strategy) == "no":
        raise ConfigError(f"{subject}: set eval_strategy, or take another scheduler")
    if student_metric(args) is not None:
        raise ConfigError(
            f"{subject}, and metric_for_best_model (={args.metric_for_best_model!r}) is of the student's evaluation: "
            "leave it out, or take another scheduler"
        )


def _value(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))


def _check_saving(args: "DOPDConfig", subject: str) -> None:
    """The best is saved when it is found, whatever else is saved."""
    strategy = _value(args.save_strategy)
    if strategy == "no":
        name = "early_stop" if args.early_stop is not None else f"load_best_model_at_end with {subject}"
        raise ConfigError(
            f"{name} ends with the weights of the best checkpoint, and save_strategy (='no') saves none: set "
            "save_strategy to 'best' (the best alone), 'steps' or 'epoch'"
        )


def _check_spelling(name: str | None) -> None:
    bare = (name or "loss").removeprefix("eval_")
    hint = did_you_mean(bare, STUDENT_METRICS)
    if hint and bare != "loss":
        raise ConfigError(
            f"metric_for_best_model (={name!r}) is not measured.{hint} Metrics of the student: "
            f"{', '.join(STUDENT_METRICS)}"
        )
