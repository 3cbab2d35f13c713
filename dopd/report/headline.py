"""The table that a reader sees first: start, teacher and every method, with 95% intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dopd.report.comparisons import over_seeds
from dopd.report.ending import weights_step
from dopd.report.groups import RunGroup
from dopd.report.palette import method_colour
from dopd.report.records import RunRecord
from dopd.report.roles import places
from dopd.statistics import Interval, wilson_interval

ACCURACIES = {
    "accuracy_greedy": "greedy, no p",
    "accuracy_sampled": "sampled, no p",
    "accuracy_blank": "greedy, grey images",
    "accuracy_privileged": "greedy WITH p",
}
_ONLY_WITH_IMAGES = "accuracy_blank"
_MEANS = ("entropy (nats)", "length (tokens)", "KL to teacher (nats)", "runs")


def headline(groups: Sequence[RunGroup], summary: Mapping[str, Any]) -> dict[str, Any]:
    """The table as `columns` and `rows` (`headline_rows`); what was answered to grey images only where it was asked."""
    results = [result for group in groups for result in map(last_evaluation, group.runs) if result]
    results += [summary[name] for name in ("start", "teacher_result") if summary.get(name)]
    pictured = any(_ONLY_WITH_IMAGES in result["metrics"] for result in results)
    names = [name for name in ACCURACIES if pictured or name != _ONLY_WITH_IMAGES]
    columns = [*(ACCURACIES[name] for name in names), *_MEANS]
    return {"columns": columns, "rows": headline_rows(groups, summary, names)}


def headline_rows(
    groups: Sequence[RunGroup], summary: Mapping[str, Any], accuracies: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows with `label`, `kind` (`start`, `teacher` or `method`), `colour` (its number in the palette; -1 for
    others), `hue` (of methods) and `cells`.

    A cell has `text` and, for accuracies, `mean`, `low`, `high` in [0, 1]. Intervals of single evaluations are over
    prompts (Wilson), those of several seeds over seeds (Student's t).
    """
    rows = []
    start = summary.get("start") or _first_evaluation(groups)
    if start:
        rows.append({"label": "start (student)", "kind": "start", "colour": -1, "cells": _single([start], accuracies)})
    if summary.get("teacher_result"):
        cells = _single([summary["teacher_result"]], accuracies)
        rows.append({"label": "teacher", "kind": "teacher", "colour": -1, "cells": cells})
    for group, place in zip(groups, places([group.label for group in groups]), strict=True):
        results = [result for result in map(last_evaluation, group.runs) if result]
        if results:
            cells = (_single if len(results) == 1 else _over_seeds)(results, accuracies)
            named = {"label": group.label, "kind": "method", "colour": place, "hue": method_colour(place)}
            rows.append({**named, "cells": cells})
    return rows


def last_evaluation(run: RunRecord) -> dict[str, Any]:
    """The evaluation after training, or that of the step whose weights the run left, or has now; empty if there was
    none.
    """
    if run.result.get("metrics"):
        return run.result
    records = evaluations(run)
    return as_result(of_the_weights(run, records)) if records else {}


def of_the_weights(run: RunRecord, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of evaluations of a run, in order, that of the step whose weights it left; the last one while it is under way."""
    step = weights_step(run)
    return next((record for record in reversed(records) if record["step"] == step), records[-1])


def evaluations(run: RunRecord) -> list[dict[str, Any]]:
    """Records of evaluations without privileged context, in order."""
    return [record for record in run.metrics if "eval_accuracy_greedy" in record]


def _first_evaluation(groups: Sequence[RunGroup]) -> dict[str, Any]:
    for group in groups:
        for run in group.runs:
            records = [record for record in evaluations(run) if record["step"] == 0]
            if records:
                return as_result(records[0])
    return {}


def as_result(record: Mapping[str, Any]) -> dict[str, Any]:
    """A logged evaluation as `result.json` has them: `metrics`, and `intervals` over prompts (Wilson)."""
    metrics = {key.removeprefix("eval_"): value for key, value in record.items() if key.startswith("eval_")}
    count = int(metrics.get("num_prompts", 0))
    intervals = {}
    for name in ACCURACIES:
        if name in metrics and count:
            interval = wilson_interval(metrics[name] * count, count)
            intervals[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {"metrics": metrics, "intervals": intervals}


def _single(results: Sequence[Mapping[str, Any]], accuracies: Sequence[str]) -> list[dict[str, Any]]:
    (result,) = results
    intervals = result.get("intervals", {})
    cells = [_accuracy(Interval(**intervals[name]) if name in intervals else None) for name in accuracies]
    return [*cells, *_plain_cells(results)]


def _over_seeds(results: Sequence[Mapping[str, Any]], accuracies: Sequence[str]) -> list[dict[str, Any]]:
    return [*(_accuracy(over_seeds(results, name)) for name in accuracies), *_plain_cells(results)]


def _plain_cells(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    cells = []
    for name, form in (
        ("entropy", "{:.3f}"),
        ("length", "{:.1f}"),
        ("divergence_to_teacher", "{:.3f}"),
    ):
        values = [result["metrics"][name] for result in results if result["metrics"].get(name) is not None]
        cells.append({"text": form.format(sum(values) / len(values)) if values else "-"})
    return [*cells, {"text": str(len(results))}]


def _accuracy(interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {"text": "-"}
    if not math.isfinite(interval.low):
        return {"text": f"{100 * interval.mean:.1f}%", "mean": interval.mean}
    low, high = max(interval.low, 0.0), min(interval.high, 1.0)
    text = f"{100 * interval.mean:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
    return {"text": text, "mean": interval.mean, "low": low, "high": high}
