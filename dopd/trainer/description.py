"""What a run that a program starts writes as its configuration: its settings, and what its objects are."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dopd.report.records import GIVEN_IN_PYTHON
from dopd.secrets import without_secrets
from dopd.settings import dump_yaml
from dopd.trainer.config import DOPDConfig


def describe_run(
    args: DOPDConfig,
    *,
    model: Any,
    teacher_model: Any,
    teacher_models: Mapping[str, Any],
    train_dataset: Any,
    eval_dataset: Any,
    verifier: Any,
    reward_funcs: Any,
    rollout_engine: Any,
    peft_config: Any,
) -> str:
    """A run as flat YAML, in the keys of `dopd train`; an object is written as its class and what tells it from others.

    Args:
        args (`DOPDConfig`): of which settings that were left at their defaults are not written.
        model, teacher_model, teacher_models, train_dataset, eval_dataset, verifier, reward_funcs, rollout_engine,
            peft_config: as `DOPDTrainer` was given them.
    """
    objects = {
        "model_name_or_path": _described(model),
        "teacher_model_name_or_path": _described(teacher_model),
        "teacher_models": {name: _described(one) for name, one in teacher_models.items()} or None,
        "dataset_name": _described(train_dataset),
        "dataset_eval_name": _described(eval_dataset),
        "verifier": _described(verifier),
        "reward_funcs": _each_described(reward_funcs),
        "rollout_engine": _described(rollout_engine),
    }
    entries = {name: text for name, text in objects.items() if text is not None} | _adapter(peft_config)
    chosen = {"method": args.method, "output_dir": args.output_dir, **args.chosen()}
    return dump_yaml(without_secrets(entries | {name: value for name, value in chosen.items() if name not in entries}))


def _described(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return GIVEN_IN_PYTHON + _in_words(value)


def _each_described(value: Any) -> list[str | None] | str | None:
    return [*map(_described, value)] if isinstance(value, list | tuple) else _described(value)


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_in_words(part)}" for name, part in value.items())
    if isinstance(value, nn.Module):
        name = getattr(value.config, "_name_or_path", "")
        millions = sum(parameter.numel() for parameter in value.parameters()) / 1e6
        return f"{type(value).__name__}{f' of {name}' if name else ''}, {millions:.1f} M parameters"
    if hasattr(value, "column_names"):
        return ", ".join([type(value).__name__, *_of_rows(value)])
    place = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None)
    return f"{place}.{name}" if name else type(value).__name__


def _of_rows(value: Any) -> list[str]:
    found = [f"{len(value)} rows"] if hasattr(value, "__len__") else []
    found += [f"columns {', '.join(value.column_names)}"] if value.column_names else []
    fingerprint = getattr(value, "_fingerprint", None)
    return [*found, f"fingerprint {fingerprint}"] if fingerprint else found


def _adapter(peft_config: Any) -> dict[str, Any]:
    if peft_config is None:
        return {}
    if type(peft_config).__name__ != "LoraConfig":
        return {"peft_config": _described(peft_config)}
    modules = peft_config.target_modules
    named = modules if modules is None or isinstance(modules, str) else sorted(modules)
    return {
        "use_peft": True,
        "lora_r": peft_config.r,
        "lora_alpha": peft_config.lora_alpha,
        "lora_dropout": peft_config.lora_dropout,
        "lora_target_modules": named,
    }
