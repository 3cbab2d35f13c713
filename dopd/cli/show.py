"""What commands print."""

import inspect
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from dopd.report.terminal import print_paragraph, print_table
from dopd.settings import settings_of_call
from dopd.shown import visible
from dopd.sources import REFERENCE_COLUMN, SOURCES

if TYPE_CHECKING:
    from dopd.tables import RoutingTable


def print_tasks(name: str | None) -> None:
    """All tasks with a line each, or one with an example of each privileged text."""
    from dopd.tasks import TASKS, get_source, rows_of_task

    console = Console()
    if name is None:
        rows = [[key, str(getattr(kind, "description", ""))] for key, kind in TASKS.items()]
        print_table(console, ["task", "what it is"], rows)
        console.print("`dopd tasks NAME` shows an example with its privileged texts.")
        return
    source = get_source(name)
    first = rows_of_task(source, "train", 1, "none")[0]
    console.print(f"[bold]prompt[/bold]    {escape(visible(first['prompt'][0]['content']))}")
    console.print(f"[bold]solution[/bold]  {escape(visible(first['solution']))}")
    console.print(f"[bold]answer[/bold]    {escape(visible(first['answer']))}")
    for privileged_kind in source.privileged_kinds:
        text = rows_of_task(source, "train", 1, privileged_kind)[0]["privileged_context"]
        console.print(f"[bold]{privileged_kind}[/bold]  {escape(visible(text))}")


def print_methods(name: str | None) -> None:
    """All routing tables by subject, each with what it does; or one with all that is known of it."""
    from dopd.methods import CARDS, METHODS, table

    console = Console()
    if name is not None:
        built, registered = table(name), METHODS.resolve(name)
        card = CARDS[registered]
        _print_rules(console, built)
        lines = {
            "what": card.about,
            "loss": card.equation,
            "source": f"{card.source} (confidence: {card.confidence})" if card.source else "your own",
            "departures": card.departures or ("none known" if card.source else ""),
            "needs": _needs_in_words(built),
            "options": ". ".join(map(str, settings_of_call(METHODS[registered]).values())) or "none",
        }
        for label, text in lines.items():
            if text:
                print_paragraph(console, label, text)
        return
    for number, (title, names) in enumerate(_by_subject().items()):
        console.print(f"{chr(10) if number else ''}[bold]{escape(title)}[/bold]", highlight=False)
        for key in names:
            card = CARDS[key]
            print_paragraph(console, key, card.about, "  ")
    console.print("\n`dopd methods NAME` shows a method's rules, loss, source, needs and options.")


def _print_rules(console: Console, table: "RoutingTable") -> None:
    described = visible(table.describe())
    if max(map(len, described.splitlines())) <= console.width:
        console.print(Text(described), soft_wrap=True)
        return
    print_paragraph(console, *table.heading().split(": ", 1))
    header, *rows = table.cells()
    print_table(console, header, [list(row) for row in rows])


def _by_subject() -> dict[str, list[str]]:
    """Names of methods by the title of the module that has them."""
    from dopd.methods import METHODS

    subjects: dict[str, list[str]] = {}
    for name, build in METHODS.items():
        title = (sys.modules[build.__module__].__doc__ or build.__module__).splitlines()[0].rstrip(".")
        subjects.setdefault(title, []).append(name)
    return subjects


def methods_as_markdown() -> str:
    """The list of `docs/reference/methods.md`: methods with loss, needs and departures."""
    from dopd.methods import CARDS, METHODS, table

    lines: list[str] = []
    for title, names in _by_subject().items():
        lines += ["", f"## {title}", ""]
        for name in names:
            card, needs = CARDS[name], _needs_in_words(table(name))
            options = ", ".join(f"`{option}`" for option in inspect.signature(METHODS[name]).parameters)
            lines += [
                f"- **`{name}`** ({card.source}; confidence {card.confidence}): {card.about}.",
                f"  - loss: `{card.equation}`",
                f"  - needs {needs}; options: {options or 'none'}",
                *([f"  - departs: {card.departures}"] if card.departures else []),
            ]
    return "\n".join(lines[1:]) + "\n"


def _needs_in_words(table: "RoutingTable") -> str:
    return ", ".join(needs_of(table)) or "nothing beside the student"


def needs_of(table: "RoutingTable") -> list[str]:
    """What a method needs beside prompts and the student, in words."""
    from dopd.servers import support_in_words

    sources = [SOURCES[name] for name in table.sources]
    needs = [f"a teacher (on a server: {support_in_words(table)})"] if table.needs_teacher else []
    needs += ["privileged_context"] if table.needs_privileged else []
    needs += [REFERENCE_COLUMN] if table.needs_references else []
    needs += table.context_columns
    needs += ["a verifier"] if table.needs_scores else ["rewards (reward_funcs or a verifier)"] * table.needs_rewards
    if any(source.model == "initial" for source in sources) or (table.anchor != "current"):
        needs.append("a second copy of the student")
    return needs
