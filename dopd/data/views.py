"""From a row of a dataset to the prompts that models read: plain, and privileged; images in their places.

A prompt with images is a conversation whose image blocks hold what the dataset holds (a path, bytes, a PIL image); it
is opened where it is encoded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dopd.data.images import PRIVILEGED_COLUMN, blank_like, images_of, open_image
from dopd.data.privileged import PrivilegedTemplate, Prompt
from dopd.errors import DataError


def plain_prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row with its images, if it has any: what the student reads.

    Raises:
        DataError: images without a conversation to put them in, or not as many as the conversation has places for.
    """
    return with_images(row["prompt"], images_of(row))


def privileged_prompt(row: Mapping[str, Any], template: PrivilegedTemplate) -> Prompt:
    """The plain prompt with p in it: its text, its images, or both. The plain prompt where p is missing."""
    return template.apply(plain_prompt(row), row.get("privileged_context"), images_of(row, (PRIVILEGED_COLUMN,)))


def lacks_privileged(row: Mapping[str, Any]) -> bool:
    """Whether a row has neither privileged text nor privileged images."""
    text = row.get("privileged_context")
    return (text is None or not text.strip()) and not images_of(row, (PRIVILEGED_COLUMN,))


def with_images(prompt: Prompt, images: Sequence[Any]) -> Prompt:
    """A conversation with images in its places: its `{"type": "image"}` blocks, or before the first user turn's text.

    Raises:
        DataError: the prompt is text, or has places for another number of images.
    """
    if isinstance(prompt, str):
        if images:
            raise DataError("images need a conversation as prompt: [{'role': 'user', 'content': ...}]")
        return prompt
    places = sum(_is_open_place(block) for message in prompt for block in _blocks(message))
    if not images and not places:
        return prompt
    if places == 0 and any(is_image(block) for message in prompt for block in _blocks(message)):
        raise DataError(
            f"the row has {len(images)} images and its conversation holds its own: leave the image column out, or "
            "the images in the conversation"
        )
    if places == 0:
        return _images_first(prompt, images)
    if places != len(images):
        raise DataError(
            f"the conversation has {places} image blocks without an image and the row has {len(images)} images: give "
            "one image for each block, or leave the blocks out and images come first"
        )
    rest: Iterator[Any] = iter(images)
    return _map_blocks(prompt, lambda block: _filled(block, rest) if _is_open_place(block) else block)


def with_blank_images(prompt: Prompt) -> Prompt:
    """The prompt with grey images of the same sizes in place of its own: the control that reads off no image."""
    if isinstance(prompt, str):
        return prompt
    return _map_blocks(
        prompt,
        lambda block: {"type": "image", "image": blank_like(open_image(image_in(block)))} if is_image(block) else block,
    )


def is_image(block: Mapping[str, Any]) -> bool:
    return block.get("type") == "image"


def image_in(block: Mapping[str, Any]) -> Any:
    """What an image block holds; `None` for an empty place."""
    return next((block[name] for name in ("image", "path", "url") if block.get(name) is not None), None)


def _blocks(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _is_open_place(block: Mapping[str, Any]) -> bool:
    return is_image(block) and image_in(block) is None


def _filled(block: Mapping[str, Any], images: Iterator[Any]) -> dict[str, Any]:
    return {"type": "image", "image": next(images)}


def _map_blocks(prompt: list[dict[str, Any]], change: Callable[[Any], Any]) -> list[dict[str, Any]]:
    return [
        {**message, "content": [change(block) for block in message["content"]]} if _blocks(message) else message
        for message in prompt
    ]


def _images_first(prompt: list[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    messages = list(prompt)
    first = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise DataError("prompt: a conversation without a user turn has no place for images")
    content = messages[first]["content"]
    text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    places = [{"type": "image", "image": image} for image in images]
    messages[first] = {**messages[first], "content": [*places, *text]}
    return messages
