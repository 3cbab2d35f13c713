"""What a chat template leaves out of a conversation: the words of each turn are looked for in what it wrote, and the
conversation is written once more with an unlikely word in the place of each of its texts, for texts may repeat each
other, or stand in a rendering for another reason.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dopd.data.blocks import texts_of
from dopd.data.privileged import is_blank
from dopd.errors import cut

CALLS, TOOLS = "tool_calls", "tools"
_ABRIDGED_ROLE = "assistant"  # templates may leave out what it thought
_KEPT = ("role", "name", "tool_call_id")  # of a turn, beside its texts: templates branch on them, or compare them


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
        other_turns = [_turn(turn, parts) for turn in turns]
        other = dict(arguments)
        if arguments.get(TOOLS):
            parts.column = TOOLS
            other[TOOLS] = [_tool(tool, parts) if isinstance(tool, Mapping) else tool for tool in arguments[TOOLS]]
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


def _turn(turn: Mapping[str, Any], parts: _Parts) -> dict[str, Any]:
    role, calls = turn["role"], turn.get(CALLS)
    copied: dict[str, Any] = {}
    for name, value in turn.items():
        if name == "content":
            copied[name] = _content(value, role, parts, needed=not (calls and role == _ABRIDGED_ROLE))
        elif name == CALLS and calls:
            copied[name] = [_call(call, role, parts) for call in calls]
        else:
            copied[name] = value if name in _KEPT or not isinstance(value, str) else parts.replaced(value, None)
    return copied


def _content(content: Any, role: str, parts: _Parts, *, needed: bool) -> Any:
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


def _call(call: Mapping[str, Any], role: str, parts: _Parts) -> dict[str, Any]:
    named = call.get("function", call)
    who = f"the {role}'s call of the tool {str(named.get('name'))!r}"
    copied = {**named}
    if isinstance(named.get("name"), str):
        copied["name"] = parts.replaced(named["name"], who)
    if "arguments" in named:
        copied["arguments"] = _arguments(named["arguments"], who, parts)
    return {**call, "function": copied} if "function" in call else {**call, **copied}


def _arguments(arguments: Any, who: str, parts: _Parts) -> Any:
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


def _tool(tool: Mapping[str, Any], parts: _Parts) -> dict[str, Any]:
    function = tool.get("function", tool)
    who = f"the tool {str(function.get('name'))!r}"
    copied = {**function}
    if isinstance(function.get("name"), str):
        copied["name"] = parts.replaced(function["name"], who)
    if isinstance(function.get("description"), str):
        copied["description"] = parts.replaced(function["description"], f"the description of {who}")
    return {**tool, "function": copied} if "function" in tool else copied


def lost_words(text: str, turns: Sequence[Mapping[str, Any]]) -> str | None:
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


def lost_tool(text: str, arguments: Mapping[str, Any]) -> str | None:
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
