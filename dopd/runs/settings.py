"""A run's configuration: one flat YAML file and `--key value` flags, in TRL's words, checked before anything is
loaded.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from dopd.errors import ConfigError
from dopd.runs.noise import PrivilegedNoise
from dopd.runs.recipes import config_path
from dopd.secrets import without_secrets
from dopd.tasks.sources import resolve_kind

# Fields of the trainer that accept more than their annotation says, for the sake of the host's parsers.
_WIDER: dict[str, Any] = {"resume_from_checkpoint": bool | str | None}


@dataclass(kw_only=True)
class RunSettings:
    """What a run needs beside `DOPDConfig`: models, data and the verifier.

    Attributes:
        model_name_or_path (`str`): the student: a hub id, a folder, or `tiny:TASK/ROLE` (an embedded model, shipped
            or trained the first time it is asked for; `tiny:dag/student?seed=1` for another seed).
        dtype (`str`): precision of the student's weights (`float32`, `bfloat16`, `auto`).
        student_keep_layers (`list[int]`, *optional*): keep these decoder layers of the student alone.
        dataset_name (`str` or `list[str]`, *optional*): a hub id; a folder of data, of images or of `save_to_disk`; a
            `.json`, `.jsonl`, `.parquet`, `.arrow`, `.csv` or `.tsv` file, compressed or not; a pattern of such files
            (`data/*.jsonl.gz`), or several of them.
        dataset_config, dataset_train_split, dataset_test_split: as in TRL; slices (`train[:5%]`, `train[100:]`) and
            sums of them (`train+validation`) as in `datasets`. Files have the one split `train`.
        dataset_eval_name, dataset_eval_config, dataset_eval_split: held-out rows of another dataset; its only split
            if none is named.
        task (`str`, *optional*): generated problems in place of a dataset: see `dopd tasks`.
        task_options (`dict`): difficulty knobs of the task.
        privileged_kind (`str`, *optional*): which of a task's privileged texts is p; the task's own choice if not set.
        privileged_noise (`dict`): corrupts p in training rows, for example `{kind: wrong, share: 0.5}`; see
            `dopd.runs.noise`.
        train_prompts, eval_prompts (`int`): problems generated for each split of a task.
        verifier (`str`, *optional*): `math` (compares with the column `answer`), `exact`, or
            `package.module:function`; a task brings its own.
        use_peft (`bool`), lora_r, lora_alpha, lora_dropout, lora_target_modules, lora_target_parameters,
            lora_modules_to_save, use_rslora, use_dora: as in TRL. A student that is an adapter's folder goes on
            training it without `use_peft`; with it, the adapter becomes part of the weights below a new one.
        load_in_4bit (`bool`), load_in_8bit, bnb_4bit_quant_type, use_bnb_nested_quant, bnb_4bit_quant_storage: as in
            TRL: how bitsandbytes packs the student's weights, which then train by adapters alone.
        final_eval_prompts (`int`, *optional*): held-out prompts of the evaluation after training; `None`: none.
        overwrite (`bool`): replace an earlier run in `output_dir`.
    """

    model_name_or_path: str
    dtype: str = "float32"
    student_keep_layers: list[int] | None = None
    dataset_name: str | list[str] | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    dataset_eval_name: str | list[str] | None = None
    dataset_eval_config: str | None = None
    dataset_eval_split: str | None = None
    task: str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    privileged_kind: str | None = None
    privileged_noise: dict[str, Any] = field(default_factory=dict)
    train_prompts: int = 4096
    eval_prompts: int = 512
    verifier: str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | str | None = None
    lora_target_parameters: list[str] | str | None = None
    lora_modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    use_bnb_nested_quant: bool = False
    bnb_4bit_quant_storage: str | None = None
    final_eval_prompts: int | None = None
    overwrite: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.task is None) == (self.dataset_name is None):
            raise ConfigError(
                f"exactly one of task (={self.task!r}) and dataset_name (={self.dataset_name!r}) must be set: a "
                "task makes its problems, a dataset brings them"
            )
        self._check_held_out()
        if self.task is not None:
            self.privileged_kind = resolve_kind(self.task, self.privileged_kind)
        if self.privileged_noise:
            PrivilegedNoise.from_mapping(self.privileged_noise)
        for name in ("train_prompts", "eval_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} (={getattr(self, name)}) must be at least 1")

    def _check_held_out(self) -> None:
        if self.task is not None and self.dataset_eval_name is not None:
            raise ConfigError(
                f"dataset_eval_name (={self.dataset_eval_name!r}) is for runs with dataset_name: the task "
                f"{self.task!r} makes its own held-out problems"
            )
        if self.dataset_eval_name is None:
            for name in ("dataset_eval_config", "dataset_eval_split"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} (={getattr(self, name)!r}) needs dataset_eval_name: a split of dataset_name itself is "
                        "dataset_test_split"
                    )
        elif self.dataset_test_split is not None and self.dataset_eval_split is not None:
            raise ConfigError(
                f"dataset_test_split (={self.dataset_test_split!r}) and dataset_eval_split "
                f"(={self.dataset_eval_split!r}) both say which split of dataset_eval_name is held out: leave one out"
            )

    @property
    def output_dir(self) -> Path:
        return Path(self.trainer["output_dir"])

    def to_yaml(self) -> str:
        """The settings as one flat YAML text that `load_settings` reads back, without what is secret by name."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "trainer"}
        return yaml.safe_dump(without_secrets({**own, **self.trainer}), sort_keys=False)


