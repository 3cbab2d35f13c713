"""The tests of a row, as data sets of programming problems write them.

| columns | as in |
|---|---|
| `test_list`, `test_setup_code` or `test_imports` | MBPP |
| `test` with `check(candidate)`, `entry_point` | HumanEval, EvalPlus |
| `public_test_cases`, `private_test_cases`, `metadata` | LiveCodeBench |
| `input_output` with `inputs`, `outputs`, and `fn_name` for functions | APPS, TACO |
| `answer` with any of these as JSON, or a list of assertions | Skywork-OR1, DeepCoder |
"""

import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dopd.data.checks import renaming
from dopd.errors import DataError

_MOST_UNPACKED = 512 * 2**20
_COLUMNS = ("test_list", "test", "public_test_cases", "private_test_cases", "input_output", "tests", "answer")
# What LeetCode has imported where an answer begins, and LiveCodeBench with it.
PRELUDE = (
    "import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys\n"
    "from bisect import *\nfrom collections import *\nfrom functools import *\nfrom heapq import *\n"
    "from itertools import *\nfrom math import *\nfrom typing import *\nfrom math import pow\n"
)


@dataclass(frozen=True)
class Called:
    """A call of a function, or of a method of `Solution`, and what it gives."""

    name: str
    args: Sequence[Any]
    gives: Any


@dataclass
class CodeTests:
    """What an answer has to do.

    Attributes:
        programs (`list[tuple[str, str]]`): standard input, and the output that is right.
        assertions (`list[str]`): Python that raises nothing.
        calls (`list[Called]`): of a function.
        header (`str`): what stands above the answer: imports and helpers of the prompt.
        start (`str`): the beginning of a function that an answer may go on with.
        entry_point (`str`): the function's name, where it is known.
    """

    programs: list[tuple[str, str]] = field(default_factory=list)
    assertions: list[str] = field(default_factory=list)
    calls: list[Called] = field(default_factory=list)
    header: str = ""
    start: str = ""
    entry_point: str = ""

    def __len__(self) -> int:
        return len(self.programs) + len(self.assertions) + len(self.calls)


def read_tests(row: Mapping[str, Any]) -> CodeTests:
    """The tests of a row.

    Raises:
        DataError: it has none, or they cannot be read.
    """
    found = CodeTests()
    try:
        if row.get("test_list"):
            _add_assertions(found, row["test_list"], row)
        if isinstance(row.get("test"), str) and row.get("entry_point"):
            _add_check(found, row)
        for name in ("public_test_cases", "private_test_cases", "input_output", "tests", "answer"):
            if row.get(name) and not (name == "answer" and len(found)):
                _add(found, row[name], row)
    except (ValueError, TypeError, KeyError, IndexError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise DataError(f"the tests of a row cannot be read: {type(error).__name__}: {str(error)[:200]}") from error
    if not len(found):
        raise DataError(
            f"the verifier 'code' finds no tests in a row, which has {', '.join(row)}: it reads {', '.join(_COLUMNS)}. "
            f"Write {renaming('answer', 'NAME')} where they are elsewhere, or leave the row out"
        )
    return found


def _add_assertions(found: CodeTests, tests: Sequence[str], row: Mapping[str, Any]) -> None:
    imports = row.get("test_imports") or []
    setup = "\n".join([*([imports] if isinstance(imports, str) else imports), row.get("test_setup_code") or ""])
    found.assertions += [f"{setup}\n{test}".lstrip("\n") for test in tests]


def _add_check(found: CodeTests, row: Mapping[str, Any]) -> None:
    """HumanEval: `check` calls the function; the prompt begins it, under imports and helpers."""
    name = str(row["entry_point"])
    found.assertions.append(f"{row['test']}\ncheck({name})")
    found.entry_point = name
    prompt = row.get("prompt")
    begins = re.search(rf"^def {re.escape(name)}\b", prompt, re.M) if isinstance(prompt, str) else None
    if begins is not None and isinstance(prompt, str):
        found.header, found.start = prompt[: begins.start()], prompt


def _add(found: CodeTests, value: Any, row: Mapping[str, Any]) -> None:
    """What a column has, in whichever of the ways."""
    value = _unpacked(value)
    if isinstance(value, Mapping):
        name = value.get("fn_name") or value.get("func_name")
        for asked, gives in zip(value["inputs"], value["outputs"], strict=True):
            _add_pair(found, asked, gives, name)
        return
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:80]!r} is neither a list of tests nor inputs with outputs")
    if all(isinstance(one, str) for one in value):
        _add_assertions(found, value, row)
        return
    metadata = _unpacked(row.get("metadata") or {})
    for case in value:
        kind = case.get("testtype") or case.get("type") or "stdin"
        name = case.get("fn_name") or (metadata.get("func_name") if kind == "functional" else None)
        if kind == "functional" and isinstance(case["input"], str):
            lines = [json.loads(line) for line in case["input"].split("\n") if line.strip()]
            found.calls.append(Called(str(name), lines, json.loads(case["output"])))
        else:
            _add_pair(found, case["input"], case["output"], name)


