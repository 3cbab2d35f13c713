"""What the settings of transformers and TRL may be: their annotations say the types, this table the limits."""

import difflib
import functools
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import torch
from accelerate.utils import DynamoBackend
from annotated_types import Ge, Le, Lt
from transformers import SchedulerType
from transformers.debug_utils import DebugOption
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import FSDPOption
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available
from trl import DistillationConfig

from dopd.errors import did_you_mean, first_line
from dopd.rollout_settings import COLDEST, HOTTEST
from dopd.settings import (
    Count,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Probability,
    Seed,
    Setting,
    Share,
    Steps,
    Text,
    check,
    quoted,
    settings_of,
)
from dopd.trainer.host_generation import generation_problems
from dopd.trainer.host_optimizer import optimizer_problems

_Port = Annotated[int, Ge(1), Le(65535)]
_BelowOne = Annotated[float, Ge(0), Lt(1)]
_MOST = 1e3  # beyond it a number can only be a mistake, and float32 soon has none left
_WORKERS = 8 * (os.cpu_count() or 1)
_DEBUG = ["", "underflow_overflow", "tpu_metrics_debug", "underflow_overflow tpu_metrics_debug"]
_CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

# Types with limits, where the host's annotation is wider than what works.
_NARROWER: dict[str, Any] = {
    "output_dir": Text | None,
    "per_device_train_batch_size": Count,
    "per_device_eval_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "num_train_epochs": Positive,
    "max_steps": Literal[-1] | Count,
    "learning_rate": Annotated[float, Ge(0), Le(_MOST)],
    "lr_scheduler_type": SchedulerType,
    "warmup_steps": Natural | Fraction,
    "weight_decay": Annotated[float, Ge(0), Le(_MOST)],
    "adam_beta1": _BelowOne,
    "adam_beta2": _BelowOne,
    "adam_epsilon": Share,
    "max_grad_norm": NotNegative,
    "label_smoothing_factor": _BelowOne,
    "neftune_noise_alpha": Positive | None,
    "torch_empty_cache_steps": Count | None,
    "torch_compile_backend": Literal[tuple(backend.value.lower() for backend in DynamoBackend)] | None,
    "torch_compile_mode": _CompileMode | None,
    "logging_steps": Steps,
    "eval_steps": Steps | None,
    "eval_delay": NotNegative,
    "eval_accumulation_steps": Count | None,
    "include_num_input_tokens_seen": Literal["all", "non_padding", "no"] | bool,
    "include_for_metrics": list[Literal["inputs", "loss"]],
    "save_steps": Steps,
    "save_total_limit": Count | None,
    "report_to": list[str] | str | None,
    "seed": Seed,
    "data_seed": Seed | None,
    "dataloader_num_workers": Annotated[int, Ge(0), Le(_WORKERS)],
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
            "teacher_chat_template_kwargs",
            "method_options",
            "early_stop",
            "teacher_models",
            "monitor_limits",
        ),
        dict[str, Any] | None,
    ),
    "rules": list[dict[str, Any]] | None,
    "debug": Literal[tuple(_DEBUG)] | list[DebugOption] | None,
    "local_rank": Annotated[int, Ge(-1)],
    "max_completion_length": Count,
    "pad_to_multiple_of": Literal["auto", "none", "null"] | Count | None,
    "temperature": Annotated[float, Ge(COLDEST), Le(HOTTEST)],
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
    **dict.fromkeys(
        ("warmup_steps", "logging_steps", "eval_steps", "save_steps"),
        "a number of steps, or below 1 a share of them all",
    ),
    "temperature": "for the likeliest tokens set generation_kwargs={'do_sample': False} and off_policy_rollouts=True",
    "learning_rate": "a larger one leaves no number finite",
    "dataloader_num_workers": "8 for each core of this machine at most, and each is a process of its own",
    "max_steps": "-1 leaves the number of steps to num_train_epochs",
    "save_total_limit": "leave it out to keep every checkpoint",
    "max_grad_norm": "0 does not clip",
    "early_stop": "for example {metric: accuracy_greedy, patience: 3, min_delta: 0.01}",
}

