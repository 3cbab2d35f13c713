"""What a model was trained for: the circumstances of its run, or of its recipe, in which it is judged by default."""

import glob
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dopd.data.column_names import Columns
from dopd.errors import ConfigError
from dopd.report.records import CONFIG_FILE, GIVEN_IN_PYTHON
from dopd.runs.build import resolve_model
from dopd.runs.row_files import ONLY_SPLIT, names_files
from dopd.runs.settings import all_settings
from dopd.sampling import stop_strings_in
from dopd.settings import SettingsError, check, read_yaml_file
from dopd.tasks import get_source
from dopd.tiny.shipped import CARD_NAME
from dopd.trainer import DOPDConfig

_OF_THE_TASK = ("task_options", "privileged_kind")
_WHICH_ROWS = ("dataset_config", "dataset_test_split")
_OF_THE_ROWS = (*_WHICH_ROWS, "columns")
_OBJECTS = (
    "dataset_name",
    "dataset_eval_name",
    "verifier",
    "reward_funcs",
)  # which a program may have given to its run
_TRAINED_ON = "trained_on"  # dataset and split of a run
_TINY_TEMPLATE = "{prompt} {privileged_context}"  # as the tiny models were trained
_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Circumstances:
    """How a model is asked.

    Attributes:
        task (`str`, *optional*), task_options (`dict`), privileged_kind (`str`, *optional*): the problems.
        dataset_name (`str` or `list[str]`, *optional*), dataset_config, dataset_test_split (`str`, *optional*), columns
            (`dict`): rows in the place of a task's problems, as in training; of a run, those that it held out.
        verifier (`str`, *optional*), verifier_options (`dict`): how an answer is scored; a task brings its own.
        reward_funcs (`list[str]`), reward_weights (`list[float]`, *optional*): what methods learn from, as in training.
        privileged_template (`str`, *optional*), chat_template_kwargs (`dict`): how a prompt is written.
        teacher_chat_template_kwargs (`dict`, *optional*): the same for a teacher; as for the model if left out.
        prompt_format (`str`): what a prompt that is text means, as in `DOPDConfig`.
        stop_strings (`list[str]`): texts that end an answer, beside those that the checkpoint declares.
        max_new_tokens (`int`): most tokens of an answer.
        temperature (`float`): of the distributions that answers are drawn from and scored by. A model is judged at 1.
    """

    task: str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    privileged_kind: str | None = None
    dataset_name: str | list[str] | None = None
    dataset_config: str | None = None
    dataset_test_split: str | None = None
    columns: Columns = field(default_factory=dict)
    verifier: str | None = None
    verifier_options: dict[str, Any] = field(default_factory=dict)
    reward_funcs: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] | None = None
    privileged_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_chat_template_kwargs: dict[str, Any] | None = None
    prompt_format: str = "auto"
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int = _MAX_NEW_TOKENS
    temperature: float = 1.0


_TEACHERS = "teacher_chat_template_kwargs"
_REWARDS = ("reward_funcs", "reward_weights")
_VERIFIER = ("verifier", "verifier_options")
JUDGED_FIELDS = tuple(
    one.name for one in fields(Circumstances) if one.name not in ("temperature", _TEACHERS, *_REWARDS)
)
LOOKED_AT_FIELDS = (
    "privileged_template",
    "chat_template_kwargs",
    _TEACHERS,
    "prompt_format",
    "stop_strings",
    "temperature",
)
REWARDED_FIELDS = ("task", "task_options", *_VERIFIER, *_REWARDS)


