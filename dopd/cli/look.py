"""`dopd report` and `dopd inspect`: looking at runs, and at single answers."""

import argparse
from typing import Any


def add_report(commands: Any, command: Any) -> None:
    """The parser of `dopd report`; `command` makes a subparser (`dopd.cli.main`)."""
    parser = command(
        commands,
        "report",
        "one HTML file of one or several runs: table, curves, warnings, and every traced token",
        "  dopd report runs/tiny-dag\n  dopd report runs/quickstart\n"
        "  dopd report runs/vanilla runs/dopd --output both.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a folder with run folders in it")
    parser.add_argument("--output", help="file (default: report.html in RUN, or here for several)")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    from dopd.report.page import write_report

    path = write_report(arguments.runs, arguments.output)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB): open it in a browser; it needs no network")
