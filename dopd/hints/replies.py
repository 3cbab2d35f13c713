"""From what a model has written to a hint, boxes or a verdict; what is none is told with its reason."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dopd.hints.boxes import fault_of_box
from dopd.hints.coverage import is_empty
from dopd.hints.journal import Reply

_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.S | re.I)
_FENCE = re.compile(r"^```[\w-]*\n(.*?)\n?```$", re.S)
_MOST_BOXES = 32


@dataclass(frozen=True)
class WrittenHint:
    """A hint, or why there is none.

    Attributes:
        text (`str`, *optional*): p.
        boxes (`list[dict]`, *optional*): of a hint of boxes: `image`, `label`, `xyxy` in pixels.
        reason (`str`): why there is none, or `""`.
    """

    text: str | None
    boxes: list[dict[str, Any]] | None = None
    reason: str = ""


def hint_of_reply(reply: Reply, kind: str, sizes: Sequence[tuple[int, int]] = ()) -> WrittenHint:
    """The hint in a reply.

    Args:
        reply (`Reply`): of the writer.
        kind (`str`): of hint.
        sizes: widths and heights of the row's images, in which boxes must be.
    """
    if reply.finish == "refused":
        return WrittenHint(None, reason=f"the writer refused: {reply.text[:200]}")
    if reply.finish == "length":
        return WrittenHint(None, reason="the reply was cut at --max-new-tokens")
    text = without_wrapping(reply.text)
    if kind == "boxes" and text:
        return _boxes(text, sizes)
    return WrittenHint(None, reason="the reply is empty") if is_empty(text) else WrittenHint(text)


def without_wrapping(text: str) -> str:
    """The text without thoughts and fences around it."""
    text = _THOUGHTS.sub("", text).strip()
    fenced = _FENCE.match(text)
    return (fenced[1] if fenced else text).strip()


def _boxes(text: str, sizes: Sequence[tuple[int, int]]) -> WrittenHint:
    found = json_in(text, "[", "]")
    if not isinstance(found, list) or not found:
        return WrittenHint(None, reason="the reply is no JSON list of boxes")
    if len(found) > _MOST_BOXES:
        return WrittenHint(None, reason=f"the reply has {len(found)} boxes, and {_MOST_BOXES} are allowed")
    boxes: list[dict[str, Any]] = []
    for number, one in enumerate(found):
        if not isinstance(one, Mapping):
            return WrittenHint(None, reason=f"box {number} is no object")
        fault = fault_of_box(one, sizes)
        label = one.get("label")
        if fault is None and (not isinstance(label, str) or not label.strip()):
            fault = "it has no label"
        if fault is not None:
            return WrittenHint(None, reason=f"box {number}: {fault}")
        xyxy = next(one[name] for name in ("xyxy", "bbox", "box", "bbox_2d") if name in one)
        boxes.append(
            {"image": int(one.get("image") or 0), "label": str(label).strip(), "xyxy": [float(n) for n in xyxy]}
        )
    lines = [f"{box['label']} [{', '.join(f'{n:g}' for n in box['xyxy'])}]" for box in boxes]
    return WrittenHint("\n".join(lines), boxes)


def json_in(text: str, opening: str, closing: str) -> Any:
    """The JSON that a text has from its first opening to its last closing bracket; `None` where there is none."""
    start, end = text.find(opening), text.rfind(closing)
    if start < 0 or end < start:
        return None
    try:
        return json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a hint.

    Attributes:
        faults (`tuple[str]`): of `incorrect`, `incomplete`, `leaks`; `unjudged` where its reply cannot be read.
        reason (`str`): in the judge's words, or why there is no verdict.
    """

    faults: tuple[str, ...]
    reason: str


def verdict_of_reply(reply: Reply) -> Verdict:
    """The verdict in a reply."""
    if reply.finish in ("refused", "length"):
        return Verdict(("unjudged",), "the judge refused" if reply.finish == "refused" else "the reply was cut")
    found = json_in(without_wrapping(reply.text), "{", "}")
    names = ("correct", "complete", "leaks")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), bool) for name in names):
        return Verdict(("unjudged",), f"the reply is no verdict: {reply.text[:100]}")
    faults = [
        *(["incorrect"] if not found["correct"] else []),
        *(["incomplete"] if not found["complete"] else []),
        *(["leaks"] if found["leaks"] else []),
    ]
    return Verdict(tuple(faults), str(found.get("reason") or "")[:500])
