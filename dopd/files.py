"""Files that are whole or not there, and what is said where one cannot be written."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from dopd.errors import DopdError, FileError

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_PLACE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# What libraries say that lose the number of an error on the way (safetensors, torch.save).
_WORDS = {
    "no space left": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "read-only file system": errno.EROFS,
    "permission denied": errno.EACCES,
    "file write failed": errno.ENOSPC,
    "enforce fail at inline_container": errno.ENOSPC,
    "iostream error": errno.ENOSPC,
}


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in its place in one piece: the whole content is there afterwards, or what was there before.

    A link in its place is replaced, and not written through.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_FOLLOW, 0o644), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise _named(error, path) from error


def append_line(path: Path, line: bytes) -> None:
    """Add one whole line with a single system call, so that a reader or a second writer never sees it cut.

    Where it does not fit, nothing of it is left.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_FOLLOW, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _named(error, path) from error


def _named(error: OSError, path: Path) -> OSError:
    """The same error with the file that it is about."""
    return OSError(error.errno, error.strerror, str(path))


def not_written(
    error: BaseException, path: str | Path, *, choose: str = "another folder", surely: bool = False
) -> FileError | None:
    """One line for an error of writing: the path, the reason and the way out; `None` for any other error.

    Args:
        error: what was raised, perhaps by a library that wraps the system's error.
        path (`str` or `Path`): where it was written to; the error's own file goes before it.
        choose (`str`): what a user can choose otherwise, such as `"another output_dir"`.
        surely (`bool`): leave out errors that reading gives as well, such as a permission.
    """
    if isinstance(error, DopdError):
        return None
    found = next(((number, file) for number, file in map(_number, _chain(error)) if number is not None), None)
    if found is None:
        return None
    number, file = found
    if surely and number not in (*_FULL, errno.EROFS):
        return None
    if number in _FULL:
        way = f"free space there, or choose {choose}"
    elif number in _CLOSED:
        way = f"choose {choose}, one that may be written to"
    else:
        way = f"move away what is there, or choose {choose}"
    return FileError(f"{str(file or path)!r}: {os.strerror(number)}; nothing more was written. To go on, {way}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _number(error: BaseException) -> tuple[int | None, str | None]:
    """The system's number of an error of writing, and the file; (`None`, `None`) for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        known = error.errno in (*_FULL, *_CLOSED, *_PLACE)
        return (error.errno if known else None), (error.filename if isinstance(error.filename, str) else None)
    said = str(error).lower()
    return next((number for words, number in _WORDS.items() if words in said), None), None
