"""The folder of an experiment: every run as data, a README for people, and the figure."""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopd.errors import ConfigError
from dopd.files import make_folder, not_written, read_plain, replace_file
from dopd.statistics import Interval
from lab.analysis import Judgement, Values, collect, judge, summarise, verdict
from lab.figures import FIGURE_FILE, draw
from lab.protocol import untuned
from lab.spec import RESULTS_FILE, RUN_VERSION, Claim, Experiment, RunSpec

README_FILE = "README.md"
NOTES_FILE = "notes.md"  # written by hand: why, and what was seen on the way; the README takes it in
INCOMPLETE = "not finished"

_COLUMN_NAMES = {
    "greedy": "greedy (%)",
    "sampled": "sampled (%)",
    "privileged": "greedy with p (%)",
    "entropy": "entropy (nats)",
    "length": "length (tokens)",
    "learned": "learned (%)",
    "kept": "kept (points)",
    "early_gain": "early gain (points)",
    "late_change": "late change (points)",
    "entropy_ratio": "entropy, end / start",
}
_PLAIN = ("entropy", "length", "entropy_ratio", "tokens")  # neither shares nor their differences
Runs = Sequence[tuple[str, Mapping[str, Any]]]


def check_writable(folder: Path) -> None:
    """Make a folder that a user has named, or raise `FileError` where it cannot be made or written."""
    try:
        make_folder(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        raise not_written(error, folder, choose="another --output-dir") or error from error


def check_experiment_folder(experiment: Experiment, folder: Path) -> None:
    """Make the folder of an experiment; refuse one that cannot be written, or has files that are no experiment's.

    Raises:
        ConfigError: there is a file of a name that would be written, and no results.json of this experiment beside it.
        FileError: the folder cannot be made or written.
    """
    check_writable(folder)
    try:
        ours = json.loads(read_plain(folder / RESULTS_FILE))["experiment"] == experiment.name
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        ours = False
    there = [name for name in (RESULTS_FILE, FIGURE_FILE, README_FILE) if os.path.lexists(folder / name)]
    if there and not ours:
        raise ConfigError(
            f"{str(folder / there[0])!r} is not of experiment {experiment.name!r}: move it away, or choose another "
            "--output-dir"
        )


def write_experiment(
    experiment: Experiment, runs: Runs, wanted: Sequence[tuple[str, RunSpec]], folder: Path
) -> dict[str, Any]:
    """Write results, figure and README of the runs that there are; returns what results.json holds.

    Args:
        runs: (label, record) of finished runs.
        wanted: (label, run) of all runs of the experiment, finished or not.
        folder (`Path`): made if it is not there.
    """
    values = collect(runs)
    complete = len(runs) == len(wanted)
    judgements = judge(experiment, values) if complete else []
    result = {
        "experiment": experiment.name,
        "source": experiment.source,
        "run_version": RUN_VERSION,
        "finished_runs": len(runs),
        "wanted_runs": len(wanted),
        "verdict": verdict(judgements) if complete else INCOMPLETE,
        "claims": [_claim_json(judgement) for judgement in judgements],
        "runs": [{"condition": label, **record} for label, record in runs],
    }
    replace_file(folder / RESULTS_FILE, _compact_json(result).encode())
    records: dict[str, list[Mapping[str, Any]]] = {}
    for label, record in runs:
        records.setdefault(label, []).append(record)
    if runs:
        draw(experiment, values, records, folder / FIGURE_FILE)
    notes = folder / NOTES_FILE
    text = readme(experiment, result, values, judgements, notes.read_text(encoding="utf-8") if notes.exists() else "")
    replace_file(folder / README_FILE, text.encode())
    return result


def readme(
    experiment: Experiment, result: Mapping[str, Any], values: Values, judgements: Sequence[Judgement], notes: str
) -> str:
    """The README: claim, protocol, ours beside the paper's, tests, verdict, why, deviations."""
    waiting = untuned(experiment)
    diverged = [run["condition"] for run in result["runs"] if run["status"] != "finished"]
    seeds = sorted({(run["run"]["pretraining_seed"], run["run"]["run_seed"]) for run in result["runs"]})
    lines = [
        f"# {experiment.title}",
        "",
        f"**Verdict: {result['verdict']}** ({result['finished_runs']} of {result['wanted_runs']} runs).",
        "",
        f"**Claim** ({_origin(experiment.source)}): {experiment.claim}",
        "",
        f"**Protocol**: [PROTOCOL.md](../PROTOCOL.md). {experiment.protocol}"
        + (f" **Not tuned, at the default rate: {', '.join(waiting)}.**" if waiting else ""),
        "",
        f"![{experiment.title}]({FIGURE_FILE})" if result["runs"] else "No run is finished.",
        "",
        "## Ours beside the paper's",
        f"Mean [95% interval] over {len(seeds)} runs (pretraining seed / run seed: "
        f"{', '.join(f'{a}/{b}' for a, b in seeds) or 'none'}). The paper's numbers are of other models and "
        f"benchmarks: "
        "compare the order, not the size.",
        "",
        *_table(experiment, values),
        "",
        f"Diverged, counted as 0: {', '.join(diverged) if diverged else 'none'}. Runs dropped: none.",
        "",
        "## Tests",
        *_tests(experiment, judgements),
        "",
    ]
    if notes.strip():
        lines += ["## Why", notes.strip(), ""]
    deviations = (*experiment.deviations, _deviation_of_scale(experiment))
    lines += ["## Deviations from the paper", *(f"- {text}" for text in deviations), ""]
    lines += [f"Again: `dopd experiment {experiment.name}`. Every run: [{RESULTS_FILE}]({RESULTS_FILE}).", ""]
    return "\n".join(lines)


def _deviation_of_scale(experiment: Experiment) -> str:
    steps = max(condition.run.steps for condition in experiment.conditions)
    return (
        f"Models of less than 0.7 M parameters on generated problems, {steps} steps, top 8 of some 80 words where "
        "the paper has 128."
    )


def _origin(source: str) -> str:
    return f"arXiv 2606.30626, {source}" if source.startswith(("Table", "Figure")) else source


def _table(experiment: Experiment, values: Values) -> list[str]:
    paper = list(dict.fromkeys(name for condition in experiment.conditions for name in condition.paper))
    header = [
        "condition",
        *(_COLUMN_NAMES.get(name, name) for name in experiment.columns),
        *(f"paper: {p}" for p in paper),
    ]
    rows = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for condition in experiment.conditions:
        cells = [_interval(summarise(values, condition.label, name), name) for name in experiment.columns]
        theirs = [f"{condition.paper[name]:g}" if name in condition.paper else "" for name in paper]
        rows.append(f"| {' | '.join([condition.label, *cells, *theirs])} |")
    return rows


def _interval(interval: Interval | None, metric: str, *, sign: bool = False) -> str:
    if interval is None:
        return ""
    plain = metric.rpartition("/")[2] in _PLAIN
    decimals = 3 if "entropy" in metric else 0 if metric == "tokens" else 1
    scale, digits = (1.0, decimals) if plain else (100.0, 1)
    plus = "+" if sign or metric in ("early_gain", "late_change", "kept") else ""
    texts = [f"{scale * value:{plus}.{digits}f}" for value in (interval.mean, interval.low, interval.high)]
    return texts[0] if interval.low == float("-inf") else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _tests(experiment: Experiment, judgements: Sequence[Judgement]) -> list[str]:
    if not judgements:
        return ["Made when every run is finished." if experiment.claims else "None: nothing was claimed."]
    rows = [
        "Paired over equal seeds; p is Holm's, over all tests of this experiment.",
        "",
        "| claim | metric | difference [95% interval] | p | outcome |",
        "|---|---|---|---|---|",
    ]
    for judgement in judgements:
        for place, test in enumerate(judgement.tests):
            p = "" if test.p != test.p else "< 0.001" if test.p < 0.001 else f"{test.p:.3f}"
            name = f"{judgement.claim.text} ({_formula(judgement.claim)})" if place == 0 else ""
            outcome = f"**{judgement.outcome}**" if place == 0 else ""
            difference = _interval(test.comparison.difference, test.metric, sign=True)
            rows.append(f"| {name} | {test.metric} | {difference} | {p} | {outcome} |")
    return rows


def _formula(claim: Claim) -> str:
    second = claim.second or "0"
    if claim.kind == "near":
        return f"{claim.first} within {claim.margin:g} of {second}"
    return f"{claim.first} {'>' if claim.kind == 'above' else '<'} {second}"


def _claim_json(judgement: Judgement) -> dict[str, Any]:
    tests = [
        {
            "metric": test.metric,
            "difference": [round(v, 6) for v in _bounds(test.comparison.difference)],
            "p_holm": None if test.p != test.p else round(test.p, 6),
            "pairs": test.pairs,
        }
        for test in judgement.tests
    ]
    return {
        "text": judgement.claim.text,
        "formula": _formula(judgement.claim),
        "outcome": judgement.outcome,
        "tests": tests,
    }


def _bounds(interval: Interval) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high


def _compact_json(result: Mapping[str, Any]) -> str:
    """One line for each run: a diff then shows which runs changed."""
    head = {name: value for name, value in result.items() if name != "runs"}
    body = ",\n".join(json.dumps(run, sort_keys=True) for run in result["runs"])
    return json.dumps(head, indent=1)[:-2] + f',\n "runs": [\n{body}\n]\n}}\n'
