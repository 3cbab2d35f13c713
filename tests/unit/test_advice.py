"""What documents, help and error messages advise can be done: commands parse, keys and values are accepted, extras and
targets exist.
"""

import argparse
import ast
import functools
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dopd.cli.main import build_parser
from dopd.methods import METHODS
from dopd.registry import is_reference
from dopd.runs.recipes import FOLDER, config_path
from dopd.runs.settings import all_settings, load_settings, split_arguments
from dopd.tasks import TASKS
from dopd.trainer import DOPDTrainer
from lab import command as lab_command
from lab.catalogue import EXPERIMENTS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SETTINGS = all_settings()
LAB = {name: lab_command.build_parser(name) for name in ("experiment", "tiny")}  # what dopd leaves to lab
# Words in capitals that stand for something.
EXAMPLES = {
    "CONFIG": "tiny-dag",
    "RECIPE": "tiny-dag",
    "MODEL": "tiny:dag/student",
    "TASK": "dag",
    "ROLE": "student",
    "RUN": "runs/x",
    "FILE": "x",
    "N": "1",
    "DIR": "x",
    "M": "dopd",
    "S": "0",
    "COMMAND": "train",
    # Files that the tutorial writes; what is in them is checked beside it.
    "first.yaml": "tiny-dag",
    "data.yaml": "tiny-dag",
    "hints.yaml": "qwen3-8b-to-1.7b",
    "qwen3.yaml": "tiny-dag",
}
NAMES = {"train": "tiny-dag", "eval": "dag", "tasks": "dag", "methods": "dopd", "experiment": "figure3", "tiny": "dag"}
EXTRA = re.compile(r"pip install (?:-e |--editable )?'?(?:dopd|\.)\[([\w,-]+)\]")
ASSIGNED = re.compile(r"\b([a-z]+(?:_[a-z]+)*)=('[^']*'|[A-Za-z0-9](?:[\w.]*\w)?)")
ADVISED = re.compile(r"\b(?:set|raise|lower|choose|remove|give)s? ([a-z]+(?:_[a-z]+)+)\b", re.IGNORECASE)


@functools.cache
def messages() -> list[tuple[str, str]]:
    """(module, text) of every string of dopd and lab that is no docstring; what is filled in is `{}`."""
    return list(_messages())


