"""`dopd report` and `dopd inspect`: looking at runs, and at single answers."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopd.cli.values import add_asking, add_verifier, as_asked, positive, seed
from dopd.errors import ConfigError
from dopd.files import check_plain, replace_file
from dopd.shown import visible


def add_report(commands: Any, command: Any) -> None:
    """The parser of `dopd report`; `command` makes a subparser (`dopd.cli.main`)."""
    parser = command(
        commands,
        "report",
        "one HTML file of one or several runs: verdict, paired tests of methods over seeds, warnings, curves, tokens; "
        "or of results of dopd eval: models with their intervals, and paired differences",
        "  dopd report runs/tiny-dag\n  dopd report runs/quickstart\n"
        "  dopd report runs/vanilla runs/dopd --output both.html\n  dopd report both",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder, results of dopd eval, or a folder with either in it",
    )
    parser.add_argument("--output", help="file (default: report.html in RUN, or here for several)")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from dopd.report.evaluations import evaluation_files
    from dopd.report.page import page_path, report_data, write_page

    target = page_path(arguments.runs, arguments.output)
    files = evaluation_files(arguments.runs)
    if files:
        _report_evaluations(files, target)
        return
    data = report_data(arguments.runs)
    path = write_page(data, target)
    _print_verdict(Console(), data)
    _print_place(path)


def _report_evaluations(files: Sequence[Path], target: Path) -> None:
    """The page of results that were kept, and their tables."""
    from dopd.cli.evaluate import print_evaluations
    from dopd.report.evaluations import by_rows, evaluations_data, read_evaluations
    from dopd.report.page import write_page

    evaluations = read_evaluations(files)
    path = write_page(evaluations_data(evaluations), target)
    for group in by_rows(evaluations):
        print_evaluations(group, as_json=False)
    _print_place(path)


def _print_place(path: Path) -> None:
    print(f"{visible(path)} ({path.stat().st_size / 2**20:.1f} MiB): open it in a browser; it needs no network")


def _print_verdict(console: Any, data: Mapping[str, Any]) -> None:
    """The verdict, the differences where there are several methods, warnings, and what to do next."""
    from dopd.report.terminal import print_paragraph

    found = data["verdict"]
    print_paragraph(console, "verdict", found["sentence"])
    if len({run["label"] for run in data["runs"]}) > 1:
        for row in found["table"]["rows"]:
            greedy, greedy_says, sampled, sampled_says, _ = (cell["text"] for cell in row["cells"])
            figures = f"greedy {greedy}, {greedy_says}; sampled {sampled}, {sampled_says}"
            print_paragraph(console, row["label"], figures, "  ")
        print_paragraph(console, "differences", found["note"])
    for about in data["findings"]:
        for warning in about["warnings"]:
            numbers = " ".join(": ".join(filter(None, [run["run"], run["text"]])) for run in warning["runs"])
            label = "warning" if warning["level"] == "bad" else "note"
            print_paragraph(console, label, f"{about['method']}: {warning['title']}. {numbers} {warning['advice']}")
    for step in found["next"]:
        print_paragraph(console, "next", step)


def add_inspect(commands: Any, command: Any) -> None:
    """The parser of `dopd inspect`."""
    parser = command(
        commands,
        "inspect",
        "one prompt without training: every token of the student's answer, as the method would teach it",
        "  dopd inspect --student tiny:dag/student --teacher tiny:dag/teacher --prompt 'a 3 b a 4 ? b' "
        "--privileged 'plan a b' --privileged-template '{prompt} {privileged_context}'\n"
        "  dopd inspect --student Qwen/Qwen3-1.7B --teacher Qwen/Qwen3-8B --prompt @question.txt "
        "--privileged @hint.txt --html look.html\n"
        "text that begins with @ names a file",
    )
    parser.add_argument("--student", required=True, help="hub id, folder, or tiny:TASK/ROLE")
    parser.add_argument("--teacher", help="the same; a method that reads no teacher needs none")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--privileged", help="p: what teacher and privileged student see beside it")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture of the question")
    parser.add_argument("--privileged-image", action="append", default=[], metavar="FILE", help="a picture of p")
    parser.add_argument(
        "--completion", action="append", help="an answer to look at; may be given again (default: the student answers)"
    )
    parser.add_argument("--method", default="dopd", help="see `dopd methods`; or ./file.py:function")
    parser.add_argument("--rollouts", type=positive, default=1, help="answers to draw (default 1)")
    parser.add_argument("--greedy", action="store_true", help="the likeliest tokens in place of drawn ones")
    parser.add_argument("--max-new-tokens", type=positive, default=256)
    add_asking(parser)
    parser.add_argument("--temperature", type=float, help="of answers and scores (default: that of the run, or 1)")
    parser.add_argument("--thresholds-from", metavar="RUN", help="a run whose averages route (default: these answers')")
    _add_rewards(parser)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--html", help="also write a page")
    parser.add_argument("--json", action="store_true", help="print the records as JSON lines instead")
    parser.set_defaults(run=_inspect)


def _add_rewards(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "scores and rewards", "of methods that learn from them (default: as in the student's run)"
    )
    add_verifier(group)
    group.add_argument(
        "--reward-funcs", action="append", metavar="NAME", help="the same, or 'verifier'; may be repeated"
    )
    group.add_argument("--reward-weights", type=float, nargs="+", metavar="W", help="one for each of them")
    group.add_argument("--row", help="what they read beside the prompt, as YAML: '{answer: 42}'")


def _inspect(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from dopd.cli.terminal import print_records
    from dopd.methods import table
    from dopd.report.page import check_page, inspection_page
    from dopd.runs.circumstances import circumstances
    from dopd.runs.inspection import inspect_prompt, looked_at_fields
    from dopd.runs.quiet import quiet_libraries
    from dopd.runs.settings import yaml_mapping

    quiet_libraries()
    if arguments.html:
        check_page(Path(arguments.html), "html")
    judges = {name: getattr(arguments, name) for name in ("verifier", "reward_funcs", "reward_weights")}
    judges["verifier_options"] = yaml_mapping("--verifier-options", arguments.verifier_options)
    asked = {**as_asked(arguments), **judges, "temperature": arguments.temperature}
    _, note = circumstances(arguments.student, **asked, only=looked_at_fields(table(arguments.method)))
    if note:
        print(visible(note), file=sys.stderr)
    records = inspect_prompt(
        arguments.student,
        arguments.teacher,
        _text("prompt", arguments.prompt),
        None if arguments.privileged is None else _text("privileged", arguments.privileged),
        images=arguments.image,
        privileged_images=arguments.privileged_image,
        completion=arguments.completion and [_text("completion", text) for text in arguments.completion],
        method=arguments.method,
        rollouts=arguments.rollouts,
        greedy=arguments.greedy,
        max_new_tokens=arguments.max_new_tokens,
        **asked,
        columns=yaml_mapping("--row", arguments.row),
        thresholds_from=arguments.thresholds_from,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    if arguments.json:
        for record in records:
            print(json.dumps(record))
    else:
        print_records(Console(), records)
    if arguments.html:
        subtitle = f"student {arguments.student}, teacher {arguments.teacher or 'none'}, method {arguments.method}"
        replace_file(Path(arguments.html), inspection_page("One prompt", subtitle, records).encode())
        print(visible(arguments.html), file=sys.stderr)


def _text(flag: str, text: str) -> str:
    if not text.startswith("@"):
        return text
    check_plain(f"--{flag}", text[1:])
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{text[1:]!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{text[1:]!r} is not UTF-8: save it with that encoding") from None
