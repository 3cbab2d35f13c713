"""A conversation through its chat template, and what must be true of the result: nothing of the user's words is lost,
nothing in the data acts as markup, and one beginning stands at the beginning.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dopd.data.blocks import texts_of
from dopd.data.views import Conversation, Prompt, is_blank
from dopd.errors import DataError, cut
from dopd.interrupts import TooLongError, alarm_after

CONTINUE = "continue_final_message"
_OF_PROCESSOR = "processor_kwargs"
_ASKING_ROLES = ("user", "tool")
CALLS, TOOLS = "tool_calls", "tools"
_ABRIDGED_ROLE = "assistant"  # templates may leave out what it thought
_KEPT = ("role", "name", "tool_call_id")  # of a turn, beside its texts: templates branch on them, or compare them
_TRIAL = ("first trial block", "second trial block")
_LONGEST, _MOST = 20, 20_000_000  # seconds that one rendering may take, characters that it may have
# Turns before and behind one on trial, by its role.
_A_USER = ({"role": "user", "content": "a"},)
_AROUND: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
    "system": ((), _A_USER),
    "developer": ((), _A_USER),
    "assistant": (_A_USER, _A_USER),
    "tool": ((*_A_USER, {"role": "assistant", "content": "a"}), ()),
}


class EndlessError(DataError):
    """A chat template that loops without an end, or writes without one."""


def template_of(processing_class: Any, options: Mapping[str, Any]) -> Any:
    """The chat template that conversations are rendered with; `None` where there is none."""
    owners = (processing_class, getattr(processing_class, "tokenizer", None))
    return options.get("chat_template") or next(filter(None, (getattr(o, "chat_template", None) for o in owners)), None)


def asks_text(processing_class: Any, options: Mapping[str, Any], prompt_format: str) -> bool:
    """Whether a text prompt is asked as a user's turn: where `prompt_format` is `"auto"` and a template exists."""
    return prompt_format == "auto" and template_of(processing_class, options) is not None


