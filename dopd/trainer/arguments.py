"""Arguments that `DOPDConfig` and `DOPDTrainer` do not have, or not of that kind: what to write instead."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

from trl import DistillationTrainer

from dopd.errors import ConfigError, did_you_mean
from dopd.settings.foreign import FOREIGN, KEY_OF

_HERE = "here it is "
# Keys of a file of settings, and what they are in Python.
_OF_TRAINER = {
    "model_name_or_path": "model",
    "teacher_model_name_or_path": "teacher_model",
    "dataset_name": "train_dataset",
    "dataset_config": "train_dataset",
    "dataset_train_split": "train_dataset",
    "dataset_eval_name": "eval_dataset",
    "dataset_test_split": "eval_dataset",
    "verifier": "verifier",
    "reward_funcs": "reward_funcs",
    "use_peft": "peft_config",
    "lora_r": "peft_config",
    "lora_alpha": "peft_config",
    "lora_target_modules": "peft_config",
    "load_in_4bit": "quantization_config",
    "load_in_8bit": "quantization_config",
}
_IN_PYTHON = {
    "tokenizer": f"{_HERE}processing_class of DOPDTrainer",
    "dtype": f"{_HERE}model_init_kwargs={{'dtype': ...}}",
    "columns": "rename them: dataset.rename_column('question', 'prompt')",
    "final_eval_prompts": "call trainer.final_evaluation(PROMPTS) after trainer.train()",
    **{name: f"{_HERE}{argument} of DOPDTrainer" for name, argument in _OF_TRAINER.items()},
}


def refuse_unknown(owner: str, arguments: Iterable[str], allowed: Iterable[str], elsewhere: Mapping[str, str]) -> None:
    """Refuse arguments that a class does not have.

    Args:
        owner (`str`): the class.
        arguments, allowed (`list[str]`): names of arguments.
        elsewhere (`dict[str, str]`): names that belong to another class, and how they are given there.

    Raises:
        ConfigError: naming all of them, each with what to write.
    """
    names = list(allowed)
    problems = []
    for name in arguments:
        if name not in names:
            hint = elsewhere.get(name) or _in_python(name)
            problems.append(
                f"{owner} has no argument {name!r}{f': {hint}' if hint else f'.{did_you_mean(name, names)}'}"
            )
    if problems:
        raise ConfigError("; ".join(problems))


def _in_python(name: str) -> str | None:
    if name in _IN_PYTHON or name not in FOREIGN:
        return _IN_PYTHON.get(name)
    return _IN_PYTHON.get(KEY_OF.get(name, ""), FOREIGN[name])


def known_arguments_only(cls: type) -> None:
    """Have a dataclass refuse arguments that it does not have by what to write in their place."""
    original = cls.__init__  # type: ignore[misc]
    allowed = [*inspect.signature(original).parameters][1:]

    @functools.wraps(original)
    def checked(self: object, *args: Any, **settings: Any) -> None:
        refuse_unknown(cls.__name__, settings, allowed, {})
        original(self, *args, **settings)

    cls.__init__ = checked  # type: ignore[misc]


def check_arguments(args: object, config: type, host_options: Mapping[str, Any], own: Iterable[str]) -> None:
    """Refuse arguments of the trainer that are unknown, or of a kind that nothing can be done with.

    Args:
        args (`object`): what was given as such.
        config (`type`): the class that it must be of.
        host_options (`dict`): arguments beside the trainer's own.
        own (`list[str]`): names of those, of which one may be meant.

    Raises:
        ConfigError: naming the argument, what it is, and what to write.
    """
    allowed = [*own, *[*inspect.signature(DistillationTrainer.__init__).parameters][1:]]
    of_config = {one.name: f"{_HERE}args={config.__name__}({one.name}=...)" for one in dataclasses.fields(config)}
    refuse_unknown("DOPDTrainer", host_options, allowed, of_config)
    if args is not None and not isinstance(args, config):
        raise ConfigError(
            f"args (a {type(args).__name__}) must be a {config.__name__}, which takes the same settings and those of "
            f"the method: {config.__name__}('runs/mine', ...)"
        )
    peft, callbacks = host_options.get("peft_config"), host_options.get("callbacks")
    if peft is not None and not hasattr(peft, "peft_type"):
        raise ConfigError(f"peft_config (a {type(peft).__name__}) must be one of peft's, such as LoraConfig(r=16)")
    if callbacks is not None and not isinstance(callbacks, list | tuple):
        raise ConfigError(f"callbacks (a {type(callbacks).__name__}) must be a list of them: callbacks=[...]")
    if host_options.get("tools"):
        raise ConfigError("tools: privileged views of a conversation with tools are not supported")


def as_name(model: Any) -> Any:
    """A model, or its name where a `Path` names its folder."""
    return os.fspath(model) if isinstance(model, os.PathLike) else model
