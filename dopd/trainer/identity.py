"""What a resumed run must share with its checkpoint: otherwise its numbers would be of neither run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from dopd.errors import ConfigError, cut
from dopd.methods import own_code
from dopd.registry import files_of
from dopd.secrets import without_secrets
from dopd.settings import as_mapping
from dopd.trainer.beginnings import TEACHER_WEIGHTS, WEIGHTS, same_beginning
from dopd.trainer.host import HostTrainer
from dopd.trainer.lock import main_decides
from dopd.trainer.resuming import names_of
from dopd.trainer.whole import manifest_of

# Settings that decide the steps; what is only saved, shown or evaluated may differ.
_SETTINGS = (
    "method",
    "rules",
    "method_options",
    "privileged_student",
    "ema_decay",
    "snapshot_steps",
    "num_generations",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "max_completion_length",
    "privileged_template",
    "prompt_format",
    "chat_template_kwargs",
    "teacher_chat_template_kwargs",
    "disable_dropout",
    "router_aux_loss_coef",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "shuffle_dataset",
    "optim",
    "optim_args",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "neftune_noise_alpha",
    "optim_target_modules",
    "off_policy_rollouts",
    "rollout_importance",
    "rollout_importance_cap",
    "ignore_data_skip",
    "train_sampling_strategy",
    "dataloader_drop_last",
    # What changes the rounding alone changes a run, too: its steps are then no longer those of one run.
    "bf16",
    "fp16",
    "tf32",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "use_liger_kernel",
    "use_cpu",
    "use_vllm",
    "share_prompts",
    "loss_backend",
    "loss_chunk_tokens",
    "per_device_scoring_batch_size",
    "pad_to_multiple_of",
)
_LENGTH = ("max_steps", "num_train_epochs")
_CONSTANT = ("constant", "constant_with_warmup")
# Without these the saved state has no place to go.
_NEVER = ("optim", "model", "optimizer_state")
NOT_SAVED = {"optimizer_state": "not saved (save_only_model)"}
_ROWS = 10_000
_ROWS_AT_ONCE = 256
_WITHOUT = "without secrets"
_digests: WeakKeyDictionary[Dataset, str] = WeakKeyDictionary()


def identity_of(trainer: HostTrainer) -> dict[str, Any]:
    """What decides the steps of a run, by name: settings, models, data and processes, as JSON has them."""
    args = trainer.args
    entries = {name: _written(name, _plain(getattr(args, name))) for name in _SETTINGS if hasattr(args, name)}
    if trainer.served is not None:  # its address may become another one
        entries["teacher_server_model (what is served)"] = trainer.served.model
        entries |= {name: getattr(args, name) for name in ("teacher_server_support", "teacher_server_top_k")}
    if entries.get("lr_scheduler_type") in _CONSTANT:  # a run may then be made longer: no step becomes another one
        entries = {name: value for name, value in entries.items() if name not in _LENGTH}
    student, models = trainer.unwrapped_student, trainer.loaded_models
    if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:  # these change it on their own
        entries["dtype (of the models)"] = [
            sorted({str(weight.dtype) for weight in model.parameters()}) for model in models
        ]
    return entries | {
        "fsdp_config (activation_checkpointing)": bool(
            as_mapping(args.fsdp_config).get("activation_checkpointing", False)
        ),
        "attn_implementation (of the models)": [_attention(model) for model in models],
        "model": _shape(student),
        WEIGHTS: trainer.first_weights,
        TEACHER_WEIGHTS: trainer.teacher_weights,
        "train_dataset": rows_digest(trainer.train_dataset),
        "own_code (files of the method)": own_code(None if args.rules is not None else args.method, trainer.table),
        "reward_funcs (what answers are judged by)": _judged_by(trainer),
        "rollout_engine (what draws the answers)": files_of([type(trainer.engine)]),
        "optimizer_state": "saved",
        "processes": trainer.accelerator.num_processes,
    }


def check_resumed(trainer: HostTrainer, checkpoint: str) -> tuple[str, ...]:
    """Compare a run with the one that saved a checkpoint, on the main process, which has whole weights.

    Returns:
        Names of what changes, and is meant to: see `check_identity`.

    Raises:
        ConfigError: something else differs.
    """
    saved = (manifest_of(Path(checkpoint)) or {}).get("run", {})
    meant = names_of(trainer.args.resume_with_changes)

    def compare() -> str:
        trainer.first_weights = same_beginning(checkpoint, saved, trainer)
        return ",".join(check_identity(checkpoint, saved, identity_of(trainer), meant))

    return tuple(names_of(main_decides(compare, trainer.run_folder)))


def check_identity(
    checkpoint: str | Path, saved: Mapping[str, Any], mine: Mapping[str, Any], meant: Sequence[str] | None
) -> list[str]:
    """Compare a run with the one that saved a checkpoint.

    Args:
        checkpoint (`str`): its folder, for the message.
        saved, mine (`dict`): see `identity_of`.
        meant (`list[str]`, *optional*): names of what is meant to change.

    Returns:
        Names of what changes, and is meant to.

    Raises:
        ConfigError: something else differs, or cannot change.
    """
    names = {_short(name): name for name in {**saved, **mine}}
    meant = list(meant or ())
    allowed = sorted({*names, *_SETTINGS})
    unknown = [name for name in meant if name not in allowed]
    if unknown:
        raise ConfigError(f"resume_with_changes (={meant!r}): {unknown[0]!r} is not one of {', '.join(allowed)}")
    changed = [
        short for short, name in names.items() if name in saved and name in mine and _differ(saved[name], mine[name])
    ]
    fixed = [name for name in changed if name in _NEVER]
    wrong = fixed or [name for name in changed if name not in meant]
    if not wrong:
        return changed
    differences = "; ".join(
        f"{names[n]} is {_in_text(saved[names[n]])} there and {_in_text(mine[names[n]])} here" for n in wrong
    )
    way = (
        "Nothing that was saved could be used: start a new run, with the checkpoint as model_name_or_path if its "
        "weights are wanted"
        if fixed
        else f"Resume with the settings of the run that saved it, or, if that is meant: resume_with_changes="
        f"{','.join(changed)}"
    )
    raise ConfigError(f"resume_from_checkpoint (={str(checkpoint)!r}) is of another run: {differences}. {way}")


def _judged_by(trainer: HostTrainer) -> str:
    """Functions with their weights, and the files of users' code; what is only logged may differ."""
    judge = trainer.judge
    if not trainer.table.is_judged:
        return "none"
    functions = [f"{weight:g} x {name}" for name, weight in zip(judge.functions, judge.weights, strict=True)]
    return f"{', '.join(functions) or 'the verifier'} (own code: {files_of(judge.code)})"


