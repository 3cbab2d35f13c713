"""Program synthesis in miniature: find the operations behind one test case, then run them on a new input."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, final

from dopd.tasks.base import Example, check_range
from dopd.tasks.text import TextTask

_LETTERS = "abcdefghij"
_WIDTH = 5
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


def _parse(prompt: str) -> tuple[list[str], list[str], list[str]]:
    words = prompt.split()
    return words[:_WIDTH], words[_WIDTH + 1 : 2 * _WIDTH + 1], words[2 * _WIDTH + 2 :]


@final
@dataclass(frozen=True)
class ProgramTask(TextTask):
    """Find a short program over lists of five letters from one test case, and trace it on a new input.

    Prompt: `a b c d e > b a c d e ? f a j b c`, the input and output of the test case and the input to run on.
    Solution: per operation its name and the list after it, `swap a f j b c`. Any program of at most `num_ops`
    operations that passes the test counts. Operations: `rev`, `rotl`, `rotr`, `swap` (first two), `tail` (last two).

    Privileged text: `final_answer` is the last letter of the output (`answer c`); `hints_with_execution` the program
    with its trace (`trace swap a f j b c`); `hints_without_execution` the program (`ops swap`); `summarised_hint` its
    first operation (`first swap`).

    `ood`: programs one operation longer than the knobs say.

    Args:
        seed: Chooses the stream of problems.
        num_ops: Length of the shortest program that passes the test (1 to 4).
    """

    num_ops: int = 3

    name: ClassVar[str] = "program"
    description: ClassVar[str] = "find the list operations behind a test case and run them; the hint is the program"

    def __post_init__(self) -> None:
        check_range("num_ops", self.num_ops, 1, _MAX_OPS - 1, "ood adds one more.")

    def vocabulary(self) -> tuple[str, ...]:
        return (*_LETTERS, *_OPERATIONS, ">", "?", "answer", "trace", "ops", "first")

    def completion_words(self, split: str = "test") -> int:
        return _STEP * (self.num_ops + (split == "ood"))

    def _draw(self, rng: random.Random, split: str) -> Example:
        num_ops = self.num_ops + (split == "ood")
        program = rng.choice(_shortest_programs(num_ops))
        given, query = rng.sample(_LETTERS, _WIDTH), rng.sample(_LETTERS, _WIDTH)
        steps, now = [], query
        for operation in program:
            now = _apply(operation, now)
            steps.append(" ".join([operation, *now]))
        solution = " ".join(steps)
        return Example(
            prompt=" ".join([*given, ">", *_run(program, given), "?", *query]),
            solution=solution,
            answer=now[-1],
            privileged={
                "final_answer": f"answer {now[-1]}",
                "hints_with_execution": f"trace {solution}",
                "hints_without_execution": " ".join(["ops", *program]),
                "summarised_hint": f"first {program[0]}",
            },
            metadata={"num_ops": num_ops},
        )

    def _canonical(self, prompt: str) -> str:
        return prompt

    def _is_correct(self, words: Sequence[str], prompt: str, answer: str) -> bool:
        given, wanted, now = _parse(prompt)
        program = words[::_STEP]
        # One operation more than the knobs say, since the row may be an ood one; the test case decides all the same.
        if len(words) % _STEP or len(program) > self.num_ops + 1 or words[-1] != answer:
            return False
        for i, operation in enumerate(program):
            if operation not in _OPERATIONS:
                return False
            now = _apply(operation, now)
            if list(words[i * _STEP + 1 : (i + 1) * _STEP]) != now:
                return False
        return _run(program, given) == wanted

    def _near_misses(self, example: Example) -> dict[str, str]:
        words = example.solution.split()
        program = words[::_STEP]
        _, _, query = _parse(example.prompt)
        renamed = "rev" if program[-1] != "rev" else "swap"
        wrong_program = [*program[:-1], renamed]
        traced: list[str] = []
        for i, operation in enumerate(wrong_program):
            traced += [operation, *_run(wrong_program[: i + 1], query)]
        wrong = {
            "other program, traced rightly": traced,
            "wrong last operation, right list": [*words[:-_STEP], renamed, *words[-_WIDTH:]],
            "last two letters exchanged": [*words[:-2], words[-1], words[-2]],
            "letters exchanged, right answer": [*words[:-3], words[-2], words[-3], words[-1]],
            "stopped one step early": words[:-_STEP],
            "program alone": program,
            "lists alone": [word for i, word in enumerate(words) if i % _STEP],
            "output alone": words[-_WIDTH:],
            "first step missing": words[_STEP:],
            "last step twice": [*words, *words[-_STEP:]],
            "run on the wrong input": [
                word
                for i, operation in enumerate(program)
                for word in [operation, *_run(program[: i + 1], _parse(example.prompt)[0])]
            ],
        }
        return {name: " ".join(text) for name, text in wrong.items()}

    def _secrets(self, example: Example) -> frozenset[str]:
        return frozenset(_LETTERS)
