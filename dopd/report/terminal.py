"""Tables for a terminal of any width: as columns where whole words fit, else as a block of lines for each row."""

import textwrap
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dopd.shown import visible

_BESIDE = 3  # what a cell has beside its text: a space on each side and a border
_NARROWEST = 7  # characters of a column of prose
_INDENT = "  "


def print_table(
    console: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    title: str = "",
    right: Collection[str] = (),
) -> None:
    """Print rows of text; the first cell names a row. No cell is cut, and none is broken within a word.

    Args:
        header (`list[str]`): names of the columns.
        rows (`list[list[str]]`): cells, plain text or styled.
        right: columns of numbers.
    """
    if title:
        console.print(Text(visible(title), style="bold"), soft_wrap=True)
    rows = [[visible(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    widths = _widths(console.width, list(zip(header, *rows, strict=True)))
    if widths is None:
        _print_blocks(console, header, rows)
        return
    table = Table()
    for name, width in zip(header, widths, strict=True):
        table.add_column(name, justify="right" if name in right else "left", width=width)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print(table)


def _widths(available: int, columns: Sequence[Sequence[str | Text]]) -> list[int] | None:
    """Characters for each column, every word whole; `None` where there are not enough."""
    most = [max(map(len, cells)) for cells in columns]
    words = [max((len(word) for cell in cells for word in str(cell).split()), default=0) for cells in columns]
    widths = [max(word, min(_NARROWEST, whole)) for word, whole in zip(words, most, strict=True)]
    spare = available - 1 - _BESIDE * len(columns) - sum(widths)
    if spare < 0:
        return None
    for place in sorted(range(len(columns)), key=lambda place: most[place] - widths[place]):
        more = min(spare, most[place] - widths[place])
        widths[place] += more
        spare -= more
    return widths


def print_paragraph(console: Console, label: str, text: str, indent: str = "") -> None:
    """Print `label: text` in the console's width, the label bold and later lines further in; no word is broken."""
    shown = Text(fill(visible(f"{label}: {text}"), console.width, indent))
    shown.stylize("bold", len(indent), len(indent) + len(label))
    console.print(shown, soft_wrap=True)


def fill(text: str, width: int, indent: str = "", hanging: str = _INDENT) -> str:
    """A paragraph in lines of a width, those behind the first further in by `hanging`; no word is broken."""
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _print_blocks(console: Console, header: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    for first, *rest in rows:
        console.print(Text(str(first), style="bold"), soft_wrap=True)
        for name, cell in zip(header[1:], rest, strict=True):
            print_paragraph(console, name, str(cell), _INDENT)
