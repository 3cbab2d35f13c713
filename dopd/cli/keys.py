"""`dopd train --keys`: every key of a configuration, from the one description that also checks it."""

import textwrap
from collections.abc import Sequence

from dopd.errors import ConfigError
from dopd.runs.settings import all_settings
from dopd.settings import Setting

_WIDTH = 110


def print_keys(words: Sequence[str]) -> None:
    """Print keys with what they may be, their defaults and what they are for.

    Args:
        words: those with one of these in their name or description; all keys if there is none.

    Raises:
        ConfigError: no key has one.
    """
    wanted = [word.lower() for word in words]
    shown = [setting for setting in all_settings().values() if _has(setting, wanted)]
    if not shown:
        raise ConfigError(f"no key has {' or '.join(map(repr, words))} in its name or description")
    print("\n".join(map(_lines, shown)))


def _has(setting: Setting, wanted: Sequence[str]) -> bool:
    text = f"{setting.name} {setting.about}".lower()
    return not wanted or any(word in text for word in wanted)


def _lines(setting: Setting) -> str:
    indented = {"width": _WIDTH, "subsequent_indent": "    "}
    head = textwrap.fill(str(setting), **indented)  # type: ignore[arg-type]
    if not setting.about:
        return head
    return head + "\n" + textwrap.fill(setting.about, initial_indent="    ", **indented)  # type: ignore[arg-type]
