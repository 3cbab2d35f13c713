"""What `DOPDTrainer` checks and prepares before the first step."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from accelerate.utils import gather_object
from datasets import IterableDataset
from torch import nn
from transformers import AutoTokenizer
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import ParallelMode

from dopd.adapters import without_adapters
from dopd.checkpoints import config_of, files_of, reason_of, resolve_model
from dopd.data.checks import check_columns
from dopd.errors import ConfigError, DopdError, ModelError
from dopd.evaluation.results import EvaluationResult
from dopd.evaluation.student import StudentEvaluator
from dopd.quantized import compute_as_stored
from dopd.sampling import ends_of, mend_generation_config
from dopd.scoring import evaluation_mode
from dopd.settings import as_mapping
from dopd.sources import PLAIN
from dopd.step.rewards import Judge
from dopd.step.verifier import Verifier
from dopd.tables import RoutingTable
from dopd.trainer import adapting, base_teacher, guards, images, passes
from dopd.trainer.anchors import Sharding
from dopd.trainer.config import DOPDConfig
from dopd.trainer.host import HostTrainer
from dopd.trainer.packages import missing_here
from dopd.trainer.served import check_served
from dopd.trainer.teachers import check_heads, field
from dopd.vocabulary import check_has_words

logger = logging.getLogger(__name__)


def completions_per_step(args: DOPDConfig, num_processes: int) -> int:
    """Completions of one optimizer step, over all processes and micro-batches."""
    return args.per_device_train_batch_size * num_processes * args.gradient_accumulation_steps


def teachers_options(args: DOPDConfig) -> dict[str, Any] | None:
    """What chat templates are told for the teacher, where it is not what they are told for the student."""
    own, shared = args.teacher_chat_template_kwargs, as_mapping(args.chat_template_kwargs)
    return None if own is None or as_mapping(own) == shared else as_mapping(own)


def check_processes(args: DOPDConfig) -> None:
    """Raise `ConfigError` for settings that do not fit the number of processes."""
    check_batch_sizes(args)
    check_sharding(args)


def check_batch_sizes(args: DOPDConfig) -> None:
    """Raise `ConfigError` unless a step holds whole groups of rollouts."""
    completions = completions_per_step(args, args.world_size)
    if completions % args.num_generations:
        raise ConfigError(
            f"per_device_train_batch_size (={args.per_device_train_batch_size}) x processes (={args.world_size}) x "
            f"gradient_accumulation_steps (={args.gradient_accumulation_steps}) = {completions} completions a "
            f"step must be a multiple of num_generations (={args.num_generations}), the rollouts of each prompt"
        )


def check_sharding(args: DOPDConfig) -> None:
    """Raise `ConfigError` where weights are to be split over processes, and this one is alone."""
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ConfigError(
            f"fsdp (={args.fsdp!r}) splits weights over processes, and this one is alone: start it with dopd train "
            "... --num_processes 2 (or accelerate launch), or leave fsdp out"
        )


def check_judged(judge: Judge, table: RoutingTable) -> None:
    """Raise `ConfigError` if the method learns from rewards, or asks which answers are right, and nobody says so."""
    if table.needs_rewards and not judge.gives_rewards:
        raise ConfigError(
            f"method {table.name!r} learns from rewards: pass reward_funcs=... or verifier=... to the trainer, or set "
            "reward_funcs or verifier in the config (a task brings a verifier)"
        )
    if table.needs_scores and judge.verifier is None:
        raise ConfigError(
            f"method {table.name!r} asks which answers are right: pass verifier=... to the trainer, or set verifier in "
            "the config (a task brings its own); rewards, which may have any scale, do not say it"
        )


def tried_judge(judge: Judge, table: RoutingTable, train_dataset: Any, eval_dataset: Any) -> Judge:
    """A judge whose verifier and reward functions were called for each dataset; before models are loaded.

    Raises:
        ConfigError: as `check_judged`.
        DataError: a dataset without a prompt, whose rows the users' code was not written for.
        ScoringError: users' code raises, takes too long, or gives no finite number.
    """
    check_judged(judge, table)
    held_out = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    for rows in (train_dataset, *held_out):
        if getattr(rows, "column_names", None):
            check_columns(rows.column_names, needs_privileged=False, method=table.name)
    return judge.tried_on([train_dataset, *held_out])


def check_trackers(args: DOPDConfig) -> None:
    """Raise `ConfigError` for a tracker of `report_to` that is not installed here."""
    here = get_available_reporting_integrations()
    for name in args.report_to or []:
        # The host finds out about flyte by itself, when it is used.
        if name not in (*here, "flyte"):
            raise ConfigError(f"report_to (={name!r}) is not installed here: install it, or set report_to=none")


def check_before_loading(
    model: Any,
    teachers: Mapping[str, Any],
    table: RoutingTable,
    args: DOPDConfig,
    *,
    processing_class: Any,
    teacher_processing_class: Any,
    peft_config: Any,
) -> None:
    """Compare what can be compared, and say what can be said, without loading weights.

    Args:
        model: the student, or its name.
        teachers (`dict`): each teacher, or its name, by what names it in messages; none where the run loads none.
    """
    check_trackers(args)
    for problem in missing_here(args):
        raise ConfigError(problem)
    if table.unverified:
        logger.warning(
            f"method {table.name!r} is not verified against its source: {table.unverified}. Do not take its results "
            "for those of the published method"
        )
    own = [part.view for part in table.parts if part.text == "rollout" and part.view != PLAIN]
    if own and args.rollout_importance == "truncated":
        raise ConfigError(
            f"rollout_importance (='truncated') weighs answers by the prompt that they were drawn for, and method "
            f"{table.name!r} trains on them behind another one (view={own[0]!r}): leave rollout_importance out"
        )
    adapting.check_configs(model, peft_config, args)
    base_teacher.check_has_base(model, peft_config, args)
    if args.loads_teacher and not teachers:
        guards.check_models(None, None, table)
    student_config = _config("model", model, images.where_from(args))
    passes.check_kind("model", student_config)
    for name, teacher in teachers.items():
        teacher_config = _config(name, teacher, images.where_from(args, teacher=True))
        passes.check_kind(name, teacher_config)
        with guards.named(name):
            guards.check_vocab_sizes(
                student_config,
                teacher_config,
                partial(guards.shared_tokenizer, model, teacher, processing_class, teacher_processing_class),
            )
            if isinstance(model, nn.Module) and model is teacher:
                guards.check_models(model, teacher, table)


def _config(name: str, source: Any, where: dict[str, Any]) -> Any:
    if not isinstance(source, str):
        return source.config
    try:
        return config_of(source, **where)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    except DopdError:
        raise
    except Exception as error:  # readers of checkpoints fail in many ways
        raise ModelError(f"{name} (={source!r}) cannot be read: {reason_of(error)}") from error


def declared_vocab_size(model: Any, args: DOPDConfig) -> int:
    """Rows of the student's output embedding, loaded or not."""
    size: int = _config("model", model, images.where_from(args)).get_text_config().vocab_size
    return size