def circumstances(model_name: str, *, only: Sequence[str] = JUDGED_FIELDS, **options: Any) -> tuple[Circumstances, str]:
    """Those given, and for what is `None` those of the model's run folder or of a tiny model's recipe.

    Options and kind of p belong to a task: with another task than the model's, they are that task's own. So do
    configuration and split to a dataset.

    Args:
        model_name (`str`): a hub id, a folder (of a run, or a checkpoint in one), or `tiny:TASK/ROLE`.
        only: the fields that the model may bring.
        options: fields of `Circumstances`; a mapping replaces the model's whole mapping.

    Returns:
        The circumstances, and a sentence that says which are not given, and whether rows that are given are those that
        the run was trained on, or `""`.

    Raises:
        ConfigError: a file that the run names, and that is not where the command looks for it.
    """
    origin, own = _own(model_name, options.get("task"))
    trained_on = own.pop(_TRAINED_ON, ())
    options = {name: value for name, value in options.items() if value is not None}
    if options.get("task", own.get("task")) != own.get("task"):
        strange = (*_OF_THE_TASK, "dataset_name", *_OF_THE_ROWS, *_VERIFIER)
        own = {name: value for name, value in own.items() if name not in strange}
    if options.get("dataset_name", own.get("dataset_name")) != own.get("dataset_name"):
        own = {name: value for name, value in own.items() if name not in ("task", *_OF_THE_TASK, *_WHICH_ROWS)}
    if options.get("verifier", own.get("verifier")) != own.get("verifier"):
        own.pop("verifier_options", None)
    own = {name: own[name] for name in only if own.get(name) not in (None, {}, ())}
    taken = {name: value for name, value in own.items() if name not in options}
    _check_here(taken, origin)
    sentence = ", ".join(f"{name} {value!r}" for name, value in taken.items())
    notes = [f"from {origin}: {sentence}"] if sentence else []
    if trained_on and _same_rows(trained_on, options.get("dataset_name"), options.get("dataset_test_split")):
        notes.append(f"dataset_name (={options['dataset_name']!r}) has the rows that {model_name} was trained on")
    return Circumstances(**taken | options), "; ".join(notes)


def _check_here(taken: Mapping[str, Any], origin: str) -> None:
    """Refuse a file that a run names relative to the folder in which it was started, where it is not in this one."""
    for name in ("verifier", "reward_funcs", "dataset_name"):
        for text in _texts(taken.get(name)):
            file = text.rpartition(":")[0] if name != "dataset_name" else text if names_files(text) else ""
            is_file = name == "dataset_name" or file.endswith(".py")
            if file and is_file and not os.path.isabs(file) and not glob.glob(os.path.expanduser(file)):
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(
                    f"{name} (={text!r}) is what {origin} says, seen from the folder in which that run was started; it "
                    f"is not in this one, {os.getcwd()!r}: run the command from there, or give {flag}"
                )


def _same_rows(trained_on: tuple[Any, str], name: Any, split: str | None) -> bool:
    theirs, their_split = trained_on
    places = [[os.path.realpath(os.path.expanduser(text)) for text in _texts(one)] for one in (theirs, name)]
    return bool(places[1]) and places[0] == places[1] and (split or ONLY_SPLIT) == their_split


def _texts(value: Any) -> Sequence[str]:
    return [value] if isinstance(value, str) else list(value or ())


def check_problems(model_name: str, chosen: Circumstances) -> None:
    """Raise `ConfigError` unless it is said, by the user or the model, what a model is to be judged on: a task, whose
    options are tried, or rows with a verifier.
    """
    if chosen.task is not None and chosen.dataset_name is not None:
        raise ConfigError(
            f"task (={chosen.task!r}) and dataset_name (={chosen.dataset_name!r}) both say what is asked: leave one out"
        )
    inside = ("*config.json", "*/adapter_config.json", "checkpoint-*")  # which the reader of the model looks into
    if Path(model_name).is_dir() and not any(any(Path(model_name).glob(name)) for name in inside):
        raise ConfigError(
            f"model (={model_name!r}) is a folder without a model: nothing was saved there, as where a run was refused "
            "at its start or was cut off before its end. Name the folder of a model, or a checkpoint-N of a run"
        )
    if chosen.task is None and chosen.dataset_name is None:
        raise ConfigError(
            f"task is missing: {model_name!r} is not the folder of a run on a task, or with held-out rows that its "
            f"{CONFIG_FILE} names. Name a task (--task; `dopd tasks` lists them), or rows (--dataset-name, with "
            "--verifier)"
        )
    names = ("dataset_name", *_OF_THE_ROWS, *_VERIFIER)
    options = {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}
    _, wrong = check(options, {name: all_settings()[name] for name in options})
    if wrong:
        raise SettingsError(wrong)
    strange, whose = (_OF_THE_ROWS, "rows (dataset_name)") if chosen.task is not None else (_OF_THE_TASK, "a task")
    for name in strange:
        if getattr(chosen, name):
            raise ConfigError(f"{name} (={getattr(chosen, name)!r}) is of {whose}, which is not asked: leave it out")
    if chosen.task is not None:
        get_source(chosen.task, **chosen.task_options)
    elif chosen.verifier is None:
        raise ConfigError(
            f"verifier is missing: nothing says how an answer to a row of {chosen.dataset_name!r} is scored. Name one "
            "(--verifier): {NAMES}"
        )


