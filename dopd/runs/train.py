"""Train one student from settings, and leave a run folder that reports can be made from.

A run folder has `config.yaml` (resolved), `table.txt`, `metrics.jsonl`, `trace.jsonl`, `result.json` (the evaluation
after training), `curves.png`, `report.html`, the student's checkpoint and tokenizer, and a model card.
"""

import copy
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import ModelConfig, get_peft_config

from dopd.adapters import check_adapter_config
from dopd.checkpoints import adapter_config, config_of, origin_of, where_of
from dopd.errors import ConfigError, DataError, DopdError, FileError, ModelError, first_line
from dopd.files import leaving_no_folder, not_written
from dopd.inspection.schema import METRICS_FILE, TRACE_FILE
from dopd.interrupts import Stopped
from dopd.layers import keep_layers
from dopd.quantized import quantization_config
from dopd.report.curves import CURVES_FILE
from dopd.report.page import REPORT_FILE
from dopd.report.records import CONFIG_FILE, RESULT_FILE, TABLE_FILE
from dopd.rollout_settings import check_named_tokens
from dopd.runs.beforehand import run_problems, unread
from dopd.runs.build import check_model, load_model, load_processing_class, resolve_model
from dopd.runs.quiet import quiet_libraries
from dopd.runs.rows import load_rows, located
from dopd.runs.settings import RunSettings
from dopd.settings import Problems
from dopd.step.rewards import Judge, judge_of
from dopd.trainer import DOPDConfig, DOPDTrainer
from dopd.trainer.adapting import on_revision
from dopd.trainer.evidence import NON_FINITE_FILE
from dopd.trainer.folder import RunFolder
from dopd.trainer.guards import named
from dopd.trainer.images import where_from
from dopd.trainer.lock import FolderLock, main_decides
from dopd.trainer.owned import CARD_FILE
from dopd.trainer.resuming import is_complete
from dopd.trainer.served import ask_server, asked_once
from dopd.trainer.setup import tried_judge
from dopd.trainer.teachers import field
from dopd.trainer.whole import newest_whole
from dopd.verifiers.named import load_reward_functions

logger = logging.getLogger(__name__)

# What transformers saves, as far as it is known before; whatever else it saves is not written over a user's files.
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
_READER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training_args.bin")


def make_config(settings: RunSettings, *, elsewhere: bool = False) -> DOPDConfig:
    """The trainer's configuration; everything that can be checked without a model is checked here.

    Args:
        settings (`RunSettings`): the run.
        elsewhere (`bool`): the run is for another machine, so this one need not have a GPU for it.
    """
    there: dict[str, Any] = {"ddp_backend": None, "tf32": None} if elsewhere else {}
    there |= {"use_cpu": True} if elsewhere and not torch.cuda.is_available() else {}
    config, problems = None, Problems()
    with problems.collected():
        config = DOPDConfig(**settings.trainer | there)
    if settings.use_peft and (not elsewhere or importlib.util.find_spec("peft")):
        with problems.collected():
            peft_config_of(settings)
    if config is not None:
        problems.add(*run_problems(settings, config, elsewhere=elsewhere))
        if os.path.isdir(settings.model_name_or_path):  # of a hub id, one would have to ask the hub
            with problems.collected():
                options = _student_options(settings, config)
                vocab_size = _vocab_size(settings.model_name_or_path, options)
                arguments: Any = config.generation_kwargs  # a mapping: the config has read any JSON
                if vocab_size is not None:
                    check_named_tokens(arguments, vocab_size)
    problems.raise_any()
    assert config is not None
    for note in unread(settings, config):
        logger.warning(note)
    return config


def _vocab_size(folder: str, options: dict[str, Any]) -> int | None:
    try:
        size: int = config_of(folder, **where_of(options)).get_text_config().vocab_size
    except Exception:  # the loader says what is wrong with it
        return None
    return size


def describe(settings: RunSettings, config: DOPDConfig) -> str:
    """The resolved configuration and the routing table, for `--dry-run`."""
    table = config.routing_table()
    steps = "see num_train_epochs" if config.max_steps < 1 else f"{config.max_steps} steps"
    completions = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    plan = (
        f"{steps}; {completions} completions a step on {config.world_size} process(es): "
        f"{completions // config.num_generations} prompts x {config.num_generations} rollouts"
    )
    served = config.served_table()
    notes = (
        [] if served is None or not served.notes else ["teacher on a server:", *(f"  {note}" for note in served.notes)]
    )
    about = [table.describe(), *notes, f"source: {table.source_note or 'your own rows'}"]
    return "\n".join([settings.to_yaml(), plan, "", *about])