def teacher_sources(teacher_model: Any, several: Mapping[str, Any], args: DOPDConfig) -> dict[str, Any]:
    """The teachers that a run loads, or their places where they are named, by their names in messages.

    Args:
        teacher_model: the only one, if the trainer was given any.
        several (`dict`): the teachers, where rows name theirs.
        args (`DOPDConfig`): the run.

    Raises:
        ConfigError, ModelError: a teacher beside a server, or one that is nowhere.
    """
    if args.teacher_server is not None and teacher_model is not None:
        raise ConfigError("teacher_server and teacher_model both bring the teacher: leave one of them out")
    sources = {field(name): one for name, one in several.items()}
    if args.loads_teacher and teacher_model is not None:
        sources = {"teacher_model": teacher_model}
    for name, one in sources.items():
        with guards.named(name):
            sources[name] = resolve_model(one) if isinstance(one, str) else one
    return sources


def check_loaded(
    host: HostTrainer, sources: Mapping[str, Any], peft_config: Any = None, teacher_processing_class: Any = None
) -> None:
    """Guards that need the weights; what is odd but not wrong is logged.

    Args:
        sources (`dict`): what the trainer was given as its teachers, by their names in messages.
    """
    student = host.unwrapped_student
    if host.teacher_model is not None:
        host.teacher_model.eval()
    adapting.check_names(student, peft_config)
    for model in host.loaded_models:
        compute_as_stored(model)
    whole, half = not host.is_split, host.is_half
    with host.accelerator.autocast():
        adapting.prepare(student, half=half, whole=whole)
    if host.args.loads_teacher:
        guards.check_models(student, host.unwrapped_teacher, host.table)
    if host.args.teacher_is_base:
        base_teacher.check_base(student, host.table)
    check_served(host)
    check_has_words(host.tokenizer)
    host.eos_token_ids = ends_of(student, host.tokenizer)
    mended = mend_generation_config(without_adapters(student))
    notes = [mended] if mended else []
    notes += _compared(host, sources, teacher_processing_class)
    if not host.args.learning_rate:
        notes.append(
            "learning_rate (=0) changes no weight: the run draws, scores and logs, and the student stays as it is. "
            "Leave it out for the default"
        )
    notes += adapting.dropout_notes(student, disable=host.args.disable_dropout)
    if host.args.neftune_noise_alpha:
        notes.append(
            f"neftune_noise_alpha (={host.args.neftune_noise_alpha:g}) shakes the embeddings "
            f"{adapting.WHERE_NOISE}, so gaps and targets differ by its noise"
        )
    for note in notes:
        logger.warning(note)
    if whole:
        for name, model in host.named_models():
            with evaluation_mode(model), host.accelerator.autocast():
                passes.check_self_divergence(name, model, half=half)


