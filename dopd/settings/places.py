"""Settings that name files and folders of this machine: what a shell would have put into them."""

import os
import re
from collections.abc import Iterator
from typing import Any

from dopd.settings.quoting import quoted

# Keys that may name a file or a folder of this machine.
PLACES = (
    "dataset_eval_name",
    "dataset_name",
    "deepspeed",
    "logging_dir",
    "method",
    "model_name_or_path",
    "output_dir",
    "resume_from_checkpoint",
    "reward_funcs",
    "rollout_engine",
    "task",
    "teacher_model_name_or_path",
    "verifier",
)


def at_home(place: Any) -> Any:
    """A place with the user's folder for a `~` in front, which no shell has seen in a file."""
    if isinstance(place, list):
        return [at_home(one) for one in place]
    return os.path.expanduser(place) if isinstance(place, str) and place.startswith("~") else place


def left_open(key: str, place: Any) -> Iterator[str]:
    """What is wrong with a place in which a variable or a user's folder stands that nothing has put in."""
    for one in place if isinstance(place, list) else [place]:
        if not isinstance(one, str) or (key != "output_dir" and os.path.lexists(one)):
            continue
        variable = re.search(r"\$(?:[A-Za-z_]\w*|\{\w+\})", one)
        if variable is not None:
            yield (
                f"{key} (={quoted(one)}) has {variable[0]} in it, which only a shell would put in: write the folder "
                "out (a `~` at the beginning is your home), or give the flag without single quotes"
            )
        elif re.match(r"~[\w.-]+(?=/|$)", one):
            yield f"{key} (={quoted(one)}) begins with the home of a user who is not here: write the folder out"
