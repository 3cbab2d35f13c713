"""Traced completions as compact columns for the page, no more than the page has room for."""

import base64
import io
import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dopd.inspection.schema import RULE_TEXTS, SCHEMA_VERSION

MAX_BYTES = 6_000_000  # of all traces in a page
_MAX_IMAGE_BYTES = 1_500_000  # of all pictures in a page
_IMAGE_SIDE = 640
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_MAX_PIXELS, _MAX_PICTURE = 50_000_000, 2**26  # of one picture: pixels, bytes of its file


class Strings:
    """Texts by number: most tokens appear many times."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]


def pack_traces(runs: Sequence[tuple[Path, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """Columns of every traced completion that fits: `strings`, `items`, `left_out`.

    First and last step of every run come first, then the steps between them, halving the distances. Records of another
    version of the format are left out.

    Args:
        runs (`list[tuple[Path, list[dict]]]`): folder and trace records of each run.
    """
    strings, pictures = Strings(), _Pictures()
    candidates = []
    foreign = 0
    for number, (folder, every) in enumerate(runs):
        records = [record for record in every if record.get("schema") == SCHEMA_VERSION]
        foreign += len(every) - len(records)
        order = _spread(sorted({record["step"] for record in records}))
        candidates += [(order[r["step"]], r["row"], number, place, folder, r) for place, r in enumerate(records)]
    candidates.sort(key=lambda candidate: candidate[:4])
    chosen, size = [], 0
    for _, _, number, place, folder, record in candidates:
        item = _pack(record, number, strings)
        length = len(json.dumps(item, separators=(",", ":")))
        if size + length > MAX_BYTES:
            continue
        size += length
        chosen.append((number, place, item | pictures.of(record, folder)))
    chosen.sort(key=lambda entry: entry[:2])
    return {
        "strings": strings.texts,
        "items": [item for _, _, item in chosen],
        "left_out": foreign + len(candidates) - len(chosen),
    }


def _pack(record: Mapping[str, Any], run: int, strings: Strings) -> dict[str, Any]:
    tokens = record["tokens"]
    rules = dict(record["rules"])
    if "all" not in rules and any(token["regime"] is None for token in tokens):
        # Rows with names of their own in a table that routes nothing: each token is taught by all of them together.
        rules["all"] = _together(list(rules.values()))
    labels = list(rules)

    def column(name: str) -> list[Any]:
        return [token[name] for token in tokens]

    return {
        "run": run,
        "kind": record["kind"],
        "step": record["step"],
        "row": record["row"],
        "rollout": record["rollout"],
        "key": record["prompt_key"],
        "prompt": record["prompt"],
        "p": record["privileged_context"],
        "score": record["score"],
        "num": record["num_tokens"],
        "view": record["teacher_view"],
        "thresholds": record["thresholds"],
        "rules": rules,
        "labels": labels,
        "text": [strings.number(token["text"]) for token in tokens],
        "regime": [labels.index(token["regime"] or "all") for token in tokens],
        "gap": column("gap"),
        "teacher": column("logprob_teacher"),
        "student": column("logprob_student"),
        "plain": column("logprob_plain"),
        "entropy": column("entropy"),
        "weight": column("weight"),
        "loss": column("loss"),
        "target_top": [_flat(token["top_target"], strings) for token in tokens],
        "student_top": [_flat(token["top_student"], strings) for token in tokens],
    }


def _together(rules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several rows as one entry of a token card."""
    texts = {name: " + ".join(dict.fromkeys(str(rule[name]) for rule in rules)) for name in RULE_TEXTS}
    return {**texts, "weight": rules[0]["weight"] if len(rules) == 1 else None}


def _flat(pairs: Iterable[Sequence[Any]] | None, strings: Strings) -> list[Any] | None:
    """[[text, probability], ...] as [number, probability, number, ...]."""
    return (
        None if pairs is None else [value for text, prob in pairs for value in (strings.number(text), round(prob, 4))]
    )


def _spread(steps: Sequence[int]) -> dict[int, int]:
    """Step -> rank: the ends first, then the middle, then the quarters, and so on."""
    ranks: dict[int, int] = {}
    gaps = [(0, len(steps) - 1)]
    for place in (0, -1):
        if steps:
            ranks.setdefault(steps[place], len(ranks))
    while gaps:
        first, last = gaps.pop(0)
        middle = (first + last) // 2
        if last - first > 1:
            ranks.setdefault(steps[middle], len(ranks))
            gaps += [(first, middle), (middle, last)]
    return ranks


class _Pictures:
    """Pictures of vision records as data URIs, made small, as long as there is room."""

    def __init__(self) -> None:
        self._left = _MAX_IMAGE_BYTES
        self._seen: dict[tuple[str, Path], str | None] = {}

    def of(self, record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        if not record.get("images"):
            return {}
        images = [self._uri(str(source), folder) for source in record["images"]]
        return {"images": images, "boxes": [box for box in record.get("boxes", []) if _is_box(box, len(images))]}

    def _uri(self, source: str, folder: Path) -> str | None:
        if (source, folder) not in self._seen:
            uri = _small_uri(source, folder)
            if uri is not None and len(uri) > self._left:
                uri = None
            self._left -= len(uri or "")
            self._seen[source, folder] = uri
        return self._seen[source, folder]


def _small_uri(source: str, folder: Path) -> str | None:
    """A JPEG data URI of at most `_IMAGE_SIDE` pixels a side; `None` where there is no picture to read.

    A picture is in the record, or a file in the run's folder: a folder that came from elsewhere may name any path.
    """
    from PIL import Image

    try:
        written = source.startswith("data:")
        raw = base64.b64decode(source.partition(",")[2]) if written else _file_inside(folder, source)
        # Of other formats some are read by programs beside Pillow, such as Ghostscript.
        with Image.open(io.BytesIO(raw), formats=_FORMATS) as picture:
            if picture.width * picture.height > _MAX_PIXELS:
                return None
            small = picture.convert("RGB")
        small.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=75)
    except Exception:  # a decoder may fail in any way on bytes from elsewhere
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _file_inside(folder: Path, source: str) -> bytes:
    path = folder / source
    status = path.lstat()
    inside = path.resolve().is_relative_to(folder.resolve())
    if not inside or not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_PICTURE:
        raise OSError(f"{source!r} is no picture of the run")
    return path.read_bytes()


def _is_box(box: Any, num_images: int) -> bool:
    """Whether a box can be drawn: it names a picture, and has four fractions."""
    if not isinstance(box, Mapping) or not isinstance(box.get("xyxy"), Sequence) or len(box["xyxy"]) != 4:
        return False
    numbers = all(isinstance(value, int | float) and 0 <= value <= 1 for value in box["xyxy"])
    return numbers and box.get("image", 0) in range(num_images)
