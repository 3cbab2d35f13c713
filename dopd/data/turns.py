"""Conversations as other datasets write them, as the prompts that a run asks."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dopd.errors import DataError

# Who speaks, in ShareGPT's words and ours.
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_FROM, _VALUE = "from", "value"
MARK = "<image>"  # where a picture stands in the text of LLaVA, LLaMA-Factory, ms-swift and verl
_BETWEEN = "\n\n"  # texts that are put together


def written_turns(text: str) -> list[dict[str, Any]] | None:
    """The turns of a conversation that is text, as JSON or Python writes it; `None` for other text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return value if _is_conversation(value) else None
    return None


def asked_turns(prompt: Any) -> Any:
    """A prompt as a run asks it: turns have `role` and `content`, and the assistant's at the end are left out, for they
    answer it. What is no conversation stays as it is.

    Args:
        prompt: of a row: text, turns, or turns written as text.

    Raises:
        DataError: a turn of somebody unknown.
    """
    written = written_turns(prompt) if isinstance(prompt, str) else prompt
    if written is None or not _is_conversation(written):
        return prompt
    turns = [_turn(turn) for turn in written]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return turns


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and ("role" in turn or (_FROM in turn and _VALUE in turn)) for turn in value)
    )


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    if turn.get("role") is not None or _FROM not in turn:
        return dict(turn)
    role = ROLES.get(str(turn[_FROM]).lower())
    if role is None:
        raise DataError(f"a turn is from {turn[_FROM]!r}, which must be one of {', '.join(ROLES)}")
    rest = {name: value for name, value in turn.items() if name not in (_FROM, _VALUE, "role", "content")}
    return {"role": role, "content": turn[_VALUE], **rest}


def joined(parts: Mapping[str, Any]) -> str | None:
    """Texts of several columns as one, a blank line between them; empty ones are left out, and `None` where none has
    any.

    Args:
        parts (`dict`): what a row has, by column.

    Raises:
        DataError: something that is neither text nor a number.
    """
    texts = []
    for column, value in parts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
            raise DataError(
                f"{column!r} has a {type(value).__name__}, and only texts are put together. A system prompt beside a "
                "conversation is columns: {system: NAME}"
            )
        texts.append(None if value is None else str(value))
    if all(text is None for text in texts):
        return None
    return _BETWEEN.join(text for text in texts if text is not None and text.strip())


def with_system(prompt: Any, system: Any) -> Any:
    """The prompt as a conversation that a system prompt begins; as it is where there is none.

    Raises:
        DataError: it begins with another one, or the system prompt is no text.
    """
    if system is None or (isinstance(system, str) and not system.strip()):
        return prompt
    if not isinstance(system, str):
        raise DataError(f"a system prompt is text, got {type(system).__name__}")
    turns = as_turns(prompt)
    if not isinstance(turns, list):
        return prompt  # what is wrong with it is said where rows are checked
    if turns and isinstance(turns[0], Mapping) and turns[0].get("role") == "system":
        if turns[0].get("content") == system:
            return turns
        raise DataError(
            f"the conversation begins with a system prompt ({str(turns[0].get('content'))[:40]!r}), and the row has "
            f"another ({system[:40]!r}): leave system out of columns, or take one of them away"
        )
    return [{"role": "system", "content": system}, *turns]


def as_turns(prompt: Any) -> Any:
    """A text as a user's turn; anything else as it is."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def has_marks(prompt: Any) -> bool:
    """Whether a text of the prompt says where a picture stands."""
    return any(MARK in text for text in _texts(prompt))


def has_blocks(prompt: Any) -> bool:
    """Whether the content of a turn is a list of blocks."""
    return isinstance(prompt, list) and any(isinstance(turn.get("content"), list) for turn in prompt)


def _texts(prompt: Any) -> Sequence[str]:
    if isinstance(prompt, str):
        return [prompt]
    turns = prompt if isinstance(prompt, list) else []
    return [turn["content"] for turn in turns if isinstance(turn, Mapping) and isinstance(turn.get("content"), str)]


def with_places(prompt: Any, *, marks: bool = True) -> Any:
    """The prompt as a conversation of blocks, each `<image>` in its texts as the place of a picture; `marks=False`
    leaves these in the texts.
    """
    turns = as_turns(prompt)
    if not isinstance(turns, list):
        return prompt
    return [
        {**turn, "content": _blocks(turn["content"], marks)} if isinstance(turn.get("content"), str) else turn
        for turn in turns
    ]


def _blocks(text: str, marks: bool) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    for part in re.split(f"({MARK})", text) if marks else [text]:
        if part == MARK:
            blocks.append({"type": "image"})
        elif part.strip():
            blocks.append({"type": "text", "text": part})
    return blocks or [{"type": "text", "text": text}]
