"""Options of chat templates, and whether they read them."""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import SandboxedEnvironment

from dopd.data.encode import reads_images, text_of, tokenizer_of
from dopd.data.findings import Findings
from dopd.data.rendering import template_of
from dopd.data.views import TEMPLATE_COLUMN, row_options
from dopd.errors import ConfigError, DataError, cut, did_you_mean

# What every template is given, and tools, without whose names a rendering is refused.
_GIVEN = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "tools"}
_OF_TEMPLATES = {"documents", "kwargs"}  # arguments of `apply_chat_template` that a template alone reads
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")  # a tag of transformers' own
_SLIP = 0.85  # likeness of two names of which one is probably misspelt
_TRUTHS = ("true", "false")
_CONTINUE = "continue_final_message"  # transformers', which takes any text for true


def check_options(
    processing_classes: Sequence[Any], options: Mapping[str, Any], setting: str = "chat_template_kwargs"
) -> list[str]:
    """What a run tells chat templates and none of them reads, one sentence for each name.

    Args:
        processing_classes: tokenizers or processors, whose templates receive it.
        options (`dict`): arguments of `apply_chat_template`.
        setting (`str`): where they were set.

    Raises:
        ConfigError: a name that is close to one that is read, or a value as for `wrong_truth`.
    """
    wrong = wrong_truth(processing_classes, options)
    if wrong:
        raise ConfigError(f"{setting}: {wrong}")
    sentences = []
    for name in _unread(processing_classes, options):
        sentence = f"{setting}: {cut(name)!r} is read by no chat template of this run"
        # A slip of the pen, and no other switch: `enable_thinking` is given to templates that have `preserve_thinking`.
        read_names = _names(processing_classes, options)
        longer = [one for one in read_names if name in one or one in name]
        hint = did_you_mean(name, read_names, likeness=_SLIP) or did_you_mean(name, longer)
        if hint:
            raise ConfigError(f"{sentence}.{hint}")
        sentences.append(f"{sentence} and changes nothing. {_reads(processing_classes, options)}")
    return sentences


