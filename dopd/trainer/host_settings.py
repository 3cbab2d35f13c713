"""What the settings of transformers and TRL may be: their annotations say the types, this table the limits."""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate.utils import DynamoBackend
from annotated_types import Ge, Le, Lt, MaxLen, MinLen
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import GenerationConfig, SchedulerType, SequenceBiasLogitsProcessor
from transformers.debug_utils import DebugOption
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_torch_bf16_gpu_available

from dopd.errors import first_line
from dopd.settings import (
    Count,
    Natural,
    NotNegative,
    Positive,
    Probability,
    Seed,
    Setting,
    Share,
    Text,
    check,
    quoted,
    settings_of,
    settings_of_call,
)

_Port = Annotated[int, Ge(1), Le(65535)]
_BelowOne = Annotated[float, Ge(0), Lt(1)]
_CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

# Types with limits, where the host's annotation is wider than what works.
_NARROWER: dict[str, Any] = {
    "output_dir": Text | None,
    "per_device_train_batch_size": Count,
    "per_device_eval_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "num_train_epochs": Positive,
    "max_steps": Literal[-1] | Count,
    "learning_rate": NotNegative,
    "lr_scheduler_type": SchedulerType,
    "warmup_steps": NotNegative,
    "weight_decay": NotNegative,
    "adam_beta1": _BelowOne,
    "adam_beta2": _BelowOne,
    "adam_epsilon": Positive,
    "max_grad_norm": NotNegative,
    "label_smoothing_factor": _BelowOne,
    "neftune_noise_alpha": Positive | None,
    "torch_empty_cache_steps": Count | None,
    "torch_compile_backend": Literal[tuple(backend.value.lower() for backend in DynamoBackend)] | None,
    "torch_compile_mode": _CompileMode | None,
    "logging_steps": Positive,
    "eval_steps": Positive | None,
    "eval_delay": NotNegative,
    "eval_accumulation_steps": Count | None,
    "include_num_input_tokens_seen": Literal["all", "non_padding", "no"] | bool,
    "include_for_metrics": list[Literal["inputs", "loss"]],
    "save_steps": Positive,
    "save_total_limit": Count | None,
    "report_to": list[str] | str,
    "seed": Seed,
    "data_seed": Seed | None,
    "dataloader_num_workers": Natural,
    "dataloader_prefetch_factor": Count | None,
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
    "ddp_bucket_cap_mb": Count | None,
    "ddp_timeout": Count,
    # Mappings, or JSON text of one, which is how the parsers of transformers and TRL have it.
    **dict.fromkeys(
        (
            "lr_scheduler_kwargs",
            "activation_checkpointing_kwargs",
            "gradient_checkpointing_kwargs",
            "model_init_kwargs",
            "teacher_model_init_kwargs",
            "generation_kwargs",
            "chat_template_kwargs",
            "method_options",
        ),
        dict[str, Any] | None,
    ),
    "rules": list[dict[str, Any]] | None,
    "debug": Literal["", "underflow_overflow", "tpu_metrics_debug"] | list[DebugOption] | None,
    "local_rank": Annotated[int, Ge(-1)],
    "max_completion_length": Count,
    "pad_to_multiple_of": Literal["auto", "none", "null"] | Count | None,
    "temperature": Positive,
    "top_p": Share,
    "top_k": Annotated[int, Ge(-1)],
    "min_p": Probability | None,
    "repetition_penalty": Positive,
    "cache_implementation": Literal[tuple(ALL_CACHE_IMPLEMENTATIONS)] | None,
    "vllm_mode": Literal["colocate", "server"],
    "vllm_model_impl": Literal["vllm", "transformers"],
    "vllm_server_port": _Port,
    "vllm_group_port": _Port,
    "vllm_server_timeout": Positive,
    "vllm_gpu_memory_utilization": Share,
    "vllm_max_model_length": Count | None,
    "vllm_tensor_parallel_size": Count,
    "beta": Probability,
    "max_tool_calling_iterations": Natural | None,
    "num_completions_to_print": Count | None,
    # `True` too; the parsers of transformers and TRL cannot read a union with `bool` in it.
    "resume_from_checkpoint": bool | str | None,
    "fsdp": bool | str | list[str] | None,
}
_FIXES = {
    "temperature": "for the likeliest tokens set generation_kwargs={'do_sample': False} and off_policy_rollouts=True",
    "max_steps": "-1 leaves the number of steps to num_train_epochs",
    "save_total_limit": "leave it out to keep every checkpoint",
    "max_grad_norm": "0 does not clip",
}

