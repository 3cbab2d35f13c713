"""Whose setting a key of the configuration is, for those who know it from another library."""

import dataclasses
from typing import Literal

from transformers import TrainingArguments
from trl import DistillationConfig, ModelConfig, ScriptArguments

from dopd.settings import REQUIRED, Setting

Origin = Literal["dopd", "TRL", "transformers"]


def origin_of(name: str) -> Origin:
    """The library whose documentation of a key holds here too; `"dopd"` where there is no such key elsewhere.

    Args:
        name (`str`): a key of a configuration.
    """
    if name in _defaults(TrainingArguments):
        return "transformers"
    return (
        "TRL" if any(name in _defaults(cls) for cls in (DistillationConfig, ModelConfig, ScriptArguments)) else "dopd"
    )


def other_default(setting: Setting) -> str:
    """What a key's default is in TRL's `DistillationConfig`, where it differs from the one here; else `""`."""
    theirs = _defaults(DistillationConfig).get(setting.name, setting.default)
    return "" if theirs is REQUIRED or theirs == setting.default else repr(getattr(theirs, "value", theirs))


def _defaults(cls: type) -> dict[str, object]:
    """Defaults of a dataclass's fields; those that are made anew for each object are not compared."""
    return {
        field.name: REQUIRED if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(cls)
    }
