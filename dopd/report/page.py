"""The report: one HTML file that needs nothing else, made from run folders and nothing else."""

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from dopd.errors import FileError
from dopd.files import read_plain, replace_file
from dopd.report.ending import ending_of
from dopd.report.findings import findings
from dopd.report.groups import RunGroup, differences, find_runs, find_summary, group_runs, seed_of
from dopd.report.headline import headline
from dopd.report.palette import TINT_LIGHT, label_colours, label_meanings, style_variables
from dopd.report.records import GIVEN_IN_PYTHON, RunRecord
from dopd.report.series import charts
from dopd.report.traces import pack_traces
from dopd.report.verdict import verdict

REPORT_FILE = "report.html"
_MODELS = {"student": "model_name_or_path", "teacher": "teacher_model_name_or_path"}
_GENERATOR = b'<meta name="generator" content="dopd">'
_SCRIPTS = (
    "page.js",
    "download.js",
    "results.js",
    "charts.js",
    "token_card.js",
    "strip.js",
    "microscope.js",
    "lists.js",
)


def write_report(paths: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page of run folders, or of folders that hold run folders.

    The same folders give the same bytes.

    Args:
        paths (`list[str]`): the folders.
        output (`str`, *optional*): the file; `report.html` in the folder if there is one, else in the working
            directory.

    Raises:
        DataError: a folder that holds no run.
        FileError: `check_page`.
    """
    target = page_path(paths, output)
    return write_page(report_data(paths), target)


def page_path(paths: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Where `write_report` puts a page.

    Raises:
        FileError: `check_page`.
    """
    is_folder = len(paths) == 1 and not Path(paths[0]).is_file()
    target = Path(output or (Path(paths[0]) if is_folder else Path()) / REPORT_FILE)
    check_page(target, "output")
    return target


def write_page(data: Mapping[str, Any], target: Path) -> Path:
    """Write the page of a data object (`report_data`) to a file that `page_path` has allowed."""
    replace_file(target, render(data).encode())
    return target


def check_page(path: Path, flag: str) -> None:
    """Refuse to write a page over something else.

    Args:
        path (`Path`): where it is to be.
        flag (`str`): what says so, for the message.

    Raises:
        FileError: there is a link, or no page of ours.
    """
    if os.path.lexists(path) and not is_page(path):
        raise FileError(
            f"{str(path)!r} is there, and is no page that dopd has written: it is not written over. Choose another "
            f"file (--{flag}), or move it away"
        )


def is_page(path: Path) -> bool:
    """Whether a file is a page that dopd has written, which may be written anew; a link is not."""
    try:
        return _GENERATOR in read_plain(path)[:1000]
    except OSError:
        return False


def report_page(paths: Sequence[str | Path]) -> str:
    """The page as text."""
    return render(report_data(paths))


def report_data(paths: Sequence[str | Path]) -> dict[str, Any]:
    """All that the page of some folders shows, as JSON has it.

    Raises:
        DataError: a folder that holds no run.
    """
    summary = find_summary(paths)
    order = list(summary.get("methods", []))
    groups = sorted(
        group_runs(find_runs(paths)), key=lambda group: order.index(group.label) if group.label in order else len(order)
    )
    warnings = findings(groups, summary)
    runs = [(group, run) for group in groups for run in group.runs]
    table = differences(groups)
    return {
        "title": _title(groups, summary),
        "subtitle": _subtitle(groups),
        "runs": [{"label": group.label, "seed": seed_of(run), "several": len(group.runs) > 1} for group, run in runs],
        "verdict": verdict(groups, summary, warnings),
        "headline": headline(groups, summary),
        "findings": warnings,
        "charts": charts(groups, summary),
        "differences": {"columns": [group.label for group in groups], "rows": table},
        "traces": pack_traces([(run.folder, [*run.trace, *run.foreign]) for _, run in runs]),
    }


def inspection_page(title: str, subtitle: str, records: Sequence[Mapping[str, Any]]) -> str:
    """A page with the token microscope alone, for completions that no run traced."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    by_method = [[record for record in records if record["method"] == method] for method in methods]
    return render(
        {
            "title": title,
            "subtitle": subtitle,
            "runs": [{"label": method, "seed": 0, "several": False} for method in methods],
            "verdict": None,
            "headline": {"columns": [], "rows": []},
            "findings": [],
            "charts": [],
            "differences": {"columns": [], "rows": []},
            "traces": pack_traces([(Path(), part) for part in by_method]),
        }
    )


def render(data: Mapping[str, Any]) -> str:
    """The page of a data object; texts of models reach it as JSON alone, and its scripts insert them as text."""
    folder = files("dopd.report")
    labels = [label for item in data["traces"]["items"] for label in item["labels"]]
    meanings = label_meanings(labels)
    constants = {
        "regimes": {label: {"name": name, "meaning": text} for label, (name, text) in meanings.items()},
        "regime_colours": label_colours(labels),
        "tint": TINT_LIGHT,
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["csp_hash"] = _content_hash
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=data["title"],
        style=style_variables() + (folder / "page.css").read_text(encoding="utf-8"),
        data=script_json({**constants, **data}),
        scripts=['\n"use strict";\n' + (folder / name).read_text(encoding="utf-8") + "\n" for name in _SCRIPTS],
    )


def _content_hash(script: str) -> str:
    """How a Content-Security-Policy names the one script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _title(groups: Sequence[RunGroup], summary: Mapping[str, Any]) -> str:
    names = " and ".join(group.label for group in groups) if len(groups) < 3 else f"{len(groups)} methods"
    subject = summary.get("task") or _subject([run for group in groups for run in group.runs])
    return f"{subject}: {names}" if subject else names


def _subject(runs: Sequence[RunRecord]) -> str:
    """What runs are known by: their task, the name of their dataset or, of one run, that of its folder."""
    task, dataset = runs[0].config.get("task"), runs[0].config.get("dataset_name")
    if task:
        return str(task)
    if isinstance(dataset, str) and dataset and not dataset.startswith(GIVEN_IN_PYTHON):
        is_hub_id = dataset.count("/") < 2 and not Path(dataset).suffix and not dataset.startswith((".", "/", "~"))
        return dataset if is_hub_id else Path(dataset).name or dataset
    return runs[0].folder.resolve().name if len(runs) == 1 else ""


def _subtitle(groups: Sequence[RunGroup]) -> str:
    config = groups[0].runs[0].config
    steps = max((record["step"] for group in groups for run in group.runs for record in run.metrics), default=0)
    num_runs = sum(len(group.runs) for group in groups)
    parts = [
        *(f"{role} {str(config.get(name, '?')).removeprefix(GIVEN_IN_PYTHON)}" for role, name in _MODELS.items()),
        f"{num_runs} run{'s' if num_runs != 1 else ''}",
        f"{steps} steps",
    ]
    return "; ".join([", ".join(parts), *_endings(groups)])


def _range_of(steps: Sequence[int]) -> str:
    first, last = min(steps), max(steps)
    return f"{first}" if first == last else f"{first} to {last}"


def _endings(groups: Sequence[RunGroup]) -> list[str]:
    """That runs stopped early, or left the weights of an earlier step."""
    endings = [ending for group in groups for ending in map(ending_of, group.runs) if ending is not None]
    notable = [ending for ending in endings if ending.why]
    if len(endings) < 2:
        return [ending.why for ending in notable]
    early = [ending.step for ending in notable if ending.early]
    steps = [ending.weights_of for ending in notable if ending.weights_of != ending.step]
    parts = []
    if early:
        parts.append(f"{len(early)} of {len(endings)} runs stopped early, at steps {_range_of(early)}")
    if steps:
        parts.append(f"weights of the best steps ({_range_of(steps)})")
    return parts
