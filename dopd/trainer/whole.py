"""Whole checkpoints: written beside, sealed with a manifest of sizes and checksums, then renamed into their place.

A folder `checkpoint-N` without a manifest is not one of ours and is never deleted; of ours, what the manifest lists.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dopd.errors import ConfigError
from dopd.files import checksum, is_part, is_unchanged, make_folder, read_plain, replace_file
from dopd.trainer.owned import KEPT, MARKER_FILE, check_free, other_version, own, read_marker

logger = logging.getLogger(__name__)

MANIFEST_FILE = "dopd_checkpoint.json"
# In a run folder; hubs are not sent what begins with an underscore.
UNFINISHED, ABANDONED = "_unfinished", "_abandoned"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """Steps and folders `checkpoint-N` of a run, in order of their steps; links are none."""
    if not run.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir() and not path.is_symlink())
    return sorted((int(match.group(1)), path) for match, path in named if match)


def seal(folder: Path, step: int, run: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint, once its files are on the disk.

    Args:
        folder (`Path`): the checkpoint.
        step (`int`): optimizer steps made.
        run (`dict`): what a run that goes on from it must share (`dopd.trainer.identity`).
    """
    files = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": checksum(path)}
    manifest = {"format": 1, "step": step, "files": files, "run": dict(run)}
    replace_file(folder / MANIFEST_FILE, (json.dumps(manifest, indent=1) + "\n").encode())


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; `None` where there is none that can be read."""
    try:
        manifest = json.loads(read_plain(folder / MANIFEST_FILE))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        return None
    files, run = manifest.get("files"), manifest.get("run")
    if not isinstance(files, dict) or not isinstance(run, dict) or not all(map(_is_inside, files)):
        return None
    return manifest if all(isinstance(entry, dict) for entry in files.values()) else None


def damage(folder: Path, *, checksums: bool = True) -> str | None:
    """What keeps a checkpoint from being whole, in words; `None` for a whole one."""
    if not folder.is_dir():
        return "is no folder"
    manifest = manifest_of(folder)
    if manifest is None:
        return (
            f"has no {MANIFEST_FILE} that can be read: its writing was cut off, or another program or version of dopd "
            "made it (its weights may be named as model_name_or_path of a new run)"
        )
    named = _NAME.fullmatch(folder.name)
    if named and int(named.group(1)) != manifest.get("step"):
        return f"was made at step {manifest.get('step')}, and its name says another: give it its name again"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != entry.get("size"):
            return f"is torn: {name} has {path.stat().st_size} bytes of {entry.get('size')}"
        if checksums and checksum(path) != entry.get("sha256"):
            return f"is damaged: {name} has another checksum than when it was written"
    return None


def newest_whole(run: Path, *, checksums: bool = True) -> Path | None:
    """The last checkpoint of a run that is whole; those that are not are named in the log."""
    for _, folder in reversed(checkpoints_of(run)):
        found = damage(folder, checksums=checksums)
        if found is None:
            return folder
        logger.warning(f"{folder} is left out: it {found}")
    return None


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Rename a sealed checkpoint to its name; what stands there is set aside."""
    if os.path.lexists(folder):
        logger.warning(f"{folder} was there already: moved to {set_aside(folder)}")
    os.replace(unfinished, folder)
    for changed in (folder.parent, unfinished.parent):
        _flush_names(changed)


def set_aside(folder: Path) -> Path:
    """Move a checkpoint of a run to where no resumed run looks for it."""
    aside = folder.parent / ABANDONED
    make_folder(aside)
    names = (folder.name, *(f"{folder.name}-{number}" for number in range(2, 10**6)))
    free = next(aside / name for name in names if not os.path.lexists(aside / name))
    os.replace(folder, free)
    return free


