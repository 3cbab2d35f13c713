"""What a trace keeps of the pictures of a row: small copies, and boxes as fractions of width and height."""

from collections.abc import Mapping, Sequence
from typing import Any

from dopd.data.encode import image_sources
from dopd.data.images import PRIVILEGED_COLUMN, image_key, image_size, small_data_uri
from dopd.data.views import images_of
from dopd.errors import DataError
from dopd.inspection.schema import prompt_key, prompt_text


def row_key(row: Mapping[str, Any]) -> str:
    """The key of the problem of a row: of its prompt, its privileged text and its images."""
    keys = [image_key(source) for source in _sources(row)]
    text = prompt_text(row["prompt"])
    return prompt_key("\0".join([text, *keys]), row.get("privileged_context"))


def pictures_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `images` and `boxes` of a record; empty for a row without pictures.

    Boxes of a dataset are in pixels, `[left, top, right, bottom]`; those with all numbers within 0 and 1 are fractions
    already.
    """
    sources = _sources(row)
    if not sources:
        return {}
    fields: dict[str, Any] = {"images": [_picture(source) for source in sources]}
    sizes: dict[int, tuple[int, int]] = {}
    boxes = []
    for box in row.get("boxes") or []:
        number = int(box.get("image") or 0) if isinstance(box, Mapping) else -1
        if not 0 <= number < len(sources) or not _is_box(box.get("xyxy")):
            continue  # a box of no picture is not drawn
        if number not in sizes:
            sizes[number] = _size(sources[number])
        boxes.append({"image": number, "label": box.get("label"), "xyxy": _fractions(box["xyxy"], sizes[number])})
    return {**fields, "boxes": boxes} if boxes else fields


def _sources(row: Mapping[str, Any]) -> list[Any]:
    """Pictures of the prompt, then those of p."""
    written = [source for source in image_sources(row["prompt"]) if source is not None]
    return [*images_of(row), *written, *images_of(row, (PRIVILEGED_COLUMN,))]


def _picture(source: Any) -> str:
    try:
        return small_data_uri(source)
    except DataError:
        return str(source)[:200] if isinstance(source, str) else ""  # the report says that it cannot be shown


def _size(source: Any) -> tuple[int, int]:
    try:
        return image_size(source)
    except DataError:
        return (1, 1)


def _is_box(numbers: Any) -> bool:
    return isinstance(numbers, Sequence) and len(numbers) == 4 and all(isinstance(n, int | float) for n in numbers)


def _fractions(xyxy: Sequence[float], size: tuple[int, int]) -> list[float]:
    if max(xyxy) <= 1:
        return [float(number) for number in xyxy]
    return [round(min(max(number / side, 0.0), 1.0), 4) for number, side in zip(xyxy, (*size, *size), strict=True)]
