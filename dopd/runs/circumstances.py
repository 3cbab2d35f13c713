"""What a model was trained for: the circumstances of its run, or of its recipe, in which it is judged by default."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dopd.errors import ConfigError
from dopd.report.records import CONFIG_FILE
from dopd.runs.build import resolve_model
from dopd.runs.settings import all_settings
from dopd.sampling import stop_strings_in
from dopd.settings import check, read_yaml_file
from dopd.tasks import get_source
from dopd.tiny.shipped import CARD_NAME
from dopd.trainer import DOPDConfig

_OF_THE_TASK = ("task_options", "privileged_kind")
_TINY_TEMPLATE = "{prompt} {privileged_context}"  # as the tiny models were trained
_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Circumstances:
    """How a model is asked.

    Attributes:
        task (`str`, *optional*), task_options (`dict`), privileged_kind (`str`, *optional*): the problems.
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
    privileged_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_chat_template_kwargs: dict[str, Any] | None = None
    prompt_format: str = "auto"
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int = _MAX_NEW_TOKENS
    temperature: float = 1.0


_TEACHERS = "teacher_chat_template_kwargs"
JUDGED_FIELDS = tuple(one.name for one in fields(Circumstances) if one.name not in ("temperature", _TEACHERS))
LOOKED_AT_FIELDS = (
    "privileged_template",
    "chat_template_kwargs",
    _TEACHERS,
    "prompt_format",
    "stop_strings",
    "temperature",
)


def circumstances(model_name: str, *, only: Sequence[str] = JUDGED_FIELDS, **given: Any) -> tuple[Circumstances, str]:
    """Those given, and for what is `None` those of the model's run folder or of a tiny model's recipe.

    Options and kind of p belong to a task: with another task than the model's, they are that task's own.

    Args:
        model_name (`str`): a hub id, a folder (of a run, or a checkpoint in one), or `tiny:TASK/ROLE`.
        only: the fields that the model may bring.
        given: fields of `Circumstances`; a mapping replaces the model's whole mapping.

    Returns:
        The circumstances, and a sentence that says which are not given, or `""`.
    """
    origin, own = _own(model_name, given.get("task"))
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("task", own.get("task")) != own.get("task"):
        own = {name: value for name, value in own.items() if name not in _OF_THE_TASK}
    own = {name: value for name, value in own.items() if name in only and value not in (None, {}, ())}
    taken = {name: value for name, value in own.items() if name not in given}
    said = ", ".join(f"{name} {value!r}" for name, value in taken.items())
    return Circumstances(**taken | given), f"from {origin}: {said}" if said else ""


def check_task(model_name: str, chosen: Circumstances) -> str:
    """The task, or `ConfigError` where neither the user nor the model names one; its options are tried."""
    if chosen.task is None:
        raise ConfigError(
            f"task is missing: {model_name!r} is not the folder of a run that was trained on a task, so name one "
            "(--task; `dopd tasks` lists them)"
        )
    get_source(chosen.task, **chosen.task_options)
    return chosen.task


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
    names = (*asked, "generation_kwargs", "max_completion_length", "temperature")
    settings = {name: all_settings()[name] for name in names}
    own, problems = check({name: config[name] for name in names if config.get(name) is not None}, settings)
    if problems:
        raise ConfigError(f"{str(path)!r} is not the configuration of a run: {problems[0]}")
    stops = stop_strings_in(own.pop("generation_kwargs", {}))
    if stops:
        own["stop_strings"] = stops
    if own.get("temperature") == 1:
        del own["temperature"]
    return own | {"max_new_tokens": own.pop("max_completion_length", DOPDConfig.max_completion_length)}