def template_arguments(processing_class: Any, prompt: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `apply_chat_template` for one conversation: the run's, the row's own, and how it goes on."""
    own = prompt.options if isinstance(prompt, Conversation) else {}
    # transformers writes into what it is given here.
    merged = {name: dict(value) if name == _OF_PROCESSOR else value for name, value in {**options, **own}.items()}
    template = template_of(processing_class, merged)
    if template is not None and getattr(processing_class, "chat_template", None) is None:
        merged["chat_template"] = template  # a processor does not look at its tokenizer's
    goes_on = bool(merged.pop(CONTINUE, False)) and prompt[-1]["role"] == "assistant"
    return {**merged, "add_generation_prompt": not goes_on, **({CONTINUE: True} if goes_on else {})}


def check_last_turn(prompt: Prompt, options: Mapping[str, Any]) -> None:
    """Raise `DataError` unless an answer can follow a conversation."""
    if isinstance(prompt, str):
        return
    role = prompt[-1]["role"]
    own = prompt.options if isinstance(prompt, Conversation) else {}
    if role in _ASKING_ROLES or (role == "assistant" and {**options, **own}.get(CONTINUE)):
        return
    raise DataError(
        f"column 'prompt': the last turn is the {role}'s; an answer follows the user's (or a tool's). "
        + (
            "Leave the answer out of the prompt, or set chat_template_kwargs={'continue_final_message': True} to have "
            "it continued"
            if role == "assistant"
            else "Put the instruction before the user's turn"
        )
    )


def as_template_reads(tokenizer: Any, prompt: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[Any]:
    """The turns as a text model's chat template can read them: one text in the place of blocks, or the other way round,
    where it knows the other alone.

    Raises:
        DataError: a block that is no text.
    """
    for turn in prompt:
        for block in turn["content"] if isinstance(turn.get("content"), list) else []:
            if block.get("type", "text") != "text" or not isinstance(block.get("text"), str):
                raise DataError(
                    f"column 'prompt': a block of type {block.get('type')!r} in the {turn['role']}'s turn; the model "
                    "reads text only, as {'type': 'text', 'text': ...}"
                )
    template = template_of(tokenizer, options)
    text = template if isinstance(template, str) else None
    return [
        {**turn, "content": _readable(turn["content"], _read_kinds(tokenizer, text, turn["role"]))}
        if isinstance(turn.get("content"), str | list)
        else dict(turn)
        for turn in prompt
    ]


def _readable(content: str | list[Any], kinds: frozenset[type]) -> Any:
    if type(content) in kinds or not kinds:
        return content
    return [{"type": "text", "text": content}] if isinstance(content, str) else "\n".join(b["text"] for b in content)


def rendered_turns(
    processing_class: Any, prompt: list[dict[str, Any]], options: Mapping[str, Any], blocks: list[Any] | None = None
) -> tuple[list[Any], dict[str, Any], str]:
    """The turns of a conversation as its template reads them, the template's arguments, and what it makes of them.

    Args:
        blocks (`list`, *optional*): the turns in the form in which they are read; the template decides if left out.
    """
    check_last_turn(prompt, options)
    arguments = template_arguments(processing_class, prompt, options)
    turns = as_template_reads(processing_class, prompt, options) if blocks is None else blocks
    turns = with_readable_calls(processing_class, turns, arguments)
    return turns, arguments, rendered(processing_class, turns, arguments)


def with_readable_calls(
    processing_class: Any, turns: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> list[Any]:
    """The turns with tool calls as the chat template can write them: arguments as a mapping, where it takes one, or as
    JSON; the content beside a call missing, or empty.

    Args: as `rendered`.

    Raises:
        DataError: it can write them in no form.
    """
    if not any(turn.get(CALLS) for turn in turns):
        return list(turns)
    template = template_of(processing_class, arguments)
    kinds = _read_kinds(processing_class, template if isinstance(template, str) else None, "assistant")
    refusals: list[DataError] = []
    for as_json, empty in itertools.product((False, True), (None, _readable("", kinds))):
        tried = [_with_calls(turn, empty, as_json=as_json) if turn.get(CALLS) else turn for turn in turns]
        try:
            rendered(processing_class, tried, arguments)
        except DataError as refusal:
            refusals.append(refusal)
        else:
            return tried
    # What a template leaves out says more than what it fails on; where it is given every field, that is no lack of one.
    raise next((refusal for refusal in refusals if refusal.__cause__ is None), refusals[1])


def _with_calls(turn: Mapping[str, Any], empty: Any, *, as_json: bool) -> dict[str, Any]:
    calls = []
    for call in turn[CALLS]:
        named = call.get("function", call)
        named = {**named, "arguments": _arguments(named.get("arguments"), as_json=as_json)}
        calls.append({**call, "function": named} if "function" in call else named)
    content = turn.get("content")
    return {**turn, CALLS: calls, "content": empty if content is None else content}


def _arguments(arguments: Any, *, as_json: bool) -> Any:
    """Arguments of a tool call, which datasets hold as a mapping or, in OpenAI's words, as its JSON."""
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except json.JSONDecodeError:
            return arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    return json.dumps(arguments, ensure_ascii=False) if as_json and isinstance(arguments, Mapping) else arguments


@lru_cache(maxsize=64)
def _read_kinds(tokenizer: Any, template: str | None, role: str) -> frozenset[type]:
    """Which contents a chat template can read in a role's turn: `str`, `list` (blocks), or both. A role whose turns it
    does not write in a conversation on trial is taken for the user.
    """
    own = {} if template is None else {"chat_template": template}
    readable = set[type]()
    for content in (" ".join(_TRIAL), [{"type": "text", "text": text} for text in _TRIAL]):
        try:
            before, behind = _AROUND.get(role, ((), ()))
            turns = [*before, {"role": role, "content": content}, *behind]
            text = _written(tokenizer, turns, {"add_generation_prompt": True, **own})
        except EndlessError:
            raise
        except Exception:  # templates fail in whatever way their expressions do
            continue
        if all(words in text for words in _TRIAL) and not re.search(r"['\"]type['\"]", text):
            readable.add(type(content))
    if not readable and role != "user":
        return _read_kinds(tokenizer, template, "user")
    return frozenset(readable)


def rendered(processing_class: Any, turns: Sequence[Any], arguments: Mapping[str, Any]) -> str:
    """The text that a chat template makes of a conversation, with every word of user and system in it.

    Args:
        processing_class: a tokenizer or a processor.
        turns: as its template reads them.
        arguments: of `template_arguments`.

    Raises:
        DataError: the template refuses the conversation, or leaves out text of a turn.
    """
    if template_of(processing_class, arguments) is None:
        raise DataError(
            "column 'prompt': it is a conversation, and the tokenizer has no chat template to write it with. Give "
            "plain text, or set tokenizer.chat_template (chat_template_kwargs={'chat_template': ...} in a config)"
        )
    try:
        text = _written(processing_class, turns, arguments)
    except EndlessError:
        raise
    except Exception as error:  # a template raises what it likes: TemplateError, TypeError, UndefinedError, ...
        raise DataError(f"column 'prompt': the chat template refuses the conversation: {_first_line(error)}") from error
    check_unicode(text)
    _check_nothing_left_out(processing_class, text, turns, arguments)
    return text


def _written(processing_class: Any, turns: Sequence[Any], arguments: Mapping[str, Any]) -> str:
    """What a template writes, or `EndlessError`: a template is a program, and comes with a checkpoint."""
    try:
        with alarm_after(_LONGEST, "the chat template"):
            text = str(processing_class.apply_chat_template(list(turns), tokenize=False, **arguments))
    except TooLongError:
        raise EndlessError(
            f"column 'prompt': the chat template was not done after {_LONGEST} seconds: it loops without an end. Take "
            "another (chat_template_kwargs={'chat_template': ...} in a config)"
        ) from None
    if len(text) > _MOST:
        raise EndlessError(
            f"column 'prompt': the chat template writes {len(text):,} characters, and a prompt has at most {_MOST:,}. "
            "Take another (chat_template_kwargs={'chat_template': ...} in a config)"
        )
    return text


def check_unicode(text: str) -> None:
    """Raise `DataError` for text that no tokenizer can read: half of a pair of surrogates, as cut or wrongly decoded
    text has it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = ascii(text[max(error.start - 20, 0) : error.end + 20])
        raise DataError(
            f"column 'prompt' or 'privileged_context': {around} holds {text[error.start]!a}, half of a character "
            "(a lone surrogate). Was the text cut, or decoded with errors='surrogateescape'? Mend or drop the row"
        ) from error


def _first_line(error: BaseException) -> str:
    return cut((str(error).strip().splitlines() or [type(error).__name__])[0], 200)


def rendered_trial(tokenizer: Any, template: str | None, turns: list[dict[str, Any]]) -> str:
    """What a chat template writes of a conversation on trial; empty where it refuses it, or where there is none."""
    options = {} if template is None else {"chat_template": template}
    if template_of(tokenizer, options) is None:
        return ""
    try:
        return _written(tokenizer, as_template_reads(tokenizer, turns, options), options)
    except EndlessError:
        raise
    except Exception:  # what it refuses is said where a row is rendered
        return ""


# What a template leaves out: the words of each turn are looked for in what it wrote, and the conversation is written
# once more with an unlikely word in the place of each of its texts, for texts may repeat each other, or stand in a
# rendering for another reason.


@dataclass(frozen=True)
class Part:
    """A text of a conversation.

    Attributes:
        column (`str`): where it was brought.
        what (`str`): it is, in messages.
        stand_in (`str`): the word in its place.
    """

    column: str
    what: str
    stand_in: str


@dataclass(frozen=True)
class Trial:
    """A conversation with stand-ins; equal for conversations that differ in texts alone.

    Attributes:
        key (`str`): all of it.
        turns (`list`): to be written.
        arguments (`dict`): of the chat template.
        parts (`list[Part]`): which must be in what a chat template writes.
    """

    key: str
    turns: Sequence[Any] = field(compare=False)
    arguments: Mapping[str, Any] = field(compare=False)
    parts: Sequence[Part] = field(compare=False)

    @classmethod
    def of(cls, turns: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> "Trial":
        """The trial of a conversation, with the arguments that its chat template is given."""
        parts = _Parts()
        other_turns = [_tried_turn(turn, parts) for turn in turns]
        other = dict(arguments)
        if arguments.get(TOOLS):
            parts.column = TOOLS
            other[TOOLS] = [
                _tried_tool(tool, parts) if isinstance(tool, Mapping) else tool for tool in arguments[TOOLS]
            ]
        key = json.dumps([other_turns, other], default=repr)
        return cls(key, other_turns, other, parts.needed)

    def lost_in(self, text: str) -> int | None:
        """The place among `parts` of the first one that is missing in what a template wrote of this trial."""
        return next((place for place, part in enumerate(self.parts) if part.stand_in not in text), None)


class _Parts:
    """Hands out stand-ins, and remembers those that must be written."""

    def __init__(self) -> None:
        self._count = 0
        self.column = "prompt"
        self.needed: list[Part] = []

    def replaced(self, text: str, what: str | None) -> str:
        """The stand-in of a text; `what` is `None` for one that may be left out. Blank texts stand for themselves."""
        if is_blank(text):
            return text
        self._count += 1
        word = f"q{self._count}xstandinq"
        if what is not None:
            self.needed.append(Part(self.column, what, word))
        return word


def _tried_turn(turn: Mapping[str, Any], parts: _Parts) -> dict[str, Any]:
    role, calls = turn["role"], turn.get(CALLS)
    copied: dict[str, Any] = {}
    for name, value in turn.items():
        if name == "content":
            copied[name] = _tried_content(value, role, parts, needed=not (calls and role == _ABRIDGED_ROLE))
        elif name == CALLS and calls:
            copied[name] = [_tried_call(call, role, parts) for call in calls]
        else:
            copied[name] = value if name in _KEPT or not isinstance(value, str) else parts.replaced(value, None)
    return copied


def _tried_content(content: Any, role: str, parts: _Parts, *, needed: bool) -> Any:
    def what(text: str) -> str | None:
        return f"text of the {role}'s turn: {cut(text)!r}" if needed else None

    if isinstance(content, str):
        return parts.replaced(content, what(content))
    if not isinstance(content, list):
        return content
    return [
        {**block, "text": parts.replaced(block["text"], what(block["text"]))}
        if isinstance(block.get("text"), str)
        # What a block holds beside text is no part of a rendering.
        else {"type": block.get("type")}
        for block in content
    ]


def _tried_call(call: Mapping[str, Any], role: str, parts: _Parts) -> dict[str, Any]:
    named = call.get("function", call)
    who = f"the {role}'s call of the tool {str(named.get('name'))!r}"
    copied = {**named}
    if isinstance(named.get("name"), str):
        copied["name"] = parts.replaced(named["name"], who)
    if "arguments" in named:
        copied["arguments"] = _tried_arguments(named["arguments"], who, parts)
    return {**call, "function": copied} if "function" in call else {**call, **copied}


def _tried_arguments(arguments: Any, who: str, parts: _Parts) -> Any:
    def stand_in(text: str) -> str:
        return parts.replaced(text, f"an argument ({cut(text)!r}) of {who}")

    if isinstance(arguments, str):
        try:
            return json.dumps(_mapped(json.loads(arguments), stand_in), ensure_ascii=False)
        except json.JSONDecodeError:
            return stand_in(arguments)
    return _mapped(arguments, stand_in)


def _mapped(value: Any, stand_in: Callable[[str], str]) -> Any:
    """A value with other texts and names of fields, at any depth."""
    if isinstance(value, str):
        return stand_in(value)
    if isinstance(value, Mapping):
        return {stand_in(str(name)): _mapped(inner, stand_in) for name, inner in value.items()}
    return [_mapped(inner, stand_in) for inner in value] if isinstance(value, list | tuple) else value


def _tried_tool(tool: Mapping[str, Any], parts: _Parts) -> dict[str, Any]:
    function = tool.get("function", tool)
    who = f"the tool {str(function.get('name'))!r}"
    copied = {**function}
    if isinstance(function.get("name"), str):
        copied["name"] = parts.replaced(function["name"], who)
    if isinstance(function.get("description"), str):
        copied["description"] = parts.replaced(function["description"], f"the description of {who}")
    return {**tool, "function": copied} if "function" in tool else copied


def _lost_words(text: str, turns: Sequence[Mapping[str, Any]]) -> str | None:
    """What of the turns is not in a rendering as often as it is in them; white space counts as one space.

    Args:
        text (`str`): what a chat template wrote of them.
        turns (`list[dict]`): a conversation.
    """
    squeezed = _squeezed(text)
    contents = [
        (turn["role"], words)
        for turn in turns
        if turn["role"] != _ABRIDGED_ROLE
        for words in texts_of(turn)
        if words.split()
    ]
    everything = [_squeezed(words) for _, words in contents]
    for role, words in contents:
        # Some templates write contents as JSON.
        written = {words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1]}
        forms = {_squeezed(form) for form in written}
        needed = sum(_count(_squeezed(words), part) for part in everything) if len(contents) > 1 else 1
        if sum(_count(form, squeezed) for form in forms) < needed:
            often = any(form in squeezed for form in forms)
            return f"text of the {role}'s turn: {cut(words)!r}" + (f" (it is there {needed} times)" if often else "")
    return None


def _lost_tool(text: str, arguments: Mapping[str, Any]) -> str | None:
    """The first tool whose name is nowhere in a rendering, for templates that take no stand-ins.

    Args:
        text (`str`): what a chat template wrote.
        arguments (`dict`): that it was given.
    """
    tools = [tool.get("function", tool) for tool in arguments.get(TOOLS) or () if isinstance(tool, Mapping)]
    names = [str(tool.get("name")) for tool in tools]
    return next((f"the tool {name!r}" for name in names if name not in text), None)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _count(words: str, text: str) -> int:
    """How often words are in a text, overlapping ones counted."""
    return len(re.findall(f"(?={re.escape(words)})", text))


def _check_nothing_left_out(
    processing_class: Any, text: str, turns: Sequence[Any], arguments: Mapping[str, Any]
) -> None:
    trial, template = Trial.of(turns, arguments), template_of(processing_class, arguments)
    place = _lost_in(processing_class, template if isinstance(template, str) else repr(template), trial)
    part = trial.parts[place] if place is not None else None
    tool = _lost_tool(text, arguments) if part is None else None
    lost = tool or (_lost_words(text, turns) if part is None else part.what)
    column = part.column if part else TOOLS if tool else "prompt"
    if lost is not None:
        raise DataError(
            f"column {column!r}: the chat template leaves out {lost}. Leave it out of the "
            "row, or set a chat template that writes contents of this kind (chat_template_kwargs={'chat_template': "
            "...})"
        )


@lru_cache(maxsize=1024)
def _lost_in(processing_class: Any, template: str, trial: Trial) -> int | None:
    """The place among its parts of the first one that a chat template leaves out of a trial."""
    try:
        text = _written(processing_class, trial.turns, trial.arguments)
    except EndlessError:
        raise
    except Exception:  # it reads the texts, and takes no others in their place: nothing can be said
        return None
    return trial.lost_in(text)