_ACCUMULATION = ("adjust_scheduler", "sync_with_dataloader", "sync_each_batch")
_OF_SEVERAL = {"LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"}  # of launchers
_FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # a mapping, or the path of a JSON file of one
# Arguments of torch's checkpoint, and what transformers adds to them.
_CHECKPOINTING: dict[str, Any] = {
    **dict.fromkeys(("use_reentrant", "preserve_rng_state", "debug", "early_stop"), bool),
    "determinism_check": Literal["default", "none"],
    "context_fn": Callable,
    "every_n_layers": Count,
    "offload": bool,
}


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


def check_mappings(args: DistillationConfig) -> list[str]:
    """What is wrong inside the mappings that the host passes on to others.

    Args:
        args (`DOPDConfig`): whose own fields have been checked.
    """
    if args.report_to is None:
        args.report_to = "none"  # as the host has it in lists of arguments
    if isinstance(args.fsdp, str) and args.fsdp.lower() in ("true", "false"):  # of a parser that knows text alone
        args.fsdp = args.fsdp.lower() == "true"  # type: ignore[assignment]
    problems = [
        *_precision_problems(args),
        *_worker_problems(args),
        *_saving_problems(args),
        *generation_problems(args),
        *optimizer_problems(args),
        *_tracker_problems(args),
        *_machine_problems(args),
    ]
    # The second name is of transformers 5.20 and later.
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if not hasattr(args, name):
            continue
        problems += _inside(args, name, {key: Setting(key, hint) for key, hint in _CHECKPOINTING.items()})
        problems += _checkpointing_problems(name, getattr(args, name))
    accumulation = {"gradient_accumulation_kwargs": {k: Setting(k, bool) for k in _ACCUMULATION}}
    # Rows are text, which accelerate cannot hand from one process to the others.
    narrower = {"dispatch_batches": Literal[False] | None}
    settings = {
        name: replace(one, keys=accumulation.get(name), hint=narrower.get(name, one.hint))
        for name, one in settings_of(AcceleratorConfig).items()
    }
    problems += _inside(args, "accelerator_config", settings)
    problems += _file_problems(args)
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        problems += _inside_fixed_keys(args, name, LOADING)
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
    "device_map": str | dict | int | torch.device | None,
    "max_memory": dict | None,
    "offload_folder": Text | None,
    "offload_buffers": bool,
    "quantization_config": dict | None,
    "use_cache": bool,
}


# What is no setting of a model: where it is, how it is read, and what comes back.
_NOT_TO_SET = {
    "self",
    "cls",
    "name",
    "path",
    "model",
    "model_id",
    "pretrained_model_name_or_path",
    "config",
    "state_dict",
}
_NOT_TO_SET |= {"output_loading_info", "ignore_mismatched_sizes", "return_unused_kwargs", "trainable", "merged"}


def _precision_problems(args: DistillationConfig) -> list[str]:
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


def _worker_problems(args: DistillationConfig) -> list[str]:
    """Settings of the processes that load data, where there are none."""
    names = ("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_persistent_workers")
    values = {name: getattr(args, name) for name in names if getattr(args, name, None)}  # some are newer than others
    if args.dataloader_num_workers:
        return []
    return [
        f"{name} (={value!r}) needs dataloader_num_workers (=0) of at least 1: set it, or leave {name} out"
        for name, value in values.items()
    ]


def _tracker_problems(args: DistillationConfig) -> list[str]:
    trackers = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    allowed = sorted(INTEGRATION_TO_CALLBACK)
    alone = len(trackers) > 1 and set(trackers) & {"all", "none"}
    if not alone and set(trackers) <= {*allowed, "all", "none"}:
        return []
    expected = f"report_to (={quoted(args.report_to)}) must be none, all or some of {', '.join(allowed)}"
    names = [part.strip() for name in trackers for part in name.split(",") if part.strip()]
    wrong = next((name for name in names if name not in (*allowed, "all", "none")), None)
    if wrong is None:
        return [f"{expected}: none and all stand alone" if alone else f"{expected}: write a list, [{', '.join(names)}]"]
    return [f"{expected}.{did_you_mean(wrong, allowed)}"]


