"""`dopd hints`: hints are written, checked and audited; here, the audit."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopd.cli.hint_writing import add_check, add_write
from dopd.cli.values import add_asking, add_data, add_verifier, as_asked, data_as_named, positive, seed
from dopd.files import replace_file
from dopd.hints.kinds import KINDS
from dopd.shown import visible

if TYPE_CHECKING:
    from dopd.hints.audit import Audit
    from dopd.runs.hints import HintData

LEAKING = 1  # exit status where more hints leak than are allowed
_WORST = 5


def add_hints(commands: Any, command: Any) -> None:
    """The parser of `dopd hints`; `command` makes a subparser (`dopd.cli.main`)."""
    parser = command(
        commands,
        "hints",
        "privileged texts (p): write them, check them, and see what they give away",
        "  dopd hints write task:dag --kind steps --output hints.jsonl\n  dopd hints audit task:dag",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_write(actions, command)
    add_check(actions, command)
    _add_audit(actions, command)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a share from 0 to 1, such as 0.01")
    return value


def _add_audit(actions: Any, command: Any) -> None:
    parser = command(
        actions,
        "audit",
        "what hints give away: answers, results and solutions in their words, and hints that cannot be used",
        "  dopd hints audit task:dag --privileged-kind final_answer\n"
        "  dopd hints audit problems.jsonl --columns '{prompt: question, privileged_context: plan}' --html audit.html\n"
        "  dopd hints audit problems.jsonl --columns '{prompt: question, privileged_context: plan}' "
        "--max-leaks 0.01 --json audit.json\n"
        "  dopd hints audit task:dag --rows 32 --model tiny:dag/student\n"
        "exit status 1 where more leak, or more cannot be used, than --max-leaks and --max-faults allow",
    )
    add_data(parser)
    parser.add_argument("--privileged-kind", help="of a task: see `dopd tasks NAME` (default: the task's own choice)")
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="steps",
        help="what the hints are to be, where no column hint_kind says so; results of steps leak in all but "
        "steps-with-execution and answer (default steps)",
    )
    parser.add_argument("--max-words", type=positive, default=300, help="longer hints are counted (default 300)")
    parser.add_argument("--max-leaks", type=_share, metavar="SHARE", help="most hints that may leak, 0 to 1")
    parser.add_argument("--max-faults", type=_share, metavar="SHARE", help="most rows with another fault, 0 to 1")
    parser.add_argument("--json", metavar="FILE", help="write the rows that leak, with kinds, and the coverage")
    parser.add_argument("--html", metavar="FILE", help="write a page with the worst examples")
    parser.add_argument("--model", help="also ask this model: hub id, folder, or tiny:TASK/ROLE")
    parser.add_argument("--model-rows", type=positive, default=200, help="rows that it is asked (default 200)")
    add_verifier(parser, "of its answers: ")
    parser.add_argument("--hint-only-prompt", help="how it is asked for the answer: text with {privileged_context}")
    add_asking(parser)
    parser.add_argument("--max-new-tokens", type=positive, help="of its answers (default: as trained, or 256)")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=seed, default=0)
    parser.set_defaults(run=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    from dopd.hints.page import audit_page
    from dopd.report.page import check_page
    from dopd.runs.hints import audit, list_of
    from dopd.runs.quiet import quiet_libraries

    quiet_libraries()
    if arguments.html:
        check_page(Path(arguments.html), "html")
    data = data_as_named(arguments, arguments.privileged_kind)
    found, rows = audit(data, kind=arguments.kind, max_words=arguments.max_words)
    if arguments.model:
        found.behaviour = _behaviour(arguments, data, list_of(rows))
    print_audit(arguments.data, found)
    if arguments.json:
        replace_file(Path(arguments.json), (json.dumps(found.to_json(), ensure_ascii=False) + "\n").encode())
    if arguments.html:
        replace_file(Path(arguments.html), audit_page(arguments.data, found).encode())
        print(visible(f"{arguments.html}: open it in a browser; it needs no network"), file=sys.stderr)
    return _status(arguments, found)


def _behaviour(arguments: argparse.Namespace, data: "HintData", rows: list[dict[str, Any]]) -> dict[str, Any]:
    from dopd.runs.circumstances import LOOKED_AT_FIELDS, circumstances
    from dopd.runs.hint_behaviour import behaviour
    from dopd.runs.hints import verifier_of
    from dopd.runs.local_models import LocalModel
    from dopd.runs.settings import yaml_mapping

    asking = {**as_asked(arguments), "max_new_tokens": arguments.max_new_tokens}
    asked, sentence = circumstances(arguments.model, only=(*LOOKED_AT_FIELDS, "max_new_tokens"), **asking)
    if sentence:
        print(visible(sentence), file=sys.stderr)
    options = yaml_mapping("--verifier-options", arguments.verifier_options)
    verifier = verifier_of(data, arguments.verifier, rows, options)
    model = LocalModel.load(
        arguments.model, asked, dtype=arguments.dtype, batch_size=arguments.batch_size, seed=arguments.seed
    )
    most, template = arguments.model_rows, arguments.hint_only_prompt
    return behaviour(model, rows, verifier, most=most, template=template, seed=arguments.seed)


def print_audit(name: str, audit: "Audit") -> None:
    """The audit as tables, with some of the leaks."""
    from rich.console import Console

    from dopd.hints.coverage import FAULTS
    from dopd.hints.leaks import KINDS, not_looked_for
    from dopd.report.terminal import print_paragraph, print_table

    console, coverage = Console(), audit.coverage
    rows = [[kind, str(count), KINDS[kind]] for kind, count in audit.counts.items()]
    title = f"{name}: {len(audit.leaks)} of {coverage.num_hints} hints leak ({audit.share:.1%})"
    print_table(console, ["leak", "rows", "what the hint has"], rows, title=title, right={"rows"})
    faults = [[fault, str(len(coverage.rows[fault])), about] for fault, about in FAULTS.items()]
    title = f"{coverage.num_rows} rows, {coverage.num_hints} with a hint"
    print_table(console, ["fault", "rows", "what is wrong"], faults, title=title, right={"rows"})
    unjudged = coverage.num_hints - audit.num_judged
    if unjudged:
        print_paragraph(
            console,
            "note",
            f"{unjudged} rows name no answer (columns answer, solution), so nothing says whether their hints have it",
        )
    for sentence in not_looked_for():
        print_paragraph(console, "note", sentence)
    for row, kinds in list(audit.leaks.items())[:_WORST]:
        sentence = "; ".join(f"{kind} ({words})" for kind, words in kinds.items())
        print_paragraph(console, f"row {row}", " ".join(sentence.split()))
    for row, about in list(coverage.about.items())[:_WORST]:
        print_paragraph(console, f"row {row}", about)
    if audit.behaviour:
        _print_behaviour(console, audit.behaviour)


def _print_behaviour(console: Any, found: dict[str, Any]) -> None:
    from dopd.report.terminal import print_table
    from dopd.statistics import Interval

    def shown(value: Any, share: bool = False) -> str:
        if value is None:
            return "not known"
        if isinstance(value, dict):
            if None in value.values():
                return f"{value['mean']:.3g}"
            interval = Interval(**value)
            return (
                f"{interval.percent()} %" if share else f"{value['mean']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
            )
        return f"{100 * value:.1f} %" if share else f"{value:.3g}"

    rows = [
        ["accuracy from p without the question", shown(found["accuracy_from_p"], True)],
        ["the same from another row's p", shown(found["accuracy_from_other_p"], True)],
        ["gain of the answer's log-prob from p, nats", shown(found["gain"])],
        ["gain, nats per token", shown(found["gain_per_token"])],
        ["share of the gain on the final answer's tokens", shown(found["gain_share_on_answer"], True)],
        ["share of tokens that are the final answer's", shown(found["token_share_of_answer"], True)],
    ]
    title = f"{found['model']}: {found['num_rows']} rows"
    print_table(console, ["what", "value [95% interval]"], rows, title=title)


def _status(arguments: argparse.Namespace, audit: "Audit") -> int:
    """Whether more leaks or faults were found than are allowed."""
    faulty = len({row for rows in audit.coverage.rows.values() for row in rows})
    faults = faulty / max(audit.coverage.num_rows, 1)
    too_many = []
    if arguments.max_leaks is not None and audit.share > arguments.max_leaks:
        too_many.append(f"{audit.share:.1%} of hints leak, and --max-leaks allows {arguments.max_leaks:.1%}")
    if arguments.max_faults is not None and faults > arguments.max_faults:
        too_many.append(f"{faults:.1%} of rows have a fault, and --max-faults allows {arguments.max_faults:.1%}")
    for line in too_many:
        print(line, file=sys.stderr)
    return LEAKING if too_many else 0