def _attention(model: nn.Module) -> list[str]:
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return sorted({str(part.config._attn_implementation) for part in parts})


def _shape(student: Any) -> str:
    """Names and sizes of what trains."""
    parts = [f"{name} {tuple(weight.shape)}" for name, weight in student.named_parameters() if weight.requires_grad]
    return f"{len(parts)} trained tensors, {hashlib.sha256(' '.join(parts).encode()).hexdigest()[:12]}"


def rows_digest(dataset: Any) -> str:
    """A short text that differs where rows of a dataset, or their pictures, differ: of every row, or, of more than
    10,000, of that many between the first and the last. It is the same wherever the dataset is stored.
    """
    if not isinstance(dataset, Dataset):
        return "a stream"
    if dataset not in _digests:  # each checkpoint asks for it
        _digests[dataset] = f"{len(dataset)} rows, {_digest(dataset)}"
    return _digests[dataset]


def _digest(dataset: Dataset) -> str:
    last = len(dataset) - 1
    if last >= _ROWS:
        dataset = dataset.select([round(place * last / (_ROWS - 1)) for place in range(_ROWS)])
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(_ROWS_AT_ONCE):  # pictures as they are stored
        for row in batch.to_pylist():
            digest.update(json.dumps(_content(row), sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:12]


def _content(value: Any) -> Any:
    """What is in a value, as JSON has it: of bytes a checksum, of a picture that is stored its bytes alone."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, list):
        return [_content(part) for part in value]
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return Path(value["path"] or "").name if value["bytes"] is None else _content(value["bytes"])
        return {name: _content(part) for name, part in value.items()}
    return value


def _short(name: str) -> str:
    return name.split(" ")[0]


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back."""
    if isinstance(value, Enum):
        return value.value
    return json.loads(json.dumps(value, default=str))


def _written(name: str, value: Any) -> Any:
    """A setting as a checkpoint holds it: what is secret in it is left out, and known again by a checksum."""
    kept = without_secrets({name: value})[name]
    return value if kept == value else {_WITHOUT: kept, "sha256": _checksum(value)}


def _differ(saved: Any, mine: Any) -> bool:
    return bool(saved != mine) and _checksum(saved) != _checksum(mine)


def _checksum(value: Any) -> str:
    """Of a value with its secrets, which may be known or be left out."""
    if isinstance(value, dict) and value.keys() == {_WITHOUT, "sha256"}:
        return str(value["sha256"])
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _in_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return cut(text, 200)
