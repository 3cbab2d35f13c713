"""Conversations as other datasets write them, as the prompts that a run asks."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from dopd.errors import DataError

# Who speaks, in ShareGPT's words and ours.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_FROM, _VALUE = "from", "value"


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
    role = _ROLES.get(str(turn[_FROM]).lower())
    if role is None:
        raise DataError(f"a turn is from {turn[_FROM]!r}, which must be one of {', '.join(_ROLES)}")
    rest = {name: value for name, value in turn.items() if name not in (_FROM, _VALUE, "role", "content")}
    return {"role": role, "content": turn[_VALUE], **rest}
