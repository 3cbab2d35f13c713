"""Grade-school word problems of reasoning-gym's `gsm_symbolic`, with step hints made from their worked solutions."""

import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dopd.errors import ConfigError
from dopd.tasks.base import PRIVILEGED_KINDS, SPLITS
from dopd.tasks.registry import register_task

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# A number after an equals sign that no operator follows: what a step works out.
_RESULT = re.compile(rf"=[^\w=]*({_NUMBER.pattern})(?!\s*[A-Za-z/%]*\s*[-+*x/]\s*[^\w=]*\d)")
_TEST_SHARE = 10  # one problem in so many is held out
_CONCLUSION_CHARS = 400
_HARDER_FROM = 5  # solution steps from which a problem counts as out of distribution
_BLOCK = 1024
_INSTRUCTION = "Solve the problem step by step and end with a line 'The answer is N.'"


@register_task
@dataclass(frozen=True)
class GsmSymbolic:
    """Problems with 2 to 4 solution steps (train, test), or more (ood); train and test are split by a hash of the
    question.

    Attributes:
        seed (`int`): of the generator; problem i is a function of seed and i.
    """

    name: ClassVar[str] = "gsm_symbolic"
    privileged_kinds: ClassVar[tuple[str, ...]] = PRIVILEGED_KINDS
    default_kind: ClassVar[str] = "hints_without_execution"
    description: ClassVar[str] = "grade-school word problems (reasoning-gym); hints are the solution's steps"
    seed: int = 0

    def rows(self, split: str, count: int, privileged_kind: str | None = None, start: int = 0) -> list[dict[str, Any]]:
        """`count` rows, with p of a kind (*optional*, `default_kind`).

        Columns: `prompt`, `privileged_context`, `answer`, `solution`, `task` and `metadata`.

        Raises:
            ConfigError: an unknown split or kind, or reasoning-gym is not installed.
        """
        if split not in SPLITS:
            raise ConfigError(f"split (={split!r}) must be one of {', '.join(SPLITS)}")
        kind = self.default_kind if privileged_kind is None else privileged_kind
        if kind not in PRIVILEGED_KINDS:
            raise ConfigError(f"privileged_kind (={kind!r}) must be one of {', '.join(PRIVILEGED_KINDS)}")
        problems = self._problems(split)
        for _ in range(start):
            next(problems)
        return [_row(next(problems), kind) for _ in range(count)]

    def verify(self, completion: str, row: Mapping[str, Any]) -> float:
        """1 if the final number of the completion equals the row's `answer`, else 0."""
        return same_number_or_formula(completion, str(row["answer"]))

    def _problems(self, split: str) -> Iterator[dict[str, Any]]:
        try:
            from reasoning_gym import create_dataset
        except ImportError:
            raise ConfigError("task 'gsm_symbolic' needs reasoning-gym: pip install 'dopd[reasoning-gym]'") from None
        seen: set[str] = set()
        # The generator draws the templates of all its problems at once, so it is made for a block at a time.
        for block in itertools.count():
            for problem in create_dataset("gsm_symbolic", size=_BLOCK, seed=(self.seed << 32) + block * _BLOCK):
                question = problem["question"]
                if question not in seen and _split_of(problem) == split:
                    seen.add(question)
                    yield problem


def _split_of(problem: Mapping[str, Any]) -> str:
    if len(_steps(problem)) >= _HARDER_FROM:
        return "ood"
    return "test" if zlib.crc32(problem["question"].encode()) % _TEST_SHARE == 0 else "train"


def _steps(problem: Mapping[str, Any]) -> list[str]:
    lines = [line.strip() for line in problem["metadata"]["answer_cot"].strip().splitlines()]
    return [line for line in lines if line and not line.startswith("####")]


def _row(problem: Mapping[str, Any], privileged_kind: str) -> dict[str, Any]:
    answer = str(problem["answer"])
    steps = _steps(problem)
    text = f"{problem['question']}\n{_INSTRUCTION}"
    return {
        "prompt": [{"role": "user", "content": text}],
        "privileged_context": privileged_text(problem["question"], steps, answer, privileged_kind),
        "answer": answer,
        "solution": "\n".join([*steps, f"The answer is {answer}."]),
        "task": GsmSymbolic.name,
        "metadata": json.dumps({"num_steps": len(steps), "index": problem["metadata"]["source_index"]}),
    }


def privileged_text(question: str, steps: list[str], answer: str, kind: str) -> str | None:
    """One of the five kinds of privileged context for a problem with a worked solution.

    Hints say what remains to be done: models given bare intermediate results copy the last one as their answer. A hint
    without execution keeps the numbers of the question alone, and not even those that a step works out again.
    """
    results = {_value(number) for step in steps for number in _RESULT.findall(step)} | {_value(answer)}
    in_question = {_value(number) for number in _NUMBER.findall(question)} - results
    planned = [_masked(step, lambda value: value not in in_question) for step in steps]
    if kind == "none":
        return None
    if kind == "final_answer":
        return f"The final answer is {answer}."
    if kind == "hints_with_execution":
        listed = [_masked(step, lambda value: value == _value(answer)) for step in steps[:-1]]
        return _listed(listed, "Steps already worked out (the last step, which gives the answer, is still to be done):")
    if kind == "hints_without_execution":
        return _listed(planned, "Plan (each ? is a number that you must work out yourself):")
    return f"The solution takes {len(steps)} steps. It begins like this: {planned[0]}"


def _listed(lines: list[str], title: str) -> str:
    # Bullets, not numbers: a step's number could be the answer.
    return "\n".join([title, *(f"- {line}" for line in lines)])


def _masked(step: str, hidden: Callable[[float], bool]) -> str:
    """The step with a question mark in place of some of its numbers."""
    return _NUMBER.sub(lambda match: "?" if hidden(_value(match.group())) else match.group(), step)


def _value(number: str) -> float:
    try:
        return float(number.replace(",", ""))
    except ValueError:
        return math.nan  # such as 1.2.3: equal to nothing, so never taken for a given number


def same_number_or_formula(completion: str, answer: str) -> float:
    """1 if math-verify finds the answer in the completion, else 0.

    Raises:
        ConfigError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ConfigError("this verifier needs math-verify: pip install 'dopd[math]'") from None
    return float(verify(parse(answer), parse(_conclusion(completion))))


def _conclusion(completion: str) -> str:
    """The part that states the answer: short, so that a rambling completion cannot stall the parser."""
    boxed = completion.rfind("\\boxed")
    if boxed >= 0:
        return completion[boxed : boxed + _CONCLUSION_CHARS]
    lines = [line for line in completion.splitlines() if line.strip()]
    return lines[-1][-_CONCLUSION_CHARS:] if lines else ""
