"""The page of evaluations that were kept: every model with its intervals, and what pairs of them differ in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dopd.errors import DataError
from dopd.evaluation.comparing import named_apart, paired_differences, settings_that_differ
from dopd.evaluation.kept import ROWS, Evaluated, read_evaluated
from dopd.report.palette import method_colour
from dopd.report.records import CONFIG_FILE
from dopd.report.traces import pack_traces
from dopd.statistics import Interval

_COLUMNS = {
    "accuracy_greedy": "greedy, no p",
    "accuracy_sampled": "sampled, no p",
    "accuracy_blank": "greedy, grey images",
    "accuracy_privileged": "greedy WITH p",
}
_MEANS = ("length (tokens)", "cut at the limit", "samples", "prompts")
_JOURNAL = ".journal.jsonl"  # replies of a server, which are no results
_NOTE = (
    "Percentage points [95% interval over prompts]: the second model's score less the first one's, prompt by prompt; "
    "not corrected for the number of comparisons."
)


def evaluation_files(paths: Sequence[str | Path]) -> list[Path]:
    """The results that files and folders of them are; none where the paths are run folders.

    Raises:
        DataError: some are, and others are run folders; or a folder has neither.
    """
    found, others = list[Path](), list[Path]()
    for path in map(Path, paths):
        if path.is_file() or path.suffix == ".jsonl":
            found.append(path)
            continue
        is_run = (path / CONFIG_FILE).is_file() or any(path.glob(f"*/{CONFIG_FILE}"))
        inside = [] if is_run else [one for one in sorted(path.glob("*.jsonl")) if not one.name.endswith(_JOURNAL)]
        found += inside
        others += [] if inside else [path]
    if found and others:
        raise DataError(
            f"{str(found[0])!r} has results of dopd eval and {str(others[0])!r} has none of its own: report "
            "evaluations and run folders apart"
        )
    return found


def read_evaluations(files: Sequence[Path]) -> list[Evaluated]:
    """The evaluations in files, with names that differ.

    Raises:
        DataError: `dopd.evaluation.kept.read_evaluated`.
    """
    return named_apart([read_evaluated(file) for file in files], [file.name for file in files])


def by_rows(evaluations: Sequence[Evaluated]) -> list[list[Evaluated]]:
    """The evaluations in groups that answered the same rows, with the same judge."""
    groups: dict[str, list[Evaluated]] = {}
    for one in evaluations:
        judge = (one.about.get(ROWS), one.about.get("verifier"), one.about.get("verifier_options"))
        groups.setdefault(repr(judge), []).append(one)
    return list(groups.values())


def evaluations_data(evaluations: Sequence[Evaluated]) -> dict[str, Any]:
    """All that the page of evaluations shows, as `dopd.report.page.render` takes it."""
    groups = by_rows(evaluations)
    names = [one.name for one in evaluations]
    differing = settings_that_differ(evaluations) if len(evaluations) > 1 else {}
    return {
        "title": "Evaluation: " + (" and ".join(names) if len(names) < 3 else f"{len(names)} models"),
        "subtitle": "; ".join(f"{_subject(group[0])}, {group[0].result.num_prompts} prompts" for group in groups),
        "runs": [],
        "verdict": _verdict(groups),
        "headline": _headline(evaluations, several=len(groups) > 1),
        "findings": [],
        "charts": [],
        "differences": {
            "columns": names if differing else [],
            "rows": [(name, [_short(value) for value in values]) for name, values in differing.items()],
        },
        "traces": pack_traces([]),
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _subject(evaluated: Evaluated) -> str:
    """What was asked, in short: a task with its split, or a dataset."""
    task, split = evaluated.about.get("task"), evaluated.about.get("split") or "test"
    return f"{task} ({split})" if task else _short(evaluated.about.get("dataset_name") or "rows")


def _headline(evaluations: Sequence[Evaluated], *, several: bool) -> dict[str, Any]:
    intervals = [one.result.intervals() for one in evaluations]
    passes = sorted({int(name[5:]) for each in intervals for name in each if name.startswith("pass@")})
    names = [name for name in _COLUMNS if any(name in each for each in intervals)] + [f"pass@{k}" for k in passes]
    rows = []
    for place, (one, mine) in enumerate(zip(evaluations, intervals, strict=True)):
        metrics = one.result.metrics()
        means = [
            f"{metrics['length']:.1f}" if "length" in metrics else "-",
            f"{1 - metrics['eos_ratio']:.1%}" if "eos_ratio" in metrics else "-",
            str(one.result.num_samples),
            str(one.result.num_prompts),
        ]
        rows.append(
            {
                "label": (f"{one.name}: {_subject(one)}" if several else one.name) + _refused(one),
                "kind": "method",
                "colour": place,
                "hue": method_colour(place),
                "cells": [*(_cell(mine.get(name)) for name in names), *({"text": text} for text in means)],
            }
        )
    return {"columns": [*(_COLUMNS.get(name, name) for name in names), *_MEANS], "rows": rows}


def _refused(evaluated: Evaluated) -> str:
    refused = evaluated.result.refused
    return f" ({sum(refused):.0f} of {len(refused)} requests refused: wrong answers)" if any(refused) else ""


def _cell(interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {"text": "-"}
    text = f"{100 * interval.mean:.1f}% [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    return {"text": text, "mean": interval.mean, "low": interval.low, "high": interval.high}


def _verdict(groups: Sequence[Sequence[Evaluated]]) -> dict[str, Any] | None:
    """What the page says first, with the table of differences; `None` where nothing can be paired."""
    rows, sentences, levels = list[dict[str, Any]](), list[str](), list[str]()
    pairs = set[tuple[str, str]]()  # with a sentence
    for group in groups:
        for one in paired_differences(group):
            mean, low, high = (100 * value for value in (one.interval.mean, one.interval.low, one.interval.high))
            points = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
            cells = [
                {"text": one.measure},
                {"text": points, "mean": mean, "low": low, "high": high},
                {"text": one.says, "verdict": one.says if one.says in ("better", "worse") else "undecided"},
            ]
            rows.append({"label": f"{one.second} less {one.first}", "cells": cells})
            if one.measure in ("greedy", "sampled") and (one.first, one.second) not in pairs:
                pairs.add((one.first, one.second))
                words = {"better": "is better than", "worse": "is worse than"}.get(
                    one.says, "differs within chance from"
                )
                sentences.append(
                    f"{one.second} {words} {one.first} in {one.measure} answers without p: {points} points over "
                    f"{one.num_prompts} prompts"
                )
                levels.append(one.says if one.says in ("better", "worse") else "undecided")
    if not rows:
        return None
    undecided = [
        "Where a difference is within chance, more prompts (`--prompts`) tell it; more answers to each (`--samples`) "
        "help as far as answers to one prompt differ."
    ]
    whole = ["Differences are of these rows and one seed: look at other rows before you rely on them."]
    return {
        "level": levels[0] if levels else "unknown",
        "sentence": f"{'; '.join(sentences[:3]) or 'Nothing that both have answered can be paired'} (95% intervals).",
        "next": undecided if "undecided" in levels else whole,
        "table": {"columns": ["measure", "points", "second is"], "rows": rows},
        "note": _NOTE,
    }