def _machine_problems(args: DistillationConfig) -> list[str]:
    """What the host would raise while it makes its own configuration."""
    problems = []
    if args.tf32 and not is_torch_tf32_available():
        problems.append(f"tf32 (={args.tf32}) needs a GPU of NVIDIA's Ampere generation or later: leave it out")
    if args.ddp_backend is not None and not _OF_SEVERAL & set(os.environ):
        problems.append(
            f"ddp_backend (={args.ddp_backend!r}) is for several processes, and this is the only one: use accelerate "
            "launch, or leave it out"
        )
    if args.deepspeed and find_spec("deepspeed") is None:
        problems.append(
            f"deepspeed (={quoted(args.deepspeed)}) needs the package deepspeed, which is not installed here"
        )
    words = args.fsdp.split() if isinstance(args.fsdp, str) else args.fsdp if isinstance(args.fsdp, list) else []
    options = [option.value for option in FSDPOption]
    wrong = [word for word in words if word not in options]
    if wrong:
        problems.append(
            f"fsdp (={quoted(args.fsdp)}) must be true or false, or some of {', '.join(options)}, with fsdp_config "
            f"beside it: {quoted(wrong[0])} is none of them"
        )
    return problems


def _saving_problems(args: DistillationConfig) -> list[str]:
    if str(getattr(args.save_strategy, "value", args.save_strategy)) != "best" or args.metric_for_best_model:
        return []
    return ["save_strategy (='best') needs metric_for_best_model, for example accuracy_greedy with student_eval_steps"]


def _checkpointing_problems(name: str, mapping: Any) -> Iterator[str]:
    function = (mapping or {}).get("context_fn") if isinstance(mapping, dict) else None
    if not isinstance(mapping, dict) or (function is None and not mapping.get("debug")):
        return
    if mapping.get("use_reentrant"):
        yield f"{name}: context_fn and debug need use_reentrant (=True) to be False, as torch has it"
    try:
        pickle.dumps(function)
    except Exception as error:  # of whatever object it is
        yield (
            f"{name}: context_fn (={quoted(function)}) cannot be saved with the run's arguments "
            f"({first_line(error)}): define it at the top of a module"
        )


def _file_problems(args: DistillationConfig) -> list[str]:
    values = {name: getattr(args, name) for name in _FILES}
    return [
        f"{name} (={quoted(value)}) must be a mapping, or the path of a JSON file: there is no such file"
        for name, value in values.items()
        if isinstance(value, str) and not value.lstrip().startswith("{") and not os.path.isfile(value)
    ]


def _inside(args: DistillationConfig, name: str, settings: Mapping[str, Setting]) -> list[str]:
    """What is wrong inside a mapping; a right one gets the values that are meant."""
    mapping = getattr(args, name)
    if not isinstance(mapping, dict):
        return []
    read, problems = check(mapping, settings, name)
    if not problems:
        setattr(args, name, read)
    return problems


def _inside_fixed_keys(args: DistillationConfig, name: str, hints: Mapping[str, Any]) -> list[str]:
    mapping, problems = getattr(args, name), []
    if not isinstance(mapping, dict):
        return []
    settings = {key: Setting(key, hint) for key, hint in hints.items()}
    # What is None is left to the one who is called, as where it is left out; but a dtype of None is the checkpoint's.
    mapping = {key: value for key, value in mapping.items() if value is not None or hints.get(key, Dtype) is Dtype}
    setattr(args, name, mapping)
    for key, value in mapping.items():
        if value is None:
            continue
        if key in _NOT_TO_SET or not str(key).isidentifier():
            problems.append(f"{name}: {quoted(key)} cannot be set there: it is no field of a model, or dopd gives it")
            continue
        if isinstance(value, torch.dtype) and hints.get(key) is Dtype:
            value = str(value).removeprefix("torch.")  # as the host takes it from Python
        # A key that is none of these is a field of the model's configuration, unless it looks like one of them.
        if key in settings or difflib.get_close_matches(str(key), settings, n=1, cutoff=0.85):
            problems += check({key: value}, settings, name)[1]
    return problems
