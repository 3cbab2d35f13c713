"""Reading a run folder: files written while it trained, and nothing else."""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dopd.errors import ConfigError, DataError
from dopd.inspection.schema import METRICS_FILE, SCHEMA_VERSION, TRACE_FILE, problems
from dopd.settings.reading import read_yaml

_MAX_FILE = 2**30  # bytes
_MAX_PROMPTS = 10**9  # of one evaluation
_MAX_TEXT = 10_000  # characters of a setting, and entries of one
CONFIG_FILE, TABLE_FILE, RESULT_FILE = "config.yaml", "table.txt", "result.json"
GIVEN_IN_PYTHON = "given in Python: "  # before what an object was that a program gave to a run


@dataclass(frozen=True)
class RunRecord:
    """A run folder's contents.

    Attributes:
        folder (`Path`): where it is.
        config (`dict`): resolved configuration.
        metrics (`list[dict]`): logged records, each with `step`.
        trace (`list[dict]`): traced completions of this version of the format.
        result (`dict`): the evaluation after training; empty if there was none.
        unread (`int`): lines of metrics and traces that do not follow the format, and were left out.
        foreign (`tuple[dict, ...]`): traced completions of another version of the format.
        damaged (`tuple[str, ...]`): what is wrong with files of which nothing could be read, in a sentence each.
    """

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    trace: list[dict[str, Any]]
    result: dict[str, Any]
    unread: int = 0
    foreign: tuple[dict[str, Any], ...] = ()
    damaged: tuple[str, ...] = ()

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was logged."""
        points = [(record["step"], record[name]) for record in self.metrics if record.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def names(self, prefix: str) -> list[str]:
        """Logged metrics whose name begins with `prefix`, in order of first appearance."""
        return list(dict.fromkeys(name for record in self.metrics for name in record if name.startswith(prefix)))


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder, as much of it as follows the format; nothing outside of it, and no link out of it.

    Raises:
        DataError: it is not one.
    """
    folder = Path(folder)
    text = own_text(folder / CONFIG_FILE)
    if text is None:
        raise DataError(f"{str(folder)!r} is not a run folder: it has no {CONFIG_FILE} of its own that can be read")
    config, damaged = _config(text)
    metrics, torn_metrics = _lines(folder / METRICS_FILE, _metrics_record)
    traced, torn_trace = _lines(folder / TRACE_FILE, _trace_record)
    result = own_text(folder / RESULT_FILE)
    evaluation = evaluation_of(json_of(result))
    if result is not None and not evaluation:
        damaged.append(f"{RESULT_FILE} holds no evaluation")
    for name, records in ((METRICS_FILE, metrics), (TRACE_FILE, traced)):
        if not records and (own_text(folder / name) or "").strip():
            damaged.append(f"no line of {name} can be read")
    damaged += [
        f"{name} is a link or no file, and is not read"
        for name in (METRICS_FILE, TRACE_FILE, RESULT_FILE)
        if os.path.lexists(folder / name) and own_text(folder / name) is None
    ]
    return RunRecord(
        folder=folder,
        config={str(key): _plain(value) for key, value in config.items()},
        metrics=metrics,
        trace=[record for record in traced if record.get("schema") == SCHEMA_VERSION],
        result=evaluation,
        unread=torn_metrics + torn_trace,
        foreign=tuple(record for record in traced if record.get("schema") != SCHEMA_VERSION),
        damaged=tuple(damaged),
    )


def _config(text: str) -> tuple[dict[Any, Any], list[str]]:
    """The settings in a configuration, none where it cannot be read, and what is wrong with it."""
    try:
        config = read_yaml(text)
    except ConfigError as error:
        return {}, [f"{CONFIG_FILE} {error}"]
    if isinstance(config, dict):
        return config, []
    return {}, [f"{CONFIG_FILE} must be a mapping of keys to values, and is none"]


def own_text(path: Path) -> str | None:
    """The text of a file of the run; `None` where there is none. A link, a device or a pipe is no file of a run."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE:
            return None
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _lines(path: Path, read: Callable[[Any], dict[str, Any] | None]) -> tuple[list[dict[str, Any]], int]:
    """The records of a JSON lines file that follow their format, and how many do not."""
    records, unread = [], 0
    lines = (own_text(path) or "").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = read(json_of(line))
        if record is not None:
            records.append(record)
        elif number < len(lines):  # a whole line ends with a line feed; the last one may be half-written
            unread += 1
    return records, unread


def json_of(text: str | None) -> Any:
    """What a text says as JSON; `None` where it is none."""
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError):
        return None


def _metrics_record(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not _is_number(value.get("step")) or value["step"] < 0:
        return None
    return {"step": int(value["step"]), **{k: v for k, v in value.items() if k != "step" and _is_metric(k, v)}}


def _trace_record(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    # Records of another version of the format are counted where they would have been shown.
    return value if value.get("schema") != SCHEMA_VERSION or not problems(value) else None


def evaluation_of(value: Any) -> dict[str, Any]:
    """What follows the format of an evaluation's result; empty where it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("metrics"), dict):
        return {}
    record: dict[str, Any] = {
        "metrics": {name: number for name, number in value["metrics"].items() if _is_metric(name, number)}
    }
    if isinstance(value.get("intervals"), dict):
        record["intervals"] = {name: v for name, v in value["intervals"].items() if _is_interval(v)}
    if isinstance(value.get("scores"), dict):
        record["scores"] = {
            name: numbers
            for name, numbers in value["scores"].items()
            if isinstance(numbers, list) and all(map(_is_share, numbers))
        }
    return record | {
        name: value[name] for name in ("method", "train_seconds") if isinstance(value.get(name), str | float)
    }


def _is_interval(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(key)) for key in ("mean", "low", "high"))


def _is_metric(name: str, value: Any) -> bool:
    """Whether a value can be what its metric measures: an accuracy is a share, and prompts are counted."""
    name = name.removeprefix("eval_")
    if name == "num_prompts":
        return _is_number(value) and 0 <= value <= _MAX_PROMPTS
    return _is_share(value) if name.startswith("accuracy_") else _is_number(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_number(value: Any) -> bool:
    # Comparing is safe where a whole number is too large for a float, and false for NaN.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _plain(value: Any, depth: int = 4) -> Any:
    """A setting as numbers, texts, lists and mappings; anything else, or too deep, as a short text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value[:_MAX_TEXT]
    if depth and isinstance(value, list):
        return [_plain(inner, depth - 1) for inner in value[:_MAX_TEXT]]
    if depth and isinstance(value, dict):
        return {str(key)[:_MAX_TEXT]: _plain(inner, depth - 1) for key, inner in list(value.items())[:_MAX_TEXT]}
    return type(value).__name__
