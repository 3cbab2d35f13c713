"""`dopd hints write` and `dopd hints check`."""

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dopd.cli.values import add_asking, add_data, add_server, add_verifier, as_asked, data_as_named, positive, seed
from dopd.hints.kinds import KINDS
from dopd.shown import visible

if TYPE_CHECKING:
    from dopd.runs.asking import AskerSettings, Bill

INCOMPLETE = 1  # exit status where a budget left rows out


def add_write(actions: Any, command: Any) -> None:
    """The parser of `dopd hints write`; `command` makes a subparser (`dopd.cli.main`)."""
    parser = command(
        actions,
        "write",
        "write hints as the column privileged_context: by a model on a server or here, or by a rule",
        "  dopd hints write task:dag --rows 64 --kind steps --writer rules --output hints.jsonl\n"
        "  dopd hints write task:dag --rows 64 --kind other-problem --output control.jsonl\n"
        "  dopd hints write problems.jsonl --columns '{prompt: question}' --kind answer --output told.jsonl\n"
        "  dopd hints write problems.jsonl --columns '{prompt: question}' --kind steps --writer http://localhost:8000 "
        "--concurrency 32 --output hints.jsonl\n"
        "  dopd hints write problems.jsonl --columns '{prompt: question}' --kind steps --writer Qwen/Qwen3-8B "
        "--output hints.jsonl\n"
        "  dopd hints write problems.jsonl --columns '{prompt: question}' --kind steps --writer ./rule.py:hint "
        "--output hints.jsonl\n"
        "  dopd hints write task:scenes --rows 8 --kind caption --writer tiny:scenes/student --max-new-tokens 12 "
        "--output captions.parquet\n"
        "a call that ended early goes on where it was: replies are kept in OUTPUT.journal.jsonl, and not paid twice",
    )
    add_data(parser)
    parser.add_argument("--kind", choices=KINDS, required=True, help="what the hints are to be")
    parser.add_argument(
        "--writer",
        default="rules",
        help="an address, a model of this machine, rules (the default), or a function of your own: ./file.py:function",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="a .jsonl or .parquet file")
    _add_asker(parser, "writer", "DOPD_WRITER_API_KEY")
    parser.set_defaults(run=_write)


def add_check(actions: Any, command: Any) -> None:
    """The parser of `dopd hints check`; `command` makes a subparser (`dopd.cli.main`)."""
    parser = command(
        actions,
        "check",
        "have hints judged, or see whether a teacher answers better with them; keep the good ones",
        "  dopd hints check task:dag --rows 16 --teacher tiny:dag/teacher_needs_p --output good.jsonl\n"
        "  dopd hints check hints.jsonl --judge http://localhost:8000 --output good.jsonl\n"
        "  dopd hints check hints.jsonl --teacher Qwen/Qwen3-8B --verifier math --samples 4 --min-gain 0 "
        "--output good.jsonl\n"
        "rows that are dropped are in OUTPUT.dropped.jsonl, with the reason",
    )
    add_data(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="a .jsonl or .parquet file")
    parser.add_argument(
        "--judge", help="an address, or a model of this machine: is it correct, complete, free of leaks?"
    )
    parser.add_argument("--teacher", help="an address, or a model of this machine: it answers with p and without it")
    parser.add_argument("--teacher-model", help="its name on the server (default: the only one there)")
    add_verifier(parser, "of its answers: ")
    parser.add_argument("--samples", type=positive, default=1, help="its answers to each prompt (default 1, greedy)")
    parser.add_argument("--min-gain", type=float, metavar="GAIN", help="drop rows that gain less, from -1 to 1")
    parser.add_argument("--keep-rows", action="store_true", help="keep rows whose hint is dropped, without the hint")
    add_asking(parser)
    _add_asker(parser, "judge", "DOPD_JUDGE_API_KEY")
    parser.set_defaults(run=_check)


def _add_asker(parser: argparse.ArgumentParser, who: str, variable: str) -> None:
    group = parser.add_argument_group(f"how the {who} is asked")
    group.add_argument("--prompt-file", metavar="FILE", help="what it is asked, in the place of dopd's own text")
    group.add_argument(
        f"--{who}-model", dest="served_model", help="its name on the server (default: the only one there)"
    )
    add_server(group, variable)
    group.add_argument("--temperature", type=float, default=0.0, help="of its replies (default 0)")
    group.add_argument("--max-new-tokens", type=positive, default=1024, help="of a reply (default 1024)")
    group.add_argument("--batch-size", type=positive, default=16, help="of a model of this machine (default 16)")
    group.add_argument("--dtype", default="float32", help="of a model of this machine (default float32)")
    group.add_argument("--seed", type=seed, default=0)


