"""What writers and judges of hints are asked: texts in files of the package, which a user can replace."""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dopd.errors import ConfigError
from dopd.files import check_plain
from dopd.hints.answers import answer_text
from dopd.hints.kinds import WITHOUT_RESULTS
from dopd.inspection.schema import prompt_text

_FIELDS = ("question", "reference", "images", "hint", "also")
_FIELD = re.compile(r"\{(" + "|".join(_FIELDS) + r")\}")
_ALSO = ", or the result of a step"


def prompt_of(kind: str, path: str | None = None) -> str:
    """The text for a kind of hint (or `judge`), from a file of the user's if there is one.

    Raises:
        ConfigError: the file cannot be read, or does not have the field `{question}`.
    """
    if path is None:
        return (files("dopd.hints") / "prompts" / f"{kind}.txt").read_text(encoding="utf-8")
    check_plain("--prompt-file", path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--prompt-file (={path!r}) cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--prompt-file (={path!r}) is not UTF-8: save it with that encoding") from None
    needed = ("question", "hint") if kind == "judge" else ("question",)
    for field in needed:
        if "{" + field + "}" not in text:
            raise ConfigError(
                f"--prompt-file (={path!r}) must contain {{{field}}}; its fields are "
                f"{', '.join('{' + name + '}' for name in _FIELDS)}"
            )
    return text


def filled(template: str, row: Mapping[str, Any], *, hint: str = "", kind: str = "", sizes: Sequence[Any] = ()) -> str:
    """The text for a row, in one pass: braces in a question or a hint are text."""
    values = {
        "question": prompt_text(row["prompt"]).strip(),
        "reference": reference(row),
        "images": "\n".join(f"image {n}: {width} x {height}" for n, (width, height) in enumerate(sizes)) or "none",
        "hint": hint,
        "also": _ALSO if kind in WITHOUT_RESULTS else "",
    }
    return _FIELD.sub(lambda found: values[found[1]], template)


def reference(row: Mapping[str, Any]) -> str:
    """Solution and answer of a row, as a writer or a judge reads them."""
    solution, answer = row.get("solution"), answer_text(row)
    parts = [f"Worked solution:\n{solution.strip()}"] if isinstance(solution, str) and solution.strip() else []
    parts += [f"Final answer: {answer}"] if answer is not None else []
    return "\n\n".join(parts) or "(no solution is known)"
