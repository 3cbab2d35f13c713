"""The commands that dopd has in a checkout alone: the paper's tables and figures, and the tiny models."""

import argparse
import json
import sys

from rich.console import Console

from dopd.cli.parser import Parser
from dopd.cli.values import positive, seed
from dopd.errors import ConfigError, did_you_mean
from dopd.report.terminal import print_table


def main(arguments: argparse.Namespace) -> None:
    """Run `dopd experiment` or `dopd tiny`.

    Args:
        arguments: with the `command`, and its own arguments in `rest`; they are added.

    Raises:
        SystemExit: they are not those of the command.
        DopdError: what a user can mend.
    """
    build_parser(arguments.command).parse_args(arguments.rest, arguments)
    from dopd.runs.quiet import quiet_libraries

    quiet_libraries()
    (_experiment if arguments.command == "experiment" else _tiny)(arguments)


def build_parser(command: str) -> Parser:
    """The parser of `"experiment"` or `"tiny"`."""
    parser = Parser(prog=f"dopd {command}")
    (_add_experiment if command == "experiment" else _add_tiny)(parser)
    return parser


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.description = "the paper's tables and figures: runs, tests, a figure and a verdict; without a name, the list"
    parser.epilog = (
        "examples:\n  dopd experiment\n  dopd experiment figure3\n  dopd experiment all --jobs 2\n"
        "  dopd experiment table4 --seeds 1 --output-dir runs/look\n"
        "  dopd experiment table1_dag --scale full --output-dir runs/launch\n"
        "an interrupted experiment goes on where it stopped"
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


def _add_tiny(parser: argparse.ArgumentParser) -> None:
    parser.description = "obtain the tiny models of an embedded task: packed ones, or trained here"
    parser.epilog = (
        "examples:\n  dopd tiny dag\n  dopd tiny dag --role student --seed 1\n  dopd tiny dag --role student --train"
    )
    parser.add_argument("task")
    parser.add_argument("--role", help="one role (default: all)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--train", action="store_true", help="train it here, even if there are weights of it")


def _experiment(arguments: argparse.Namespace) -> None:
    from lab.catalogue import EXPERIMENTS

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
        from lab.launch import write_launch

        paths = write_launch(name, arguments.output_dir, seeds=arguments.seeds or 1)
        print(f"{name}: {len(paths) - 1} configs; look at them, then: sh {paths[-1]}")
        return
    from lab.run import run_experiment

    run_experiment(
        name,
        folder=arguments.output_dir,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        resume=not arguments.restart,
        only_report=arguments.report,
    )


def _list() -> None:
    from lab.catalogue import EXPERIMENTS, models_without_recipe
    from lab.protocol import PRETRAINING_SEEDS, RUN_SEEDS

    rows = []
    for name, make in EXPERIMENTS.items():
        experiment = make()
        missing = models_without_recipe(experiment)
        runs = str(len(experiment.runs(PRETRAINING_SEEDS, RUN_SEEDS)))
        runs = f"no model {', '.join(missing)}" if missing else runs
        rows.append([name, experiment.source, experiment.title, runs])
    print_table(Console(), ["name", "of the paper", "what", "runs"], rows, title="dopd experiment NAME")


def _tiny(arguments: argparse.Namespace) -> None:
    """Obtain tiny models and say what they can do."""
    from dopd.tiny.shipped import CARD_NAME
    from lab.tiny import RECIPES, tiny_model_path

    task = arguments.task
    if task not in RECIPES:
        hint = did_you_mean(task, RECIPES)
        raise ConfigError(f"task (={task!r}) must be one of {', '.join(RECIPES)}: these have tiny models.{hint}")
    rows = []
    for name in [arguments.role] if arguments.role else RECIPES[task]:
        path = tiny_model_path(task, name, arguments.seed, train=arguments.train)
        card = json.loads((path / CARD_NAME).read_text())
        measured = {key: value for key, value in card.items() if key.startswith("accuracy")}
        rows.append([name, str(path), json.dumps(measured)])
    print_table(Console(), ["role", "folder", "measured"], rows)
