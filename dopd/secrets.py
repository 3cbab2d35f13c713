"""Values that are secret by name, here or in the environment: they are used, and written nowhere."""

import os
import re
from collections.abc import Mapping
from typing import Any

_WORDS = ("api_key", "apikey", "password", "passwd", "secret", "credential")
# Of an address: what stands between `//` and `@`, with a colon in it, is a name and a password.
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/@:'\"]*:[^\s/'\"]+@")
_SHORTEST = 8  # characters of a value of the environment; a shorter one would be found in ordinary text
_TOKENS_OF_TEXT = ("eos", "bos", "pad", "unk", "sep", "cls", "mask", "image", "video", "audio")


def is_secret(name: str) -> bool:
    """Whether a key names something that must not be written down, such as `hub_token`; tokens of text are none."""
    lowered = name.lower()
    ends = lowered == "token" or (lowered.endswith("_token") and not lowered.startswith(_TOKENS_OF_TEXT))
    return ends or any(word in lowered for word in _WORDS)


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with `None` in the place of every secret at any depth, and texts `without_tokens`."""
    return {
        name: (None if value is not None and not isinstance(value, bool) and is_secret(str(name)) else _inside(value))
        for name, value in values.items()
    }


def _inside(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, str):
        return without_tokens(value)
    return [_inside(entry) for entry in value] if isinstance(value, list) else value


def without_tokens(text: str) -> str:
    """Text with `<NAME>` in the place of every value of the environment that is secret by name, and `<user>@` in that
    of the name and the password of an address.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and is_secret(name) and value in text:
            text = text.replace(value, f"<{name}>")
    return _IN_ADDRESS.sub("<user>@", text)
