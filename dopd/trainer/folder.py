"""The folder of a run: what in it is the run's own, and how one run takes the place of another.

A run owns what its marker lists and what the manifests of its checkpoints list; nothing else is moved, overwritten or
deleted, and no link is followed. A run that replaces another sets it aside until it has ended itself.
"""

import logging
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from dopd.errors import ConfigError
from dopd.files import fingerprint, is_part, make_folder
from dopd.report.records import CONFIG_FILE, TABLE_FILE
from dopd.trainer import whole
from dopd.trainer.evidence import NON_FINITE_FILE
from dopd.trainer.lock import LOCK_FILE
from dopd.trainer.owned import (
    MARKER_FILE,
    check_free,
    clear_way,
    foreign,
    is_as_written,
    keep_aside,
    own,
    read_marker,
    write_marker,
    write_own,
)

logger = logging.getLogger(__name__)

PREVIOUS = "_previous"
_HOUSEKEEPING = (LOCK_FILE, MARKER_FILE, whole.UNFINISHED)


class RunFolder:
    """The folder that a run writes to; of several processes the main one alone calls what changes it.

    Args:
        path (`Path`): `output_dir`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._replaces = False

    # --- Before anything is loaded

    def check(
        self,
        names: Collection[str] = (),
        *,
        reads: Iterable[tuple[str, str]] = (),
        overwrite: bool,
        resume: bool,
        steps: int,
    ) -> None:
        """Raise `ConfigError` unless a run may write here; nothing is changed.

        Args:
            names (`list[str]`): of files that the run will write.
            reads (pairs of `str`): what the run itself is made from: in words, and its file or folder.
            steps (`int`): of the run.
        """
        subject = f"output_dir (={str(self.path)!r})"
        if self.path.is_symlink() and not self.path.exists():
            raise ConfigError(f"{subject} is a link to {os.readlink(self.path)!r}, which is not there: choose another")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{subject} is a file: choose another, a folder or one that is still to be made")
        whole.check_places(self.path, None if resume else steps)
        there = [name for name in _names(self.path) if name not in _HOUSEKEEPING and not is_part(name, _HOUSEKEEPING)]
        if not there:
            return
        go_on = ", or resume_from_checkpoint=true to go on" if whole.checkpoints_of(self.path) else ""
        if not resume and read_marker(self.path) is None and there != [PREVIOUS]:
            raise ConfigError(
                f"{subject} is not empty, and holds files that are not a run's (it has no {MARKER_FILE}), which "
                f"overwrite would not replace: choose another, or move them away{go_on}"
            )
        self._check_aside(subject)
        check_free(self.path, names)
        if not resume and not overwrite:
            aside = f" ({PREVIOUS} in it is the run that was to be replaced)" if PREVIOUS in there else ""
            raise ConfigError(
                f"{subject} is not empty{aside}: choose another, or set overwrite=true to replace the run in it{go_on}"
            )
        if not resume:
            self._check_reads(subject, reads)

    def _check_reads(self, subject: str, reads: Iterable[tuple[str, str]]) -> None:
        """Raise `ConfigError` where replacing the run in it would delete what the new one is made from."""
        root = self.path.resolve()
        places = [place for place in (self.path, self.path / PREVIOUS) if read_marker(place) is not None]
        owned = [
            [(place / name).resolve() for name in files] + [path.resolve() for path in checkpoints]
            for place in places
            for files, checkpoints in (_owned(place),)
        ]
        for what, path in reads:
            read = Path(path).resolve()
            if read.is_relative_to(root) and any(
                read.is_relative_to(own) or own.is_relative_to(read) for paths in owned for own in paths
            ):
                raise ConfigError(
                    f"{what} is of the run in {subject}, which overwrite replaces and deletes: choose another "
                    "output_dir, or move the model or data out of it first"
                )

    def _check_aside(self, subject: str) -> None:
        """Raise `ConfigError` where the place of a replaced run holds what is no run's."""
        aside = self.path / PREVIOUS
        if not os.path.lexists(aside):
            return
        if aside.is_symlink() or not aside.is_dir():
            raise ConfigError(
                f"{subject} has a {PREVIOUS} that is no folder of its own: move it away, or choose another"
            )
        owned, checkpoints = _owned(aside)
        of_runs = {*owned, MARKER_FILE, *(path.relative_to(aside).as_posix() for path in checkpoints)}
        strange = sorted(
            path.relative_to(aside).as_posix()
            for path in aside.rglob("*")
            if not path.is_dir() and not any(path.is_relative_to(aside / name) for name in of_runs)
        )
        if strange:
            raise ConfigError(
                f"{subject}: {PREVIOUS}/{strange[0]} is not a run's, and the next run that is replaced goes there: "
                "move it away, or choose another"
            )

    @property
    def is_complete(self) -> bool:
        """Whether the run in it has ended, with its evaluation and report."""
        return (read_marker(self.path) or {}).get("complete") is True

    # --- While a run goes on

    def begin(self) -> None:
        """Make room for a new run: what is here of an earlier one is set aside."""
        whole.clear_unfinished(self.path)
        if read_marker(self.path) is not None:
            self._set_aside()
        self._replaces = (self.path / PREVIOUS).is_dir()

    def describe(self, settings: str, table: str) -> None:
        """Write what a run is.

        Args:
            settings (`str`): its configuration, as YAML.
            table (`str`): its routing table, in words.
        """
        own(self.path, (), complete=False)
        write_own(self.path, CONFIG_FILE, settings.encode())
        write_own(self.path, TABLE_FILE, table.encode())

    def give_back(self) -> None:
        """The run has failed: the one that it was to replace returns, if this one has nothing to be gone on from."""
        if not self._replaces:
            return
        self._replaces = False
        if self._has_something():
            logger.warning(
                f"the run that was to be replaced is still in {self.path / PREVIOUS}: it goes once this one has ended"
            )
            return
        _delete(self.path, self.path, keep=(NON_FINITE_FILE,))  # what it failed at is there to be looked at
        _move(self.path / PREVIOUS, self.path)
        if (self.path / NON_FINITE_FILE).is_file():
            own(self.path, {NON_FINITE_FILE: fingerprint(self.path / NON_FINITE_FILE)})
        logger.warning(f"the run that was to be replaced is back in {self.path}")

    def complete(self) -> None:
        """The run has ended: the one that it replaces can go."""
        own(self.path, (), complete=True)
        if read_marker(self.path / PREVIOUS) is not None:
            self._drop_previous()

    def _drop_previous(self) -> None:
        """Delete the run that was set aside; what was a user's in it is moved to `_kept`."""
        aside = self.path / PREVIOUS
        _delete(aside, self.path)
        for path in [path for path in aside.rglob("*") if path.is_symlink() or not path.is_dir()]:
            keep_aside(self.path, path.relative_to(aside).as_posix(), aside)
        whole.remove_empty(aside)

    def _set_aside(self) -> None:
        aside = self.path / PREVIOUS
        returning = (read_marker(aside) or {}).get("moving")
        if returning:  # its run was killed while it returned
            _move(aside, self.path)
        moving = (read_marker(self.path) or {}).get("moving")
        if aside.is_dir() and not moving:
            ended = (read_marker(aside) or {}).get("complete") is True
            if not self._has_something() or (ended and not self.is_complete):
                _delete(self.path, self.path)  # of a run that was to replace the one set aside, and never ended
                return
            self._drop_previous()
        _move(self.path, aside)

    def _has_something(self) -> bool:
        return self.is_complete or whole.newest_whole(self.path) is not None


