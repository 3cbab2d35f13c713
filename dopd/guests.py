"""Users' code inside of a run: it neither ends the process, nor leaves it in another folder or without its output."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dopd.errors import ScoringError
from dopd.interrupts import not_left

logger = logging.getLogger(__name__)

_STREAMS = {"stdout": "standard output", "stderr": "standard error"}


@contextmanager
def as_guest(what: str) -> Iterator[None]:
    """Inside, users' code runs. Afterwards the process is in the folder that it was in, and can print.

    Args:
        what (`str`): whose code it is, for messages.

    Raises:
        ScoringError: it closed a stream that the run prints to.
        SystemExit: it would have ended the process at once.
    """
    folder, streams = _folder(), _open_streams()
    try:
        with not_left():
            yield
    finally:
        _go_back(folder, what)
        closed = streams - _open_streams()
        for name in closed:
            _open_again(name)
    if closed:
        raise ScoringError(
            f"{what} closed {_STREAMS[min(closed)]}, which the run prints to: leave it open "
            "(contextlib.redirect_stdout leads what is printed elsewhere for a while)"
        )


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # somebody has removed it
        return None


def _go_back(folder: str | None, what: str) -> None:
    if folder is None or _folder() == folder:
        return
    logger.warning(
        f"{what} left the process in the folder {_folder()!r}: back in {folder!r}, where relative paths of the run "
        "begin. Use absolute paths in place of os.chdir"
    )
    os.chdir(folder)


def _open_streams() -> set[str]:
    return {name for name in _STREAMS if _is_open(getattr(sys, name))}


def _is_open(stream: object) -> bool:
    if stream is None or getattr(stream, "closed", False):
        return False
    try:
        os.fstat(stream.fileno())  # type: ignore[attr-defined]
    except OSError as error:
        return error.errno is None  # io.UnsupportedOperation: of a notebook, which has no number
    except (AttributeError, ValueError):
        return True
    return True


def _open_again(name: str) -> None:
    """Lead a closed stream to nowhere: the next file that is opened would take its number, and what is printed."""
    number = 1 + list(_STREAMS).index(name)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        try:
            os.fstat(number)
            os.close(nowhere)
        except OSError:
            os.dup2(nowhere, number)
            os.close(nowhere)
    stream = getattr(sys, name)
    if stream is None or stream.closed:
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the whole life
