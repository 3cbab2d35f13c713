"""What in a folder is a run's own: its marker lists it, with size and checksum; of a file that grows, of its beginning.

What the marker does not list, or what is no longer as it was written, is the user's, and stays.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dopd.errors import ConfigError
from dopd.files import beginning, fingerprint, is_unchanged, make_folder, read_plain, replace_file
from dopd.inspection.schema import record_of
from dopd.report.page import REPORT_FILE, is_page

logger = logging.getLogger(__name__)

_FORMAT = 2
_OF_EVERY_VERSION = ("config.yaml", "table.txt", "metrics.jsonl")
MARKER_FILE, CARD_FILE = "dopd_run.json", "README.md"
KEPT = "_kept"  # in a run folder: what users had put in the place of its model


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What a run's marker says; `None` where there is none of ours."""
    try:
        value = json.loads(read_plain(folder / MARKER_FILE))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("format") != _FORMAT or not isinstance(value.get("files"), dict):
        return None
    files = {
        name: entry for name, entry in value["files"].items() if _is_inside(name) and isinstance(entry, dict | None)
    }
    return {**value, "files": files}


def other_version(folder: Path) -> str | None:
    """What says that a folder is the run of another version of dopd, which does not say in our way what it owns."""
    try:
        value = json.loads(read_plain(folder / MARKER_FILE))
    except FileNotFoundError:
        is_run = all((folder / name).is_file() for name in _OF_EVERY_VERSION)
        return f"it has {', '.join(_OF_EVERY_VERSION)} and no {MARKER_FILE}" if is_run else None
    except (OSError, ValueError, RecursionError):
        return None
    is_marker = isinstance(value, dict) and isinstance(value.get("files"), dict | list) and "format" in value
    if not is_marker or value["format"] == _FORMAT:
        return None
    return f"its {MARKER_FILE} is of format {value['format']!r}, and this version writes {_FORMAT}"


def _listed(folder: Path) -> dict[str, Any]:
    """The files that a folder's marker lists, with their entries; none where there is no marker."""
    return (read_marker(folder) or {"files": {}})["files"]


def write_marker(folder: Path, marker: Mapping[str, Any]) -> None:
    """Write what `read_marker` reads."""
    replace_file(folder / MARKER_FILE, (json.dumps({**marker, "format": _FORMAT}, indent=1) + "\n").encode())


def own(folder: Path, files: Mapping[str, Any] | Iterable[str], *, complete: bool | None = None) -> None:
    """Enter files in the marker: names that are about to be written, or written ones with their `fingerprint`.

    Args:
        complete (`bool`, *optional*): whether the run has ended; left as it is if not given.
    """
    marker = read_marker(folder) or {"complete": False, "files": {}}
    new = dict(files) if isinstance(files, Mapping) else dict.fromkeys(files)
    done = marker.get("complete") is True if complete is None else complete
    write_marker(folder, marker | {"complete": done, "files": dict(sorted((marker["files"] | new).items()))})


def begin_growing(folder: Path, name: str, step: int) -> None:
    """Have a file to which records are added; what a user has made of an earlier one is moved to `_kept`.

    Its records stay: `mend_lines` says which of them are those of the run.

    Args:
        folder (`Path`): of the run.
        name (`str`): of the file.
        step (`int`): at which the run begins, or goes on.
    """
    if step and name in _listed(folder) and not os.path.lexists(folder / name):
        logger.warning(
            f"{folder / name} is not there any more: what it held of the steps up to {step} is missing from reports"
        )
    if (folder / name).is_file() and not (folder / name).is_symlink() and users(folder, [name]):
        shutil.copyfile(keep_aside(folder, name), folder / name)
    own(folder, {name: {"grows": True, "size": 0}})


def seal_growing(folder: Path, *, ended: bool) -> None:
    """Enter in the marker how far the files that grow have come.

    Args:
        ended (`bool`): nothing is added to them from here on, so that any change is a user's.
    """
    listed = _listed(folder)
    paths = [folder / name for name, entry in listed.items() if entry and entry.get("grows")]
    paths = [path for path in paths if path.is_file() and not path.is_symlink()]
    state = fingerprint if ended else lambda path: beginning(path) | {"grows": True}
    own(folder, {path.relative_to(folder).as_posix(): state(path) for path in paths})


