"""`dopd data`: a look at rows before anything is trained on them."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopd.cli.values import add_asking, add_data, as_asked, data_as_named, positive
from dopd.files import replace_file
from dopd.runs.layout_names import layout_names
from dopd.shown import visible

if TYPE_CHECKING:
    from rich.console import Console

    from dopd.runs.data_look import DataLook, Reader

_ROWS_NAMED = 5


def add_data_command(commands: Any, command: Any) -> None:
    """The parser of `dopd data`; `command` makes a subparser (`dopd.cli.main`)."""
    parser = command(
        commands,
        "data",
        "look at rows before training: columns and a mapping, views, lengths, duplicates, overlap, and what is dropped",
        "  dopd data problems.jsonl\n"
        "  dopd data problems.jsonl --model tiny:dag/student --write data.yaml\n"
        "  dopd data problems.jsonl --keep '{distinct: true, filled: [answer]}' --output kept.jsonl\n"
        "  dopd data dapo-math-17k --output problems.parquet\n"
        "what is written with --write is a configuration: `dopd train data.yaml --model_name_or_path MODEL`",
    )
    add_data(parser)
    parser.add_argument("--held-out", metavar="DATA", help="another dataset: how many of its rows ask the same?")
    parser.add_argument("--layout", choices=layout_names(), help="DATA is a copy of this dataset; DATA may be its name")
    parser.add_argument(
        "--keep",
        help="rows that are kept, as YAML: '{distinct: true, filled: [answer], between: {difficulty: [1, 15]}, "
        "without: {prompt: [<image>]}}' (default: those of the layout)",
    )
    parser.add_argument("--model", help="show rows as this model reads them, in its tokens; no weight is loaded")
    parser.add_argument("--teacher", help="another model, whose tokens and context count, too")
    add_asking(parser)
    parser.add_argument("--max-completion-length", type=positive, help="of an answer (default: as trained, or 256)")
    parser.add_argument("--max-prompt-length", type=positive, help="as in training")
    parser.add_argument("--write", metavar="FILE", help="write the mapping, as a configuration that reads these rows")
    parser.add_argument("--output", metavar="FILE", help="write the rows that are kept, .jsonl or .parquet")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_data)


def _data(arguments: argparse.Namespace) -> None:
    from dopd.runs.data_look import config_of_data, look_at
    from dopd.runs.hint_writing import output_path, write_rows
    from dopd.runs.layouts import read_layout
    from dopd.runs.quiet import quiet_libraries
    from dopd.runs.row_filters import Keep
    from dopd.runs.settings import yaml_mapping
    from dopd.settings import dump_yaml

    quiet_libraries()
    layout = read_layout(arguments.layout) if arguments.layout else None
    if layout is None and arguments.data in layout_names() and not os.path.exists(arguments.data):
        layout = read_layout(arguments.data)
        arguments.data, arguments.split = layout.dataset_name, arguments.split or layout.split
    data = data_as_named(arguments)
    output = output_path(arguments.output, "--output", data) if arguments.output else None
    keep = yaml_mapping("--keep", arguments.keep)
    found, rows = look_at(
        data,
        _readers(arguments),
        layout=layout,
        keep=Keep.from_mapping(keep) if keep is not None else None,
        held_out=arguments.held_out,
        max_prompt_length=arguments.max_prompt_length,
    )
    if arguments.json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        _print(found)
    if arguments.write:
        replace_file(Path(arguments.write), dump_yaml(config_of_data(data, found)).encode())
        print(visible(f"{arguments.write}: the mapping, as a configuration"), file=sys.stderr)
    if output is not None:
        write_rows(rows, output)
        print(visible(f"{output}: {len(rows)} rows under the names of a run"), file=sys.stderr)


def _readers(arguments: argparse.Namespace) -> list["Reader"]:
    from dopd.runs.circumstances import LOOKED_AT_FIELDS, circumstances
    from dopd.runs.data_look import Reader

    readers = []
    for name in dict.fromkeys([arguments.model, arguments.teacher]):
        if name is not None:
            options = {**as_asked(arguments), "max_new_tokens": arguments.max_completion_length}
            asked, _ = circumstances(name, only=(*LOOKED_AT_FIELDS, "max_new_tokens"), **options)
            readers.append(Reader.of(name, asked))
    return readers


def _print(found: "DataLook") -> None:
    from rich.console import Console

    from dopd.report.terminal import print_paragraph, print_table
    from dopd.runs.data_look import reasons_in_words
    from dopd.settings import dump_yaml

    console = Console()
    columns = [
        [one["name"], one["type"], "" if one["missing"] is None else str(one["missing"]), one["example"]]
        for one in found.columns
    ]
    title = f"{found.name}: {found.num_rows} rows"
    print_table(console, ["column", "type", "missing", "example"], columns, title=title, right={"missing"})
    mapping = dump_yaml(found.mapping, flow=True)
    guess = f" ({', '.join(found.guessed)}: a guess)" if found.guessed else ""
    print_paragraph(console, "columns", f"{mapping if found.mapping else 'as they are'}{guess}")
    _print_examples(console, found.examples)
    _print_lengths(console, found)
    if found.filtered:
        left = f"{found.num_kept} of {found.num_rows} rows are kept; {reasons_in_words(found.filtered)}"
        print_paragraph(console, "filters", left)
    repeated = f"{found.num_repeated} of {found.num_kept} rows ask what an earlier row asks"
    if found.num_contradictory:
        repeated += f", {found.num_contradictory} of them with another answer"
    print_paragraph(console, "duplicates", repeated)
    print_paragraph(console, "without p", f"{found.num_without_privileged} rows have no privileged context")
    for name, count in found.overlaps.items():
        print_paragraph(console, "overlap", f"{count} rows of {name} ask what a row here asks")
    for reason, rows in found.unusable.items():
        named = ", ".join(map(str, rows[:_ROWS_NAMED])) + (", ..." if len(rows) > _ROWS_NAMED else "")
        print_paragraph(console, "refused", f"{len(rows)} row(s) ({named}): {reason}")
    if any("longer than" in reason for reason in found.unusable):
        print_paragraph(console, "note", "overlong_prompts: drop leaves rows that are too long out, and counts them")
    for note in found.notes:
        print_paragraph(console, "note", note)


def _print_examples(console: "Console", examples: Sequence[Mapping[str, str]]) -> None:
    from rich.markup import escape

    for number, views in enumerate(examples):
        for view, text in views.items():
            console.print(f"[bold]row {number}, {view}[/bold]", highlight=False)
            console.print(escape(visible(text)), soft_wrap=True, highlight=False)


def _print_lengths(console: "Console", found: "DataLook") -> None:
    from dopd.report.terminal import print_table

    rows = [
        [
            one.view,
            f"tokens of {one.reader}" if one.reader else "words",
            *map(str, (one.median, one.p95, one.longest)),
            "" if one.allowed is None else f"{one.num_too_long} above {one.allowed}",
        ]
        for one in found.lengths
    ]
    if rows:
        header = ["view", "in", "median", "95%", "longest", "too long"]
        print_table(console, header, rows, title="lengths", right={"median", "95%", "longest"})
