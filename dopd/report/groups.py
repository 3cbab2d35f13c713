"""Which run folders belong together: runs that differ in the seed alone are one group, one line in every table."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dopd.errors import DataError
from dopd.progress import tracked
from dopd.report.records import CONFIG_FILE, RunRecord, evaluation_of, json_of, own_text, read_run

SUMMARY_FILE = "summary.json"
_EVALUATIONS = ("start", "teacher_result")
# What may differ between runs of one group.
_SEEDS = frozenset({"seed", "data_seed"})
_PLACES = frozenset({"output_dir", "run_name", "logging_dir", "overwrite", "hub_model_id"})
_RESUMING = frozenset({"resume_from_checkpoint", "resume_with_changes"})


@dataclass(frozen=True)
class RunGroup:
    """Runs of one configuration, one for each seed.

    Attributes:
        label (`str`): the method, and what tells it from other groups of that method.
        runs (`list[RunRecord]`): in order of their seeds.
    """

    label: str
    runs: list[RunRecord]

    @property
    def routed(self) -> bool:
        return len(self.runs[0].names("share/")) > 1


def find_runs(paths: Iterable[str | Path]) -> list[RunRecord]:
    """The runs of folders: a run folder itself, or every run folder directly inside it.

    Raises:
        DataError: a folder that is neither.
    """
    folders: list[Path] = []
    for name in paths:
        path = Path(name)
        inside = [path] if (path / CONFIG_FILE).is_file() else sorted(p.parent for p in path.glob(f"*/{CONFIG_FILE}"))
        if not inside:
            raise DataError(f"{str(path)!r} is not a run folder (it has no {CONFIG_FILE}), nor does it hold any")
        folders += inside
    unique = {folder.resolve(): folder for folder in folders}
    return [read_run(folder) for folder in tracked("reading runs", "run", list(unique.values()))]


def find_summary(paths: Iterable[str | Path]) -> dict[str, Any]:
    """What `dopd quickstart` wrote beside the runs: evaluations of start and teacher; empty if there is none."""
    for name in paths:
        for folder in (Path(name), Path(name).resolve().parent):
            found = _own_summary(folder / SUMMARY_FILE)
            if found:
                return found
    return {}


def _own_summary(path: Path) -> dict[str, Any]:
    """A summary that `dopd quickstart` wrote; empty for a file of that name that is somebody else's."""
    value = json_of(own_text(path))
    if not isinstance(value, dict) or not isinstance(value.get("methods"), dict):
        return {}
    evaluations = {name: evaluation_of(value.get(name)) for name in _EVALUATIONS}
    return {**value, **evaluations} if all(evaluations.values()) else {}


def group_runs(runs: Sequence[RunRecord]) -> list[RunGroup]:
    """Put runs together that differ in the seed alone, in order of first appearance."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(json.dumps(settings_of(run), sort_keys=True, default=str), []).append(run)
    members = [sorted(group, key=lambda run: (seed_of(run), str(run.folder))) for group in groups.values()]
    return [RunGroup(label, group) for label, group in zip(_labels(members), members, strict=True)]


def settings_of(run: RunRecord) -> dict[str, Any]:
    """A run's configuration without its seed and its place on the disk."""
    return {key: value for key, value in run.config.items() if key not in _SEEDS | _PLACES | _RESUMING}


def seed_of(run: RunRecord) -> int:
    seed = run.config.get("seed")
    return seed if isinstance(seed, int) else 0


def differences(groups: Sequence[RunGroup]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all groups, with the value of each group; and the seeds."""
    settings = [settings_of(group.runs[0]) for group in groups]
    rows = []
    for key in dict.fromkeys(key for values in settings for key in values):
        cells = [_show(values[key]) if key in values else "-" for values in settings]
        if len(set(cells)) > 1:
            rows.append((key, cells))
    seeds = [", ".join(str(seed_of(run)) for run in group.runs) for group in groups]
    return [*rows, ("seed", seeds)] if rows or len(set(seeds)) > 1 else []


def _labels(members: Sequence[Sequence[RunRecord]]) -> list[str]:
    names = [_method(group[0]) for group in members]
    labels = []
    for name, group in zip(names, members, strict=True):
        same = [settings_of(other[0]) for other, label in zip(members, names, strict=True) if label == name]
        mine = settings_of(group[0])
        # As text, in which a number that is none equals itself.
        keys = [key for key in mine if any(repr(other.get(key)) != repr(mine[key]) for other in same)]
        parts = ", ".join(f"{key}={_show(mine[key])}" for key in keys[:3])
        labels.append(f"{name} ({parts})" if parts else name)
    return [label if labels.count(label) == 1 else f"{label} #{n}" for n, label in enumerate(labels, 1)]


def _method(run: RunRecord) -> str:
    """The method of a run, as far as its files can be read."""
    return str(run.result.get("method") or run.config.get("method") or ("dopd" if run.config else "unknown method"))


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
