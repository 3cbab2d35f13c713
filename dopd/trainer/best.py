"""Which checkpoint is the best, by the evaluation of the student: `metric_for_best_model` in the host's words."""

from typing import TYPE_CHECKING, Any

from transformers import SchedulerType

from dopd.errors import ConfigError, did_you_mean
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
    subject = f"metric_for_best_model (={args.metric_for_best_model!r})"
    if not args.student_eval_steps:
        raise ConfigError(f"{subject} is measured by the student's evaluation: set student_eval_steps")
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
    strategy = _value(args.save_strategy)
    if strategy == "best":
        return
    if strategy != "steps":
        raise ConfigError(
            f"load_best_model_at_end with {subject} needs save_strategy (={strategy!r}) to be 'steps' or 'best': the "
            "student is evaluated every student_eval_steps"
        )
    if args.save_steps < 1 or args.save_steps % (args.student_eval_steps or 1):
        raise ConfigError(
            f"load_best_model_at_end with {subject}: save_steps (={args.save_steps:g}) must be a multiple of "
            f"student_eval_steps (={args.student_eval_steps}), or a saved step may not have been evaluated"
        )


def _check_spelling(name: str | None) -> None:
    bare = (name or "loss").removeprefix("eval_")
    hint = did_you_mean(bare, STUDENT_METRICS)
    if hint and bare != "loss":
        raise ConfigError(
            f"metric_for_best_model (={name!r}) is not measured.{hint} Metrics of the student: "
            f"{', '.join(STUDENT_METRICS)}"
        )
