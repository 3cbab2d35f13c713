"""Room on the disk: what the checkpoints of a run will take, and what can be deleted where they do not fit."""

import errno
import logging
import math
import os
import shutil
from pathlib import Path

from dopd.adapters import has_adapters
from dopd.shown import shown_bytes
from dopd.trainer.folder import PREVIOUS
from dopd.trainer.host import HostTrainer
from dopd.trainer.optimizer_states import kept_bytes

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def tell_room(host: HostTrainer) -> None:
    """Warn where the checkpoints of a run will not fit on the disk."""
    run = Path(str(host.args.output_dir))
    model, checkpoint, count = _model_size(host), checkpoint_size(host), _count(host)
    free = shutil.disk_usage(run).free
    if count * checkpoint + model <= free:
        return
    logger.warning(
        f"output_dir (={str(run)!r}) needs about {shown_bytes(count * checkpoint + model)} ({count} checkpoints of "
        f"{shown_bytes(checkpoint)} and the model of {shown_bytes(model)}), and {shown_bytes(free)} are free there: "
        f"set save_total_limit or save_only_model, choose another output_dir, or free space{way_of_previous(run)}"
    )


def checkpoint_size(host: HostTrainer) -> int:
    """Bytes of a checkpoint, about: weights, and what the optimizer remembers of those that are trained."""
    if host.args.save_only_model:
        return _model_size(host)
    name = str(getattr(host.args.optim, "value", host.args.optim))
    trained = [weight for weight in host.unwrapped_student.parameters() if weight.requires_grad]
    return _model_size(host) + int(sum(weight.numel() * kept_bytes(name, weight.itemsize) for weight in trained))


def _model_size(host: HostTrainer) -> int:
    student = host.unwrapped_student
    saved = [weight for weight in student.parameters() if weight.requires_grad or not has_adapters(student)]
    return sum(weight.numel() * weight.itemsize for weight in saved)


def _count(host: HostTrainer) -> int:
    """Most checkpoints that are there at one time: a new one is whole before an old one goes."""
    args, steps = host.args, host.state.max_steps
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    count = (
        math.ceil(args.num_train_epochs) if strategy == "epoch" else math.ceil(steps / max(host.state.save_steps, 1))
    )
    limit = args.save_total_limit
    return max(count, 1) if limit is None or limit < 1 else min(count, limit + 1)


def way_of_previous(run: Path, message: str | None = None) -> str:
    """What to delete of a run that is replaced, in words; `""` where there is none.

    Args:
        run (`Path`): `output_dir`.
        message (`str`, *optional*): of an error of writing; the way is one out of a full disk alone.
    """
    aside = run / PREVIOUS
    if not aside.is_dir() or aside.is_symlink():
        return ""
    if message is not None and not any(os.strerror(number) in message for number in _FULL):
        return ""
    size = sum(os.lstat(path).st_size for path in aside.rglob("*") if path.is_file() and not path.is_symlink())
    return (
        f"; the run that is replaced takes {shown_bytes(size)} until the new one has ended: where it is not needed, "
        f"delete it ({PREVIOUS}, or what is here without it) before you start again"
    )
