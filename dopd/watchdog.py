"""A process beside this one that ends it where a call does not end and nothing inside of it can interrupt the call.

Neither alarms nor threads reach code in C that holds the interpreter, blocked signals, or code that catches whatever is
raised. Run as a script, this file is that process; it needs nothing but Python, which it starts without any packages.
"""

import contextlib
import itertools
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence


class Watchdog:
    """Calls of this process that have to end in time; their watchman starts with the first of them."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._pipe: int | None = None
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)  # a copy of this process has a watchman of its own

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._is_started = False
        self._leave()

    def _leave(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    @contextlib.contextmanager
    def ending_after(self, seconds: float, line: str) -> Iterator[None]:
        """Inside, this process is ended (SIGKILL) after so many seconds, with a line on standard error.

        Where no process can be started, nothing happens.
        """
        number = next(self._numbers)
        self._write(f"{number} {time.monotonic() + seconds!r} {' '.join(line.split())}")
        try:
            yield
        finally:
            self._write(f"{number}")

    def _write(self, text: str) -> None:
        with self._lock:
            if not self._is_started:
                self._is_started, self._pipe = True, _started()
            try:
                if self._pipe is not None:
                    os.write(self._pipe, f"{text}\n".encode())
            except OSError:  # somebody has ended the watchman
                self._leave()


def _started() -> int | None:
    """A pipe to a new watchman of this process; `None` where there cannot be one."""
    if not hasattr(os, "fork") or not sys.executable:
        return None
    try:
        read, write = os.pipe()
    except OSError:
        return None
    try:
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
        subprocess.run(command, stdin=read, stdout=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.SubprocessError):
        os.close(write)
        return None
    finally:
        os.close(read)
    return write


# --- The other process


def _watch(process: int) -> None:
    """Read what calls begin and end, until the process has ended or one of its calls is over its time."""
    ended = [os.pidfd_open(process)] if hasattr(os, "pidfd_open") else []
    calls: dict[str, tuple[float, str]] = {}
    unread = b""
    while True:
        first = min(calls.values(), default=None)
        ready = select.select([0, *ended], [], [], None if first is None else max(first[0] - time.monotonic(), 0.0))[0]
        if any(one in ready for one in ended):
            return
        if not ready and first is not None:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{first[1]}\n".encode())
            with contextlib.suppress(OSError):
                _kill(process, ended)
            return
        content = os.read(0, 65536)
        if not content:
            return
        *lines, unread = (unread + content).split(b"\n")
        for line in lines:
            number, *call = line.decode(errors="replace").split(" ", 2)
            if call:
                calls[number] = (float(call[0]), call[1])
            else:
                calls.pop(number, None)


def _kill(process: int, descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:  # the number of a process that has ended may be another's
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return
    os.kill(process, signal.SIGKILL)


def _main() -> None:
    # A child of nobody: programs that wait for their children do not wait for this one.
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    with contextlib.suppress(OSError):
        _watch(int(sys.argv[1]))


if __name__ == "__main__":
    _main()