def _compared(host: HostTrainer, sources: Mapping[str, Any], teacher_processing_class: Any) -> list[str]:
    """What differs between the student and each teacher without making the run impossible.

    Raises:
        ConfigError, ModelError: a teacher that teaches nothing, or cannot be compared token by token.
    """
    notes = list[str]()
    student = host.unwrapped_student
    for name, teacher in host.named_models():
        if teacher is student:
            continue
        source = sources.get(name)
        tokenizer = partial(guards.shared_tokenizer, student, source, host.processing_class, teacher_processing_class)
        with guards.named(name):
            if host.parked.models:
                guards.check_models(student, teacher, host.table)
            found = guards.check_vocab_sizes(student.config, teacher.config, tokenizer)
            found += guards.compare_generation(student, teacher, host.eos_token_ids)
            if isinstance(source, str):
                found += guards.compare_tokenizers(host.tokenizer, _tokenizer(name, source, host.args))
        notes += [f"{name}: {note}" for note in found] if host.parked.models else found
    if host.parked.models:
        check_heads(host.parked.models)
    return notes


def _tokenizer(name: str, path: str, args: DOPDConfig) -> Any:
    try:
        place, where = files_of(path, **images.where_from(args, teacher=True))
        return AutoTokenizer.from_pretrained(place, **where)
    except Exception as error:
        raise ModelError(f"{name} (={path!r}) has no readable tokenizer: {reason_of(error)}") from error


def sharding_of(host: HostTrainer) -> Sharding:
    """How the student's weights will be split over processes."""
    if host.is_fsdp_enabled:
        return Sharding("fsdp2" if host.accelerator.is_fsdp2 else "other", host.accelerator.process_index)
    return Sharding("other" if is_zero3(host) else "whole")


def is_zero3(host: HostTrainer) -> bool:
    """Whether DeepSpeed splits the parameters themselves over ranks."""
    plugin = host.accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def make_evaluator(host: HostTrainer, num_prompts: int | None = None) -> StudentEvaluator:
    """The evaluation without privileged context, of `num_prompts` held-out prompts or as many as the config says.

    Raises:
        ConfigError: it lacks a verifier or held-out prompts.
    """
    args, dataset = host.args, host.eval_dataset
    if isinstance(dataset, dict):
        raise ConfigError(
            f"eval_dataset is a dict ({', '.join(map(str, dataset))}), and the evaluation of the student answers one "
            "dataset: pass that one, or join them (datasets.concatenate_datasets)"
        )
    if host.judge.verifier is None or dataset is None or isinstance(dataset, IterableDataset):
        raise ConfigError(
            "student_eval_steps and final_eval_prompts need a verifier and an eval_dataset with a length: pass "
            "verifier=(completion, row) -> score and eval_dataset to DOPDTrainer, or leave both out"
        )
    asked = num_prompts or args.chosen().get("student_eval_prompts", 0)
    if asked > len(dataset) and host.accelerator.is_main_process:
        name = "student_eval_prompts" if num_prompts is None else "final_eval_prompts"
        logger.warning(f"{name} (={asked}) is more than there are held-out rows: all {len(dataset)} are answered")
    rows = [dataset[index] for index in range(min(num_prompts or args.student_eval_prompts, len(dataset)))]
    return answering(host, rows, host.judge.verifier)


def shard_of(host: HostTrainer) -> tuple[int, int]:
    """Which part of an evaluation's prompts this process answers, and of how many. Processes that share weights must
    make the same passes, so there each answers every prompt.
    """
    return (0, 1) if host.is_split else (host.accelerator.process_index, host.accelerator.num_processes)


def evaluated(host: HostTrainer, evaluator: StudentEvaluator) -> EvaluationResult:
    """The student's evaluation, of all processes together."""
    with host.whole_student() as model:
        teacher, through = host.unwrapped_teacher, host.through_teacher
        mine = evaluator.evaluate(model, teacher=teacher, shard=shard_of(host), through=through)
    return mine if host.is_split else sum(gather_object([mine]), start=EvaluationResult())


def answering(host: HostTrainer, rows: Sequence[Mapping[str, Any]], verifier: Verifier) -> StudentEvaluator:
    """An evaluator that answers rows with the run's own tokenizer or processor, template and lengths."""
    return StudentEvaluator(
        rows,
        verifier,
        host.prompts,
        host.ending,
        int(host.max_completion_length or 0),
        batch_size=host.args.student_eval_batch_size,
        seed=host.args.seed,
    )