def claim(folder: Path, names: Sequence[str]) -> None:
    """Write down that files of these names in a folder are ours to write; edited ones are moved to `_kept`.

    Raises:
        ConfigError: one of them is there, and somebody else's.
    """
    for name in foreign(folder, names):
        raise ConfigError(
            f"{str(folder / name)!r} was not written by dopd (as far as {MARKER_FILE} says): move it away, or "
            "choose another folder"
        )
    clear_way(folder, names)


def seal(folder: Path, names: Sequence[str]) -> None:
    """Write down what the files of these names that are there have become: any change is a user's from here on."""
    own(folder, {name: fingerprint(folder / name) for name in names if (folder / name).is_file()})


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _owned(folder: Path) -> tuple[list[str], list[Path]]:
    """Files that the marker of a folder lists and that are there, and its sealed checkpoints."""
    marker = read_marker(folder) or {"files": {}}
    files = [
        name
        for name in marker["files"]
        if os.path.lexists(folder / name) and not _through_link(folder, name) and not (folder / name).is_dir()
    ]
    aside = folder / whole.ABANDONED
    places = [folder, *([aside] if aside.is_dir() and not aside.is_symlink() else [])]
    inside = [path for place in places for path in place.iterdir() if path.is_dir() and not path.is_symlink()]
    return files, [path for path in inside if (path / whole.MANIFEST_FILE).is_file()]


def _through_link(folder: Path, name: str) -> bool:
    parents = list(Path(name).parents)[:-1]
    return any((folder / parent).is_symlink() for parent in parents)


def _move(source: Path, target: Path) -> None:
    """Move what a run owns. Where that is cut off, the marker of the source says so, and the next call goes on."""
    marker = {key: value for key, value in (read_marker(source) or {"files": {}}).items() if key != "moving"}
    write_marker(target, marker)
    write_marker(source, marker | {"moving": True})
    files, checkpoints = _owned(source)
    for name in [*files, *(path.relative_to(source).as_posix() for path in checkpoints)]:
        make_folder((target / name).parent)
        os.replace(source / name, target / name)
    (source / MARKER_FILE).unlink()
    _tidy(source, files)


def _delete(folder: Path, run: Path, keep: Sequence[str] = ()) -> None:
    """Delete what a run owns, in its folder or where it is set aside; what was edited is moved to its `_kept`."""
    written = (read_marker(folder) or {"files": {}})["files"]
    files, checkpoints = _owned(folder)
    for path in checkpoints:
        whole.delete(path)
    for name in files:
        if name in keep:
            continue
        if is_as_written(folder / name, written[name]):
            (folder / name).unlink()
        else:
            keep_aside(run, name, folder)
    (folder / MARKER_FILE).unlink(missing_ok=True)
    _tidy(folder, files)


def _tidy(folder: Path, files: Iterable[str]) -> None:
    """Remove folders that a run's files have left empty."""
    held = {folder / whole.ABANDONED, *(folder / name for file in files for name in list(Path(file).parents)[:-1])}
    for path in sorted(held, key=lambda path: len(path.parts), reverse=True):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
    if folder.name == PREVIOUS:
        whole.remove_empty(folder)
