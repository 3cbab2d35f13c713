"""What the settings of transformers and TRL may be: their annotations say the types, this table the limits."""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from transformers import SchedulerType
from transformers.debug_utils import DebugOption
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig

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
    "torch_compile_mode": _CompileMode | None,
    "logging_steps": Positive,
    "eval_steps": Positive | None,
    "eval_delay": NotNegative,
    "eval_accumulation_steps": Count | None,
    "include_num_input_tokens_seen": Literal["all", "non_padding", "no"] | bool,
    "include_for_metrics": list[Literal["inputs", "loss"]],
    "save_steps": Positive,
    "save_total_limit": Count | None,
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
}
_FIXES = {
    "temperature": "for the likeliest tokens set generation_kwargs={'do_sample': False} and off_policy_rollouts=True",
    "max_steps": "-1 leaves the number of steps to num_train_epochs",
    "save_total_limit": "leave it out to keep every checkpoint",
    "max_grad_norm": "0 does not clip",
}

# Values of transformers' `GenerationConfig`, which has no annotations. Which keys there are it says itself.
_GENERATION: dict[str, Any] = {
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
    "bad_words_ids": list[list[Natural]] | None,
    "suppress_tokens": list[Natural] | None,
    "begin_suppress_tokens": list[Natural] | None,
    "forced_bos_token_id": Natural | None,
    "forced_eos_token_id": Natural | list[Natural] | None,
    "remove_invalid_values": bool | None,
    "renormalize_logits": bool | None,
    "exponential_decay_length_penalty": list | None,
    "sequence_bias": list | dict | None,
    "token_healing": bool | None,
    "guidance_scale": Annotated[float, Gt(0)] | None,
    "presence_penalty": float | None,
    "frequency_penalty": float | None,
    "seed": int | None,
}
_CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")


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
    problems = [*_generation_problems(args), *_optimizer_problems(args)]
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        known = {key: Setting(key, bool if key != "determinism_check" else str) for key in _CHECKPOINTING}
        problems += _inside(args, name, known)
    if isinstance(args.accelerator_config, dict):
        problems += _inside(args, "accelerator_config", settings_of(AcceleratorConfig))
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        problems += _inside_what_is_known(args, name, _LOADING)
    return problems


# Arguments of `from_pretrained`; any field of a model's configuration can stand beside them.
_LOADING: dict[str, Any] = {
    "dtype": str,
    "torch_dtype": str,
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


def _generation_problems(args: Any) -> list[str]:
    if args.use_vllm:  # an engine of its own has settings of its own
        return []
    known = {name: Setting(name, hint) for name, hint in _GENERATION.items()}
    given = {name: value for name, value in (args.generation_kwargs or {}).items() if name in known}
    return check(given, known, "generation_kwargs")[1]


def _optimizer_problems(args: Any) -> list[str]:
    problems = []
    scheduler = TYPE_TO_SCHEDULER_FUNCTION.get(SchedulerType(args.lr_scheduler_type))
    open_ended = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # they pass on what they are given
    if scheduler is not None and args.lr_scheduler_type not in open_ended:
        of_the_host = ("optimizer", "num_warmup_steps", "num_training_steps")
        known = {name: one for name, one in settings_of_call(scheduler).items() if name not in of_the_host}
        problems += _inside(args, "lr_scheduler_kwargs", known)
    parts = (args.optim_args or "").replace(" ", "").split(",") if args.optim_args else []
    if any(part.count("=") != 1 or part.startswith("=") or part.endswith("=") for part in parts):
        problems.append(
            f"optim_args (={args.optim_args!r}) must be names with values, separated by commas: 'rank=64,scale=0.25'"
        )
    return problems


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
        # A key that is none of these is a field of the model's configuration, unless it looks like one of them.
        if key in known or difflib.get_close_matches(str(key), known, n=1, cutoff=0.85):
            problems += check({key: value}, known, name)[1]
    return problems