def _own(model_name: str, task: str | None) -> tuple[str, dict[str, Any]]:
    folder = Path(resolve_model(model_name))
    if (folder / CARD_NAME).is_file():
        recipe = json.loads((folder / CARD_NAME).read_text(encoding="utf-8"))["recipe"]
        return f"the recipe of {model_name}", _of_recipe(recipe, task)
    for place in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        if (place / CONFIG_FILE).is_file():
            return str(place / CONFIG_FILE), _of_run(place / CONFIG_FILE)
    return "", {}


def _of_recipe(recipe: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """A model of several tasks has the options of each."""
    knobs = {one["task"]: one["knobs"] for one in (recipe, *recipe.get("others", ()))}
    own = task if task in knobs else recipe["task"]
    return {"task": own, "task_options": dict(knobs[own]), "privileged_template": _TINY_TEMPLATE}


def _of_run(path: Path) -> dict[str, Any]:
    try:
        config = read_yaml_file(path)
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r} is not the configuration of a run: {error}") from None
    asked = ("task", *_OF_THE_TASK, "privileged_template", "chat_template_kwargs", _TEACHERS, "prompt_format")
    rows = ("dataset_name", *_OF_THE_ROWS, "dataset_eval_name", "dataset_eval_config", "dataset_eval_split", *_VERIFIER)
    names = (*asked, *rows, *_REWARDS, "generation_kwargs", "max_completion_length", "temperature")
    config = {n: v for n, v in config.items() if not (n in _OBJECTS and GIVEN_IN_PYTHON in str(v))}
    settings = {name: all_settings()[name] for name in names}
    own, problems = check({name: config[name] for name in names if config.get(name) is not None}, settings)
    if problems:
        raise ConfigError(f"{str(path)!r} is not the configuration of a run: {problems[0]}")
    trained_on = (own.get("dataset_name"), config.get("dataset_train_split") or ONLY_SPLIT)
    own = _held_out(own) | {_TRAINED_ON: trained_on}
    for name in _REWARDS:
        if name in own:
            own[name] = tuple(own[name]) if isinstance(own[name], list) else (own[name],)
    stops = stop_strings_in(own.pop("generation_kwargs", {}))
    if stops:
        own["stop_strings"] = stops
    if own.get("temperature") == 1:
        del own["temperature"]
    return own | {"max_new_tokens": own.pop("max_completion_length", DOPDConfig.max_completion_length)}


def _held_out(own: dict[str, Any]) -> dict[str, Any]:
    """A run's settings with the rows that it held out as `dataset_name`; without rows where it held out none."""
    theirs = {name: own.pop(f"dataset_eval_{name}", None) for name in ("name", "config", "split")}
    split = theirs["split"] or own.get("dataset_test_split")
    if theirs["name"] is not None:
        return own | {"dataset_name": theirs["name"], "dataset_config": theirs["config"], "dataset_test_split": split}
    if split is None:
        return {name: value for name, value in own.items() if name not in ("dataset_name", *_WHICH_ROWS)}
    return own
