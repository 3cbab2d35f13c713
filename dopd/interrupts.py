"""Signals that end a command: finish what is under way, save, say how to go on. Needs nothing but Python."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from dopd.launched import is_main_process
from dopd.watchdog import Watchdog

_WATCHDOG = Watchdog()

# SIGUSR1 is what batch systems send before the time is up (`sbatch --signal=USR1@120`); SIGHUP comes where a
# terminal or its connection is lost (`nohup` has it ignored, and it stays so).
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

GRACE = 5.0  # seconds between an alarm and the end of a process in which it did nothing

ENDS_WITH = "DOPD_ENDS_WITH"  # variable of a command that ends when the process of this number has


def exit_status(number: int) -> int:
    """128 and the signal's number, as shells have it: 143 for SIGTERM, 130 for SIGINT. SIGUSR1 has its own, 138, so
    that a batch script can tell a run that was warned of its time limit from one that was cancelled.
    """
    return 128 + number


class Stopped(SystemExit):
    """A signal has ended the work, which was left in order; a script that does not catch it ends with `code`.

    Attributes:
        signal (`int`): its number.
        message (`str`): what was saved, and how to go on.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(exit_status(number))
        self.signal, self.message = number, message

    def __str__(self) -> str:
        return self.message


class StopRequests:
    """The signals that came: the first is noted in `number`, the second ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that this one was copied into
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        if self.number:
            _say(f"{name}: left at once; the last whole checkpoint is as it was")
            os._exit(exit_status(number))
        self.number = number
        _say(f"{name}: this step is finished and saved first; a second signal leaves at once")


def _say(text: str) -> None:
    if not is_main_process():  # a launcher sends its signal to all of them
        return
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())  # a print could be inside of another one


@contextmanager
def noted() -> Iterator[StopRequests]:
    """Inside, signals are noted. Handlers that somebody else has set stay, as does all outside of the main thread."""
    requests = StopRequests()
    with _handling(requests):
        yield requests


@contextmanager
def raising() -> Iterator[None]:
    """Inside, a signal raises `Stopped` wherever the program is: what it has started is ended on the way out."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Stopped(number, f"{signal.Signals(number).name}: interrupted")

    leave.replaceable = True  # type: ignore[attr-defined]
    with _handling(leave):
        yield


@contextmanager
def _handling(handler: Any) -> Iterator[None]:
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            old = signal.getsignal(number)
            if old in (signal.SIG_DFL, signal.default_int_handler) or getattr(old, "replaceable", False):
                before[number] = old
                signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def end_with(parent: int) -> None:
    """Let this process end when the one that started it has, in the middle of its work if need be."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class TooLongError(BaseException):
    """A time is over. No `Exception`: code that catches those would go on."""


@contextmanager
def alarm_after(seconds: float, what: str) -> Iterator[None]:
    """Raise `TooLongError` in what runs inside after so many seconds.

    In the main thread of a Unix process it is interrupted; where it cannot be (other threads, code in C, code that
    resets alarms or catches whatever is raised), the error is raised once it has ended by itself. If that takes longer
    than `GRACE`, the process ends with SIGKILL, status 137, and a line on standard error.

    Args:
        seconds (`float`): above 0.
        what (`str`): what runs inside, for that line.
    """
    line = (
        f"error: {what} took more than {seconds:g} seconds and could not be interrupted: this process ends at once, "
        "with status 137; the last whole checkpoint is as it was"
    )
    end = time.monotonic() + seconds
    with _WATCHDOG.ending_after(seconds + GRACE, line), _alarm(seconds) as rung:
        try:
            yield
        except Exception as error:
            if rung:  # caught inside, and made another one of
                raise TooLongError from error
            raise
        if rung or time.monotonic() > end:
            raise TooLongError


@contextmanager
def _alarm(seconds: float) -> Iterator[list[int]]:
    """Raise `TooLongError` in the main thread after so many seconds; the list says whether that was done."""
    rung: list[int] = []
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield rung
        return
    inside = True

    def stop(number: int, frame: FrameType | None) -> None:
        if inside:
            rung.append(number)
            raise TooLongError

    begun = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield rung
    finally:
        inside = False
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        left = max(left - (time.monotonic() - begun), 1e-3) if left else 0.0  # of somebody else's alarm
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def not_left() -> Iterator[None]:
    """Inside, code that ends the process at once (`os._exit`) raises `SystemExit`: nothing would be saved or said.
    Processes that it starts end as they like.
    """
    leave, mine = os._exit, os.getpid()

    def refused(status: int) -> NoReturn:
        if os.getpid() != mine:
            leave(status)
        raise SystemExit(status)

    os._exit = refused
    try:
        yield
    finally:
        os._exit = leave
