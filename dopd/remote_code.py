"""Code that a checkpoint brings runs where `trust_remote_code` asks for it, and nowhere else."""

from collections.abc import Mapping
from typing import Any

KEY = "trust_remote_code"


def only_if_asked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained` that say whether such code may run: left out, transformers asks at the keyboard in
    the middle of a command; now it refuses.
    """
    return {**options, KEY: bool(options.get(KEY))}
