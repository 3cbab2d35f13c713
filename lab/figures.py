"""One figure for an experiment: points with intervals, lines over a setting, a grid of groups and settings, or curves
over a run.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopd.files import replace_file
from dopd.report.palette import METHOD_COLOURS
from dopd.statistics import mean_interval
from lab.analysis import Values, summarise
from lab.protocol import best_rate
from lab.spec import Experiment

FIGURE_FILE = "figure.png"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_LABELS = {
    "greedy": "greedy accuracy without p (%)",
    "sampled": "sampled accuracy without p (%)",
    "privileged": "greedy accuracy WITH p (%)",
    "entropy": "entropy (nats per token)",
    "rollout/accuracy": "accuracy of the rollouts (%)",
    "learned": "accuracy right after a stage (%)",
    "kept": "change on earlier families (points)",
}
_LINE_METRICS = ("greedy", "sampled")
_IN_PERCENT = ("accuracy", "greedy", "sampled", "privileged", "learned", "kept")

Records = Mapping[str, Sequence[Mapping[str, Any]]]  # by condition


def draw(experiment: Experiment, values: Values, records: Records, path: Path) -> None:
    """Write the experiment's figure as PNG. Marks differ in shape as well as in colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing = {"points": _points, "lines": _lines, "grid": _grid, "curves": _curves}[experiment.figure]
    figure = drawing(pyplot, experiment, values, records)
    figure.suptitle(experiment.title, fontsize=11)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    replace_file(path, drawn.getvalue())
    pyplot.close(figure)


def _scale(metric: str) -> float:
    return 100.0 if metric.rpartition("/")[2] in _IN_PERCENT else 1.0


def _label(metric: str) -> str:
    where, _, name = metric.rpartition("/")
    if where and metric not in _LABELS and name in _LABELS:
        return f"{where}: {_LABELS[name]}"
    return _LABELS.get(metric, metric)


def _points(pyplot: Any, experiment: Experiment, values: Values, records: Records) -> Any:
    labels = [condition.label for condition in experiment.conditions][::-1]
    shown = experiment.shown
    size = (max(9, 3.4 * len(shown) + 1.5), 1.4 + 0.28 * len(labels))
    figure, panels = pyplot.subplots(1, len(shown), sharey=True, figsize=size, layout="constrained", squeeze=False)
    for place, (axes, metric) in enumerate(zip(panels[0], shown, strict=True)):
        for row, label in enumerate(labels):
            interval = summarise(values, label, metric)
            if interval is None:
                continue
            runs = [m[metric] * _scale(metric) for m in values[label].values() if metric in m]
            axes.plot(runs, [row] * len(runs), "|", color="#888888", markersize=7)
            low, high = (
                _scale(metric) * (interval.mean - interval.low),
                _scale(metric) * (interval.high - interval.mean),
            )
            axes.errorbar(
                _scale(metric) * interval.mean,
                row,
                xerr=None if len(runs) < 2 else [[low], [high]],
                fmt=_MARKERS[place],
                color=METHOD_COLOURS[place],
                capsize=2,
            )
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel(_label(metric))
        axes.grid(axis="x", alpha=0.3)
    return figure


def _lines(pyplot: Any, experiment: Experiment, values: Values, records: Records) -> Any:
    figure, panels = pyplot.subplots(1, len(_LINE_METRICS), figsize=(9, 3.6), layout="constrained")
    groups = list(dict.fromkeys(c.group for c in experiment.conditions if c.x is not None))
    places = [c.x for c in experiment.conditions if c.x is not None]
    logarithmic = min(places) > 0 and max(places) > 10 * min(places)
    # Intervals at one place of a plain axis stand side by side.
    apart = 0.0 if logarithmic else 0.012 * (max(places) - min(places))
    for axes, metric in zip(panels, _LINE_METRICS, strict=True):
        for place, group in enumerate(groups):
            members = sorted((c.x, c.label) for c in experiment.conditions if c.group == group and c.x is not None)
            found = [(x, summarise(values, label, metric)) for x, label in members]
            kept = [(x, interval) for x, interval in found if interval is not None]
            if not kept:
                continue
            middle = [100 * interval.mean for _, interval in kept]
            errors = [
                [100 * (i.mean - i.low) for _, i in kept],
                [100 * (i.high - i.mean) for _, i in kept],
            ]
            shift = apart * (place - (len(groups) - 1) / 2)
            axes.errorbar(
                [x + shift for x, _ in kept],
                middle,
                yerr=None if any(len(values[label]) < 2 for _, label in members if label in values) else errors,
                fmt=f"-{_MARKERS[place % len(_MARKERS)]}",
                color=METHOD_COLOURS[place % len(METHOD_COLOURS)],
                capsize=2,
                label=group,
            )
        axes.set_ylabel(_label(metric))
        axes.set_xlabel(experiment.curves[0] if experiment.curves else "setting")
        axes.grid(alpha=0.3)
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xticks(sorted(set(places)), [f"{place:g}" for place in sorted(set(places))])
            axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


