"""Values in messages: as they are where they are short, and cut where they are not."""

from collections.abc import Iterable, Mapping
from typing import Any

from dopd.secrets import is_secret

_MAX_CHARACTERS = 200
_MAX_ENTRIES = 8
_MAX_DEPTH = 4


def quoted(value: Any) -> str:
    """The `repr` of a value, of bounded size and time: a value nested in itself a thousand times costs no more."""
    text = _text(value, _MAX_DEPTH)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 3]}..."


def _text(value: Any, depth: int) -> str:
    if isinstance(value, Mapping):
        if depth == 0:
            return "{...}"
        pairs = ((k, "<secret>" if is_secret(str(k)) else _text(v, depth - 1)) for k, v in value.items())
        return "{" + _entries((f"{_text(k, 0)}: {inside}" for k, inside in pairs), len(value)) + "}"
    if isinstance(value, list | tuple):
        if depth == 0:
            return "[...]"
        inside = _entries((_text(entry, depth - 1) for entry in value), len(value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if isinstance(value, str | bytes) and len(value) > _MAX_CHARACTERS:
        return f"{value[:_MAX_CHARACTERS]!r}..."
    try:
        return repr(value)
    except ValueError:  # of a whole number with more digits than Python writes
        if isinstance(value, int):
            return f"a whole number of {value.bit_length()} bits"
        return f"a {type(value).__name__}"
    except Exception:  # of whatever object it is
        return f"a {type(value).__name__}"


def _entries(texts: Iterable[str], count: int) -> str:
    shown = [text for text, _ in zip(texts, range(_MAX_ENTRIES), strict=False)]
    return ", ".join([*shown, "..."] if count > _MAX_ENTRIES else shown)
