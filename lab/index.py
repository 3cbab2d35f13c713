"""experiments/README.md: the verdict of every experiment on one page, beside the protocol."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dopd.files import replace_file
from lab.catalogue import EXPERIMENTS, get_experiment, models_without_recipe
from lab.spec import RESULTS_FILE, RUN_VERSION, Experiment
from lab.writing import README_FILE

PROTOCOL_FILE = "PROTOCOL.md"
_EARLIER = " (with tiny models that have been replaced since)"
_OTHERWISE = " (with settings that have changed since)"
_SEEDS = ("pretraining_seed", "run_seed")

_HEAD = """# Experiments

The paper's tables and figures with tiny models, one folder each. How they were made and judged:
[PROTOCOL.md](PROTOCOL.md); what was tried beside them: [LOG.md](LOG.md); the commands:
[docs/explanation/experiments.md](../docs/explanation/experiments.md).

| experiment | of the paper | what | runs | claims supported | verdict |
|---|---|---|---|---|---|
"""


def write_index(folder: Path) -> Path:
    """Write the page from the results.json files that there are; an experiment without one is named as not run."""
    lines = []
    for name in EXPERIMENTS:
        experiment = get_experiment(name)
        path = folder / name / RESULTS_FILE
        if path.exists():
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            outcomes = [claim["outcome"] for claim in result["claims"]]
            link, runs = f"[{name}]({name}/{README_FILE})", f"{result['finished_runs']} of {result['wanted_runs']}"
            supported = f"{outcomes.count('supported')} of {len(outcomes)}" if outcomes else ""
            verdict = result["verdict"] + _caveat(experiment, result)
        else:
            lacking = models_without_recipe(experiment)
            reason = f": no tiny model {', '.join(lacking)}" if lacking else ""
            link, runs, supported, verdict = name, "none", "", f"not run{reason}"
        lines.append(f"| {link} | {experiment.source} | {experiment.title} | {runs} | {supported} | {verdict} |")
    target = folder / README_FILE
    replace_file(target, (_HEAD + "\n".join(lines) + "\n").encode())
    return target


def _caveat(experiment: Experiment, result: Mapping[str, Any]) -> str:
    """Whether the experiment would be made otherwise today."""
    if result.get("run_version") != RUN_VERSION:
        return _EARLIER
    settings = [_without_seeds(condition.run.to_json()) for condition in experiment.conditions]
    same = all(_without_seeds(run["run"]) in settings for run in result["runs"])
    return "" if same else _OTHERWISE


def _without_seeds(run: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name not in _SEEDS}
