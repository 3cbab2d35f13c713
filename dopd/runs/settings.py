"""A run's configuration: one flat YAML file and `--key value` flags, in TRL's words, checked before anything is
loaded.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt, MinLen

from dopd.errors import ConfigError
from dopd.report.records import GIVEN_IN_PYTHON
from dopd.runs.noise import PrivilegedNoise
from dopd.runs.recipes import config_path
from dopd.secrets import is_secret, without_secrets
from dopd.settings import (
    Count,
    Natural,
    Problems,
    Setting,
    Text,
    check,
    check_attributes,
    dump_yaml,
    quoted,
    read_yaml,
    read_yaml_file,
    settings_of,
)
from dopd.settings.foreign import FOREIGN
from dopd.settings.places import PLACES, at_home, left_open
from dopd.tasks import get_source, resolve_kind

PromptCount = Annotated[int, Ge(1), Le(10_000_000)]  # they are held in memory
Precision = Literal["auto", "float32", "bfloat16", "float16"]
_SWITCHED = ("true", "false", "yes", "no", "on", "off", "null", "~")


@dataclass(kw_only=True)
class RunSettings:
    """What a run needs beside `DOPDConfig`: models, data, the verifier and reward functions.

    Attributes:
        model_name_or_path (`str`): the student: a hub id, a folder, or `tiny:TASK/ROLE` (an embedded model; a checkout
            of the repository has more of them, `tiny:dag/student?seed=3` for another seed).
        dtype (`str`): precision of the student's weights (`float32`, `bfloat16`, `auto`).
        student_keep_layers (`list[int]`, *optional*): keep these decoder layers of the student alone.
        dataset_name (`str` or `list[str]`, *optional*): a hub id; a folder of data, of images or of `save_to_disk`; a
            `.json`, `.jsonl`, `.parquet`, `.arrow`, `.csv` or `.tsv` file, compressed or not; a pattern of such files
            (`data/*.jsonl.gz`), or several of them.
        dataset_config, dataset_train_split, dataset_test_split: as in TRL; slices (`train[:5%]`, `train[100:]`) and
            sums of them (`train+validation`) as in `datasets`. Files have the one split `train`.
        dataset_eval_name, dataset_eval_config, dataset_eval_split: held-out rows of another dataset; its only split
            if none is named.
        columns (`dict`): the dataset's names of the columns that a run reads, by the run's names, for example
            `{prompt: question, privileged_context: solution}`, or paths into them (`answer: reward_model.ground_truth`,
            `answer: messages.-1.content`). Several are put together (`prompt: [instruction, input]`, `images: [image_1,
            image_2]`), and `system` becomes the first turn. A conversation that is `prompt` is asked up to the last
            turn that is not the assistant's, `<image>` in it being the place of a picture. Held-out rows need have
            `prompt` alone of them.
        task (`str`, *optional*): generated problems in place of a dataset: see `dopd tasks`; or a class of your own as
            `package.module:Class` or `./file.py:Class`.
        task_options (`dict`): difficulty knobs of the task.
        privileged_kind (`str`, *optional*): which of a task's privileged texts is p; the task's own choice if not set.
        privileged_noise (`dict`): corrupts p in training rows, for example `{kind: wrong, share: 0.5}`; see
            `dopd.runs.noise`.
        train_prompts, eval_prompts (`int`): problems generated for each split of a task.
        verifier (`str`, *optional*): `math`, `exact` or `choice` (compare with the column `answer`), `code` (runs tests
            in a sandbox), `judge` (a model on a server), or `package.module:function` or
            `./file.py:function`; a task brings its own.
        verifier_options (`dict`): of a verifier that has some, for example `{allow_code_execution: true}` of `code`.
        reward_funcs (`list[str]` or `str`, *optional*): as in TRL, with `reward_weights`: functions of your own as
            `package.module:function` or `./file.py:function`, and `verifier` for the verifier's score.
        rollout_engine (`str`, *optional*): a function of your own that makes what draws the answers, as
            `package.module:factory` or `./file.py:factory`; transformers' `generate`, or vLLM with `use_vllm`, if left
            out.
        use_peft (`bool`), lora_r, lora_alpha, lora_dropout, lora_target_modules, lora_target_parameters,
            lora_modules_to_save, use_rslora, use_dora: as in TRL. A student that is an adapter's folder goes on
            training it without `use_peft`; with it, the adapter becomes part of the weights below a new one.
        load_in_4bit (`bool`), load_in_8bit, bnb_4bit_quant_type, use_bnb_nested_quant, bnb_4bit_quant_storage: as in
            TRL: how bitsandbytes packs the student's weights, which then train by adapters alone.
        final_eval_prompts (`int`, *optional*): held-out prompts of the evaluation after training; `None`: none.
        overwrite (`bool`): replace an earlier run in `output_dir`.
    """

    model_name_or_path: Text
    dtype: Precision = "float32"
    student_keep_layers: Annotated[list[Natural], MinLen(1)] | None = None
    dataset_name: Text | Annotated[list[Text], MinLen(1)] | None = None
    dataset_config: Text | None = None
    dataset_train_split: Text = "train"
    dataset_test_split: Text | None = None
    dataset_eval_name: Text | Annotated[list[Text], MinLen(1)] | None = None
    dataset_eval_config: Text | None = None
    dataset_eval_split: Text | None = None
    columns: dict[str, Text | Annotated[list[Text], MinLen(1)]] = field(default_factory=dict)
    task: Text | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    privileged_kind: Text | None = None
    privileged_noise: dict[str, Any] = field(default_factory=dict)
    train_prompts: PromptCount = 4096
    eval_prompts: PromptCount = 512
    verifier: Text | None = None
    verifier_options: dict[str, Any] = field(default_factory=dict)
    reward_funcs: Annotated[list[Text], MinLen(1)] | Text | None = None
    rollout_engine: Text | None = None
    use_peft: bool = False
    lora_r: Count = 16
    lora_alpha: Count = 32
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    lora_target_modules: list[Text] | Text | None = None
    lora_target_parameters: list[Text] | Text | None = None
    lora_modules_to_save: list[Text] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    use_bnb_nested_quant: bool = False
    bnb_4bit_quant_storage: Literal["uint8", "int8", "float16", "bfloat16", "float32"] | None = None
    final_eval_prompts: Count | None = None
    overwrite: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_attributes(self, own_settings())
        problems = Problems(self._unusable_names())
        if (self.task is None) == (self.dataset_name is None):
            problems.add(
                f"exactly one of task (={self.task!r}) and dataset_name (={quoted(self.dataset_name)}) must be set: a "
                "task makes its problems, a dataset brings them"
            )
        with problems.collected():
            self._check_held_out()
        if self.task is not None:
            with problems.collected():
                self.privileged_kind = resolve_kind(self.task, self.privileged_kind)
                get_source(self.task, **self.task_options)
        if self.privileged_noise:
            with problems.collected():
                PrivilegedNoise.from_mapping(self.privileged_noise)
        problems.raise_any()

    def _unusable_names(self) -> Iterator[str]:
        layers = self.student_keep_layers or []
        if any(one >= next_one for one, next_one in pairwise(layers)):
            yield (
                f"student_keep_layers (={quoted(layers)}) must name each layer once, from the lowest: "
                f"{sorted(set(layers))}"
            )
        for name in ("lora_target_modules", "lora_target_parameters"):
            text = getattr(self, name)
            if isinstance(text, str) and re.fullmatch(r"[\w.\s-]+(,[\w.\s-]*)+", text):
                listed = ", ".join(part.strip() for part in text.split(",") if part.strip())
                yield f"{name} (={text!r}) is one name, with commas in it: write a list, [{listed}]"

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
        return dump_yaml(without_secrets({**own, **self.trainer}))


@functools.cache
def own_settings() -> dict[str, Setting]:
    """The settings of `RunSettings`, with what its docstring says of them."""
    about = dict(_documented(RunSettings.__doc__ or ""))
    found = settings_of(RunSettings)
    return {name: replace(setting, about=about.get(name, "")) for name, setting in found.items() if name != "trainer"}


def all_settings() -> dict[str, Setting]:
    """Every key of a configuration: those of `RunSettings`, and those of the trainer."""
    from dopd.trainer.config import DOPDConfig
    from dopd.trainer.host_settings import trainer_settings

    return own_settings() | trainer_settings(DOPDConfig)


def load_settings(path: str | Path | None, flags: Sequence[str] = (), /, **overrides: Any) -> RunSettings:
    """Read a YAML file, then flags, then keyword arguments, each overriding the ones before.

    Args:
        path (`str`, *optional*): a YAML file of keys and values, or the name of a recipe.
        flags (`list[str]`): `["--key", "value", "--other=value"]`; a flag without a value is `true`.
        overrides: keys and values, of any name.

    Raises:
        ConfigError: an unreadable file, unknown keys (with the closest known ones), or values that cannot be used; all
            of them at once.
    """
    values = {**(read_yaml_file(config_path(path)) if path is not None else {}), **parse_flags(flags), **overrides}
    values |= {key: at_home(values[key]) for key in PLACES if key in values}
    problems = Problems(chain.from_iterable(left_open(key, values.get(key)) for key in PLACES))
    nothing = [key for key, value in values.items() if value is None or (isinstance(value, str) and not value)]
    if "model_name_or_path" not in values or "model_name_or_path" in nothing:
        values.pop("model_name_or_path", None)
        problems.add("model_name_or_path is missing: the student, as a hub id, a folder or tiny:TASK/ROLE")
    if "output_dir" not in values or "output_dir" in nothing:
        values.pop("output_dir", None)
        problems.add("output_dir is missing: the folder of this run, for example runs/my-run")
    for key, value in values.items():
        if isinstance(value, str) and value.startswith(GIVEN_IN_PYTHON):
            problems.add(
                f"{key} (={quoted(value)}) was an object of a program, which this file describes and cannot bring: run "
                f"the program again, or give {key} a name"
            )
    foreign = [f"unknown key {key!r}: {FOREIGN[key]}" for key in values if key in FOREIGN]
    read, found = check({key: value for key, value in values.items() if key not in FOREIGN}, all_settings())
    problems.found[:0] = [*foreign, *found]  # a misspelt key comes before what is missing for it
    own = own_settings()
    if not problems.found:
        return RunSettings(
            **{key: value for key, value in read.items() if key in own},
            trainer={key: value for key, value in read.items() if key not in own},
        )
    problems.raise_any()
    raise AssertionError("unreachable: there was a problem")


def settings_of_command(command: str, config: str | None, flags: Sequence[str]) -> RunSettings:
    """The settings that a command is given: a config with flags, or flags alone.

    Raises:
        ConfigError: as `load_settings`; neither a config nor a model is named.
    """
    if config is None and "model_name_or_path" not in parse_flags(flags):
        raise ConfigError(
            f"a config is missing: dopd {command} CONFIG, a YAML file or the name of a recipe; or flags alone, at "
            "least --model_name_or_path and --output_dir (`dopd config` lists the keys)"
        )
    return load_settings(config, flags)


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The config and the flags of `dopd train`, which may stand in any order.

    Returns:
        The config, if one is named, and flags as `load_settings` takes them.

    Raises:
        ConfigError: several configs.
    """
    settings_by_name, configs, flags, rest = all_settings(), [], [], list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            configs.append(word)
            continue
        flags.append(word)
        setting = settings_by_name.get(_key(word))
        # A switch needs no value, so what follows is one only if it looks like one.
        takes = rest and not rest[0].startswith("--") and "=" not in word
        if takes and not (setting is not None and setting.is_switch and rest[0].lower() not in _SWITCHED):
            flags.append(rest.pop(0))
    if len(configs) > 1:
        raise ConfigError(
            f"one config is read, got {' and '.join(map(repr, configs))}: values belong behind their --key"
        )
    return (configs[0] if configs else None), flags


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` as a dict, values read as YAML.

    Raises:
        ConfigError: what is no flag, values that are no YAML, and a key that is given two values.
    """
    values: dict[str, Any] = {}
    rest = list(flags)
    problems = Problems()
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"expected --key value, got {flag!r}")
        key, separator, text_after = flag[2:].partition("=")
        text: str | None = text_after
        if not separator:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else None
        name = _key(key)
        with problems.collected():
            value = _value(key, text)
            if name in values and values[name] != value:
                was, now = ("<secret>",) * 2 if is_secret(name) else (quoted(values[name]), quoted(value))
                problems.add(f"--{name} is there twice, as {was} and {now}: leave one of them out")
            values[name] = value
    problems.raise_any()
    return values


def yaml_mapping(name: str, text: str | None) -> dict[str, Any] | None:
    """A mapping written on the command line as YAML, or `ConfigError`; `None` where none was."""
    if text is None:
        return None
    try:
        value = read_yaml(text)
    except ConfigError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} (={quoted(text)}) must be a YAML mapping, for example '{{num_needed: 3}}'")
    return value


def _key(flag: str) -> str:
    return flag.removeprefix("--").partition("=")[0].replace("-", "_")


def _value(key: str, text: str | None) -> Any:
    """What a flag's text means: YAML; and as it stands, where the key is text alone and YAML reads something else."""
    setting = all_settings().get(_key(key))
    if text is None:
        if setting is not None and not {bool, Any} & setting.kinds:
            raise ConfigError(f"--{key} has no value: it must be {setting.words}")
        return True
    try:
        value = read_yaml(text)
    except ConfigError as error:
        if setting is not None and setting.is_text:
            return text
        hint = str(error) if "is not YAML" not in str(error) else "is not a YAML value"
        raise ConfigError(f"--{key} (={quoted(text)}) {hint}: quote text that has colons or brackets") from None
    return text if setting is not None and setting.is_text and not isinstance(value, str | None) else value


def _documented(text: str) -> Iterator[tuple[str, str]]:
    """Names and descriptions of a docstring's attributes."""
    for entry in re.split(r"\n {8}(?=\w)", text.partition("Attributes:")[2]):
        names, _, about = entry.partition(": ")
        for name in re.sub(r"\([^)]*\)", "", names).split(","):
            yield name.strip(), " ".join(about.split())
