"""Program synthesis in miniature: find the operations behind one test case, then run them on a new input."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, final

from dopd.errors import ConfigError
from dopd.tasks.base import Example, check_choice, check_range
from dopd.tasks.registry import register_task
from dopd.tasks.text import TextTask

_LETTERS = "abcdefghij"
_WIDTH = 5
_MAP = 2 * _WIDTH  # words of a solution that say where each letter of the test case's output came from
_STEP = _WIDTH + 1  # words per solution step: an operation and the list after it

# Position i of the result takes the element at position OPERATIONS[name][i].
_OPERATIONS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "rev": (4, 3, 2, 1, 0),
        "rotl": (1, 2, 3, 4, 0),
        "rotr": (4, 0, 1, 2, 3),
        "swap": (1, 0, 2, 3, 4),
        "tail": (0, 1, 2, 4, 3),
    }
)
_MAX_OPS = 5


def _apply(operation: str, items: Sequence[str]) -> list[str]:
    return [items[i] for i in _OPERATIONS[operation]]


def _run(program: Sequence[str], items: Sequence[str]) -> list[str]:
    result = list(items)
    for operation in program:
        result = _apply(operation, result)
    return result


@functools.cache
def _shortest_programs(num_ops: int) -> tuple[tuple[str, ...], ...]:
    """Every program of `num_ops` operations whose effect no shorter program has."""
    start = "".join(map(str, range(_WIDTH)))
    seen = {start}
    level: dict[str, list[tuple[str, ...]]] = {start: [()]}
    for _ in range(num_ops):
        following: dict[str, list[tuple[str, ...]]] = {}
        for state, programs in level.items():
            for operation in _OPERATIONS:
                following.setdefault("".join(_apply(operation, state)), []).extend(
                    (*program, operation) for program in programs
                )
        level = {state: programs for state, programs in following.items() if state not in seen}
        seen |= set(level)
    return tuple(sorted(program for programs in level.values() for program in programs))


@functools.cache
def _programs_of(num_ops: int, operations: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Those of them that are made of `operations`."""
    return tuple(program for program in _shortest_programs(num_ops) if set(program) <= set(operations))


def _parse(prompt: str) -> tuple[list[str], list[str], list[str]]:
    letters, _, rest = prompt.partition(" > ")
    wanted, _, query = rest.partition(" ? ")
    return letters.split()[::2], wanted.split(), query.split()


