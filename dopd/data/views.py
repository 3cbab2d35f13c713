"""From a row of a dataset to the prompts that models read: plain, and privileged; images in their places.

A prompt with images is a conversation whose image blocks hold what the dataset holds (a path, bytes, a PIL image); it
is opened where it is encoded.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dopd.data.blocks import blocks_of, check_blocks, image_in, is_image, place_images
from dopd.data.images import PRIVILEGED_COLUMN, blank_like, images_of, open_image
from dopd.data.privileged import Conversation, PrivilegedTemplate, Prompt, is_blank, with_turns
from dopd.errors import DataError

TOOLS_COLUMN, TEMPLATE_COLUMN = "tools", "chat_template_kwargs"
# Arguments of `apply_chat_template` that this project gives itself.
RESERVED_OPTIONS = (
    "add_generation_prompt",
    "conversation",
    "max_length",
    "padding",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)


def plain_prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row with its images, if it has any, and its own template options: what the student reads.

    Raises:
        DataError: images without a conversation to put them in, or not as many as the conversation has places for;
            tools that cannot be read.
    """
    prompt = with_images(_without_empty_fields(row["prompt"]), images_of(row))
    options = row_options(row)
    if not options:
        return prompt
    if isinstance(prompt, str):
        raise DataError(f"column {next(iter(options))!r}: a text prompt has no chat template to read it")
    return Conversation(prompt, options)


def row_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row tells its chat template: the columns `tools` and `chat_template_kwargs`, in TRL's words.

    Raises:
        DataError: tools that are no list of schemas (or its JSON), or arguments that are no mapping.
    """
    options = _row_value(row, TEMPLATE_COLUMN, dict) or {}
    forbidden = sorted(set(options) & set(RESERVED_OPTIONS))
    if forbidden:
        raise DataError(f"column {TEMPLATE_COLUMN!r}: {forbidden[0]} cannot be set there")
    if "chat_template" in options:  # what would be markup is looked for in one template
        raise DataError(
            f"column {TEMPLATE_COLUMN!r}: a row has no chat_template of its own. Set one for the run "
            "(chat_template_kwargs={'chat_template': ...} in a config), which may read what rows tell it"
        )
    tools = _row_value(row, TOOLS_COLUMN, list)
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"column {TOOLS_COLUMN!r}: {str(tool)[:60]!r} is no schema of a function: expected {{'type': "
                "'function', 'function': {'name': ..., 'parameters': ...}}"
            )
    return {**options, **({"tools": tools} if tools else {})}


def _row_value(row: Mapping[str, Any], column: str, kind: type) -> Any:
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise DataError(f"column {column!r} is text that is not JSON: {error}") from None
    if value is not None and not isinstance(value, kind):
        raise DataError(f"column {column!r} must be a {kind.__name__} or its JSON, got {type(value).__name__}")
    return _without_none(value)


def _without_none(value: Any) -> Any:
    """Datasets give every row the fields of all rows, None where a row has none: its schema did not say so."""
    if isinstance(value, dict):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _without_empty_fields(prompt: Any) -> Any:
    """The prompt without what a dataset's schema added to its turns, blocks and tool calls."""
    if isinstance(prompt, str):
        return prompt
    # A turn's own content may be None, beside a tool call.
    own = [{"content": None} if turn.get("content", "") is None else {} for turn in prompt]
    turns = [{**_without_none(turn), **kept} for turn, kept in zip(prompt, own, strict=True)]
    return prompt if turns == prompt else with_turns(prompt, turns)


def as_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a text prompt as a user's turn."""
    prompt = row["prompt"]
    return {**row, "prompt": [{"role": "user", "content": prompt}]} if isinstance(prompt, str) else row


def privileged_prompt(row: Mapping[str, Any], template: PrivilegedTemplate) -> Prompt:
    """The plain prompt with p in it: its text, its images, or both. The plain prompt where p is missing."""
    return template.apply(plain_prompt(row), row.get("privileged_context"), images_of(row, (PRIVILEGED_COLUMN,)))


def lacks_privileged(row: Mapping[str, Any]) -> bool:
    """Whether a row has neither privileged text nor privileged images."""
    return is_blank(row.get("privileged_context")) and not images_of(row, (PRIVILEGED_COLUMN,))


def with_images(prompt: Prompt, images: Sequence[Any]) -> Prompt:
    """A conversation with images in its places: its `{"type": "image"}` blocks, or before the first user turn's text.

    Raises:
        DataError: the prompt is text, or has places for another number of images.
    """
    if isinstance(prompt, str):
        if images:
            raise DataError("images need a conversation as prompt: [{'role': 'user', 'content': ...}]")
        return prompt
    if not images and all(isinstance(message.get("content"), str) for message in prompt):
        return prompt
    check_blocks(prompt)
    pictures = [block for message in prompt for block in blocks_of(message) if is_image(block)]
    places = [block for block in pictures if image_in(block) is None]
    if not images and not pictures:
        return prompt
    if images and pictures and not places:
        raise DataError(
            f"the row has {len(images)} images and its conversation holds its own: leave the image column out, or "
            "the images in the conversation"
        )
    if not pictures:
        return _images_first(prompt, images)
    rest = place_images(places, images)
    return _map_blocks(prompt, lambda block: _filled(block, rest) if is_image(block) else block)


def with_blank_images(prompt: Prompt) -> Prompt:
    """The prompt with grey images of the same sizes in place of its own: the control that reads off no image."""
    if isinstance(prompt, str):
        return prompt
    return _map_blocks(
        prompt,
        lambda block: {"type": "image", "image": blank_like(open_image(image_in(block)))} if is_image(block) else block,
    )


def _filled(block: Mapping[str, Any], images: Iterator[Any]) -> dict[str, Any]:
    own = image_in(block)
    return {"type": "image", "image": next(images) if own is None else own}


def _map_blocks(prompt: list[dict[str, Any]], change: Callable[[Any], Any]) -> list[dict[str, Any]]:
    turns = [
        {**message, "content": [change(block) for block in message["content"]]} if blocks_of(message) else message
        for message in prompt
    ]
    return with_turns(prompt, turns)


def _images_first(prompt: list[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    messages = list(prompt)
    first = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise DataError("prompt: a conversation without a user turn has no place for images")
    content = messages[first]["content"]
    text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    places = [{"type": "image", "image": image} for image in images]
    messages[first] = {**messages[first], "content": [*places, *text]}
    return with_turns(prompt, messages)