def train(settings: RunSettings) -> Path:
    """Train, evaluate and save; returns the run folder.

    Raises:
        DopdError: before anything is written where the settings, the data or the models cannot work.
    """
    quiet_libraries()
    config = make_config(settings)
    folder = RunFolder(settings.output_dir)
    with _alone(folder, settings, config):  # what is refused is refused before a row is read
        checkpoint = config.resume_from_checkpoint
        if checkpoint is not None and folder.is_complete and is_complete(checkpoint, config):
            logger.warning(f"the run in {folder.path} is complete: nothing was done")
            return folder.path
    data = judged_data(settings, config)  # before there is a folder: a verifier without an end ends this process
    with _alone(folder, settings, config):
        trainer = make_trainer(settings, config, data)
        try:
            _run(trainer, folder, settings, config)
        except BaseException as error:
            if trainer.accelerator.is_main_process:
                folder.give_back()
            last = newest_whole(folder.path, checksums=False)
            if isinstance(error, FileError) and last is None:
                raise FileError(f"{error}. No checkpoint was whole: overwrite=true begins again here") from error
            if isinstance(error, Stopped) and last is not None and str(last) not in error.message:
                way = f"{error.message}. resume_from_checkpoint=true goes on from {last}"
                raise Stopped(error.signal, way) from None
            raise
    return folder.path


@contextmanager
def _alone(folder: RunFolder, settings: RunSettings, config: DOPDConfig) -> Iterator[None]:
    """Inside, this run has its folder to itself; one that never began leaves no folder behind."""
    lock = FolderLock(folder.path)

    def take() -> None:
        check_folder(folder, settings, config, overwrite=settings.overwrite)
        lock.take()

    with leaving_no_folder(folder.path) if config.process_index == 0 else nullcontext():
        main_decides(take, folder.path)
        try:
            yield
        except Exception as error:
            found = not_written(error, folder.path, choose="another output_dir")
            if found is None:
                raise
            raise found from error
        finally:
            if config.process_index == 0:
                lock.release()


def check_folder(folder: RunFolder, settings: RunSettings, config: DOPDConfig, *, overwrite: bool = True) -> None:
    """Raise `ConfigError` unless a run of these settings may write into a folder."""
    of_settings = {TRACE_FILE: config.trace_steps, RESULT_FILE: settings.final_eval_prompts}
    of_model = ("adapter_config.json", "adapter_model.safetensors") if settings.use_peft else _MODEL_FILES
    ours = (CONFIG_FILE, TABLE_FILE, METRICS_FILE, CARD_FILE, CURVES_FILE, REPORT_FILE, NON_FINITE_FILE)
    names = [*ours, *(name for name, value in of_settings.items() if value is not None), *of_model, *_READER_FILES]
    steps = config.max_steps if config.max_steps > 0 else sys.maxsize
    reads = _local_sources(settings, config)
    folder.check(names, reads=reads, overwrite=overwrite, resume=bool(config.resume_from_checkpoint), steps=steps)


def _local_sources(settings: RunSettings, config: DOPDConfig) -> Iterator[tuple[str, str]]:
    """What on this machine a run is made from: the setting that names it, in words, and the file or folder."""
    models = {"model_name_or_path": settings.model_name_or_path}
    if config.loads_teacher and config.teacher_model_name_or_path is not None:
        models["teacher_model_name_or_path"] = config.teacher_model_name_or_path
    models |= {field(name): model for name, model in config.several_teachers.items()}
    for key, name in models.items():
        yield f"{key} (={name!r})", name
        place = name
        with suppress(ModelError):  # said where the model is read
            while os.path.isdir(place) and (origin := origin_of(place)) is not None:
                place = origin[0]
                yield f"{place!r}, the base of {key} (={name!r}),", place
    for key in ("dataset_name", "dataset_eval_name"):
        named = getattr(settings, key)
        for name in [named] if isinstance(named, str) else named or ():
            yield from ((f"{key} (={name!r})", path) for path in glob(name, recursive=True))


def _run(trainer: DOPDTrainer, folder: RunFolder, settings: RunSettings, config: DOPDConfig) -> None:
    """Train, save, evaluate and report."""
    if trainer.accelerator.is_main_process and not config.resume_from_checkpoint:
        folder.begin()
    trainer.accelerator.wait_for_everyone()
    trainer.configuration, trainer.says_outcome = settings.to_yaml(), False  # who calls says what the run came to
    with trainer.recorded():
        trainer.train()
        trainer.save_model()
        if settings.final_eval_prompts is not None:
            trainer.final_evaluation(settings.final_eval_prompts)


@dataclass(frozen=True)
class JudgedData:
    """The rows of a run, and what scores answers to them, which has been tried."""

    train: Dataset
    held_out: Dataset | None
    judge: Judge


def judged_data(settings: RunSettings, config: DOPDConfig) -> JudgedData:
    """Read the rows of a run, and try its verifier and reward functions on them.

    Raises:
        ConfigError, DataError, ScoringError: rows or users' code that cannot work.
    """
    train_rows, held_out, verifier = load_rows(settings, verifier_timeout=config.verifier_timeout)
    functions = load_reward_functions(settings.reward_funcs, config.verifier_timeout)
    judge = judge_of(verifier, functions, config.reward_weights, config.verifier_timeout)
    return JudgedData(train_rows, held_out, tried_judge(judge, config.routing_table(), train_rows, held_out))


