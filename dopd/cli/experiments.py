"""`dopd experiment`: the paper's tables and figures as commands."""

import argparse
import importlib.util
import sys
from typing import Any

from dopd.cli.values import positive
from dopd.errors import ConfigError


def add_experiment(commands: Any, command: Any) -> None:
    """The parser of `dopd experiment`; `command` makes a subparser (`dopd.cli.main`)."""
    parser = command(
        commands,
        "experiment",
        "the paper's tables and figures: runs, tests, a figure and a verdict; without a name, the list",
        "  dopd experiment\n  dopd experiment figure3\n  dopd experiment all --jobs 2\n"
        "  dopd experiment table4 --seeds 1 --output-dir runs/look\n"
        "  dopd experiment table1_dag --scale full --output-dir runs/launch\n"
        "an interrupted experiment goes on where it stopped",
    )
    parser.add_argument("name", nargs="?", help="an experiment, or `all`")
    parser.add_argument(
        "--scale",
        choices=["tiny", "full"],
        default="tiny",
        help="tiny: run it here; full: write launch configs for the paper's models (default tiny)",
    )
    parser.add_argument("--seeds", type=positive, help="run seeds for each pretraining seed (default three)")
    parser.add_argument("--jobs", type=positive, help="runs at a time (default: one for each core)")
    parser.add_argument("--output-dir", default="experiments", help="folder of folders (default experiments)")
    parser.add_argument("--restart", action="store_true", help="make finished runs anew")
    parser.add_argument("--report", action="store_true", help="make no run: write what finished runs give")
    parser.set_defaults(run=_experiment)


def _experiment(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("dopd.experiments") is None:
        raise ConfigError(
            "dopd experiment needs a checkout of the repository, where the experiments, their runs and their models "
            "are: start it there, after pip install --editable ."
        )
    from dopd.experiments.catalogue import EXPERIMENTS

    if arguments.name is None:
        _list()
        return
    if arguments.report and arguments.restart:
        raise ConfigError("--report makes no run and --restart makes all: give one of the two")
    if arguments.name != "all":
        _one(arguments.name, arguments)
        return
    failed = []
    for name in EXPERIMENTS:
        try:
            _one(name, arguments)
        except ConfigError as error:
            # The others can still be run.
            print(f"left out: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        raise ConfigError(f"{len(failed)} experiment(s) could not be run: {', '.join(failed)}; the reasons are above")


def _one(name: str, arguments: argparse.Namespace) -> None:
    if arguments.scale == "full":
        from dopd.experiments.launch import write_launch

        paths = write_launch(name, arguments.output_dir, seeds=arguments.seeds or 1)
        print(f"{name}: {len(paths) - 1} configs; look at them, then: sh {paths[-1]}")
        return
    from dopd.experiments.run import run_experiment
    from dopd.runs.progress import quiet_libraries

    quiet_libraries()
    run_experiment(
        name,
        folder=arguments.output_dir,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        resume=not arguments.restart,
        only_report=arguments.report,
    )


def _list() -> None:
    from rich.console import Console

    from dopd.experiments.catalogue import EXPERIMENTS, models_without_recipe
    from dopd.experiments.protocol import PRETRAINING_SEEDS, RUN_SEEDS
    from dopd.report.terminal import print_table

    rows = []
    for name, make in EXPERIMENTS.items():
        experiment = make()
        missing = models_without_recipe(experiment)
        runs = str(len(experiment.runs(PRETRAINING_SEEDS, RUN_SEEDS)))
        runs = f"no model {', '.join(missing)}" if missing else runs
        rows.append([name, experiment.source, experiment.title, runs])
    print_table(Console(), ["name", "of the paper", "what", "runs"], rows, title="dopd experiment NAME")