def check_row_options(row: Mapping[str, Any], processing_classes: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Raise `DataError` for a value of a row's own options as for `wrong_truth`.

    Args:
        processing_classes, options: as for `check_options`.
    """
    own = row_options(row)
    wrong = wrong_truth(processing_classes, {**options, **own}) if own else ""
    if wrong:
        raise DataError(f"column {TEMPLATE_COLUMN!r}: {wrong}")


def wrong_truth(processing_classes: Sequence[Any], options: Mapping[str, Any]) -> str:
    """What is wrong with the first value that says true or false and is neither for a chat template; empty if none.

    Templates take the text "False" for true where they ask `{% if name %}`, and the number 0 for neither where they ask
    `{% if name is false %}`: thinking would go on without a word.
    """
    texts = [text for owner in processing_classes for text in _templates(owner, options) if isinstance(text, str)]
    names = [found for found in map(_Names.of, texts) if found]
    for name, value in options.items():
        spelt = isinstance(value, str) and value.strip().lower() in _TRUTHS
        if spelt and not any((name, value) in found.compared for found in names):
            kind, meant = "text", value.strip().lower()
        elif type(value) in (int, float) and value in (0, 1) and any(name in found.truths for found in names):
            kind, meant = "a number", _TRUTHS[not value]
        else:
            continue
        if name == _CONTINUE or any(name in found.read for found in names):
            sentence = f"{name} (={value!r}) is {kind}, and the chat template asks whether it is true or false"
            return f"{sentence}: write {meant} without quotes ({meant.capitalize()} in Python)"
    return ""


def option_columns(columns: Sequence[str], processing_classes: Sequence[Any], options: Mapping[str, Any]) -> list[str]:
    """Columns that nothing reads and that have the name of an option of the run's chat templates."""
    return [name for name in columns if name in set(_names(processing_classes, options)) - _OF_TEMPLATES]


def check_generation_prompt(processing_class: Any, options: Mapping[str, Any], closing: str | None) -> list[str]:
    """The warning where a prompt ends as an answer does, and no turn is begun for the next.

    Args:
        processing_class: a tokenizer or a processor.
        options (`dict`): arguments of its chat template.
        closing (`str`, *optional*): what stands behind an answer (of `Markup`).
    """
    try:
        text = text_of(processing_class, [{"role": "user", "content": "trial question"}], options)
    except DataError:  # what it refuses is said where a row is rendered
        return []
    if not closing or not text.rstrip().endswith(closing):
        return []
    return [
        f"the chat template writes no generation prompt: prompts end with {closing!r}, as an answer does, and nothing "
        "says that the assistant's turn follows. Take one that reads add_generation_prompt "
        "(chat_template_kwargs={'chat_template': ...} in a config), unless the model was trained so"
    ]


def check_same_lead(
    processing_class: Any, options: Mapping[str, Any], teachers_class: Any, teachers: Mapping[str, Any]
) -> None:
    """Raise `ConfigError` where student and teacher read an answer behind different texts.

    The first token of an answer is predicted from what a chat template writes behind the question. If that opens a
    thought for one and not for the other, the teacher is asked about a text that it would never write there.

    Args:
        processing_class, teachers_class: tokenizers or processors of student and teacher.
        options, teachers (`dict`): arguments of their chat templates.
    """
    try:
        mine, theirs = _lead(processing_class, options), _lead(teachers_class, teachers)
    except DataError:  # what a template refuses is said where a row is rendered
        return
    if mine != theirs:
        raise ConfigError(
            f"teacher_chat_template_kwargs (={cut(str(dict(teachers)))}): the teacher would read answers behind "
            f"{cut(theirs)!r}, and the student writes them behind {cut(mine)!r} (chat_template_kwargs="
            f"{cut(str(dict(options)))}). Set options with which both templates write the same between question and "
            "answer"
        )


def _lead(processing_class: Any, options: Mapping[str, Any]) -> str:
    """What a chat template writes between a question and its answer."""
    question = "trial question"
    return text_of(processing_class, [{"role": "user", "content": question}], options).rpartition(question)[2]


@dataclass
class UnreadOptions(Findings):
    """Counts rows that tell their chat template what it does not read.

    Args:
        processing_classes: as for `check_options`.
        options (`dict`): what the run tells the templates.
    """

    processing_classes: Sequence[Any]
    options: Mapping[str, Any]
    what: str = field(init=False, default="not read by the chat template")

    def look(self, row: Mapping[str, Any], where: str) -> list[str]:
        """Names that a row tells and no template reads."""
        own = row_options(row)
        merged = {**self.options, **own}
        found = {}
        for name in _unread(self.processing_classes, merged) if own else ():
            if name in own:
                hint = did_you_mean(name, _names(self.processing_classes, merged))
                advice = hint.strip() or _reads(self.processing_classes, merged)
                found[f"column {TEMPLATE_COLUMN!r}, {cut(name)!r}"] = f"in {where}. {advice}"
        return self.add(found)


def _unread(processing_classes: Sequence[Any], options: Mapping[str, Any]) -> list[str]:
    read_names = [_variables(owner, options) for owner in processing_classes]
    return [
        name
        for name in options
        if not any(
            read is None or name in read or name in _GIVEN or _is_of_host(owner, name)
            for owner, read in zip(processing_classes, read_names, strict=True)
        )
    ]


def _is_of_host(processing_class: Any, name: str) -> bool:
    """Whether transformers reads it itself, or hands it to a part of a processor that has a setting of this name."""
    if name in set(inspect.signature(processing_class.apply_chat_template).parameters) - _OF_TEMPLATES:
        return True
    if not reads_images(processing_class):
        return False
    parts = [getattr(processing_class, part, None) for part in ("image_processor", "video_processor")]
    return name.endswith("_kwargs") or any(hasattr(part, name) for part in parts if part is not None)


def _names(processing_classes: Sequence[Any], options: Mapping[str, Any]) -> list[str]:
    """The options that a run's templates read."""
    read = {name for owner in processing_classes for name in _settings(owner, options)}
    special = {name for owner in processing_classes for name in tokenizer_of(owner).special_tokens_map}
    return sorted(read - _GIVEN - special)


def _reads(processing_classes: Sequence[Any], options: Mapping[str, Any]) -> str:
    names = _names(processing_classes, options)
    return f"The options that are read: {', '.join(names)}" if names else "It reads no options: leave it out"


def _variables(processing_class: Any, options: Mapping[str, Any]) -> frozenset[str] | None:
    """Names of the values that the chat templates of a tokenizer read; `None` where that cannot be said."""
    found = [_Names.of(text) if isinstance(text, str) else None for text in _templates(processing_class, options)]
    return None if None in found else frozenset[str]().union(*(names.read for names in found if names))


def _settings(processing_class: Any, options: Mapping[str, Any]) -> frozenset[str]:
    """Names among them that are meant to be set, and not the templates' own."""
    texts = [text for text in _templates(processing_class, options) if isinstance(text, str)]
    return frozenset[str]().union(*(names.settings for names in map(_Names.of, texts) if names))


def _templates(processing_class: Any, options: Mapping[str, Any]) -> Iterable[Any]:
    template = template_of(processing_class, options)
    return template.values() if isinstance(template, Mapping) else [template or ""]


@dataclass(frozen=True)
class _Names:
    """Names of a chat template.

    Attributes:
        read (`frozenset[str]`): of values that it may be given.
        settings (`frozenset[str]`): without those that it assigns, unless it asks whether they were given.
        truths (`frozenset[str]`): of those that it asks to be true or false, and nothing that is like it.
        compared (`frozenset[tuple]`): of a name and a text that it compares it with.
    """

    read: frozenset[str]
    settings: frozenset[str]
    truths: frozenset[str]
    compared: frozenset[tuple[str, str]]

    @staticmethod
    @lru_cache(maxsize=64)
    def of(template: str) -> "_Names | None":
        environment = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        try:
            parsed = environment.parse(_GENERATION.sub("", template))
            read = frozenset(meta.find_undeclared_variables(parsed))
        except TemplateError:  # what is wrong with it is said where a row is rendered
            return None
        assigned = {name.name for name in parsed.find_all(nodes.Name) if name.ctx != "load"}
        own = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "param"}
        tests = (test.node for test in parsed.find_all(nodes.Test) if test.name in ("defined", "undefined"))
        defaults = (one.node for one in parsed.find_all(nodes.Filter) if one.name in ("default", "d"))
        asked = {node.name for node in (*tests, *defaults) if isinstance(node, nodes.Name)}
        truths = (test.node for test in parsed.find_all(nodes.Test) if test.name in (*_TRUTHS, "boolean"))
        compared = frozenset(
            (name.name, text.value)
            for comparison in parsed.find_all(nodes.Compare)
            for name in comparison.find_all(nodes.Name)
            for text in comparison.find_all(nodes.Const)
            if isinstance(text.value, str)
        )
        tested = frozenset(node.name for node in truths if isinstance(node, nodes.Name))
        return _Names(read, read - own - (assigned - asked), tested, compared)
