"""Users' code inside of a run: it neither ends the process, nor leaves it in another state than it found.

A run goes on in the folder it was in, can print, can be stopped, and draws the random numbers that it would have drawn
without that code, whose own go on from call to call.
"""

import hashlib
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from dopd.errors import ScoringError
from dopd.interrupts import SIGNALS, not_left

# Torch, which takes a second to import, is imported where users' code runs: commands that run none start without it.
if TYPE_CHECKING:
    import torch

    from dopd.random_states import RandomStates

logger = logging.getLogger(__name__)

_STREAMS = {"stdout": "standard output", "stderr": "standard error"}


@contextmanager
def as_guest(what: str) -> Iterator[None]:
    """Inside, users' code runs. Afterwards the process is in the folder that it was in, can print and be stopped,
    computes as before, and draws the random numbers that it would have drawn.

    Args:
        what (`str`): whose code it is, for messages.

    Raises:
        ScoringError: it closed a stream that the run prints to.
        SystemExit: it would have ended the process at once.
    """
    process, folder, streams = os.getpid(), _folder(), _open_streams()
    settings = [setting.read() for setting in _settings()]
    filters = list(warnings.filters)
    random_states = _RANDOM.enter()
    try:
        with not_left():
            yield
    finally:
        if os.getpid() != process:
            _end_copy(what)
        _RANDOM.leave(random_states)
        _set_back(settings, what)
        _without_new_errors(filters, what)
        _go_back(folder, what)
        closed = streams - _open_streams()
        for name in closed:
            _open_again(name)
    if closed:
        raise ScoringError(
            f"{what} closed {_STREAMS[min(closed)]}, which the run prints to: leave it open "
            "(contextlib.redirect_stdout leads what is printed elsewhere for a while)"
        )


class _GuestRandom:
    """The random numbers of users' code: a stream of their own, which begins anew at each step of a run, so that a run
    that goes on from a checkpoint has those of the run that saved it.
    """

    def __init__(self) -> None:
        self._states: RandomStates | None = None
        self._begun: object = None
        self._step: int | None = None
        self._depth = 0

    def begin(self, step: int) -> None:
        self._step, self._states = step, None

    def enter(self) -> "RandomStates | None":
        """The states of the run, in whose place those of the guest are now; `None` inside of another guest."""
        import torch

        from dopd.random_states import RandomStates

        self._depth += 1
        if self._depth > 1:
            return None
        before = RandomStates.now(*_devices())
        begins = (torch.initial_seed(), self._step)
        if self._states is None or self._begun != begins or self._states.devices.keys() != before.devices.keys():
            key = f"{begins} {os.environ.get('RANK', '0')}"
            RandomStates.seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big"), *before.devices)
            self._begun = begins
        else:
            self._states.restore()
        return before

    def leave(self, before: "RandomStates | None") -> None:
        self._depth -= 1
        if before is not None:
            self._states = before.now(*before.devices)
            before.restore()


_RANDOM = _GuestRandom()


def begin_step(step: int) -> None:
    """Let the random numbers of users' code depend on the step of the run (and on its seed) from here on."""
    _RANDOM.begin(step)


def _devices() -> "list[torch.device]":
    """The device that is drawn on by default, where one is in use: its state is a pair of numbers on the host."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return []
    return [torch.device("cuda", torch.cuda.current_device())]


class _Setting(NamedTuple):
    """A setting of the process that users' code may change, and a run may not find changed.

    Attributes:
        name (`str`): what sets it, for messages.
        read, write (callable).
        harms (callable): whether the change from the first value to the second does.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    harms: Callable[[Any, Any], bool] = lambda before, after: bool(before is not after and before != after)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in SIGNALS}


def _set_handlers(handlers: dict[int, Any]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number, handler in handlers.items():
        if handler is not None:  # None: set by code that is no Python
            signal.signal(number, handler)


def _stream(name: str) -> _Setting:
    return _Setting(f"sys.{name}", lambda: getattr(sys, name), lambda value: setattr(sys, name, value))


@cache
def _settings() -> tuple[_Setting, ...]:
    import torch

    return (
        _stream("stdout"),
        _stream("stderr"),
        _Setting("torch.set_grad_enabled", torch.is_grad_enabled, torch.set_grad_enabled),
        _Setting("torch.set_default_dtype", torch.get_default_dtype, torch.set_default_dtype),
        _Setting("torch.set_default_device", torch.get_default_device, torch.set_default_device),
        _Setting(
            "sys.setrecursionlimit", sys.getrecursionlimit, sys.setrecursionlimit, lambda before, after: after < before
        ),
        _Setting("os.umask", _umask, os.umask),
        _Setting("signal.signal", _handlers, _set_handlers),
    )


def _set_back(before: list[Any], what: str) -> None:
    for setting, value in zip(_settings(), before, strict=True):
        if setting.harms(value, setting.read()):
            setting.write(value)
            _warn_once(what, setting.name)


def _without_new_errors(before: list[Any], what: str) -> None:
    """Take out filters that make errors of warnings, which would end the run in whatever library warns next."""
    new = [one for one in warnings.filters if one[0] == "error" and one not in before]
    if new:
        warnings.filters[:] = [one for one in warnings.filters if one not in new]  # type: ignore[index]
        with warnings.catch_warnings():  # which tells Python that filters have changed
            pass
        _warn_once(what, "warnings.simplefilter('error')")


_TOLD: set[tuple[str, str]] = set()


def _warn_once(what: str, setting: str) -> None:
    if (what, setting) not in _TOLD:
        _TOLD.add((what, setting))
        logger.warning(
            f"{what} changed {setting}, which the whole process shares: it is set back after each call. Set it back "
            "there yourself"
        )


def _end_copy(what: str) -> None:
    """End a process that came out of users' code as a copy of this one: it would be a second run in the same folder."""
    error = sys.exc_info()[1]
    if isinstance(error, SystemExit):
        os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))
    if error is not None:
        traceback.print_exception(error)
    else:
        os.write(2, f"{what} made a copy of the process (os.fork) that did not end: it was ended\n".encode())
    os._exit(1)


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
