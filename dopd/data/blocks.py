"""The blocks of a conversation: what they hold, in the words of transformers' chat templates and OpenAI's messages."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dopd.errors import DataError

# Every key under which transformers looks for the picture of an image block.
IMAGE_KEYS = ("image", "url", "path", "base64")
_URL_TYPE = "image_url"  # {"type": "image_url", "image_url": {"url": ...}}
_PLACE = "index"  # which of the row's images stands here; without it they come in their order
_NO_VIDEO = "Videos and audio are not supported: leave the row out, or give frames as images"


def is_image(block: Mapping[str, Any]) -> bool:
    """Whether a block stands for a picture."""
    return block.get("type") in ("image", _URL_TYPE)


def image_in(block: Mapping[str, Any]) -> Any:
    """What an image block holds; `None` for an empty place."""
    if block.get("type") == _URL_TYPE:
        value = block.get(_URL_TYPE)
        return value.get("url") if isinstance(value, Mapping) else value
    name = next((name for name in IMAGE_KEYS if block.get(name) is not None), None)
    value = None if name is None else block[name]
    return as_data_uri(value) if name == "base64" else value


def as_data_uri(encoded: Any) -> Any:
    """Base64 as a data URI, which says what it is; anything else as it stands."""
    plain = isinstance(encoded, str) and not is_data_uri(encoded)
    return f"data:;base64,{encoded}" if plain else encoded


def is_data_uri(text: str) -> bool:
    """Whether a text is a data URI; schemes are written in any case."""
    return text[:5].lower() == "data:"


def blocks_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The blocks of a turn; none where its content is text."""
    content = message.get("content")
    return content if isinstance(content, list) else []


def texts_of(turn: Mapping[str, Any]) -> list[str]:
    """The texts of a turn, which is text or blocks."""
    content = turn.get("content")
    if isinstance(content, str):
        return [content]
    blocks = content if isinstance(content, list) else []
    return [block["text"] for block in blocks if isinstance(block.get("text"), str)]


def check_blocks(prompt: Sequence[Mapping[str, Any]]) -> None:
    """Raise `DataError` for a block that would be read otherwise than it was meant, or not at all."""
    for turn in prompt:
        for block in blocks_of(turn):
            _check_block(block)


def _check_block(block: Mapping[str, Any]) -> None:
    # Datasets give every block of a column the same fields, None or empty where a block has no such field.
    keys = [name for name, value in block.items() if name != "type" and not _is_empty(value)]
    kind, where = block.get("type"), "column 'prompt'"
    if kind in (None, "text"):
        lost = [name for name in keys if name in (*IMAGE_KEYS, _URL_TYPE)]
        if lost:
            raise DataError(
                f"{where}: a block of type {kind!r} holds {lost[0]!r}, which only a block of type 'image' may hold. "
                "Give the picture a block of its own: {'type': 'image', 'image': ...}"
            )
        return
    if not is_image(block):
        raise DataError(f"{where}: a block of type {kind!r}; only text and image can be read. {_NO_VIDEO}")
    allowed = (_URL_TYPE,) if kind == _URL_TYPE else (*IMAGE_KEYS, _PLACE)
    unknown = [name for name in keys if name not in allowed]
    if unknown:
        raise DataError(
            f"{where}: a block of type {kind!r} holds {unknown[0]!r}, which nothing reads. Its picture belongs under "
            f"one of {', '.join(map(repr, allowed))}; sizes are settings of the image processor"
        )
    if len([name for name in keys if name != _PLACE]) > 1:
        raise DataError(f"{where}: an image block holds {' and '.join(map(repr, keys))}: give one picture to a block")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value)


def place_images(places: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> Iterator[Any]:
    """The images of a row in the order of its empty image blocks.

    Raises:
        DataError: other numbers of places and images; an index without an image, or an image without a place.
    """
    numbers = [place.get(_PLACE) for place in places]
    if not any(number is not None for number in numbers):
        if len(places) != len(images):
            raise DataError(
                f"the conversation has {len(places)} image blocks without an image and the row has {len(images)} "
                "images: give one image for each block, or leave the blocks out and images come first"
            )
        return iter(images)
    if set(numbers) != set(range(len(images))):
        raise DataError(
            f"column 'prompt': the 'index' of its image blocks are {numbers}, and the row has {len(images)} images: "
            "each image needs a block, and each block one of them, counted from 0"
        )
    return iter([images[number] for number in numbers if number is not None])
