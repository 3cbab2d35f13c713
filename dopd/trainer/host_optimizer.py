"""Settings of the optimizer and its scheduler beside one another, which the host reads when training begins."""

import copy
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import SchedulerType, Trainer
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR, get_scheduler
from transformers.training_args import OptimizerNames
from trl import DistillationConfig

from dopd.errors import first_line
from dopd.settings import as_mapping, check, quoted, settings_of_call

BY_A_METRIC = {SchedulerType.REDUCE_ON_PLATEAU: ReduceLROnPlateau, SchedulerType.GREEDY: GreedyLR}
_FEW = 8  # steps of a scheduler
_ROUNDING = 1e-6
_NO_VALUE = "0.0123"  # which no option of an optimizer has
_LOW_RANK = ("galore", "apollo")


def optimizer_problems(args: DistillationConfig) -> list[str]:
    """What is wrong with the settings of optimizer and scheduler.

    Args:
        args (`DOPDConfig`): whose own fields have been checked.
    """
    problems = _scheduler_problems(args)
    kind = OptimizerNames(args.optim).value
    if args.optim_target_modules is not None and not kind.startswith(_LOW_RANK):
        problems.append(
            f"optim_target_modules (={quoted(args.optim_target_modules)}) is read by optim galore_* and apollo_* "
            f"alone, and optim is {kind!r}: leave it out"
        )
    parts = args.optim_args.replace(" ", "").split(",") if args.optim_args else []
    if any(part.count("=") != 1 or part.startswith("=") or part.endswith("=") for part in parts):
        problems.append(
            f"optim_args (={args.optim_args!r}) must be names with values, separated by commas: 'rank=64,scale=0.25'"
        )
        return problems
    try:
        without = _optimizer(args, None)
    except Exception:  # a package or the model is missing, without which nothing can be known
        return problems
    unread = [part for part in parts if not _reads(args, part.partition("=")[0], without)]
    if unread:
        problems.append(f"optim_args (={args.optim_args!r}): {kind} does not read {', '.join(unread)}: leave it out")
    try:
        optimizer, options = _optimizer(args, args.optim_args)
        if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
            optimizer([torch.zeros(1, requires_grad=True)], **options)
    except Exception as error:  # each optimizer checks in its own way
        problems.append(f"optim (={kind!r}) cannot work with optim_args (={args.optim_args!r}): {first_line(error)}")
    return problems


def _reads(args: DistillationConfig, name: str, without: Any) -> bool:
    """Whether the optimizer is another one, or fails, with another value of an option."""
    try:
        return bool(_optimizer(args, f"{name}={_NO_VALUE}") != without)
    except Exception:  # the value has been read
        return True


def _optimizer(args: DistillationConfig, optim_args: str | None) -> Any:
    args = copy.copy(args)
    args.optim, args.optim_args = OptimizerNames(args.optim), optim_args
    return Trainer.get_optimizer_cls_and_kwargs(args)


def _scheduler_problems(args: DistillationConfig) -> list[str]:
    """What is wrong with `lr_scheduler_kwargs`, by making the scheduler and letting it go some steps."""
    kind = SchedulerType(args.lr_scheduler_type)
    factory = vars(BY_A_METRIC[kind])["__init__"] if kind in BY_A_METRIC else TYPE_TO_SCHEDULER_FUNCTION[kind]
    of_the_host = ("self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    allowed = {name: one for name, one in settings_of_call(factory).items() if name not in of_the_host}
    options, problems = check(as_mapping(args.lr_scheduler_kwargs), allowed, "lr_scheduler_kwargs")
    if problems:
        return problems
    rate = highest = args.learning_rate
    try:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
        if kind in BY_A_METRIC:  # it goes on by a metric, which is not there yet
            BY_A_METRIC[kind](optimizer, **options)
            highest = max(rate, options.get("min_lr") or 0.0)
        else:
            scheduler = get_scheduler(kind, optimizer, _FEW // 4, _FEW, scheduler_specific_kwargs=dict(options))
            for _ in range(_FEW):
                optimizer.step()
                scheduler.step()
                highest = max(highest, *scheduler.get_last_lr())
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        problems.append(
            f"lr_scheduler_type (={kind.value!r}) cannot work with lr_scheduler_kwargs "
            f"(={quoted(args.lr_scheduler_kwargs)}) and learning_rate (={args.learning_rate}): {first_line(error)}"
        )
    if highest > rate * (1 + _ROUNDING):
        problems.append(
            f"lr_scheduler_kwargs (={quoted(args.lr_scheduler_kwargs)}) would let {kind.value} rise to {highest:.3g}, "
            f"above learning_rate (={rate}), which is the highest of a run: set learning_rate to it, or lower them"
        )
    return problems
