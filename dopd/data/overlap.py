"""Held-out rows whose question is also trained on: an accuracy on these says nothing about held-out questions."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from dopd.data.encode import image_sources
from dopd.data.images import COLUMNS, image_key
from dopd.data.views import as_conversation, plain_prompt

_COLUMNS = ("prompt", *COLUMNS)


def prompt_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Equal for rows that ask the same: their turns without system prompts, and their images.

    Case, forms of Unicode and white space (but between two digits) do not count, nor whether a question is text or a
    user's turn.
    """
    prompt = plain_prompt(as_conversation(dict(row)))  # a text with images is asked as a turn, too
    assert not isinstance(prompt, str)
    turns = [part for turn in prompt if turn.get("role") != "system" for part in (str(turn.get("role")), _text(turn))]
    return (*turns, *(image_key(source) for source in image_sources(prompt)))


def count_overlap(train: Any, held_out: Any) -> int:
    """Rows of `held_out` that ask what a row of `train` asks; both are datasets with a length."""
    asked = [prompt_key(row) for row in _questions(held_out)]
    wanted = set(asked)
    trained = {key for row in _questions(train) if (key := prompt_key(row)) in wanted}
    return sum(key in trained for key in asked)


def _questions(dataset: Any) -> Iterable[Mapping[str, Any]]:
    return dataset.select_columns([name for name in _COLUMNS if name in dataset.column_names])


def _text(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, list):
        content = " ".join(str(block.get("text") or "") for block in content)
    return _plain(str(content or ""))


def _plain(text: str) -> str:
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return re.sub(r"(?<!\d) | (?!\d)", "", folded)
