"""`dopd config`: every key of a configuration, from the one description that also checks it."""

import argparse
from collections.abc import Sequence
from typing import Any

from dopd.cli.parser import text_width
from dopd.errors import ConfigError, did_you_mean
from dopd.report.terminal import fill


def add_config(commands: Any, command: Any) -> None:
    """The parser of `dopd config`; `command` makes a subparser (`dopd.cli.main`)."""
    parser = command(
        commands,
        "config",
        "every key of a configuration: type, default, whose it is, and what it is for",
        "  dopd config\n  dopd config lora\n  dopd config learning_rate temperature",
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="only keys with one of these in name or description")
    parser.set_defaults(run=_config)


def _config(arguments: argparse.Namespace) -> None:
    print_keys(arguments.words)


def print_keys(words: Sequence[str]) -> None:
    """Print keys with what they may be, their defaults, whose they are and what they are for.

    Args:
        words: those with one of these in their name or description; all keys if there is none.

    Raises:
        ConfigError: no key has one.
    """
    from dopd.runs.settings import all_settings

    wanted = [word.lower().replace("-", "_") for word in words]
    keys = all_settings()
    shown = [one for one in keys.values() if _has(f"{one.name} {one.about}".lower(), wanted)]
    if not shown:
        hints = "".join(did_you_mean(word, keys) for word in wanted)
        raise ConfigError(
            f"no key has {' or '.join(map(repr, words))} in its name or description: `dopd config` lists all"
            f"{hints and '.'}{hints}"
        )
    width = text_width()
    print("\n".join(_lines(setting, width) for setting in shown))


def _has(text: str, wanted: Sequence[str]) -> bool:
    return not wanted or any(word in text for word in wanted)


def _lines(setting: Any, width: int) -> str:
    from dopd.runs.origins import origin_of, other_default

    theirs = other_default(setting)
    beside = f"; TRL's default is {theirs}" if theirs else ""
    text = fill(f"{setting} ({origin_of(setting.name)}{beside})", width, hanging="    ")
    if not setting.about:
        return text
    return text + "\n" + fill(setting.about, width, "    ", hanging="")
