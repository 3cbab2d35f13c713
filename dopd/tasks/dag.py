"""Arithmetic on a small graph of definitions: which variables are needed, in which order, and what they are worth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from dopd.tasks.base import Example, check_range
from dopd.tasks.registry import register_task
from dopd.tasks.text import TextTask

_LETTERS = "abcdefghij"
_DIGITS = "0123456789"
_STEP = 6  # words per solution step: Head arg1 arg2 value1 value2 result
_REUSE = 0.35  # chance that an argument which may be a number is an earlier variable instead

_Definitions = dict[str, tuple[str, str]]


def _parse(prompt: str) -> tuple[_Definitions, str]:
    words = prompt.split()
    facts, query = words[:-2], words[-1]
    return {facts[i]: (facts[i + 1], facts[i + 2]) for i in range(0, len(facts), 3)}, query


@register_task
@final
@dataclass(frozen=True)
class DagTask(TextTask):
    """Sums modulo 10 over shuffled definitions, of which only some are needed.

    Prompt: `D 1 3 H d d F 1 h ? H`, three words per definition (an upper-case head, two arguments; a variable is
    lower-case where it is used), then the query. Solution: `Head arg1 arg2 value1 value2 result` for each needed
    variable, in a valid order that ends with the query. Planning (which variable first) is the hard part.

    Privileged text: `final_answer` is the value (`answer 8`); `hints_with_execution` the ordered heads with values
    (`steps D 4 H 8`); `hints_without_execution` the ordered heads (`plan D H`); `summarised_hint` only where to
    start (`first D`).

    `ood`: one needed variable and one distractor more than the knobs say.

    Args:
        seed: Chooses the stream of problems.
        num_needed: Variables the query depends on, itself included (1 to 8).
        num_variables: Variables defined in the prompt; the rest are distractors (at most 10, with the two that
            `ood` adds).
    """

    num_needed: int = 4
    num_variables: int = 6

    name: ClassVar[str] = "dag"
    description: ClassVar[str] = "sums modulo 10 over shuffled definitions with distractors; the hint is the plan"

    def __post_init__(self) -> None:
        limit = len(_LETTERS) - 2
        check_range("num_needed", self.num_needed, 1, limit, "ood adds one more, and there are ten names.")
        check_range("num_variables", self.num_variables, self.num_needed, limit, "It counts the needed ones too.")

    def vocabulary(self) -> tuple[str, ...]:
        return (*_DIGITS, *_LETTERS, *_LETTERS.upper(), "?", "answer", "steps", "plan", "first")

    def completion_words(self, split: str = "test") -> int:
        return _STEP * (self.num_needed + (split == "ood"))

    def _draw(self, rng: random.Random, split: str) -> Example:
        extra = split == "ood"
        needed, total = self.num_needed + extra, self.num_variables + 2 * extra
        names = rng.sample(_LETTERS, total)
        parents = _needed_parents(rng, needed)
        parents += [[_earlier(rng, i) for _ in range(2)] for i in range(needed, total)]
        values: list[int] = []
        args: list[tuple[str, str]] = []
        steps: list[str] = []
        for i, pair in enumerate(parents):
            numbers = [rng.randrange(10) if p is None else values[p] for p in pair]
            words = [str(n) if p is None else names[p] for n, p in zip(numbers, pair, strict=True)]
            values.append(sum(numbers) % 10)
            args.append((words[0], words[1]))
            steps.append(" ".join([names[i].upper(), *words, *map(str, numbers), str(values[i])]))
        shown = rng.sample(range(total), total)
        facts = [f"{names[i].upper()} {args[i][0]} {args[i][1]}" for i in shown]
        order = _random_order(rng, parents[:needed])
        heads = [names[i].upper() for i in order]
        answer = str(values[needed - 1])
        return Example(
            prompt=" ".join([*facts, "?", heads[-1]]),
            solution=" ".join(steps[i] for i in order),
            answer=answer,
            privileged={
                "final_answer": f"answer {answer}",
                "hints_with_execution": " ".join(["steps", *(f"{names[i].upper()} {values[i]}" for i in order)]),
                "hints_without_execution": " ".join(["plan", *heads]),
                "summarised_hint": f"first {heads[0]}",
            },
            metadata={"num_needed": needed, "num_variables": total, "depth": _depth(parents[:needed])},
        )

    def _canonical(self, prompt: str) -> str:
        # The query written out as an expression over numbers: names, order and distractors do not matter.
        definitions, query = _parse(prompt)

        def expand(word: str) -> str:
            if word in _DIGITS:
                return word
            return "(" + "+".join(sorted(map(expand, definitions[word.upper()]))) + ")"

        return expand(query.lower())

    def _is_correct(self, words: Sequence[str], prompt: str, answer: str) -> bool:
        # The whole derivation is checked, not only the answer: one in ten guesses of a digit is right by luck.
        definitions, query = _parse(prompt)
        if len(words) % _STEP or words[-_STEP] != query or words[-1] != answer:
            return False
        values = {digit: digit for digit in _DIGITS}
        for i in range(0, len(words), _STEP):
            head, *rest = words[i : i + _STEP]
            if head not in definitions or tuple(rest[:2]) != definitions[head]:
                return False
            numbers = [values.get(word) for word in rest[:2]]
            if None in numbers or rest[2:4] != numbers:
                return False
            result = str(sum(map(int, rest[2:4])) % 10)
            if rest[4] != result:
                return False
            values[head.lower()] = result
        return True

    def _near_misses(self, example: Example) -> dict[str, str]:
        words = example.solution.split()
        last = words[-_STEP:]
        definitions, query = _parse(example.prompt)
        bump = str((int(example.answer) + 1) % 10)
        other = next((head for head in definitions if head != query), "A" if query != "A" else "B")
        value = str((int(last[3]) + 1) % 10)
        wrong = {
            "wrong result": [*words[:-1], bump],
            "wrong query variable": [*words[:-_STEP], other, *last[1:]],
            "right answer, wrong value": [*words[:-3], value, *words[-2:]],
            "right answer, wrong argument": [*words[:-4], "9" if last[2] != "9" else "8", *words[-3:]],
            "head in lower case": [*words[:-_STEP], query.lower(), *last[1:]],
            "last step twice, cut": [*words, *last[:-1]],
        }
        if len(words) > _STEP:
            wrong["stopped one step early"] = words[:-_STEP]
            wrong["last step alone"] = last
            wrong["first step has a wrong result"] = [
                *words[: _STEP - 1],
                str((int(words[_STEP - 1]) + 1) % 10),
                *words[_STEP:],
            ]
            wrong["first step missing"] = words[_STEP:]
            wrong["last step first"] = [*last, *words[:-_STEP]]
        return {name: " ".join(text) for name, text in wrong.items()}

    def _secrets(self, example: Example) -> frozenset[str]:
        return frozenset(_DIGITS)


def _earlier(rng: random.Random, node: int) -> int | None:
    return rng.randrange(node) if node and rng.random() < _REUSE else None


def _needed_parents(rng: random.Random, count: int) -> list[list[int | None]]:
    """Two parents per node (None is a number); every node is an ancestor of the last one."""
    parents: list[list[int | None]] = [[None, None] for _ in range(count)]
    for node in range(count - 2, -1, -1):
        free = [(user, slot) for user in range(node + 1, count) for slot in range(2) if parents[user][slot] is None]
        user, slot = rng.choice(free)
        parents[user][slot] = node
    return [[p if p is not None else _earlier(rng, node) for p in pair] for node, pair in enumerate(parents)]


def _random_order(rng: random.Random, parents: Sequence[Sequence[int | None]]) -> list[int]:
    """A random order of the nodes in which parents come first."""
    order: list[int] = []
    while len(order) < len(parents):
        ready = [
            node
            for node, pair in enumerate(parents)
            if node not in order and all(p is None or p in order for p in pair)
        ]
        order.append(rng.choice(ready))
    return order


def _depth(parents: Sequence[Sequence[int | None]]) -> int:
    depths: list[int] = []
    for pair in parents:
        depths.append(1 + max((depths[p] for p in pair if p is not None), default=0))
    return depths[-1]
