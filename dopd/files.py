"""Files that are whole or not there, and what is said where one cannot be written."""

import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dopd.errors import ConfigError, DopdError, FileError
from dopd.secrets import content_without_tokens

logger = logging.getLogger(__name__)

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_READ_WHOLE = 2**20  # bytes; nobody edits what is larger by hand
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_PLACE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
_TEXTS = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".jinja", ".toml", ".csv")
_OF_TOKENIZERS = ("tokenizer.json", "vocab", "merges", "added_tokens", "special_tokens_map", "chat_template")
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


def make_folder(path: Path) -> None:
    """Have a folder, and those that it is in; where one of them cannot be made, none of them is."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remove_empty_folders(missing)
        raise _named(error, path) from error


def remove_empty_folders(paths: list[Path]) -> None:
    """Remove folders in which nothing is, in this order; what cannot be removed stays."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.rmdir()


@contextlib.contextmanager
def leaving_no_folder(path: Path) -> Iterator[None]:
    """Folders that are made inside for `path`, itself included, are removed afterwards where nothing is in them."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        yield
    finally:
        remove_empty_folders(missing)


def is_part(name: str, of: Collection[str]) -> bool:
    """Whether a name is that of a file which `replace_file` was writing, for one of some names, when it was killed."""
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.part", name, re.DOTALL)
    return found is not None and found.group(1) in {name[:100] for name in of}


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in its place in one piece: the whole content is there afterwards, or what was there before.

    What is in its place is replaced and not written to: a link's target, or another name of the same file, stays as it
    is. Tokens of the environment are left out of what is written.
    """
    with leaving_no_folder(path.parent):
        make_folder(path.parent)
        beside = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
                file.write(content_without_tokens(content))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise _named(error, path) from error


def leave_out_tokens(folder: Path) -> None:
    """Have no token of the environment in the texts that libraries have written into a folder.

    Weights and pickles are no texts. What a tokenizer reads or writes with is left as it is, because other words would
    be another model: a token in it is named.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix not in _TEXTS or path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        without = content_without_tokens(content)
        if content == without:
            continue
        if path.name.startswith(_OF_TOKENIZERS) or path.suffix == ".jinja":
            logger.warning(
                f"{path.name} holds a value that a variable of the environment names as secret, and is written with "
                "it: the tokenizer would be another one without it. Take it out of the model's files before you share "
                "them"
            )
        else:
            replace_file(path, content)


def finish(folder: Path) -> None:
    """Make of what libraries have written into a folder what may lie there: without tokens, and open as usual."""
    leave_out_tokens(folder)
    _open_as_usual(folder)


def _open_as_usual(folder: Path) -> None:
    """Give the files of a folder the permissions that new files have here (umask): safetensors writes its own for their
    owner alone, and a group could read everything of a model but its weights.
    """
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):  # of file systems without permissions
                path.chmod(stat.S_IMODE(path.stat().st_mode) | (0o666 & ~mask))


def append_line(path: Path, line: bytes) -> None:
    """Add one whole line with a single system call, so that a reader or a second writer never sees it cut.

    Where it does not fit, nothing of it is left. A file that has another name, too, is copied first. Tokens of the
    environment are left out.
    """
    line = content_without_tokens(line)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_WAIT | _NO_FOLLOW, 0o644)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
            if status.st_nlink > 1:
                replace_file(path, path.read_bytes() + line)
            elif os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, status.st_size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _named(error, path) from error


@contextlib.contextmanager
def held(path: Path, choose: str) -> Iterator[None]:
    """Inside, a file that is written line by line is this process's alone; its folder is made.

    Args:
        choose (`str`): what a user can do otherwise.

    Raises:
        FileError: another process has it.
    """
    import fcntl  # where there is none, it cannot be known

    make_folder(path.parent)
    guard = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o644)
    try:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileError(f"{str(path)!r} is being written by another process: wait for it, or {choose}") from None
        yield
    finally:
        os.close(guard)


def read_plain(path: Path) -> bytes:
    """The content of a file of ours.

    Raises:
        OSError: there is none that can be read, or a link, a pipe or a device is in its place.
    """
    with open(os.open(path, os.O_RDONLY | _NO_WAIT | _NO_FOLLOW), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        return file.read()


def check_plain(name: str, path: str | Path) -> None:
    """Refuse what is there and no file, such as a pipe, which would be waited for without an end.

    Args:
        name (`str`): what a user gave the path as.
        path (`str` or `Path`): a link to a file will do, and what is not there is left to its reader.

    Raises:
        ConfigError: it is a pipe, a device, a socket or a folder.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise ConfigError(f"{name} (={str(path)!r}) is {kind}: give a file")


