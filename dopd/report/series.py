"""What the curves of the page show: means over the seeds of a group, thinned to what a screen can show."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dopd.report.groups import RunGroup
from dopd.report.monitors import CLIPPED, COPIES, LENGTH, LOOPS, MONITORS, PRIVILEGED_KL, SPEAKS, limits_of
from dopd.report.palette import PHASE_COLOURS, label_colours, method_colour
from dopd.report.records import RunRecord
from dopd.report.roles import places

_MAX_POINTS = 160
_REGIME_ORDER = ("HT", "HS", "LH", "LL", "all")
# Metric, title, unit of its numbers, name of its axis.
_LINES = (
    ("eval_accuracy_greedy", "Accuracy without p, greedy", "share", "accuracy"),
    ("eval_accuracy_sampled", "Accuracy without p, sampled (T = 1)", "share", "accuracy"),
    ("eval_accuracy_privileged", "Accuracy WITH p, greedy", "share", "accuracy"),
    ("eval_accuracy_blank", "Accuracy with grey images, greedy", "share", "accuracy"),
    ("rollout/accuracy", "Accuracy of rollouts", "share", "accuracy"),
    ("entropy", "Entropy of the student", "number", "nats per token"),
    (LENGTH, "Length of rollouts", "number", "tokens"),
    (CLIPPED, "Rollouts cut at the length limit", "share", "share of rollouts"),
    (COPIES, "Rollouts that repeat their p", "share", "share of rollouts"),
    (SPEAKS, "Rollouts that speak of a hint", "share", "share of rollouts"),
    (LOOPS, "Rollouts that end in a loop", "share", "share of rollouts"),
    (PRIVILEGED_KL, "KL of the student WITH p from its start", "number", "nats per token"),
    ("eval_divergence_to_teacher", "KL to the plain teacher", "number", "nats per token"),
    ("loss", "Loss", "number", "nats"),
    ("threshold/gap", "Mean privilege gap, the threshold", "number", "nats"),
)
Points = Mapping[int, float]


def charts(groups: Sequence[RunGroup], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Line charts of all groups, then stacked and histogram charts of each."""
    charts = [chart for chart in (_line_chart(groups, summary, *line) for line in _LINES) if chart["series"]]
    for group in groups:
        charts += _group_charts(group)
    return charts


def _line_chart(
    groups: Sequence[RunGroup], summary: Mapping[str, Any], metric: str, title: str, unit: str, axis: str
) -> dict[str, Any]:
    """One line for each group: the one of interest solid, the others dashed; and the teacher's level, if known."""
    series = []
    for group, place in zip(groups, places([group.label for group in groups]), strict=True):
        runs = [points for points in (points_of(run, metric) for run in group.runs) if points]
        if not runs:
            continue
        mean = _mean(runs)
        steps = list(thin(mean))
        shown = {
            "label": group.label,
            "colour": method_colour(place),
            "dash": place,
            "x": steps,
            "y": _rounded(thin(mean).values()),
            "seeds": [],
        }
        if len(runs) > 1:
            shown["seeds"] = [{"x": list(thin(points)), "y": _rounded(thin(points).values())} for points in runs]
        series.append(shown)
    teacher = summary.get("teacher_result", {}).get("metrics", {}).get(metric.removeprefix("eval_"))
    levels = [{"label": "teacher", "y": teacher}] if teacher is not None and metric.startswith("eval_acc") else []
    levels += _limits(groups, metric)
    return {"kind": "lines", "title": title, "unit": unit, "axis": axis, "series": series, "levels": levels}


def _limits(groups: Sequence[RunGroup], metric: str) -> list[dict[str, Any]]:
    """Where the limits of a monitor stand, of one group; they begin where each group does."""
    if metric not in MONITORS or len(groups) != 1:
        return []
    limit = limits_of(groups[0].runs[0].config)[metric]
    edges = MONITORS[metric].edges([*_group_points(groups[0], metric).values()], limit)
    return [{"label": label, "y": float(f"{value:.5g}")} for label, value in edges.items()]


