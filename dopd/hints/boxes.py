"""Boxes in pictures, as a column or in the words of a hint: whether they are boxes, and inside their picture."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dopd.data.encode import image_sources
from dopd.data.images import image_size
from dopd.data.views import images_of
from dopd.errors import DataError

_NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
_WRITTEN = re.compile(rf"\[{_NUMBER}(?:[,\s]{_NUMBER}){{3}}\]")


def pictures_of(row: Mapping[str, Any]) -> list[Any]:
    """The pictures of a row's prompt, in order, not opened."""
    return [*images_of(row), *(one for one in image_sources(row["prompt"]) if one is not None)]


def sizes_of(row: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Widths and heights of the pictures of a row's prompt, in order; those that cannot be read are left out."""
    sizes = []
    for source in pictures_of(row):
        try:
            sizes.append(image_size(source))
        except DataError:
            continue
    return sizes


def fault_of_box(box: Any, sizes: Sequence[tuple[int, int]]) -> str | None:
    """What is wrong with a box: `{"xyxy": [left, top, right, bottom], "image": 0}`, or the four numbers alone, in
    pixels or (all within 0 and 1) as fractions; `None` for a box inside its picture.
    """
    place, numbers = 0, box
    if isinstance(box, Mapping):
        numbers = next((box[name] for name in ("xyxy", "bbox", "box", "bbox_2d") if name in box), None)
        place = box.get("image") or 0
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) != 4:
        return "it is no list of four numbers"
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers):
        return "it has something other than numbers"
    left, top, right, bottom = numbers
    if not (left < right and top < bottom):
        return f"left, top, right, bottom (={list(numbers)}) are not in order"
    if not isinstance(place, int) or not 0 <= place < max(len(sizes), 1):
        return f"image (={place!r}) is none of the row's {len(sizes)}"
    if min(numbers) < 0:
        return f"{min(numbers)} is outside the image"
    if sizes and max(numbers) > 1 and (right > sizes[place][0] or bottom > sizes[place][1]):
        return f"{list(numbers)} is outside the image of {sizes[place][0]} x {sizes[place][1]} pixels"
    return None


def boxes_in(text: str) -> list[list[float]]:
    """Boxes that a text writes as four numbers in brackets."""
    return [list(map(float, re.findall(r"-?\d+(?:\.\d+)?", one))) for one in _WRITTEN.findall(text)]


def faults_of_boxes(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with the boxes of a row, those of its column and those that its hint writes."""
    sizes = sizes_of(row)
    boxes = row.get("boxes")
    found: list[Any] = list(boxes) if isinstance(boxes, list | tuple) else []
    if sizes and isinstance(row.get("privileged_context"), str):
        found += boxes_in(row["privileged_context"])
    return [fault for box in found if box is not None and (fault := fault_of_box(box, sizes)) is not None]