def _grid(pyplot: Any, experiment: Experiment, values: Values, records: Records) -> Any:
    """Groups by settings, for more groups than lines can tell apart; the setting that each group takes is framed."""
    placed = [condition for condition in experiment.conditions if condition.x is not None]
    groups, places = list(dict.fromkeys(c.group for c in placed)), sorted({c.x for c in placed if c.x is not None})
    size = (3.2 + 0.6 * len(places) * len(_LINE_METRICS), 1.3 + 0.24 * len(groups))
    figure, panels = pyplot.subplots(1, len(_LINE_METRICS), sharey=True, figsize=size, layout="constrained")
    means: dict[str, dict[tuple[str, float], float]] = {metric: {} for metric in _LINE_METRICS}
    for axes, metric in zip(panels, _LINE_METRICS, strict=True):
        for condition in placed:
            interval = summarise(values, condition.label, metric)
            if interval is not None and condition.x is not None:
                means[metric][condition.group, condition.x] = interval.mean
        cells = [[100 * means[metric].get((group, x), float("nan")) for x in places] for group in groups]
        axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=100)
        for row, line in enumerate(cells):
            for column, cell in enumerate(line):
                text = "" if cell != cell else f"{cell:.0f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=_ink(cell))
        axes.set_xticks(range(len(places)), [f"{x:g}" for x in places], fontsize=8)
        axes.set_yticks(range(len(groups)), groups, fontsize=8)
        axes.set_title(_label(metric), fontsize=9)
        axes.set_xlabel(experiment.curves[0] if experiment.curves else "setting")
    for row, group in enumerate(groups):
        scores = {
            x: sum(means[metric][group, x] for metric in _LINE_METRICS) / len(_LINE_METRICS)
            for x in places
            if all((group, x) in means[metric] for metric in _LINE_METRICS)
        }
        if len(scores) == len(places):
            corner = (places.index(best_rate(scores)) - 0.47, row - 0.46)
            for axes in panels:
                axes.add_patch(pyplot.Rectangle(corner, 0.94, 0.92, fill=False, edgecolor="#d00000", linewidth=1.8))
    return figure


def _ink(percent: float) -> str:
    return "black" if percent > 60 else "white"  # on the light and on the dark half of viridis


def _curves(pyplot: Any, experiment: Experiment, values: Values, records: Records) -> Any:
    shown = experiment.curves
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    size = (4.6 * columns, 3.4 * rows + 0.6)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    panels = list(grid.flat)
    for unused in panels[len(shown) :]:
        unused.set_axis_off()
    drawn = [c.label for c in experiment.conditions if any(r["curves"].get(shown[0]) for r in records.get(c.label, ()))]
    for axes, name in zip(panels[: len(shown)], shown, strict=True):
        for place, label in enumerate(drawn):
            runs = [record["curves"][name] for record in records[label] if record["curves"].get(name)]
            if not runs:
                continue
            length = min(map(len, runs))
            intervals = [mean_interval([run[at] for run in runs]) for at in range(length)]
            steps = _steps(records[label][0], name, length)
            colour, scale = METHOD_COLOURS[place % len(METHOD_COLOURS)], _scale(name)
            axes.plot(
                steps,
                [scale * i.mean for i in intervals],
                marker=_MARKERS[place],
                markersize=4,
                color=colour,
                label=label,
            )
            if len(runs) > 1:
                low, high = [scale * i.low for i in intervals], [scale * i.high for i in intervals]
                axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel(_label(name.removeprefix("eval/")))
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _steps(record: Mapping[str, Any], name: str, length: int) -> list[float]:
    if name.startswith("eval/"):
        return list(record["curves"]["eval/step"][:length])
    return [10 * place + 5 for place in range(length)]
