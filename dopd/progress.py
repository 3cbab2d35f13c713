"""What a person sees while a command works: one line with the time left, where somebody watches it."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from dopd.launched import is_main_process
from dopd.shown import visible

_Thing = TypeVar("_Thing")
_DELAY = 2.0  # seconds before a bar is shown; what ends sooner needs none
_LINE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"


def progress_bar(
    label: str, total: int, unit: str, *, initial: int = 0, delay: float = _DELAY, shown: bool = True
) -> Any:
    """A `tqdm` bar with the time left, in the width of the terminal; it shows nothing where nobody watches.

    Args:
        label (`str`): what is under way.
        total (`int`): units of work.
        unit (`str`): what one is, for example `prompt`.
        initial (`int`): units that are done already.
        delay (`float`): seconds before it is shown; such a bar goes when it is closed.
        shown (`bool`): whether this process shows it.
    """
    return tqdm(
        total=total,
        initial=initial,
        desc=visible(label),
        unit=unit,
        delay=delay,
        bar_format=_LINE,
        ncols=shutil.get_terminal_size().columns - 1,
        leave=not delay,
        disable=not (shown and is_watched()),
    )


def tracked(label: str, unit: str, things: Sequence[_Thing]) -> Iterator[_Thing]:
    """The things one after the other, with a bar that moves."""
    with progress_bar(label, len(things), unit) as bar:
        for thing in things:
            yield thing
            bar.update()


def say(text: str) -> None:
    """Print a line, on the main process of a run alone. Where nobody reads it any more, or it does not fit, what it is
    about goes on.
    """
    if not is_main_process():
        return
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_watched() -> bool:
    """Whether somebody sees a bar move: a terminal or a notebook, and not the log of a CI job."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    """Whether the code runs in a cell of Jupyter, Colab or the like."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and type(shell).__name__ != "TerminalInteractiveShell"
