"""How commands read their flags, and what they say of ones that they do not know."""

import argparse
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from dopd.errors import did_you_mean
from dopd.report.terminal import fill

_WIDEST = 110  # characters of a line that one still reads with ease
_MARGIN = 2  # as argparse leaves it
_EXAMPLE = re.compile(r"  (?:dopd|accelerate) ")


def text_width() -> int:
    """Characters of a line of prose in this terminal."""
    return min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns)


class HelpFormatter(argparse.HelpFormatter):
    """Help in the width of the terminal: every line of a description or an epilogue is a paragraph of its own, and
    examples stay on one line each, so that they can be copied.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=text_width() - _MARGIN)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return paragraphs(text, width)


class Parser(argparse.ArgumentParser):
    """A parser whose flags may be written with `-` or `_`, and whose refusals name what is close."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **options})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self.unknown(rest))
        return arguments

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(self._respelt(sys.argv[1:] if args is None else args), namespace)

    def unknown(self, flags: Sequence[str]) -> str:
        """What is said of words that no flag reads."""
        names = [flag.partition("=")[0] for flag in flags if flag.startswith("-")]
        hints = "".join(did_you_mean(name, self.flags) for name in names)
        return f"unrecognized arguments: {' '.join(flags)}{hints and '.'}{hints}"

    def check_none_meant(self, words: Sequence[str], keys: Iterable[str]) -> None:
        """End the program where a flag is no key, and closer to a flag of this parser than to any key."""
        own = [flag.removeprefix("--") for flag in self.flags]
        others = {_bare(key) for key in keys}
        for word in words:
            name = _bare(word.partition("=")[0].removeprefix("--"))
            if not word.startswith("--") or name in others:
                continue
            hint = did_you_mean(name, own)
            if hint and hint == did_you_mean(name, [*own, *others]):
                self.error(self.unknown([word]))

    @property
    def flags(self) -> list[str]:
        """All long flags, as help writes them."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def _respelt(self, args: Iterable[str]) -> list[str]:
        """Arguments with the flags among them as help writes them."""
        flags = {_bare(flag): flag for flag in self.flags}
        written, are_flags = [], True
        for word in args:
            are_flags = are_flags and word != "--"
            name, separator, value = word.partition("=")
            right = flags.get(_bare(name)) if are_flags and name.startswith("--") else None
            written.append(f"{right}{separator}{value}" if right else word)
        return written

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"{value!r} must be one of {', '.join(names)}.{did_you_mean(value, names)}"
            )

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:  # argparse goes on where nobody reads it
            (file or sys.stderr).write(message)


def paragraphs(text: str, width: int) -> str:
    """A text of a paragraph a line, in lines of a width; examples stay as they are."""
    return "\n".join(line if _EXAMPLE.match(line) else _paragraph(line, width) for line in text.splitlines())


def _paragraph(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return fill(line.strip(), width, indent, hanging="    " if indent else "")


def _bare(flag: str) -> str:
    return flag.replace("_", "-")