# Values of transformers' `GenerationConfig`, which has no annotations. Which keys there are it says itself.
GENERATION: dict[str, Any] = {
    "do_sample": bool,
    "use_cache": bool,
    "disable_compile": bool,
    "cache_implementation": Literal[tuple(ALL_CACHE_IMPLEMENTATIONS)] | None,
    "cache_config": dict | None,
    "prefill_chunk_size": Count | None,
    "stop_strings": Text | list[Text] | None,
    "temperature": Positive | None,
    "top_k": Annotated[int, Ge(-1)] | None,
    "top_p": Share | None,
    "min_p": Probability | None,
    "top_h": Share | None,
    "typical_p": Share | None,
    "epsilon_cutoff": _BelowOne | None,
    "eta_cutoff": _BelowOne | None,
    "repetition_penalty": Positive | None,
    "encoder_repetition_penalty": Positive | None,
    "length_penalty": float | None,
    "no_repeat_ngram_size": Natural | None,
    "min_length": Natural | None,
    "min_new_tokens": Natural | None,
    "max_time": Positive | None,
    "bad_words_ids": Annotated[list[Annotated[list[Natural], MinLen(1)]], MinLen(1)] | None,
    "suppress_tokens": list[Natural] | None,
    "begin_suppress_tokens": list[Natural] | None,
    "remove_invalid_values": bool | None,
    "renormalize_logits": bool | None,
    "exponential_decay_length_penalty": Annotated[list[float], MinLen(2), MaxLen(2)] | None,
    "sequence_bias": Annotated[list[list], MinLen(1)] | dict | None,
    "token_healing": bool | None,
    "guidance_scale": Positive | None,
    "compile_config": dict | None,
    "encoder_no_repeat_ngram_size": Natural | None,
    "diversity_penalty": float | None,
    "watermarking_config": dict | None,
    "max_cache_len": Count | None,
}
_FEW = 8  # steps of a scheduler
_ACCUMULATION = ("adjust_scheduler", "sync_with_dataloader", "sync_each_batch")
_FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # a mapping, or the path of a JSON file of one
_CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")
_OF_LAYERS: dict[str, Any] = {"every_n_layers": Count, "offload": bool}  # what transformers adds to torch's


@functools.cache
def trainer_settings(cls: type) -> dict[str, Setting]:
    """Every setting of a trainer's configuration.

    Args:
        cls: `DOPDConfig`, or a class of one's own with more fields.
    """
    found = settings_of(cls)
    return {
        name: replace(setting, hint=_NARROWER.get(name, setting.hint), fix=_FIXES.get(name, ""))
        for name, setting in found.items()
    }


def check_mappings(args: Any) -> list[str]:
    """What is wrong inside the mappings that the host passes on to others.

    Args:
        args (`DOPDConfig`): whose own fields have been checked.
    """
    problems = [
        *_precision_problems(args),
        *_worker_problems(args),
        *_saving_problems(args),
        *_generation_problems(args),
        *_optimizer_problems(args),
    ]
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        known = {
            key: Setting(key, bool if key != "determinism_check" else Literal["default", "none"])
            for key in _CHECKPOINTING
        }
        known |= {key: Setting(key, hint) for key, hint in _OF_LAYERS.items()}
        problems += _inside(args, name, known)
    accumulation = {"gradient_accumulation_kwargs": {k: Setting(k, bool) for k in _ACCUMULATION}}
    # Rows are text, which accelerate cannot hand from one process to the others.
    narrower = {"dispatch_batches": Literal[False] | None}
    known = {
        name: replace(one, keys=accumulation.get(name), hint=narrower.get(name, one.hint))
        for name, one in settings_of(AcceleratorConfig).items()
    }
    problems += _inside(args, "accelerator_config", known)
    problems += _file_problems(args)
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        problems += _inside_what_is_known(args, name, LOADING)
    return problems


Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
# Arguments of `from_pretrained`; any field of a model's configuration can stand beside them.
LOADING: dict[str, Any] = {
    "dtype": Dtype,
    "torch_dtype": Dtype,
    "attn_implementation": Text | dict | None,
    "experts_implementation": Text | None,
    "revision": Text | None,
    "subfolder": str,
    "variant": Text | None,
    "cache_dir": Text | None,
    "token": Text | bool | None,
    "local_files_only": bool,
    "force_download": bool,
    "trust_remote_code": bool,
    "use_safetensors": bool | None,
    "weights_only": bool,
    "low_cpu_mem_usage": bool,
    "device_map": str | dict | int | None,
    "max_memory": dict | None,
    "offload_folder": Text | None,
    "offload_buffers": bool,
    "quantization_config": dict | None,
    "use_cache": bool,
}


def _precision_problems(args: Any) -> list[str]:
    # Where neither kind of half precision is chosen, TRL takes bfloat16.
    named = [
        name for name in ("bf16", "bf16_full_eval") if getattr(args, name) or (name == "bf16" and args.bf16 is None)
    ]
    if not named or args.fp16 or args.use_cpu or is_torch_bf16_gpu_available():
        return []
    return [
        f"{named[0]} (={getattr(args, named[0])!r}) needs a GPU that computes in bfloat16, and there is none here: set "
        f"{named[0]}=false; without a GPU, set use_cpu=true"
    ]