def _group_charts(group: RunGroup) -> list[dict[str, Any]]:
    charts = []
    if group.routed:
        logged = [name.removeprefix("share/") for name in group.runs[0].names("share/")]
        regimes = sorted(logged, key=lambda label: _REGIME_ORDER.index(label) if label in _REGIME_ORDER else -1)
        palette = label_colours(logged)
        colours = [palette[label] for label in regimes]
        shares = [_group_points(group, f"share/{label}") for label in regimes]
        losses = [
            _product(share, _group_points(group, f"loss/{label}")) for share, label in zip(shares, regimes, strict=True)
        ]
        gradients = [_group_points(group, f"gradient/{label}") for label in regimes]
        for title, axis, parts in (
            ("Share of tokens by regime", "share of tokens", shares),
            ("Share of the loss by regime", "share of the loss", losses),
            ("Share of the gradient by regime", "share of the gradient", gradients),
        ):
            charts.append(_stack(f"{title}: {group.label}", axis, regimes, colours, parts, whole=True))
        bins = group.runs[0].names("gap_bin/")
        parts = [_group_points(group, name) for name in bins]
        heat = _stack(
            f"Gaps over time: {group.label}",
            "gap, nats",
            [n.removeprefix("gap_bin/") for n in bins],
            [],
            parts,
            whole=True,
        )
        charts.append(heat | {"kind": "heat"})
    phases = group.runs[0].names("seconds/")
    parts = [_group_points(group, name) for name in phases]
    every = sorted(set().union(*parts))  # a phase that only some steps have takes no time in the others
    parts = [{step: points.get(step, 0.0) for step in every} for points in parts]
    labels = [name.removeprefix("seconds/") for name in phases]
    charts.append(
        _stack(f"Seconds per step: {group.label}", "seconds", labels, list(PHASE_COLOURS), parts, whole=False)
    )
    return [chart for chart in charts if chart["x"]]


def _stack(
    title: str, axis: str, labels: Sequence[str], colours: Sequence[str], parts: Sequence[Points], *, whole: bool
) -> dict[str, Any]:
    """Layers at the steps that all of them have; with `whole`, shares that add up to 1."""
    common = sorted(set.intersection(*(set(points) for points in parts))) if parts else []
    totals = {step: sum(points[step] for points in parts) if whole else 1.0 for step in common}
    layers = [thin({step: points[step] / (totals[step] or 1.0) for step in common}) for points in parts]
    return {
        "kind": "stack",
        "title": title,
        "unit": "share" if whole else "number",
        "axis": axis,
        "x": list(layers[0]) if layers else [],
        "layers": [
            {"label": label, "colour": colours[n % len(colours)] if colours else "", "y": _rounded(layer.values())}
            for n, (label, layer) in enumerate(zip(labels, layers, strict=True))
        ],
    }


def points_of(run: RunRecord, metric: str) -> dict[int, float]:
    """Step -> value; a step logged twice counts once."""
    return dict(zip(*run.series(metric), strict=True))


def _group_points(group: RunGroup, metric: str) -> dict[int, float]:
    return _mean([points_of(run, metric) for run in group.runs])


def _mean(runs: Sequence[Points]) -> dict[int, float]:
    """Means at the steps that every run logged."""
    common = sorted(set.intersection(*(set(points) for points in runs))) if runs else []
    return {step: statistics.fmean(points[step] for points in runs) for step in common}


def _product(first: Points, second: Points) -> dict[int, float]:
    return {step: value * second[step] for step, value in first.items() if step in second}


def thin(points: Points) -> dict[int, float]:
    """At most `_MAX_POINTS` points: means of neighbours, each at its last step; the first point stays as it is."""
    steps = sorted(points)
    if len(steps) <= _MAX_POINTS:
        return {step: points[step] for step in steps}
    width = -(-(len(steps) - 1) // (_MAX_POINTS - 1))
    thinned = {steps[0]: points[steps[0]]}
    for start in range(1, len(steps), width):
        block = steps[start : start + width]
        thinned[block[-1]] = statistics.fmean(points[step] for step in block)
    return thinned


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
