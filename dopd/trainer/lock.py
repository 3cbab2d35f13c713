"""One run at a time in a folder: a lock that says who holds it, and that a run which has died does not hold."""

import errno
import json
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list

from dopd.errors import ConfigError, DopdError
from dopd.files import make_folder, not_written

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "_dopd_lock.json"
_HELD: dict[Path, int] = {}  # folders that this process has locked, and how often


class FolderLock:
    """Context in which this process alone writes a run into a folder; it may be entered again in the same process.

    The system's lock on the file ends with its process, whatever ended that. Where a file system has none, the process
    that the file names is looked for.

    Raises:
        ConfigError: another process that lives is at it.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).absolute()
        self._path = self._folder / LOCK_FILE
        self._descriptor: int | None = None

    def __enter__(self) -> "FolderLock":
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Lock the folder, which is made if it is not there."""
        held = _HELD.get(self._folder, 0)
        if not held:
            self._descriptor = self._locked()
        _HELD[self._folder] = held + 1

    def release(self) -> None:
        """Leave the folder to others, once everybody in this process who has locked it has released it."""
        _HELD[self._folder] -= 1
        if not _HELD[self._folder]:
            del _HELD[self._folder]
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _locked(self) -> int:
        make_folder(self._folder)
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            status, owner = os.fstat(descriptor), _read(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or (status.st_size and not owner):
                os.close(descriptor)
                raise ConfigError(f"{str(self._path)!r} is no lock of ours: move it away, or choose another output_dir")
            if not _lock(descriptor, owner):
                os.close(descriptor)
                raise ConfigError(
                    f"output_dir (={str(self._folder)!r}) is in use by process {owner.get('pid', '?')} on "
                    f"{owner.get('host', '?')}, since {owner.get('since', '?')}: choose another output_dir, or wait "
                    f"until it has ended. If there is no such process, delete {self._path}"
                )
            # Whoever held it may have deleted the file between our opening and our locking it.
            if self._path.exists() and os.path.samestat(os.fstat(descriptor), self._path.stat()):
                break
            os.close(descriptor)
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(mine) + "\n").encode(), 0)
        return descriptor


def _lock(descriptor: int, owner: dict[str, Any]) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
                return False
    return not _lives(owner)


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process that a lock names lives; of another machine's process that cannot be known."""
    if not owner:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except (ProcessLookupError, KeyError, ValueError, TypeError):
        return False
    except OSError:
        return True
    return int(owner["pid"]) != os.getpid()


def _read(descriptor: int) -> dict[str, Any]:
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def main_decides(choose: Callable[[], str | None], folder: str | Path) -> str | None:
    """What the main process chooses, on every process; what it raises, too.

    Args:
        choose (callable): called by the main process alone.
        folder (`str` or `Path`): `output_dir`, for the message of a file that cannot be written.
    """
    state = PartialState()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = choose()
        except (DopdError, OSError) as error:
            outcome[1] = not_written(error, folder, choose="another output_dir") or error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    chosen: str | None = outcome[0]
    return chosen