def set_aside_after(run: Path, step: int) -> list[Path]:
    """Set aside our checkpoints of later steps: those of a run that was left when another went on from `step`."""
    later = [folder for number, folder in checkpoints_of(run) if number > step and (folder / MANIFEST_FILE).is_file()]
    for folder in later:
        set_aside(folder)
    if later:
        names = ", ".join(folder.name for folder in later)
        logger.warning(
            f"{names} of an earlier run in {run} {'is' if len(later) == 1 else 'are'} later than step {step}, where "
            f"this run begins: moved to {run / ABANDONED}"
        )
    return later


def rotate(run: Path, limit: int | None, keep: Path | None) -> None:
    """Delete the oldest checkpoints of ours beyond `limit`, but neither the last one nor `keep` (the best)."""
    ours = [folder for _, folder in checkpoints_of(run) if (folder / MANIFEST_FILE).is_file()]
    if limit is None or limit < 1 or len(ours) <= limit:
        return
    kept = {ours[-1], *([keep] if keep is not None else [])}
    excess = len(ours) - max(limit, len(kept))
    for folder in [folder for folder in ours if folder not in kept][: max(excess, 0)]:
        delete(folder)


def delete(folder: Path) -> None:
    """Delete what a checkpoint's manifest lists and nobody has edited, and the folder if nothing else is in it."""
    manifest = manifest_of(folder) or {"files": {}}
    for name, entry in manifest["files"].items():
        linked = any((folder / part).is_symlink() for part in list(Path(name).parents)[:-1])
        if not linked and is_unchanged(folder / name, entry):
            (folder / name).unlink()
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    remove_empty(folder)


def remove_empty(folder: Path) -> None:
    """Remove a folder and those in it, as far as nothing is left in them."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for inside in list(folder.iterdir()):
        remove_empty(inside)
    if not any(folder.iterdir()):
        folder.rmdir()


def clear_unfinished(run: Path) -> None:
    """Delete what a run that was cut off had begun to write."""
    folder = run / UNFINISHED
    names = (read_marker(run) or {"files": {}})["files"]
    for path in run.iterdir() if run.is_dir() else ():
        if is_part(path.name, {*names, MARKER_FILE}) and path.is_file() and not path.is_symlink():
            path.unlink()
    if UNFINISHED in names and folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)


def begin_unfinished(run: Path) -> None:
    """Say in the marker of a run that the folder of unfinished files is its own."""
    if UNFINISHED not in (read_marker(run) or {"files": {}})["files"]:
        own(run, [UNFINISHED])


def check_places(run: Path, steps: int | None) -> None:
    """Refuse a folder where a user's things are in the places of a run's own folders.

    Args:
        run (`Path`): `output_dir`.
        steps (`int`, *optional*): of a run that starts from the beginning; its checkpoints need their names.

    Raises:
        ConfigError: it names the first of them.
    """
    version = other_version(run)
    if version is not None:
        raise ConfigError(
            f"output_dir (={str(run)!r}) is the run of another version of dopd ({version}): it can be evaluated, "
            "reported and named as a model, but neither gone on with nor replaced, because nothing says which of its "
            "files have been edited since. Move it away, or choose another output_dir"
        )
    places = [
        place for place in (ABANDONED, KEPT, UNFINISHED) if os.path.lexists(run / place) and not _is_folder(run / place)
    ]
    if places:
        raise ConfigError(
            f"output_dir (={str(run)!r}) has a {places[0]} that is no folder of its own: move it away, or choose "
            "another output_dir"
        )
    there = [UNFINISHED, *([] if read_marker(run) else [MARKER_FILE])]
    if steps is not None and run.is_dir():
        named = [(_NAME.fullmatch(path.name), path) for path in run.iterdir()]
        there += [
            path.name
            for match, path in named
            if match and int(match.group(1)) <= steps and (path.is_symlink() or not (path / MANIFEST_FILE).is_file())
        ]
    check_free(run, there)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place) / name for name in sorted(names) if name != MANIFEST_FILE)


def _is_inside(name: Any) -> bool:
    path = Path(str(name))
    return isinstance(name, str) and bool(name) and not path.is_absolute() and ".." not in path.parts


def _flush_names(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