def fingerprint(path: Path) -> dict[str, Any]:
    """What `is_unchanged` knows a file again by."""
    size = path.stat().st_size
    return {"size": size} | ({"sha256": checksum(path)} if size <= _READ_WHOLE else {})


def beginning(path: Path, size: int | None = None) -> dict[str, Any]:
    """What a file that grows is known again by: `size` (bytes; all of them if not given) and their checksum, which
    covers the first of a large file.
    """
    size = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        return {"size": size, "sha256": hashlib.sha256(file.read(min(size, _READ_WHOLE))).hexdigest()}


def is_unchanged(path: Path, written: Mapping[str, Any]) -> bool:
    """Whether a file is as it was written: of that size and, unless it is large, of that checksum; a link is not."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_size != written.get("size"):
        return False
    return status.st_size > _READ_WHOLE or written.get("sha256") in (None, checksum(path))


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(error: OSError, path: Path) -> OSError:
    """The same error with the file that it is about."""
    # A place in which nothing can be made, such as /proc, says that what is to be made is not there.
    number = errno.EPERM if error.errno == errno.ENOENT else error.errno or 0
    return OSError(number, os.strerror(number), str(path))


def not_written(
    error: BaseException, path: str | Path, *, choose: str = "another folder", surely: bool = False
) -> FileError | None:
    """One line for an error of writing: the path, the reason and the way out; `None` for any other error.

    Where the error's file is in a place that a variable of the environment sets, such as a cache, the way out is that.

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
    choose = _variable_of(file, path) or choose
    if number in _FULL:
        way = f"free space there, or choose {choose}"
    elif number in _CLOSED:
        way = f"choose {choose}, one that may be written to"
    else:
        way = f"move away what is there, or choose {choose}"
    return FileError(f"{str(file or path)!r}: {os.strerror(number)}; nothing more was written. To go on, {way}")


def _variable_of(file: str | None, path: str | Path) -> str | None:
    """The variable of the environment that says where a file is, unless it is where a command was told to write."""
    if file is None or _is_on_the_way(file, path):
        return None
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    hub = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    places = {
        "DOPD_CACHE": os.environ.get("DOPD_CACHE") or os.path.expanduser("~/.cache/dopd"),
        "HF_DATASETS_CACHE": os.environ.get("HF_DATASETS_CACHE") or os.path.join(hub, "datasets"),
        "HF_HUB_CACHE": os.environ.get("HF_HUB_CACHE") or os.path.join(hub, "hub"),
        "HF_HOME": hub,
        "TMPDIR": tempfile.gettempdir(),
        "HOME": os.path.expanduser("~"),
    }
    found = next((name for name, place in places.items() if _is_on_the_way(file, place)), None)
    return f"another {found} (a variable of the environment)" if found else None


def _is_on_the_way(file: str | Path, place: str | Path) -> bool:
    """Whether a file is in a place, or the place in it."""
    one, other = Path(file).absolute(), Path(place).absolute()
    return one.is_relative_to(other) or other.is_relative_to(one)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _number(error: BaseException) -> tuple[int | None, str | None]:
    """The system's number of an error of writing, and the file; (`None`, `None`) for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        is_writing = error.errno in (*_FULL, *_CLOSED, *_PLACE)
        return (error.errno if is_writing else None), (error.filename if isinstance(error.filename, str) else None)
    words_of_error = str(error).lower()
    return next((number for words, number in _WORDS.items() if words in words_of_error), None), None
