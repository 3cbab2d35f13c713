"""The format of traced completions, one JSON object a line. `docs/reference/trace.md` explains every field.

Needs no torch: the trainer and `dopd inspect` write this format, reports read it.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dopd.errors import DataError
from dopd.files import read_plain, replace_file

SCHEMA_VERSION = 1
METRICS_FILE, TRACE_FILE = "metrics.jsonl", "trace.jsonl"
NUM_TOP = 5  # most probable tokens kept of each distribution
MAX_TOKENS = 2048  # of one completion; `num_tokens` says how many it had
MAX_CHARACTERS = 20_000  # of a prompt or a privileged context

_NUMBER, _TEXT, _WHOLE, _LIST, _MAP = (int, float), (str,), (int,), (list,), (dict,)
_NONE = (type(None),)
# Field -> types that its value may have. Fields in `OPTIONAL_FIELDS` may be absent.
RECORD_FIELDS: Mapping[str, tuple[type, ...]] = {
    "schema": _WHOLE,
    "kind": _TEXT,
    "step": _WHOLE,
    "row": _WHOLE,
    "method": _TEXT,
    "prompt_key": _TEXT,
    "rollout": _WHOLE,
    "prompt": _TEXT,
    "privileged_context": _TEXT + _NONE,
    "score": _NUMBER + _NONE,
    "num_tokens": _WHOLE,
    "teacher_view": _TEXT + _NONE,
    "thresholds": _MAP + _NONE,
    "rules": _MAP,
    "tokens": _LIST,
}
OPTIONAL_FIELDS: Mapping[str, tuple[type, ...]] = {"images": _LIST, "boxes": _LIST, "extra": _MAP}
TOKEN_FIELDS: Mapping[str, tuple[type, ...]] = {
    "id": _WHOLE,
    "text": _TEXT,
    "regime": _TEXT + _NONE,
    "gap": _NUMBER + _NONE,
    "logprob_teacher": _NUMBER + _NONE,
    "logprob_student": _NUMBER + _NONE,
    "logprob_plain": _NUMBER,
    "entropy": _NUMBER,
    "weight": _NUMBER,
    "loss": _NUMBER,
    "top_target": _LIST + _NONE,
    "top_student": _LIST,
}
RULE_TEXTS = ("source", "divergence", "support")
KINDS = ("batch", "probe", "inspect")


def problems(record: Mapping[str, Any]) -> list[str]:
    """What in a record does not follow the schema; empty if all does."""
    found = _field_problems("record", record, RECORD_FIELDS, OPTIONAL_FIELDS)
    if found:
        return found
    if record["schema"] != SCHEMA_VERSION:
        found.append(f"schema (={record['schema']}) is not {SCHEMA_VERSION}")
    if record["kind"] not in KINDS:
        found.append(f"kind (={record['kind']!r}) is not one of {', '.join(KINDS)}")
    found += _rule_problems(record)
    for number, token in enumerate(record["tokens"]):
        if not isinstance(token, dict):
            found.append(f"tokens[{number}] is a {type(token).__name__}")
            continue
        found += _field_problems(f"tokens[{number}]", token, TOKEN_FIELDS, {})
        for name in ("top_target", "top_student"):
            pairs = token.get(name) or []
            if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
                found.append(f"tokens[{number}].{name} is not a list of [text, probability]")
    return found


def _is_pair(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
        return False
    return isinstance(pair[1], int | float) and not isinstance(pair[1], bool) and abs(pair[1]) < 1e300


def _rule_problems(record: Mapping[str, Any]) -> list[str]:
    found = []
    for label, rule in record["rules"].items():
        if not isinstance(rule, dict) or not all(isinstance(rule.get(name), str) for name in RULE_TEXTS):
            found.append(f"rules.{label} lacks one of {', '.join(RULE_TEXTS)}")
        elif not isinstance(rule.get("weight"), int | float):
            found.append(f"rules.{label}.weight is a {type(rule.get('weight')).__name__}")
    if not record["rules"]:
        found.append("rules is empty")
    thresholds = record["thresholds"] or {"gap": 0.0}
    if not isinstance(thresholds.get("gap"), int | float) or not abs(thresholds["gap"]) < 1e300:
        found.append(f"thresholds.gap is {thresholds.get('gap')!r}")
    labels = {str(token["regime"]) for token in record["tokens"] if isinstance(token, dict) and token.get("regime")}
    return found + [f"regime {label!r} has no rule" for label in sorted(labels - record["rules"].keys())]


def _field_problems(
    where: str, value: Mapping[str, Any], fields: Mapping[str, Any], optional: Mapping[str, Any]
) -> list[str]:
    found = [f"{where} lacks {name}" for name in fields if name not in value]
    found += [f"{where} has an unknown field {name}" for name in value if name not in fields and name not in optional]
    types = {**fields, **optional}
    for name, entry in value.items():
        if name in types and (not isinstance(entry, types[name]) or (isinstance(entry, bool))):
            found.append(f"{where}.{name} is a {type(entry).__name__}")
        elif isinstance(entry, int | float) and not abs(entry) < 1e300:
            found.append(f"{where}.{name} is {entry if isinstance(entry, float) else type(entry).__name__}")
    return found


def prompt_key(prompt: str, privileged_context: str | None) -> str:
    """The same 12 characters wherever the same problem appears: at any step, in any run."""
    return hashlib.sha256(f"{prompt}\0{privileged_context or ''}".encode()).hexdigest()[:12]


def prompt_text(prompt: Any) -> str:
    """A prompt (text or conversation) as one text."""
    if isinstance(prompt, str):
        return prompt
    contents = [message.get("content") or "" for message in prompt]
    return "\n".join(
        content if isinstance(content, str) else " ".join(block.get("text") or "" for block in content)
        for content in contents
    )


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to a completion; where tokens share a character, each token's own text."""
    texts = []
    for n, token in enumerate(ids):
        before = tokenizer.decode(ids[max(n - 4, 0) : n])
        with_it = tokenizer.decode(ids[max(n - 4, 0) : n + 1])
        alone = not with_it.startswith(before) or "\ufffd" in with_it or with_it == before
        texts.append(tokenizer.decode([token]) if alone else with_it[len(before) :])
    return texts


def json_number(value: float | None, digits: int = 6) -> float | None:
    """A rounded number that JSON can hold; `None` where there is none."""
    return None if value is None or not math.isfinite(value) else round(value, digits)


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; none if it does not exist. A last line that is only half-written is left out.

    Raises:
        DataError: another line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    objects = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            objects.append(json.loads(line))
        except ValueError:
            if number == len(lines):  # a whole line ends with a line feed
                break
            raise DataError(f"{str(path)!r}, line {number}, is not JSON") from None
    return objects


def mend_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Leave the records of a JSON lines file for which `keep` is true, in order, and nothing that is torn.

    Returns:
        How many lines were no records with a step, such as one that was only half-written.
    """
    kept, torn = [], 0
    there = os.path.lexists(path)
    lines = read_plain(path).decode(errors="replace").split("\n") if there else []
    for line in lines:
        if record := record_of(line):
            kept += [to_line(record)] if keep(record) else []
        elif line.strip():
            torn += 1
    replace_file(path, b"".join(kept))
    return torn


def record_of(line: str | bytes) -> dict[str, Any] | None:
    """The record of a step that a line holds; `None` where it holds anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read_trace(path: str | Path) -> list[dict[str, Any]]:
    """The records of a trace file, in order."""
    return read_json_lines(path)


def to_line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, separators=(",", ":")) + "\n").encode()
