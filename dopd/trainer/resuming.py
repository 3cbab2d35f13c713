"""Which checkpoint a run goes on from."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from dopd.errors import ConfigError

_STATE = "trainer_state.json"
_LAST, _NOT = ("true", "last"), ("false", "none", "no", "")


def checkpoint_to_resume(wanted: Any, output_dir: str | Path | None) -> str | None:
    """The folder of the checkpoint that `resume_from_checkpoint` means; `None` for a start from the beginning.

    Args:
        wanted (`bool` or `str`, *optional*): `True`, `"true"` or `"last"` for the last checkpoint in `output_dir`; a
            folder, also one in `output_dir`; `None`, `False` or `"false"` for none.
        output_dir (`str`): of the run.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    text = str(wanted).lower() if isinstance(wanted, bool | str) else None
    if wanted is None or text in _NOT:
        return None
    folder = Path(output_dir or ".")
    if text in _LAST and not Path(str(wanted)).is_dir():
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if last is None:
            raise ConfigError(
                f"resume_from_checkpoint (={wanted!r}): there is no checkpoint in output_dir (={str(folder)!r}). "
                "Leave it out to start from the beginning; save_strategy and save_steps say when one is written"
            )
        return _checked(wanted, Path(last))
    if not isinstance(wanted, str | Path):
        raise ConfigError(f"resume_from_checkpoint (={wanted!r}) must be true, last or the folder of a checkpoint")
    given = Path(wanted).expanduser()
    return _checked(wanted, folder / given if not given.exists() and (folder / given).is_dir() else given)


def check_steps_left(checkpoint: str | None, max_steps: int) -> None:
    """Refuse a checkpoint that is already at the last step, after which the host would make one more.

    Args:
        checkpoint (`str`, *optional*): its folder.
        max_steps (`int`): of the run; below 1 where epochs count, of which the host makes no more than there are.

    Raises:
        ConfigError: there is nothing left to train.
    """
    if checkpoint is None or max_steps < 1:
        return
    step = json.loads((Path(checkpoint) / _STATE).read_text())["global_step"]
    if step >= max_steps:
        raise ConfigError(
            f"resume_from_checkpoint (={checkpoint!r}) is at step {step} of max_steps (={max_steps}): the run is "
            "complete. Set max_steps higher to go on, or resume from an earlier checkpoint"
        )


def _checked(wanted: Any, folder: Path) -> str:
    if (folder / _STATE).is_file():
        return str(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"resume_from_checkpoint (={wanted!r}) is no folder: give true, last or a checkpoint's folder"
        )
    inside = get_last_checkpoint(str(folder))
    hint = f": its last checkpoint is {inside!r}" if inside else ", as a run's folders checkpoint-N are"
    raise ConfigError(f"resume_from_checkpoint (={wanted!r}) is not a checkpoint with a {_STATE}{hint}")