@asked_once()
def make_trainer(settings: RunSettings, config: DOPDConfig, data: JudgedData | None = None) -> DOPDTrainer:
    """Models, data and trainer of a run, ready to train.

    Args:
        settings (`RunSettings`), config (`DOPDConfig`): the run.
        data (`JudgedData`, *optional*): what `judged_data` has read of it.
    """
    ask_server(config)
    options = _student_options(settings, config)
    peft_config = on_revision(peft_config_of(settings), settings.model_name_or_path, options)
    data = data or judged_data(settings, config)
    for name, model in config.several_teachers.items():
        with named(field(name)):
            check_model(resolve_model(model), **where_from(config, teacher=True))
    student = load_model(
        settings.model_name_or_path,
        trainable=True,
        merged=settings.use_peft,
        **{"dtype": settings.dtype, **options},
    )
    config = copy.copy(config)
    config.model_init_kwargs = None  # they have been used
    if settings.student_keep_layers is not None:
        student = keep_layers(student, settings.student_keep_layers)
    teacher = None
    if config.loads_teacher and config.teacher_model_name_or_path is not None:
        teacher = resolve_model(config.teacher_model_name_or_path)
        check_model(teacher, **where_from(config, teacher=True))
    try:
        return DOPDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=load_processing_class(settings.model_name_or_path, **options),
            verifier=data.judge.verifier,
            reward_funcs=[*data.judge.functions.values()],
            rollout_engine=settings.rollout_engine,
            peft_config=peft_config,
        )
    except DataError as error:
        raise located(error, settings) from error
    except Exception as error:
        if isinstance(error, DopdError):
            raise
        if config.push_to_hub and type(error).__module__.startswith(("httpx", "huggingface_hub", "requests")):
            raise ConfigError(
                f"push_to_hub (=True): the hub cannot be reached or refuses: {first_line(error)}"
            ) from error
        if isinstance(error, OSError | ImportError):
            raise ModelError(f"{type(error).__name__}: {first_line(error)}") from error
        if isinstance(error, ValueError):  # what the host finds wrong with settings beside models and data
            raise ConfigError(first_line(error)) from error
        raise


def _student_options(settings: RunSettings, config: DOPDConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the student.

    Raises:
        ConfigError: quantised weights that nothing would train, or quantisation that is asked for twice.
    """
    arguments: Any = config.model_init_kwargs  # a mapping: the config has read any JSON
    options = dict(arguments or {})
    if options.get("dtype", "") is None:
        options["dtype"] = settings.dtype
    if config.trust_remote_code:
        options.setdefault("trust_remote_code", True)
    packed = quantization_config(vars(settings))
    if packed is None:
        return options
    if "quantization_config" in options:
        raise ConfigError(
            "load_in_4bit or load_in_8bit and model_init_kwargs['quantization_config'] are two ways to ask for one "
            "thing: leave one of them out"
        )
    if not settings.use_peft and adapter_config(settings.model_name_or_path, **where_of(options)) is None:
        raise ConfigError(
            "load_in_4bit and load_in_8bit pack the student's weights, which then cannot train: set use_peft=true to "
            "train an adapter on them"
        )
    return options | {"quantization_config": packed}


def peft_config_of(settings: RunSettings) -> Any:
    """The adapter that a run trains; `None` for whole weights.

    Raises:
        ConfigError: PEFT is not installed, or refuses a setting.
    """
    if not settings.use_peft:
        return None
    parameters = settings.lora_target_parameters  # PEFT reads a list alone
    try:
        adapter: Any = get_peft_config(
            ModelConfig(
                use_peft=True,
                lora_r=settings.lora_r,
                lora_alpha=settings.lora_alpha,
                lora_dropout=settings.lora_dropout,
                lora_target_modules=settings.lora_target_modules,  # type: ignore[arg-type]
                lora_target_parameters=[parameters] if isinstance(parameters, str) else parameters,
                lora_modules_to_save=settings.lora_modules_to_save,
                use_rslora=settings.use_rslora,
                use_dora=settings.use_dora,
            )
        )
        if adapter is not None:
            check_adapter_config(adapter)
        # TRL makes one name a text, which PEFT reads as a pattern for whole paths.
        if (
            adapter is not None
            and isinstance(adapter.target_modules, str)
            and re.fullmatch(r"\w+", adapter.target_modules)
        ):
            adapter.target_modules = {adapter.target_modules}
        return adapter
    except ValueError as error:
        raise ConfigError(f"use_peft needs peft: pip install 'dopd[lora]' ({first_line(error)})") from None
