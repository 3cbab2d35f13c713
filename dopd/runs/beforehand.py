"""What the keys of a run say beside one another, checked before a model, a row or a file is touched."""

import os
from collections.abc import Iterator

from dopd.checkpoints import TINY
from dopd.errors import did_you_mean
from dopd.runs.rows import check_splits
from dopd.runs.settings import RunSettings, all_settings
from dopd.settings import Problems, as_mapping, quoted
from dopd.step.rewards import VERIFIER, Judge
from dopd.step.verifier import unjudged
from dopd.trainer import DOPDConfig
from dopd.trainer.best import STUDENT_METRICS, student_metric
from dopd.trainer.guards import check_models
from dopd.trainer.own_engine import check_engine
from dopd.trainer.packages import missing_here
from dopd.trainer.setup import check_batch_sizes, check_judged, check_sharding, check_trackers
from dopd.verifiers.named import check_reward_names, check_verifier

# What the host's own evaluation returns.
_HOST_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")


def run_problems(settings: RunSettings, config: DOPDConfig, *, elsewhere: bool) -> list[str]:
    """Everything that is wrong with a run's keys together.

    Args:
        settings (`RunSettings`): the run.
        config (`DOPDConfig`): made of it.
        elsewhere (`bool`): the run is for another machine, with other packages and another number of processes.
    """
    problems = Problems(_evaluation_problems(settings, config))
    if settings.load_in_4bit and settings.load_in_8bit:
        problems.add("load_in_4bit (=True) and load_in_8bit (=True) cannot both be: leave one of them out")
    if settings.overwrite and config.resume_from_checkpoint:
        problems.add(
            f"overwrite (=True) begins anew, and resume_from_checkpoint (={str(config.resume_from_checkpoint)!r}) goes "
            "on: leave one of them out"
        )
    if settings.verifier is not None:
        with problems.collected():
            check_verifier(settings.verifier, settings.verifier_options)
    with problems.collected():
        _check_rewards(settings, config)
    with problems.collected():
        check_engine(settings.rollout_engine, config)
    if config.teacher_model_name_or_path is None and config.loads_teacher:
        with problems.collected():
            check_models(None, None, config.routing_table())
    with problems.collected():
        check_splits(settings)
    if not elsewhere:
        with problems.collected():
            check_trackers(config)
        problems.add(*missing_here(config))
        with problems.collected():
            check_batch_sizes(config)
        with problems.collected():
            check_sharding(config)
    return problems.found


def _check_rewards(settings: RunSettings, config: DOPDConfig) -> None:
    """Raise `ConfigError` for rewards that cannot be given, without reading anybody's code."""
    functions = settings.reward_funcs
    names = [functions] if isinstance(functions, str) else list(functions or ())
    check_reward_names(names)
    stand_ins = {name: None if name == VERIFIER else unjudged for name in names}
    weights = config.reward_weights or [1.0] * len(stand_ins)
    is_verified = settings.verifier is not None or settings.task is not None
    check_judged(Judge(unjudged if is_verified else None, stand_ins, tuple(weights)), config.routing_table())


def unread(settings: RunSettings, config: DOPDConfig) -> Iterator[str]:
    """What a run sets and nothing reads, in a line each.

    Args:
        settings (`RunSettings`): the run.
        config (`DOPDConfig`): made of it.
    """
    values, defaults = {**vars(config), **vars(settings)}, all_settings()
    adapters = [name for name in defaults if name.startswith(("lora_", "use_dora", "use_rslora"))]
    packing = [name for name in defaults if "bnb_" in name]
    for reader, is_there, names in (
        (
            "use_peft",
            settings.use_peft,
            adapters,
        ),
        (
            "load_in_4bit",
            settings.load_in_4bit,
            packing,
        ),
        ("task", settings.task, ["task_options", "privileged_kind", "train_prompts", "eval_prompts"]),
        (
            "dataset_name",
            settings.dataset_name,
            ["dataset_config", "dataset_train_split", "dataset_test_split", "columns"],
        ),
        ("verifier", settings.verifier, ["verifier_options"]),
        ("trace_steps", config.trace_steps, ["trace_examples", "trace_probes", "trace_max_bytes"]),
        ("use_vllm", config.use_vllm, [name for name in defaults if name.startswith("vllm_")]),
        ("teacher_server", config.teacher_server, [name for name in defaults if name.startswith("teacher_server_")]),
        ("a rule that reads a teacher", config.routing_table().needs_teacher, ["teacher_server"]),
    ):
        idle = [f"{name} (={quoted(values[name])})" for name in names if values[name] != defaults[name].default]
        if idle and not is_there:
            yield f"without {reader} nothing reads {', '.join(idle)}"
    student, teacher = map(as_mapping, (config.model_init_kwargs, config.teacher_model_init_kwargs))
    for key, name, revision in (
        ("model_init_kwargs: revision", settings.model_name_or_path, student.get("revision")),
        ("teacher_model_init_kwargs: revision", config.teacher_model_name_or_path, teacher.get("revision")),
        ("teacher_model_revision", config.teacher_model_name_or_path, config.teacher_model_revision),
    ):
        if revision is not None and name is not None and (name.startswith(TINY) or os.path.isdir(name)):
            yield f"{key} (={revision!r}) is for models of the hub, and {name!r} is none: nothing reads it"


def _evaluation_problems(settings: RunSettings, config: DOPDConfig) -> Iterator[str]:
    held_out = settings.task or settings.dataset_test_split or settings.dataset_eval_name
    strategy = str(getattr(config.eval_strategy, "value", config.eval_strategy))
    asked = {
        "student_eval_steps": config.student_eval_steps,
        "final_eval_prompts": settings.final_eval_prompts,
        "eval_strategy": None if strategy == "no" else strategy,
    }
    for name, value in asked.items():
        if value is None:
            continue
        if held_out is None:
            yield (
                f"{name} (={value!r}) needs held-out rows: set dataset_test_split or dataset_eval_name, or leave "
                f"{name} out"
            )
        elif name != "eval_strategy" and settings.task is None and settings.verifier is None:
            yield f"{name} (={value!r}) needs a verifier: set verifier, or leave {name} out"
    yield from _metric_problems(config, evaluated=strategy != "no")


def _metric_problems(config: DOPDConfig, *, evaluated: bool) -> Iterator[str]:
    name = config.metric_for_best_model
    if name is None or student_metric(config) is not None:
        return
    if name.removeprefix("eval_") in _HOST_METRICS:
        if config.load_best_model_at_end and not evaluated:
            yield (
                f"load_best_model_at_end with metric_for_best_model (={name!r}) needs eval_strategy, which measures it"
            )
        return
    hint = did_you_mean(name.removeprefix("eval_"), [*STUDENT_METRICS, *_HOST_METRICS])
    yield (
        f"metric_for_best_model (={name!r}) is not measured.{hint} Metrics "
        f"of the student (student_eval_steps): {', '.join(STUDENT_METRICS)}; of the host (eval_strategy): "
        f"{', '.join(_HOST_METRICS)}"
    )