def _asker(arguments: argparse.Namespace, where: str) -> "AskerSettings":
    from dopd.runs.asking import AskerSettings
    from dopd.runs.settings import yaml_mapping

    return AskerSettings(
        where,
        arguments.served_model,
        arguments.key_variable,
        arguments.concurrency,
        arguments.timeout,
        arguments.retries,
        arguments.price_in,
        arguments.price_out,
        arguments.budget,
        arguments.max_new_tokens,
        arguments.temperature,
        yaml_mapping("--request", arguments.request) or {},
        arguments.dtype,
        arguments.batch_size,
        arguments.seed,
    )


def _write(arguments: argparse.Namespace) -> int:
    from dopd.runs.hint_writing import write_hints
    from dopd.runs.quiet import quiet_libraries

    quiet_libraries()
    written = write_hints(
        data_as_named(arguments),
        arguments.kind,
        _asker(arguments, arguments.writer),
        arguments.output,
        prompt_file=arguments.prompt_file,
        seed=arguments.seed,
    )
    print(
        visible(
            f"{written.output}: {written.num_hints} of {written.num_rows} rows have a hint of kind {arguments.kind}"
        )
    )
    for reason, count in written.counted.items():
        print(visible(f"  {count} without: {reason} (see {written.left_out})"))
    _print_bill(written.bill, arguments)
    if written.num_leaks:
        print(f"{written.num_leaks} hints leak: see dopd hints audit {visible(written.output)}")
    return _status(written.bill)


def _check(arguments: argparse.Namespace) -> int:
    from dopd.runs.asking import Bill
    from dopd.runs.hint_checks import check_hints
    from dopd.runs.quiet import quiet_libraries
    from dopd.runs.settings import yaml_mapping

    quiet_libraries()
    teacher = None if arguments.teacher is None else _teacher(arguments)
    found = check_hints(
        data_as_named(arguments),
        arguments.output,
        judge=None if arguments.judge is None else _asker(arguments, arguments.judge),
        prompt_file=arguments.prompt_file,
        teacher=teacher,
        verifier=arguments.verifier,
        verifier_options=yaml_mapping("--verifier-options", arguments.verifier_options),
        samples=arguments.samples,
        min_gain=arguments.min_gain,
        keep_rows=arguments.keep_rows,
    )
    print(visible(f"{found.output}: {found.num_kept} of {found.num_rows} rows are kept; {found.num_hints} had a hint"))
    for fault, count in found.counted.items():
        print(visible(f"  {count} dropped: {fault} (see {found.side_file})"))
    if found.gain is not None and found.without is not None and found.with_p is not None:
        print(f"the teacher without p: {found.without.percent()} %; with p: {found.with_p.percent()} %")
        print(f"gain: {found.gain.percent()} points [95% interval over rows]")
    _print_bill(found.bill, arguments)
    if teacher is not None and isinstance(bill := getattr(teacher, "bill", None), Bill):
        _print_bill(bill, arguments)
    return _status(found.bill)


def _teacher(arguments: argparse.Namespace) -> Any:
    from dopd.data.views import PrivilegedTemplate
    from dopd.runs.circumstances import LOOKED_AT_FIELDS, circumstances
    from dopd.runs.hint_writing import journal_of, output_path
    from dopd.runs.local_models import LocalModel
    from dopd.runs.served_answers import ServedAnswers

    served = replace(_asker(arguments, arguments.teacher), model=arguments.teacher_model)
    if served.is_served:
        path = output_path(arguments.output, "--output", data_as_named(arguments))
        journal = journal_of(path.with_name(f"{path.name}.teacher"))
        return ServedAnswers(served, journal, PrivilegedTemplate(arguments.privileged_template))
    only = (*LOOKED_AT_FIELDS, "max_new_tokens")
    asked, taken = circumstances(
        arguments.teacher, only=only, **as_asked(arguments), max_new_tokens=arguments.max_new_tokens
    )
    if taken:
        print(visible(taken), file=sys.stderr)
    options = {"dtype": arguments.dtype, "batch_size": arguments.batch_size, "seed": arguments.seed}
    return LocalModel.load(arguments.teacher, asked, **options)


def _print_bill(bill: "Bill", arguments: argparse.Namespace) -> None:
    if not (bill.num_asked or bill.num_kept):
        return
    cost = f", cost {bill.cost:.4f}" if arguments.price_in or arguments.price_out else ""
    print(
        f"{bill.num_asked} replies, and {bill.num_kept} that were there: {bill.prompt_tokens} tokens of prompts, "
        f"{bill.completion_tokens} of replies{cost}"
    )
    if bill.num_uncounted:
        print(
            f"  the server does not say the tokens of {bill.num_uncounted} replies: they count as many as they may have"
        )
    if bill.num_left:
        print(
            f"the budget leaves {bill.num_left} requests out: the same command with a larger --budget goes on",
            file=sys.stderr,
        )


def _status(bill: "Bill") -> int:
    return INCOMPLETE if bill.num_left else 0
