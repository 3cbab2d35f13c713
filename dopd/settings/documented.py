"""What a dataclass's docstring says of its fields, as the one description of each."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType

_ENTRY = re.compile(r"^(\w+) \(.*\):$")


def described_fields(cls: type) -> dict[str, str]:
    """The text below each `name (type):` of a class's docstring, on one line, by name."""
    found: dict[str, list[str]] = {}
    indent, name = 0, None
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        depth = len(line) - len(line.lstrip())
        if match := _ENTRY.match(line.strip()):
            indent, name = depth, match[1]
            found[name] = []
        elif name is not None and line.strip() and depth > indent:
            found[name].append(line.strip())
        elif line.strip():
            name = None
    return {name: " ".join(lines) for name, lines in found.items()}


def document_fields(cls: type) -> None:
    """Give a dataclass's own fields the descriptions of its docstring as the `help` of their metadata, and the class a
    signature of keywords, so that `help` begins with the docstring.
    """
    described, own = described_fields(cls), inspect.get_annotations(cls)
    for one in dataclasses.fields(cls):
        if one.name in described and one.name in own:
            help_text: Mapping[str, str] = {"help": described[one.name]}
            one.metadata = MappingProxyType({**one.metadata, **help_text})
    first = inspect.Parameter("output_dir", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    cls.__signature__ = inspect.Signature([first, inspect.Parameter("settings", inspect.Parameter.VAR_KEYWORD)])  # type: ignore[attr-defined]
