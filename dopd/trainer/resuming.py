"""Which checkpoint a run goes on from."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopd.errors import ConfigError
from dopd.trainer.best import has_stopped
from dopd.trainer.whole import checkpoints_of, damage, newest_whole

if TYPE_CHECKING:
    from dopd.trainer.config import DOPDConfig

STATE_FILE = "trainer_state.json"
_LAST, _NOT = ("true", "last"), ("false", "none", "no", "")
_RATHER = "To use its weights alone, give it as model_name_or_path"


def checkpoint_to_resume(wanted: Any, output_dir: str | Path | None, *, checksums: bool = True) -> str | None:
    """The folder of the checkpoint that `resume_from_checkpoint` means; `None` for a start from the beginning.

    Args:
        wanted (`bool` or `str`, *optional*): `True`, `"true"` or `"last"` for the last whole checkpoint in
            `output_dir`, those that are not whole being named in the log; a folder, also one in `output_dir`; `None`,
            `False` or `"false"` for none.
        output_dir (`str`): of the run.
        checksums (`bool`): read the files whole; otherwise their sizes alone are looked at.

    Raises:
        ConfigError: there is no such checkpoint, or it is not whole.
    """
    text = str(wanted).lower() if isinstance(wanted, bool | str) else None
    if wanted is None or text in _NOT:
        return None
    folder = Path(output_dir or ".")
    checksums = checksums and _is_first_on_machine()
    if text in _LAST and not os.path.isdir(str(wanted)):
        last = newest_whole(folder, checksums=checksums)
        if last is None:
            there = (
                "no checkpoint" if not checkpoints_of(folder) else "no whole checkpoint (the log says what is wrong)"
            )
            raise ConfigError(
                f"resume_from_checkpoint (={wanted!r}): there is {there} in output_dir (={str(folder)!r}). "
                "Leave it out to start from the beginning; save_strategy and save_steps say when one is written"
            )
        return _checked(wanted, last)
    if not isinstance(wanted, str | Path):
        raise ConfigError(f"resume_from_checkpoint (={wanted!r}) must be true, last or the folder of a checkpoint")
    checkpoint = Path(wanted).expanduser()
    found = _checked(
        wanted,
        folder / checkpoint if not os.path.exists(checkpoint) and os.path.isdir(folder / checkpoint) else checkpoint,
    )
    wrong = damage(Path(found), checksums=checksums)
    if wrong is not None:
        raise ConfigError(f"resume_from_checkpoint (={wanted!r}) {wrong}. Give true for the last whole one. {_RATHER}")
    return found


def is_complete(checkpoint: str, args: "DOPDConfig") -> bool:
    """Whether a checkpoint is at the last step of a run, the one that it stopped at early included: the host would make
    one more.

    Args:
        checkpoint (`str`): its folder.
        args: the configuration; where epochs count, the checkpoint says how many steps they were.

    Raises:
        ConfigError: it is beyond the last step.
    """
    state = json.loads((Path(checkpoint) / STATE_FILE).read_text())
    step = state["global_step"]
    if has_stopped(args, state["log_history"], step):
        return True
    if args.max_steps < 1:
        return step >= state["max_steps"] and state["num_train_epochs"] >= args.num_train_epochs
    if step > args.max_steps:
        raise ConfigError(
            f"resume_from_checkpoint (={checkpoint!r}) is at step {step}, beyond max_steps (={args.max_steps}): set "
            "max_steps higher to go on, or resume from an earlier checkpoint"
        )
    return step == args.max_steps


def names_of(changes: Sequence[str] | str | None) -> list[str]:
    """`resume_with_changes`, a list or a text with commas, as a list."""
    names = changes.split(",") if isinstance(changes, str) else list(changes or ())
    return [str(name).strip() for name in names if str(name).strip()]


def _is_first_on_machine() -> bool:
    """One process of a machine reads whole checkpoints; the others look at names and sizes."""
    return int(os.environ.get("LOCAL_RANK") or 0) == 0


def _checked(wanted: Any, folder: Path) -> str:
    if os.path.isfile(folder / STATE_FILE):
        return str(folder)
    if not os.path.isdir(folder):
        raise ConfigError(
            f"resume_from_checkpoint (={wanted!r}) is no folder: give true, last or a checkpoint's folder"
        )
    inside = [path for _, path in checkpoints_of(folder)]
    hint = f": its last checkpoint is {str(inside[-1])!r}" if inside else ", as a run's folders checkpoint-N are"
    raise ConfigError(f"resume_from_checkpoint (={wanted!r}) is not a checkpoint with a {STATE_FILE}{hint}. {_RATHER}")
