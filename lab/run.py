"""Run an experiment: what is missing is run, what is there is used again, and the folder is written."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dopd.errors import ConfigError
from dopd.files import leaving_no_folder
from lab.catalogue import get_experiment, models_without_recipe
from lab.index import PROTOCOL_FILE, write_index
from lab.pool import execute_all
from lab.protocol import PRETRAINING_SEEDS, RUN_SEEDS, untuned
from lab.spec import Experiment, RunSpec
from lab.store import RunStore, missing, published
from lab.writing import INCOMPLETE, check_experiment_folder, write_experiment


def run_experiment(
    name: str,
    *,
    folder: str | Path = "experiments",
    seeds: int | None = None,
    jobs: int | None = None,
    resume: bool = True,
    only_report: bool = False,
    store: RunStore | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Make an experiment's missing runs at tiny scale and write its folder.

    Args:
        name (`str`): a key of `EXPERIMENTS`.
        folder (`str` or `Path`): where the experiment's folder is made.
        seeds (`int`, *optional*): run seeds for each pretraining seed; the protocol's if left out.
        jobs (`int`, *optional*): runs at a time; one for each core if left out.
        resume (`bool`): use finished runs, of this machine and of the results.json files in `folder`; `False` makes
            every run anew.
        only_report (`bool`): make no run; write the folder from those that are finished.
        store (`RunStore`, *optional*): where finished runs are kept.

    Returns:
        What results.json holds.
    """
    experiment = get_experiment(name)
    if seeds is not None and seeds < 1:
        raise ConfigError(f"seeds (={seeds}) must be at least 1")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs (={jobs}) must be at least 1")
    missing_models = models_without_recipe(experiment)
    if missing_models:
        raise ConfigError(
            f"experiment {name!r} cannot be run at tiny scale: no recipe makes {', '.join(missing_models)} "
            "(lab.tiny.recipes). --scale full writes its launch configs"
        )
    console, store = console or Console(), store or RunStore()
    target = Path(folder) / experiment.name
    with leaving_no_folder(target):
        check_experiment_folder(experiment, target)
    conditions = experiment.runs(PRETRAINING_SEEDS, RUN_SEEDS if seeds is None else tuple(range(seeds)))
    _say_plan(console, experiment, conditions)
    keyed = [(condition.label, store.key(spec), spec) for condition, spec in conditions]
    committed = published(Path(folder)) if resume else {}
    finished = committed | store.read()
    if not only_report:
        todo = missing([(key, spec) for _, key, spec in keyed], finished if resume else ())
        count = len({key for _, key, _ in keyed})
        console.print(f"{count - len(todo)} of {count} runs are there; {len(todo)} to do")
        execute_all(todo, store.add, jobs=jobs or os.cpu_count() or 1, console=console)
        finished = committed | store.read()
    runs = [(label, finished[key]) for label, key, _ in keyed if key in finished]
    result = write_experiment(experiment, runs, [(label, spec) for label, _, spec in keyed], target)
    if (Path(folder) / PROTOCOL_FILE).is_file():
        write_index(Path(folder))
    console.print(
        f"[bold]{experiment.name}: {result['verdict']}[/bold] ({len(runs)} of {len(keyed)} runs). See {target}"
    )
    if result["verdict"] == INCOMPLETE:
        console.print("Start the command again to go on.")
    return result


def _say_plan(console: Console, experiment: Experiment, runs: Sequence[tuple[Any, RunSpec]]) -> None:
    models = sorted({model for _, spec in runs for model in spec.models})
    console.print(
        f"[bold]{experiment.title}[/bold] ({experiment.source}): {len(experiment.conditions)} conditions, "
        f"{len(runs)} runs.\n"
        f"Tiny models: {', '.join(models)} (those of the repository, or trained here once, a minute or two each)"
    )
    if waiting := untuned(experiment):
        console.print(
            f"[yellow]Not tuned, at the default rate: {', '.join(waiting)}. Run `dopd experiment tuning` and enter the "
            "rates in lab.protocol first, or the comparison is not the protocol's.[/yellow]"
        )
