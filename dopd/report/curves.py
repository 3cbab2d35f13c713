"""PNG plots of one run or of several side by side."""

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopd.files import replace_file
from dopd.report.palette import METHOD_COLOURS, label_colours
from dopd.report.records import RunRecord, read_run
from dopd.report.roles import places

CURVES_FILE = "curves.png"
_DASHES = ("--", "-.", ":")  # of methods beside the one of interest
_PANELS = (
    ("eval_accuracy_greedy", "greedy accuracy without p"),
    ("eval_accuracy_sampled", "sampled accuracy (T = 1) without p"),
    ("eval_accuracy_privileged", "greedy accuracy WITH p"),
    ("entropy", "entropy of the student (nats)"),
)


def draw_run(folder: str | Path) -> Path:
    """Accuracy, entropy and regime shares of one run over its steps, as `curves.png` in its folder."""
    run = read_run(folder)
    return draw_comparison({run.result.get("method", run.folder.name): [run]}, run.folder / CURVES_FILE)


def draw_comparison(runs: Mapping[str, Sequence[RunRecord]], path: Path) -> Path:
    """Means over seeds (with each seed as a thin line) of several methods; one panel of regime shares per routed
    method.

    Args:
        runs (`dict[str, list[RunRecord]]`): the runs of each method, one for each seed.
        path (`Path`): PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    routed = {name: group for name, group in runs.items() if len(group[0].names("share/")) > 1}
    panels = [panel for panel in _PANELS if any(run.series(panel[0])[0] for group in runs.values() for run in group)]
    columns = 2
    rows = -(-(len(panels) + len(routed)) // columns) or 1
    figure = Figure(figsize=(5.2 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (metric, title) in zip(axes, panels, strict=False):
        for (name, group), place in zip(runs.items(), places(list(runs)), strict=True):
            _draw_means(axis, [run.series(metric) for run in group], name, place)
        axis.set_title(title, fontsize=10)
        if metric.startswith("eval_accuracy"):
            axis.set_ylim(-0.02, 1.02)
        axis.set_ylabel("accuracy" if "accuracy" in metric else "nats per token", fontsize=9)
        axis.legend(fontsize=8, frameon=False)
    for axis, (name, group) in zip(axes[len(panels) :], routed.items(), strict=False):
        _draw_shares(axis, group, name)
    for axis in axes[len(panels) + len(routed) :]:
        axis.set_axis_off()
    for axis in axes[: len(panels) + len(routed)]:
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    replace_file(path, drawn.getvalue())
    return path


def _draw_means(axis: Any, series: Sequence[tuple[list[int], list[float]]], name: str, place: int) -> None:
    colour = METHOD_COLOURS[place % len(METHOD_COLOURS)]
    steps, mean = _mean_over_runs(series)
    if not steps:
        return
    if len(series) > 1:
        for run_steps, values in series:
            axis.plot(
                run_steps, values, color=colour, alpha=0.3, linewidth=0.8, marker="." if len(steps) < 20 else None
            )
    axis.plot(
        steps,
        mean,
        color=colour,
        linestyle=_DASHES[place % len(_DASHES)] if place else "-",
        linewidth=1.5 if place else 2.2,
        label=name,
        marker="o" if len(steps) < 20 else None,
        markersize=3,
    )


def _draw_shares(axis: Any, group: Sequence[RunRecord], name: str) -> None:
    labels = [label.removeprefix("share/") for label in group[0].names("share/")]
    colours = label_colours(labels)
    order = [label for label in colours if label in labels]
    means = {label: _mean_over_runs([run.series(f"share/{label}") for run in group]) for label in order}
    by_step = {label: dict(zip(*means[label], strict=True)) for label in order}
    steps = sorted(set.intersection(*(set(values) for values in by_step.values())))
    shares = ([by_step[label][step] for step in steps] for label in order)
    axis.stackplot(steps, *shares, labels=order, colors=[colours[label] for label in order])
    axis.set_title(f"share of tokens by regime: {name}", fontsize=10)
    axis.set_ylim(0, 1)
    axis.legend(fontsize=8, loc="lower right", ncols=len(order))


def _mean_over_runs(series: Sequence[tuple[list[int], list[float]]]) -> tuple[list[int], list[float]]:
    """Means at the steps that every run logged."""
    by_step = [dict(zip(steps, values, strict=True)) for steps, values in series]
    common = sorted(set.intersection(*(set(values) for values in by_step))) if by_step else []
    return common, [statistics.fmean(values[step] for values in by_step) for step in common]