def is_as_written(path: Path, entry: Mapping[str, Any] | None) -> bool:
    """Whether a file is as its entry in a marker says, one that is about to be written, or a report.

    What was added to a file that grows since its entry was made must be records.
    """
    if entry is None:
        return True
    if not entry.get("grows"):
        return is_unchanged(path, entry) or _is_report(path)
    size = entry["size"]
    try:
        content = read_plain(path)
    except OSError:
        return False
    if len(content) < size or (size and beginning(path, size) != {"size": size, "sha256": entry.get("sha256")}):
        return False
    return all(record_of(line) for line in content[size:].split(b"\n") if line)


def foreign(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the names that are in a folder and that no run of ours wrote there, or that a link leads out of it."""
    listed = _listed(folder)
    return sorted(
        name
        for name in names
        if (name not in listed and os.path.lexists(folder / name) and not _is_report(folder / name))
        or any((folder / parent).is_symlink() for parent in list(Path(name).parents)[:-1])
    )


def users(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the names that are in a folder and are a user's: no run's, or no longer as they were written."""
    listed = _listed(folder)
    edited = [
        name for name in names if os.path.lexists(folder / name) and not is_as_written(folder / name, listed.get(name))
    ]
    return sorted({*foreign(folder, names), *edited})


def check_free(folder: Path, names: Collection[str]) -> None:
    """Refuse a folder in which files would be written over that no run of ours wrote.

    Raises:
        ConfigError: it names the first of them.
    """
    for name in foreign(folder, names):
        raise ConfigError(
            f"output_dir (={str(folder)!r}) has a {name} that is not the run's, and would be written over: move it "
            "away, or choose another output_dir"
        )


def write_own(folder: Path, name: str, content: bytes) -> None:
    """Write a file of a run, as `make_own`."""
    make_own(folder, name, lambda: replace_file(folder / name, content))


def make_own(folder: Path, name: str, make: Callable[[], object]) -> None:
    """Have a file of a run made; a user's card stays, and any other file of a user's is moved to `_kept`."""
    if _is_users_card(folder, name):
        return
    clear_way(folder, [name])
    make()
    own(folder, {name: fingerprint(folder / name)})


def move_in(source: Path, folder: Path) -> None:
    """Give files of a run, written in `source`, their places; what is a user's there is kept as by `make_own`."""
    written = (path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    names = sorted(name for name in written if not _is_users_card(folder, name))
    clear_way(folder, names)
    for name in names:
        with (source / name).open("rb") as file:
            os.fsync(file.fileno())
        make_folder((folder / name).parent)
        os.replace(source / name, folder / name)
    own(folder, {name: fingerprint(folder / name) for name in names})


def clear_way(folder: Path, names: Sequence[str]) -> None:
    """Have nothing of a user's, no link and no file of two names, where a run's files are about to be written."""
    linked = {name.split("/")[0] for name in names if "/" in name and (folder / name.split("/")[0]).is_symlink()}
    for name in linked:
        keep_aside(folder, name)
    for name in users(folder, names):
        keep_aside(folder, name)
    own(folder, names)
    for path in (folder / name for name in names):
        if path.is_symlink() or (path.exists() and path.stat().st_nlink > 1):
            path.unlink()


def keep_aside(folder: Path, name: str, source: Path | None = None) -> Path:
    """Move a user's file to `_kept`, and say so.

    Args:
        folder (`Path`): of the run.
        name (`str`): of the file, in the folder.
        source (`Path`, *optional*): folder in which it is, if that is not the run's.

    Returns:
        Where it is now.
    """
    aside = _free_place(folder / KEPT / name)
    make_folder(aside.parent)
    os.replace((source or folder) / name, aside)
    logger.warning(f"{folder / name} was not the run's, or was edited since: moved to {aside}")
    return aside


def _free_place(path: Path) -> Path:
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _is_users_card(folder: Path, name: str) -> bool:
    kept = name == CARD_FILE and bool(users(folder, [name]))
    if kept:
        _say_kept(folder / name)
    return kept


@cache
def _say_kept(path: Path) -> None:
    logger.warning(f"{path} was not written by the run, or was edited since: it is kept as it is, and not renewed")


def _is_report(path: Path) -> bool:
    """Whether a file is the page of a run, which `dopd report` may have written at any time."""
    return path.name == REPORT_FILE and is_page(path)


def _is_inside(name: str) -> bool:
    path = Path(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts
