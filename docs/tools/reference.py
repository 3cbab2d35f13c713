"""Writes the pages of `docs/reference` that say what the code says: keys, names of elsewhere, commands, Python.

python docs/tools/reference.py           # make docs-reference
"""

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
import trl
from trl.experimental.gkd import GKDConfig
from trl.experimental.gold import GOLDConfig
from trl.experimental.sdft import SDFTConfig
from trl.experimental.sdpo import SDPOConfig
from trl.experimental.server_distillation import ServerDistillationConfig

import dopd
from dopd.cli.main import build_parser
from dopd.cli.parser import paragraphs
from dopd.runs.origins import origin_of, other_default
from dopd.runs.settings import all_settings
from dopd.settings import REQUIRED, Setting
from dopd.settings.foreign import FOREIGN

FOLDER = Path(__file__).resolve().parents[1] / "reference"
_MOST_CHOICES = 8
_TRAINERS = {
    "GKD": GKDConfig,
    "SDFT": SDFTConfig,
    "SDPO": SDPOConfig,
    "server distillation": ServerDistillationConfig,
    "GOLD": GOLDConfig,
    "GRPO": trl.GRPOConfig,
    "RLOO": trl.RLOOConfig,
    "scripts": trl.ScriptArguments,
    "models": trl.ModelConfig,
    "SFT": trl.SFTConfig,
}
_MADE = "<!-- Written by `make docs-reference`: change the code that it is made from. -->"
# What depends on the machine that writes the page.
_OF_MACHINE = {"dataloader_num_workers": "int of at least 0 and of at most 8 for each core"}
_SECTION = re.compile(r"^(Args|Parameters|Attributes|Returns|Raises):$")


def keys() -> str:
    """Every key of a configuration, a table for each library."""
    settings = all_settings()
    about = {
        "dopd": "Keys that are dopd's own.",
        "TRL": "Keys of TRL's `DistillationConfig`, `ModelConfig` and `ScriptArguments`, with their meaning there.",
        "transformers": "Keys of `transformers.TrainingArguments`, with their meaning there.",
    }
    lines = [
        "# Keys of a configuration",
        _MADE,
        "",
        "A configuration is one flat mapping: a YAML file for `dopd train`, flags (`--key value`), or arguments",
        "of `dopd.DOPDConfig` (models, data and verifier are then arguments of `dopd.DOPDTrainer`).",
        "`dopd config [WORD]` prints the same in a terminal. Names that other libraries have for these keys:",
        "[names of elsewhere](names.md).",
        "",
        f"Of transformers {transformers.__version__} and TRL {trl.__version__}.",
    ]
    for origin, sentence in about.items():
        own = [setting for name, setting in settings.items() if origin_of(name) == origin]
        lines += [
            "",
            f"## {origin}",
            "",
            sentence,
            "",
            "| key | what it may be | default | what it is for |",
            "|---|---|---|---|",
        ]
        lines += [_row(_code(one.name), _allowed(one), _default(one), _escaped(one.about)) for one in own]
    return "\n".join(lines) + "\n"


def _allowed(setting: Setting) -> str:
    if setting.name in _OF_MACHINE:
        return _OF_MACHINE[setting.name]
    many = len(setting.choices) > _MOST_CHOICES
    said = f"one of {len(setting.choices)}: `dopd config {setting.name}`" if many else _escaped(setting.words)
    return f"{said} or null" if setting.nullable else said


def _default(setting: Setting) -> str:
    if setting.default is REQUIRED:
        return "must be given"
    theirs = other_default(setting)
    shown = "null" if setting.default is None else f"{getattr(setting.default, 'value', setting.default)}"
    return (_code(shown) if shown else "empty") + (f" (TRL: {_code(theirs)})" if theirs else "")


def names() -> str:
    """What arguments of TRL's trainers and everyday names are called here: what errors say of them."""
    fields = {label: {one.name for one in dataclasses.fields(cls)} for label, cls in _TRAINERS.items()}
    where = {name: [label for label, known in fields.items() if name in known] for name in FOREIGN}
    lines = [
        "# Names of elsewhere",
        _MADE,
        "",
        "What arguments of TRL's other trainers, of older versions of transformers, and everyday names are called",
        "here. A configuration with one of them is refused with the same words. Every field of TRL's",
        "`DistillationConfig` is one here. Compared are its configurations for GKD, SDFT, SDPO, server distillation,",
        "GOLD, GRPO, RLOO and SFT, `ScriptArguments` (scripts) and `ModelConfig` (models): an argument that is not",
        "listed has the same name here ([keys](keys.md)), or belongs to supervised training alone.",
        "",
        "## Arguments of TRL's trainers",
        "",
        "| argument | of | here |",
        "|---|---|---|",
        *(
            _row(_code(name), ", ".join(where[name]), _escaped(FOREIGN[name]))
            for name in sorted(FOREIGN)
            if where[name]
        ),
        "",
        "## Other names",
        "",
        "| name | here |",
        "|---|---|",
        *(_row(_code(name), _escaped(FOREIGN[name])) for name in sorted(FOREIGN) if not where[name]),
    ]
    return "\n".join(lines) + "\n"