def _add_pair(found: CodeTests, asked: Any, gives: Any, name: Any) -> None:
    if name:
        found.calls.append(Called(str(name), asked if isinstance(asked, list) else [asked], gives))
    else:
        found.programs.append((_lines(asked), _lines(gives)))


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _unpacked(value: Any) -> Any:
    """JSON, or LiveCodeBench's JSON in a pickle, compressed, in base64; what is none of these is given back."""
    if not isinstance(value, str):
        return value
    if value.lstrip()[:1] in ("[", "{"):
        return json.loads(value)
    content = zlib.decompressobj().decompress(base64.b64decode(value, validate=True), _MOST_UNPACKED)
    text = _TextAlone(io.BytesIO(content)).load()
    return json.loads(text) if isinstance(text, str | bytes) else text


class _TextAlone(pickle.Unpickler):
    """Reads a pickle of text: one that would import anything is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"the pickled tests of a row name {module}.{name}, and are refused: they must be text alone")


_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.S | re.M)
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.S | re.I)
_PYTHON = ("", "python", "python3", "py", "python2")


def source_in(completion: str, tests: CodeTests) -> str:
    """The program in an answer: its last block of Python, or all of it; `""` where there is none."""
    text = _THOUGHTS.sub("", completion)
    blocks = [code for language, code in _FENCE.findall(text) if language.lower() in _PYTHON]
    source: str = blocks[-1] if blocks else text
    if not source.strip():
        return ""
    if tests.entry_point and not re.search(rf"^def {re.escape(tests.entry_point)}\b", source, re.M):
        return tests.start + source if tests.start else source
    if tests.calls and "from __future__" not in source:
        return PRELUDE + source
    return f"{tests.header}\n{source}" if tests.header else source


def called_tests(calls: Sequence[Called], source: str) -> Iterator[str]:
    """Tests of calls, as Python."""
    method = re.search(r"^class Solution\b", source, re.M) is not None
    for call in calls:
        target = f"Solution().{call.name}" if method else call.name
        yield (
            f"found = {target}(*{_literal(list(call.args))})\nwanted = {_literal(call.gives)}\n"
            "found = list(found) if isinstance(found, tuple) else found\n"
            "assert found == wanted or (isinstance(wanted, list) and len(wanted) == 1 and found == wanted[0]), "
            "repr(found)[:200]"
        )


def _literal(value: Any) -> str:
    return f"__import__('json').loads({json.dumps(value)!r})"


def same_output(found: str, wanted: str) -> bool:
    """Whether a program wrote what is wanted: line by line without blanks at their ends; numbers by value."""
    ours, theirs = ([line.split() for line in text.strip().splitlines()] for text in (found, wanted))
    if len(ours) != len(theirs):
        return False
    return all(
        len(a) == len(b) and all(_same_word(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


def _same_word(found: str, wanted: str) -> bool:
    if found == wanted:
        return True
    if "." not in wanted or len(found) > 64:
        return False
    try:
        a, b = float(found), float(wanted)
    except ValueError:
        return False
    return abs(a - b) <= 1e-9 * max(1.0, abs(b))
