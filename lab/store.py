"""Finished runs: on this machine one JSON line each, so that an interrupted experiment goes on where it stopped, and
those of the results.json files of a folder of experiments.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dopd.files import append_line, make_folder
from dopd.runs.build import TINY, resolve_model
from dopd.tiny import cache_root
from lab.spec import RESULTS_FILE, RunSpec
from lab.tiny import model_fingerprint

logger = logging.getLogger(__name__)


class RunStore:
    """Records by key. Several processes may add to one file: a line is written in one piece.

    Args:
        path (`Path`, *optional*): the file; `experiments/runs.jsonl` in the cache folder if left out.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_root() / "experiments" / "runs.jsonl"
        self._identities: dict[str, str] = {}

    def read(self) -> dict[str, dict[str, Any]]:
        """Every finished run by its key; lines that are not whole are counted and said."""
        if not self.path.exists():
            return {}
        records, broken = {}, 0
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                records[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                broken += 1
        if broken:
            logger.warning(f"{self.path}: {broken} line(s) are not whole records (an interrupted write); left out")
        return records

    def add(self, record: dict[str, Any]) -> None:
        """Append one record, which has its `key`."""
        make_folder(self.path.parent)
        append_line(self.path, (json.dumps(record) + "\n").encode())

    def key(self, spec: RunSpec) -> str:
        """The key of a run with the models of this machine; trains the tiny models that are missing."""
        return spec.key({name: self._identity(name) for name in spec.models})

    def _identity(self, model: str) -> str:
        # One recipe gives other weights on another kind of processor, so a tiny model is known by its weights.
        if model not in self._identities:
            self._identities[model] = model_fingerprint(resolve_model(model)) if model.startswith(TINY) else model
        return self._identities[model]


def published(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs of all results.json files in a folder of experiments, by key."""
    records: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"*/{RESULTS_FILE}")):
        for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
            records[run["key"]] = {name: value for name, value in run.items() if name != "condition"}
    return records


def missing(wanted: Iterable[tuple[str, RunSpec]], finished: Iterable[str]) -> list[tuple[str, RunSpec]]:
    """The (key, run) pairs that are still to do, each once, in the order given."""
    done = set(finished)
    todo: dict[str, RunSpec] = {}
    for key, spec in wanted:
        if key not in done:
            todo.setdefault(key, spec)
    return list(todo.items())
