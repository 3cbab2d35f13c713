"""Reading a run folder: files written while it trained, and nothing else."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dopd.errors import DataError
from dopd.inspection.schema import METRICS_FILE, TRACE_FILE, read_json_lines

CONFIG_FILE, TABLE_FILE, RESULT_FILE = "config.yaml", "table.txt", "result.json"


@dataclass(frozen=True)
class RunRecord:
    """A run folder's contents.

    Attributes:
        folder (`Path`): where it is.
        config (`dict`): resolved configuration.
        metrics (`list[dict]`): logged records, each with `step`.
        trace (`list[dict]`): traced completions.
        result (`dict`): the evaluation after training; empty if there was none.
    """

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    trace: list[dict[str, Any]]
    result: dict[str, Any]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was logged."""
        points = [(record["step"], record[name]) for record in self.metrics if record.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def names(self, prefix: str) -> list[str]:
        """Logged metrics whose name begins with `prefix`, in order of first appearance."""
        return list(dict.fromkeys(name for record in self.metrics for name in record if name.startswith(prefix)))


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder.

    Raises:
        DataError: it is not one.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise DataError(f"{str(folder)!r} is not a run folder: it has no {CONFIG_FILE}")
    result = folder / RESULT_FILE
    return RunRecord(
        folder=folder,
        config=yaml.safe_load((folder / CONFIG_FILE).read_text()),
        metrics=read_json_lines(folder / METRICS_FILE),
        trace=read_json_lines(folder / TRACE_FILE),
        result=json.loads(result.read_text()) if result.exists() else {},
    )