def _messages() -> Iterator[tuple[str, str]]:
    for path in sorted([*(ROOT / "dopd").rglob("*.py"), *(ROOT / "lab").rglob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documents = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                yield path.name, "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents | inner:
                yield path.name, node.value


def helps() -> Iterator[str]:
    """The epilogs of all commands."""
    parsers = [build_parser()]
    parsers += LAB.values()
    for parser in parsers:
        yield parser.epilog or ""
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()


def commands() -> Iterator[str]:
    """Every `dopd ...` that somebody is told to type."""
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    for path in sorted(FOLDER.glob("*.yaml")):
        texts.append("\n".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")))
    texts += helps()
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    yield from (
        line.strip() for line in lines if re.match(r"\s*(dopd [a-z]|accelerate launch .*dopd\.cli\.main)", line)
    )
    inline = "\n".join([*texts, *(text for _, text in messages())])
    yield from (match.replace("\n", " ") for match in re.findall(r"`((?:dopd|accelerate launch) [^`{]+)`", inline))


COMMANDS = sorted({re.sub(r"(?<=\S)\s{2,}.*", "", command).rstrip(":.,;") for command in commands()})


def typed(command: str) -> list[str]:
    """The arguments of one command as one would type them: places filled, what is optional left out."""
    command = re.sub(r"\[[^\]]*\]|\.\.\.|\u2026", "", command.partition(" | ")[0].partition(" (")[0])
    words = shlex.split(command)
    if "dopd.cli.main" in words:
        words = ["dopd", *words[words.index("dopd.cli.main") + 1 :]]
    words = [word for word in words[1:] if word != "\\"]
    name = NAMES.get(words[0] if words else "", "x")
    words = [re.sub(r"\$seed\b", "0", word) for word in words]
    return [name if word == "NAME" else EXAMPLES.get(word, word) for word in words]


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 30
    assert any(command.startswith("accelerate") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_advised_parses_and_what_it_names_exists(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = typed(command)
    assert arguments, command
    parsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    if len(arguments) == 1 and not arguments[0].startswith("-"):
        assert arguments[0] in parsers  # "`dopd train` does ..."
        return
    try:
        parsed, rest = build_parser().parse_known_args(arguments)
        if parsed.command in LAB:
            parsed = LAB[parsed.command].parse_args(rest, parsed)
            rest = []
    except SystemExit as ended:
        if ended.code == 0 or (missing := "the following arguments are required" in capsys.readouterr().err):
            assert ended.code == 0 or (missing and not {"NAME", "MODEL"} & set(command.split()))
            return
        raise AssertionError(command) from None
    if parsed.command in ("train", "doctor", "plan"):
        config, flags = split_arguments(rest)
        if config is not None:
            load_settings(config, flags)
        return
    assert rest == []
    known = {"tasks": TASKS, "methods": METHODS, "experiment": {**EXPERIMENTS, "all": None}}.get(parsed.command)
    if known is not None and parsed.name is not None:
        assert parsed.name in known or is_reference(parsed.name)
    if parsed.command == "quickstart":
        assert set(parsed.methods.split(",")) <= set(METHODS)
        config_path(parsed.config or "tiny-dag")
    if getattr(parsed, "task", None) is not None:
        assert parsed.task in TASKS or parsed.task == "text"
    for value in ("task_options", "chat_template_kwargs"):
        if getattr(parsed, value, None):
            assert isinstance(yaml.safe_load(getattr(parsed, value)), dict)


def test_extras_that_are_advised_exist() -> None:
    tables = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = tables.partition("[project.optional-dependencies]")[2].partition("[project.scripts]")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))
    texts = [path.read_text(encoding="utf-8") for path in (*DOCUMENTS, *sorted(FOLDER.glob("*.yaml")))]
    texts += [text for _, text in messages()]
    named = {extra for text in texts for found in EXTRA.findall(text) for extra in found.split(",")}
    assert len(named) > 3 and named <= extras


def test_make_targets_that_are_advised_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    documents = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", documents, re.MULTILINE))
    named |= {name for _, text in messages() for name in re.findall(r"`make ([a-z-]+)", text)}
    assert len(named) > 3 and named <= targets


def known_names() -> set[str]:
    """Settings, arguments of the trainer, and every argument and field of the package."""
    names = set(SETTINGS) | set(inspect.signature(DOPDTrainer).parameters)
    for path in (ROOT / "dopd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def test_keys_that_messages_advise_exist() -> None:
    known = known_names() | {"is_decoder", "target_modules"}  # of configurations of checkpoints and of peft
    wrong = {
        f"{module}: {name}" for module, text in messages() if " " in text for name in ADVISED.findall(text)
        if name not in known
    }  # fmt: skip
    assert wrong == set()


def advised_values() -> list[tuple[str, Any]]:
    found = {
        (name, value.strip("'"))
        for _, text in messages()
        if " " in text
        for name, value in ASSIGNED.findall(text.replace("(=", "( "))
        if name in SETTINGS
    }
    return sorted(found)


@pytest.mark.parametrize(("name", "value"), advised_values())
def test_a_value_that_a_message_advises_is_accepted(name: str, value: str) -> None:
    given = yaml.safe_load(value)
    # Some advice is for Python, where text is quoted in the message and need not be in YAML.
    assert not SETTINGS[name].read(given)[1] or not SETTINGS[name].read(value)[1]


def test_values_are_found() -> None:
    values = advised_values()
    assert ("resume_from_checkpoint", "true") in values and ("overwrite", "true") in values and len(values) > 8