def _origins(letters: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Each letter of the output and its place in the input, from 1."""
    return [word for letter in wanted for word in (letter, str(letters.index(letter) + 1))]


def _traced(program: Sequence[str], query: Sequence[str]) -> list[str]:
    """Each operation and the list after it."""
    return [word for i, operation in enumerate(program, 1) for word in (operation, *_run(program[:i], query))]


@register_task
@final
@dataclass(frozen=True)
class ProgramTask(TextTask):
    """Find a short program over lists of five letters from one test case, and trace it on a new input.

    Prompt: `a 1 b 2 c 3 d 4 e 5 > b a c d e ? f a j b c`, the input of the test case with places, its output, and the
    input to run on. Solution: what moved in the test case, `b 2 a 1 c 3 d 4 e 5`; then per operation its name and the
    list after it, `swap a f j b c`. Any program of at most `num_ops` operations that passes the test counts.
    Operations: `rev`, `rotl`, `rotr`, `swap` (first two), `tail` (last two).

    Privileged text: `final_answer` is the last letter of the output (`answer c`); `hints_with_execution` the program
    with its trace (`trace swap a f j b c`); `hints_without_execution` the program (`ops swap`); `summarised_hint` its
    first operation (`first swap`).

    `ood`: programs one operation longer than the knobs say.

    Args:
        seed: Chooses the stream of problems.
        num_ops: Length of the shortest program that passes the test (1 to 4).
        operations: What the programs of problems are made of, all five if left out. A solution may use any of the five.
    """

    num_ops: int = 3
    operations: Sequence[str] = tuple(_OPERATIONS)

    name: ClassVar[str] = "program"
    description: ClassVar[str] = "find the list operations behind a test case and run them; the hint is the program"

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", tuple(self.operations))
        check_range("num_ops", self.num_ops, 1, _MAX_OPS - 1, "ood adds one more.")
        for operation in self.operations:
            check_choice("operations", operation, tuple(_OPERATIONS))
        most = len(_OPERATIONS)
        check_range("operations", len(self.operations), 1, most, "Name at least one operation, each once.")
        if not _programs_of(self.num_ops + 1, tuple(self.operations)):
            raise ConfigError(
                f"operations: got {', '.join(self.operations)}, of which no shortest program of {self.num_ops + 1} is "
                f"made (the ood split of num_ops = {self.num_ops}). Name more operations, or lower num_ops."
            )

    def vocabulary(self) -> tuple[str, ...]:
        places = map(str, range(1, _WIDTH + 1))
        return (*places, *_LETTERS, *_OPERATIONS, ">", "?", "answer", "trace", "ops", "first")

    def completion_words(self, split: str = "test") -> int:
        return _MAP + _STEP * (self.num_ops + (split == "ood"))

    def _draw(self, rng: random.Random, split: str) -> Example:
        num_ops = self.num_ops + (split == "ood")
        program = rng.choice(_programs_of(num_ops, tuple(self.operations)))
        letters, query = rng.sample(_LETTERS, _WIDTH), rng.sample(_LETTERS, _WIDTH)
        wanted, traced = _run(program, letters), _traced(program, query)
        places = [word for place, letter in enumerate(letters, 1) for word in (letter, str(place))]
        return Example(
            prompt=" ".join([*places, ">", *wanted, "?", *query]),
            solution=" ".join([*_origins(letters, wanted), *traced]),
            answer=traced[-1],
            privileged={
                "final_answer": f"answer {traced[-1]}",
                "hints_with_execution": " ".join(["trace", *traced]),
                "hints_without_execution": " ".join(["ops", *program]),
                "summarised_hint": f"first {program[0]}",
            },
            metadata={"num_ops": num_ops},
        )

    def _canonical(self, prompt: str) -> str:
        return prompt

    def _is_correct(self, words: Sequence[str], prompt: str, answer: str) -> bool:
        letters, wanted, query = _parse(prompt)
        program = words[_MAP::_STEP]
        # One operation more than the knobs say, since the row may be an ood one; the test case decides all the same.
        if (len(words) - _MAP) % _STEP or not 0 < len(program) <= self.num_ops + 1 or words[-1] != answer:
            return False
        if not set(program) <= set(_OPERATIONS) or _run(program, letters) != wanted:
            return False
        return list(words) == [*_origins(letters, wanted), *_traced(program, query)]

    def _near_misses(self, example: Example) -> dict[str, str]:
        words = example.solution.split()
        origins, traced = words[:_MAP], words[_MAP:]
        program = traced[::_STEP]
        letters, _, query = _parse(example.prompt)
        renamed = "rev" if program[-1] != "rev" else "swap"
        wrong = {
            "other program, traced rightly": [*origins, *_traced([*program[:-1], renamed], query)],
            "wrong last operation, right list": [*words[:-_STEP], renamed, *words[-_WIDTH:]],
            "last two letters exchanged": [*words[:-2], words[-1], words[-2]],
            "letters exchanged, right answer": [*words[:-3], words[-2], words[-3], words[-1]],
            "stopped one step early": words[:-_STEP],
            "program alone": [*origins, *program],
            "lists alone": [*origins, *(word for i, word in enumerate(traced) if i % _STEP)],
            "output alone": words[-_WIDTH:],
            "first step missing": [*origins, *traced[_STEP:]],
            "last step twice": [*words, *words[-_STEP:]],
            "run on the wrong input": [*origins, *_traced(program, letters)],
            "no places": traced,
            "two places exchanged": [*words[:1], words[3], words[2], words[1], *words[4:]],
        }
        return {name: " ".join(text) for name, text in wrong.items()}

    def _secrets(self, example: Example) -> frozenset[str]:
        return frozenset(_LETTERS)
