"""The command line: each command is a thin call into the library."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import dopd
from dopd.checkout import lab_module
from dopd.cli import config_keys, look, plan
from dopd.cli.data import add_data_command
from dopd.cli.evaluate import add_eval
from dopd.cli.hints import add_hints
from dopd.cli.launch import add_launch, launch_command
from dopd.cli.output import USER_ERROR, with_any_output
from dopd.cli.parser import Parser
from dopd.cli.values import positive
from dopd.errors import ConfigError, DopdError
from dopd.files import not_written
from dopd.interrupts import ENDS_WITH, Stopped, end_with, exit_status, raising
from dopd.launched import is_main_process
from dopd.runs.recipes import recipe_names, recipe_path
from dopd.shown import visible

# Where commands write, besides what their flags name.
_PLACES = (
    "another folder: DOPD_CACHE is that of dopd's models, HF_HOME that of the hub's, TMPDIR that of temporary files"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what a user can mend becomes one line on standard error and exit status 2."""
    return with_any_output(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    # Where bitsandbytes is installed, each import says that faster kernels for a CPU are not.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    parser = build_parser()
    for argument in sys.argv[1:] if argv is None else argv:
        if argument != argument.encode(errors="replace").decode():
            parser.error(f"{argument!r} is not UTF-8: give the file another name")
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.run not in (_train, _doctor, _in_lab, plan.print_plan):
        arguments.parser.error(arguments.parser.unknown(rest))
    arguments.rest = rest
    parent = os.environ.pop(ENDS_WITH, None)
    if parent is not None:
        end_with(int(parent))
    try:
        with raising():
            return arguments.run(arguments) or 0
    except Stopped as stop:
        if is_main_process():  # all processes of a run have stopped
            with contextlib.suppress(OSError):  # of a terminal that is gone
                print(visible(stop.message), file=sys.stderr)
        return exit_status(stop.signal)
    except BrokenPipeError:
        raise
    except (DopdError, OSError) as error:
        status = error.exit_status if isinstance(error, DopdError) else USER_ERROR
        if arguments.debug:
            print(visible(traceback.format_exc()), file=sys.stderr)
            return status
        line = str(error)
        if not isinstance(error, DopdError):
            # A file that cannot be written: a full disk, a folder that is not there or is not ours.
            if error.filename is None:
                raise
            choose = _place(arguments, str(error.filename))
            note = not_written(error, error.filename, choose=choose) or f"{error.filename!r}: {error.strerror}"
            line = f"{note} (--debug shows where)"
        print(f"error: {visible(line)}", file=sys.stderr)
        return status
    except KeyboardInterrupt:  # outside of the main thread signals are Python's own
        print("interrupted", file=sys.stderr)
        return exit_status(signal.SIGINT)


def _place(arguments: argparse.Namespace, path: str) -> str:
    """What a user can choose otherwise where `path` cannot be written."""
    there = Path(path).absolute()
    for flag in ("output", "html", "output_dir"):
        chosen = getattr(arguments, flag, None)
        place = None if chosen is None else Path(chosen).absolute()
        if place is not None and (there.is_relative_to(place) or place.is_relative_to(there)):
            return f"another --{flag.replace('_', '-')}"
    return "another file: --output" if arguments.command == "report" else _PLACES


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="dopd",
        description="Dual on-policy distillation: small models learn from their own answers and privileged teachers.",
        epilog="examples:\n  dopd quickstart\n"
        "  dopd train tiny-dag --method vanilla --output_dir runs/vanilla\n"
        "  dopd eval runs/vanilla\n  dopd train qwen3-8b-to-1.7b --dry-run",
    )
    parser.add_argument("--version", action="version", version=f"dopd {dopd.__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    add_eval(commands, _command)
    _add_listing(commands)
    config_keys.add_config(commands, _command)
    add_data_command(commands, _command)
    add_hints(commands, _command)
    _add_quickstart(commands)
    _add_example(commands)
    _add_doctor(commands)
    plan.add_plan(commands, _command)
    look.add_report(commands, _command)
    look.add_inspect(commands, _command)
    _add_lab(commands)
    return parser


def _command(commands: "argparse._SubParsersAction", name: str, summary: str, examples: str) -> Parser:
    parser: Parser = commands.add_parser(name, help=summary, description=summary, epilog=f"examples:\n{examples}")
    parser.set_defaults(parser=parser)
    return parser


def _add_train(commands: "argparse._SubParsersAction") -> None:
    parser = _command(
        commands,
        "train",
        "distil a student; any key of the config can be given as --key value",
        "  dopd train tiny-dag\n  dopd train tiny-dag --method vanilla --learning_rate "
        "3e-4 --output_dir runs/vanilla\n  dopd train tiny-dag --method_options "
        "'{top_k: 8, tail: renormalize}' --dry-run\n"
        "  dopd train tiny-dag --save_strategy steps --save_steps 20 --output_dir runs/saved\n"
        "  dopd train tiny-dag --save_strategy steps --save_steps 20 --output_dir runs/saved "
        "--resume_from_checkpoint true\n"
        "  dopd train qwen3-8b-to-1.7b --accelerate_config multi_gpu --num_processes 8\n"
        "the one with --resume_from_checkpoint goes on from the newest whole checkpoint of the one before it\n\n"
        "often used keys:\n  model_name_or_path, teacher_model_name_or_path, dataset_name or task, privileged_kind, "
        "output_dir, method, method_options, learning_rate, max_steps, per_device_train_batch_size, "
        "gradient_accumulation_steps, num_generations, max_completion_length, student_eval_steps, trace_steps, "
        "use_peft, report_to, seed, save_steps, save_total_limit, resume_from_checkpoint, overwrite\n"
        "CONFIG is a YAML file or the name of a recipe, and may be left out where flags say everything; "
        "method, task and verifier may be your own code, as "
        "package.module:name or ./file.py:name\n"
        f"all keys, or those with a word in them: dopd config [WORD]\n\nrecipes:\n{_recipes()}",
    )
    parser.usage = "dopd train [CONFIG] [--dry-run] [--key value ...]"
    # `config` is found by `_train`, which knows the keys that need no value: flags stand before it or behind it.
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, the table, and what `dopd doctor CONFIG` finds, and stop",
    )
    _add_token_ids(parser)
    add_launch(parser)
    parser.set_defaults(run=_train)