def _worker_problems(args: Any) -> list[str]:
    """Settings of the processes that load data, where there are none."""
    names = ("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_persistent_workers")
    given = {name: getattr(args, name) for name in names if getattr(args, name)}
    if args.dataloader_num_workers:
        return []
    return [
        f"{name} (={value!r}) needs dataloader_num_workers (=0) of at least 1: set it, or leave {name} out"
        for name, value in given.items()
    ]


def _saving_problems(args: Any) -> list[str]:
    if str(getattr(args.save_strategy, "value", args.save_strategy)) != "best" or args.metric_for_best_model:
        return []
    return ["save_strategy (='best') needs metric_for_best_model, for example accuracy_greedy with student_eval_steps"]


def _generation_problems(args: Any) -> list[str]:
    if args.use_vllm:  # an engine of its own has settings of its own
        return []
    known = {name: Setting(name, hint) for name, hint in GENERATION.items()}
    given = {name: value for name, value in (args.generation_kwargs or {}).items() if name in known}
    problems = check(given, known, "generation_kwargs")[1]
    if not problems:
        try:
            made = GenerationConfig(**given)
            if made.sequence_bias is not None:
                SequenceBiasLogitsProcessor(made.sequence_bias)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            problems.append(f"generation_kwargs (={quoted(given)}): {first_line(error)}")
    return problems


def _optimizer_problems(args: Any) -> list[str]:
    problems = _scheduler_problems(args)
    parts = args.optim_args.replace(" ", "").split(",") if args.optim_args else []
    if any(part.count("=") != 1 or part.startswith("=") or part.endswith("=") for part in parts):
        problems.append(
            f"optim_args (={args.optim_args!r}) must be names with values, separated by commas: 'rank=64,scale=0.25'"
        )
    return problems


def _scheduler_problems(args: Any) -> list[str]:
    """What is wrong with `lr_scheduler_kwargs`, by making the scheduler and letting it go some steps."""
    kind = SchedulerType(args.lr_scheduler_type)
    classes = {SchedulerType.REDUCE_ON_PLATEAU: ReduceLROnPlateau, SchedulerType.GREEDY: GreedyLR}
    made = vars(classes[kind])["__init__"] if kind in classes else TYPE_TO_SCHEDULER_FUNCTION[kind]
    of_the_host = ("self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    known = {name: one for name, one in settings_of_call(made).items() if name not in of_the_host}
    problems = _inside(args, "lr_scheduler_kwargs", known)
    if problems:
        return problems
    try:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
        options = dict(args.lr_scheduler_kwargs or {})
        if kind in classes:  # it goes on by a metric, which is not there yet
            classes[kind](optimizer, **options)
            return problems
        scheduler = get_scheduler(kind, optimizer, _FEW // 4, _FEW, scheduler_specific_kwargs=options)
        for _ in range(_FEW):
            optimizer.step()
            scheduler.step()
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        problems.append(
            f"lr_scheduler_type (={kind.value!r}) cannot work with lr_scheduler_kwargs "
            f"(={quoted(args.lr_scheduler_kwargs)}) and learning_rate (={args.learning_rate}): {first_line(error)}"
        )
    return problems


def _file_problems(args: Any) -> list[str]:
    given = {name: getattr(args, name) for name in _FILES}
    return [
        f"{name} (={quoted(value)}) must be a mapping, or the path of a JSON file: there is no such file"
        for name, value in given.items()
        if isinstance(value, str) and not value.lstrip().startswith("{") and not Path(value).is_file()
    ]


def _inside(args: Any, name: str, known: Mapping[str, Setting]) -> list[str]:
    """What is wrong inside a mapping; a right one gets the values that are meant."""
    given = getattr(args, name)
    if not isinstance(given, dict):
        return []
    read, problems = check(given, known, name)
    if not problems:
        setattr(args, name, read)
    return problems


def _inside_what_is_known(args: Any, name: str, hints: Mapping[str, Any]) -> list[str]:
    given, problems = getattr(args, name), []
    known = {key: Setting(key, hint) for key, hint in hints.items()}
    for key, value in (given or {}).items() if isinstance(given, dict) else ():
        if isinstance(value, torch.dtype) and hints.get(key) is Dtype:
            value = str(value).removeprefix("torch.")  # as the host takes it from Python
        # A key that is none of these is a field of the model's configuration, unless it looks like one of them.
        if key in known or difflib.get_close_matches(str(key), known, n=1, cutoff=0.85):
            problems += check({key: value}, known, name)[1]
    return problems