def commands() -> str:
    """Every command with its arguments and examples."""
    (subparsers,) = [one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction)]
    summaries = {one.dest: one.help for one in subparsers._choices_actions}
    lines = [
        "# Commands",
        _MADE,
        "",
        "`dopd COMMAND --help` prints the same in a terminal. Exit status: 0; 2 with one line for each problem that",
        "you can fix; 129, 130, 138 or 143 after SIGHUP, Ctrl-C, SIGUSR1 or SIGTERM; 141 if the reader of the",
        "output has left; 75 if the server of a teacher was lost, which is worth another try later.",
        "`--debug` before the command shows tracebacks. On several GPUs:",
        "`dopd train CONFIG --accelerate_config multi_gpu --num_processes 8`.",
    ]
    for name, parser in subparsers.choices.items():
        lines += ["", f"## dopd {name}", "", _sentence(str(summaries[name]))]
        shown = [one for one in parser._actions if one.dest != "help" and one.help != argparse.SUPPRESS]
        if shown:
            lines += ["", "| argument | default | what it is for |", "|---|---|---|", *map(_argument, shown)]
        if parser.epilog:
            # What stands behind the examples depends on nothing but the package.
            examples = paragraphs(parser.epilog.removeprefix("examples:\n"), 110)
            lines += ["", "```text", textwrap.dedent(examples).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _argument(action: argparse.Action) -> str:
    name = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
    many = action.nargs in ("*", "+")
    takes = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or action.dest.upper()}"
    default = (
        "" if action.default in (None, False, []) or action.default == argparse.SUPPRESS else _code(str(action.default))
    )
    choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
    return _row(
        _code(f"{name}{takes}{' ...' if many else ''}"), default, _escaped((action.help or "") % vars(action)) + choices
    )


def python() -> str:
    """Public names of `dopd` with signatures and docstrings."""
    lines = [
        "# Python",
        _MADE,
        "",
        "The public names of `dopd`. Shapes: B sequences, T completion tokens, V words of the vocabulary, H hidden",
        "units. Log-probabilities, divergences and entropies are in nats.",
    ]
    for name in dopd.__all__:
        thing = getattr(dopd, name)
        lines += ["", f"## {name}", "", "```python", _signature(name, thing), "```", "", *_described(thing)]
        if inspect.isclass(thing) and thing.__module__.startswith("dopd"):
            for method, function in _public_methods(thing):
                lines += ["", f"### {name}.{method}", "", "```python", _signature(method, function), "```", ""]
                lines += _described(function)
    return "\n".join(lines) + "\n"


def _public_methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        documented = inspect.isfunction(function) and function.__doc__ and function.__module__.startswith("dopd")
        if documented and not name.startswith("_"):
            yield name, function


def _signature(name: str, thing: Any) -> str:
    """As the source has it, so that versions of Python do not differ."""
    if inspect.isclass(thing):
        bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
        return f"class {name}({bases})" if bases else f"class {name}"
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    returns = f" -> {ast.unparse(tree.returns)}" if tree.returns else ""
    tree.args.args = [one for one in tree.args.args if one.arg not in ("self", "cls")]
    joined = ast.unparse(tree.args)
    if len(joined) + len(name) + len(returns) > 110:
        parts = re.split(r", (?![^\[\(]*[\]\)])", joined)
        joined = "\n    " + ",\n    ".join(parts) + ",\n"
    return f"{name}({joined}){returns}"


def _described(thing: Any) -> list[str]:
    """A docstring as Markdown: sections in bold, what they describe as lists."""
    text = inspect.cleandoc(thing.__doc__ or "")
    if thing is dopd.DOPDConfig:
        return ["TRL's `DistillationConfig` and what dopd adds to it: see the [keys of a configuration](keys.md)."]
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        heading = _SECTION.match(line)
        if heading:
            section = heading[1]
            lines += [f"**{section}**", ""]
        elif not section:
            lines.append(line)
        elif line.startswith("     ") and lines[-1]:
            lines[-1] += f" {line.strip()}"
        elif line.strip():
            entry = line.strip()
            named = re.match(r"([\w, ]+?)( \([^:]*\))?: ", entry)
            body = entry[named.end() :] if named else entry
            kind = (named[2] or "") if named else ""
            lines.append(f"- `{named[1]}`{kind}: {body}" if named else f"- {entry}")
    # Names in reference brackets are links of transformers' documentation alone.
    return [re.sub(r"\[`~?([^`]*)`\](?!\()", r"`\1`", line) for line in lines]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _escaped(text: str) -> str:
    """Text in a cell: lines and bars would end it, and angle brackets be read as tags."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


PAGES = {"keys.md": keys, "names.md": names, "commands.md": commands, "python.md": python}


def main() -> None:
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