def _add_token_ids(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token-ids", action="store_true", help="also print the token ids of row 0, in every view")


def _recipes() -> str:
    """Names of recipes, each with the first line of its comment."""
    return "\n".join(
        f"  {name}: {recipe_path(name).read_text(encoding='utf-8').splitlines()[0].lstrip('# ').rstrip(':')}"
        for name in recipe_names()
    )


def _train(arguments: argparse.Namespace) -> int:
    from dopd.progress import say
    from dopd.report.closing import say_outcome
    from dopd.runs.quiet import quiet_libraries
    from dopd.runs.settings import settings_of_command
    from dopd.runs.train import describe, make_config, train

    quiet_libraries()
    config, flags = _config_and_keys(arguments)
    settings = settings_of_command("train", config, flags)
    launch = launch_command(arguments, [*(["--debug"] if arguments.debug else []), "train", *arguments.rest])
    if arguments.dry_run:
        from dopd.cli.doctor import print_findings
        from dopd.runs.examination import examine

        say(f"{describe(settings, make_config(settings, elsewhere=True))}\n")
        return 2 if print_findings(examine(settings, token_ids=arguments.token_ids), ("fail",)) else 0
    if launch is not None:  # settings that cannot work are said once, and not by every process
        make_config(settings, elsewhere=True)
        os.execv(launch[0], launch)
    say_outcome(train(settings))
    return 0


def _config_and_keys(arguments: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The config that a command names, and the keys it is given; flags of the command itself, misspelt, are refused."""
    from dopd.runs.settings import all_settings, split_arguments
    from dopd.settings.foreign import FOREIGN

    config, flags = split_arguments(arguments.rest)
    arguments.parser.check_none_meant(flags, [*all_settings(), *FOREIGN])
    return config, flags


def _add_listing(commands: "argparse._SubParsersAction") -> None:
    tasks = _command(
        commands, "tasks", "generated problems: one example of each, with its privileged texts", "  dopd tasks dag"
    )
    tasks.add_argument("name", nargs="?", help="show one task in full")
    tasks.set_defaults(run=_tasks)
    methods = _command(commands, "methods", "routing tables by name", "  dopd methods\n  dopd methods dopd")
    methods.add_argument("name", nargs="?", help="show one table in full; your own, too: ./file.py:function")
    methods.add_argument("--markdown", action="store_true", help="all of them, as docs/reference/methods.md lists them")
    methods.set_defaults(run=_methods)


def _tasks(arguments: argparse.Namespace) -> None:
    from dopd.cli.show import print_tasks

    print_tasks(arguments.name)


def _methods(arguments: argparse.Namespace) -> None:
    from dopd.cli.show import methods_as_markdown, print_methods

    if arguments.markdown:
        print(methods_as_markdown(), end="")
    else:
        print_methods(arguments.name)


def _add_quickstart(commands: "argparse._SubParsersAction") -> None:
    parser = _command(
        commands,
        "quickstart",
        "tiny teacher and student, Vanilla OPD beside DOPD, one table and plots; minutes on two cores",
        "  dopd quickstart\n  dopd quickstart --seeds 1 --output-dir runs/look",
    )
    parser.add_argument("--config", default=None, help="YAML file or recipe (default tiny-dag)")
    parser.add_argument("--output-dir", default="runs/quickstart")
    parser.add_argument(
        "--methods",
        default="vanilla,privileged_student,dopd",
        help="comma-separated, as --method of train (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each method (default 3)")
    parser.add_argument("--jobs", type=positive, default=None, help="runs at a time (default: one for each core)")
    parser.set_defaults(run=_quickstart)


def _quickstart(arguments: argparse.Namespace) -> None:
    from dopd.runs.quickstart import quickstart
    from dopd.runs.quiet import quiet_libraries

    quiet_libraries()
    quickstart(
        config=arguments.config,
        folder=arguments.output_dir,
        methods=arguments.methods.split(","),
        seeds=arguments.seeds,
        jobs=arguments.jobs,
    )


def _add_example(commands: "argparse._SubParsersAction") -> None:
    parser = _command(
        commands,
        "example",
        "from raw problems to a judged model: data, hints, checks, two runs, evaluation; minutes on two cores",
        "  dopd example\n  dopd example --dry-run\n"
        "each command is printed before it runs, to be copied; a call that was interrupted goes on where it was, and "
        "commands whose files you have edited run again",
    )
    parser.add_argument("--output-dir", default="runs/example", help="of files and results (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="write the files and print the commands, and run none")
    parser.set_defaults(run=_example)


def _example(arguments: argparse.Namespace) -> None:
    from dopd.runs.example import example

    example(arguments.output_dir, dry_run=arguments.dry_run)


def _add_doctor(commands: "argparse._SubParsersAction") -> None:
    parser = _command(
        commands,
        "doctor",
        "check the environment, and a config's models, data and memory before they are needed",
        "  dopd doctor\n  dopd doctor tiny-dag\n  dopd doctor tiny-dag --learning_rate 3e-4 --token-ids\n"
        "HERE: what this machine lacks, and another may have; FAIL: what works nowhere",
    )
    parser.usage = "dopd doctor [CONFIG] [--token-ids] [--local-teacher MODEL] [--key value ...]"
    _add_token_ids(parser)
    parser.add_argument("--local-teacher", metavar="MODEL", help="compare the teacher on teacher_server with this one")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from dopd.cli.doctor import run_doctor

    config, flags = _config_and_keys(arguments)
    return run_doctor(config, flags, token_ids=arguments.token_ids, local_teacher=arguments.local_teacher)


def _add_lab(commands: "argparse._SubParsersAction") -> None:
    """Commands whose arguments `lab` reads."""
    for name, summary in {
        "experiment": "the paper's tables and figures: runs, tests, a figure and a verdict",
        "tiny": "obtain the tiny models of an embedded task, or train them",
    }.items():
        parser = commands.add_parser(name, help=f"{summary} (in a checkout of the repository)", add_help=False)
        parser.set_defaults(run=_in_lab)


def _in_lab(arguments: argparse.Namespace) -> None:
    lab = lab_module("command")
    if lab is None:
        raise ConfigError(
            f"dopd {arguments.command} needs a checkout of the repository, where the experiments, their runs and their "
            "models are: start it there, after pip install --editable ."
        )
    lab.main(arguments)


if __name__ == "__main__":
    logging.captureWarnings(True)
    sys.exit(main())
