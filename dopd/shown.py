"""Text for people's screens: what came from data, models or names is shown, and neither obeyed nor secret; sizes."""

import re

from dopd.secrets import without_tokens

# Control characters but new line and tab, and those that turn the direction of writing round.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

_SIZES = ("bytes", "KiB", "MiB", "GiB", "TiB")


def visible(text: object) -> str:
    """Text with its control characters written out (an escape becomes the four characters `\\x1b`), and with values of
    the environment that are secret by name, such as `HF_TOKEN`, replaced by that name.
    """
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), without_tokens(str(text)))


def shown_bytes(count: float) -> str:
    """A number of bytes, such as `2.5 GiB`."""
    for unit in _SIZES:
        if count < 1024 or unit == _SIZES[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == _SIZES[0] else f"{count:.1f} {unit}"