def load_settings(path: str | Path | None, flags: Sequence[str] = (), **overrides: Any) -> RunSettings:
    """Read a YAML file, then flags, then keyword arguments, each overriding the ones before.

    Args:
        path (`str`, *optional*): a YAML file of keys and values, or the name of a recipe.
        flags (`list[str]`): `["--key", "value", "--other=value"]`; a flag without a value is `true`.
        overrides: keys and values.

    Raises:
        ConfigError: an unreadable file, an unknown key (with the closest known one), or a value of the wrong type.
    """
    values = {**(_read_yaml(config_path(path)) if path is not None else {}), **parse_flags(flags), **overrides}
    own = {f.name: _hints(RunSettings)[f.name] for f in dataclasses.fields(RunSettings) if f.name != "trainer"}
    trainer = _trainer_fields()
    for key in values:
        if key not in own and key not in trainer:
            close = difflib.get_close_matches(key, [*own, *trainer], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else " `dopd train --help` names the most used ones."
            raise ConfigError(f"unknown key {key!r}.{hint}")
    if not values.get("model_name_or_path"):
        raise ConfigError("model_name_or_path is missing: the student, as a hub id, a folder or tiny:TASK/ROLE")
    if not values.get("output_dir"):
        raise ConfigError("output_dir is missing: the folder of this run, for example runs/my-run")
    for key in sorted(_not_null(own | trainer) & {key for key, value in values.items() if value is None}):
        raise ConfigError(
            f"{key} has no value, and cannot be null: it must be {_in_words((own | trainer)[key])}. Leave the key out "
            "for its default"
        )
    checked = {key: _coerce(key, value, (own | trainer)[key]) for key, value in values.items()}
    return RunSettings(
        **{key: value for key, value in checked.items() if key in own},
        trainer={key: value for key, value in checked.items() if key in trainer},
    )


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` as a dict, values read as YAML."""
    values: dict[str, Any] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"expected --key value, got {flag!r}")
        key, separator, text = flag[2:].partition("=")
        if not separator:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            values[key.replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(
                f"--{key} (={text!r}) is not a YAML value: quote text that has colons or brackets"
            ) from None
    return values


def yaml_mapping(name: str, text: str | None) -> dict[str, Any] | None:
    """A mapping written on the command line as YAML, or `ConfigError`; `None` where none was."""
    if text is None:
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} (={text!r}) must be a YAML mapping, for example '{{num_needed: 3}}'")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config {str(path)!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"config {str(path)!r} must be a mapping of keys to values, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _trainer_fields() -> dict[str, Any]:
    from dopd.trainer.config import DOPDConfig

    hints = _hints(DOPDConfig)
    return {f.name: hints[f.name] for f in dataclasses.fields(DOPDConfig) if f.init} | _WIDER


def _not_null(hints: Mapping[str, Any]) -> set[str]:
    """Keys of plain numbers and switches, which are compared and multiplied without asking."""
    return {key for key, hint in hints.items() if hint in (int, bool)}


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """Give a YAML value the type of its field where that is plain; YAML reads `5e-6` as text."""
    if value is None or _fits(value, hint):
        return value
    if float in _parts(hint) and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ConfigError(f"{key} (={value!r}) must be {_in_words(hint)}, got {type(value).__name__}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; types that YAML cannot write are left to their own checks."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        return any(_fits(value, part) for part in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if hint in (int, float, bool, str, type(None)):
        return type(value) is hint
    return hint is typing.Any or (isinstance(hint, type) and issubclass(hint, Enum) and isinstance(value, str))


def _parts(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.get_args(hint)
    return (hint,)


def _in_words(hint: Any) -> str:
    words = []
    for part in _parts(hint):
        arguments = typing.get_args(part)
        if typing.get_origin(part) is typing.Literal:
            words += [repr(choice) for choice in arguments]
        elif typing.get_origin(part) is list:
            words.append(f"list of {_in_words(arguments[0])}")
        elif part is not type(None):
            kind = typing.get_origin(part) or part
            words.append("mapping" if kind is dict else getattr(kind, "__name__", str(kind)))
    return " or ".join(sorted(words))
