"""What happens when nobody reads what a command prints."""

import errno
import os
import sys
from collections.abc import Callable

from dopd.interrupts import Stopped, exit_status

USER_ERROR = 2
CLOSED = 141  # the status of a program that a closed pipe has ended: 128 and the number of SIGPIPE

_FULL = (errno.ENOSPC, errno.EDQUOT)


def with_any_output(command: Callable[[], int]) -> int:
    """Run a command whose output may be a pipe that closes (`| head`), or closed from the start.

    Returns:
        Its status; `CLOSED` if the reader went away before the end.
    """
    _open_closed_ones()
    status: int | None = None
    try:
        try:
            status = command()
        except SystemExit as left:
            if isinstance(left.__context__, BrokenPipeError):  # rich leaves in its own way, with status 1
                raise left.__context__ from None
            _flush()  # of --help; otherwise the interpreter would find out at its very end
            raise
        _flush()
        return status
    except BrokenPipeError:
        _to_nowhere()
        return CLOSED
    except OSError as error:
        if error.errno == errno.EIO and error.filename is None:  # a terminal that is gone
            _to_nowhere()
            before = error.__context__  # what was on its way when the last lines could not be written
            return exit_status(before.signal) if isinstance(before, Stopped) else CLOSED if status is None else status
        if error.errno not in (*_FULL, errno.EBADF):
            raise
        wrong = "does not fit" if error.errno in _FULL else "has no place, because something closed standard output"
        print(f"error: what was to be written {wrong}: {error.strerror}", file=sys.stderr)
        _to_nowhere()
        return USER_ERROR


def _flush() -> None:
    if not sys.stdout.closed:  # by code of a user's, which has been told
        sys.stdout.flush()


def _open_closed_ones() -> None:
    """Standard streams that were closed before the start go nowhere; the next file would take their place."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - for the whole life


def _to_nowhere() -> None:
    # The interpreter flushes once more when it ends.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(nowhere, stream.fileno())
        except (OSError, ValueError):
            continue
