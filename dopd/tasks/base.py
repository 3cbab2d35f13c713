"""What every embedded task provides: examples, a verifier, privileged text, and a proof that they agree.

Nothing here imports torch, so tasks can be read, tested and served without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from dopd.errors import ConfigError, DopdError

PRIVILEGED_KINDS: tuple[str, ...] = (
    "none",
    "final_answer",
    "hints_with_execution",
    "hints_without_execution",
    "summarised_hint",
)
SPLITS: tuple[str, ...] = ("train", "test", "ood")

EOS_WORD = "<eos>"
PAD_WORD = "<pad>"

_TEST_SHARE = 8  # one canonical problem in eight belongs to the test split
_MAX_DRAWS = 10_000


class TaskValidationError(DopdError, ValueError):
    """A task contradicts itself: its verifier, splits or hints do not do what they promise."""


@dataclass(frozen=True)
class Example:
    """One problem with everything that is known about it.

    Args:
        prompt: What the student reads. Words separated by single spaces.
        solution: A gold completion (chain of thought that ends in the answer), without end-of-sequence token.
        answer: The final answer, one word.
        privileged: Text per kind of the task's `privileged_kinds` other than `"none"`.
        metadata: JSON-serialisable facts about the problem (size, depth, ...).
    """

    prompt: str
    solution: str
    answer: str
    privileged: Mapping[str, str]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{name}: got {value!r}, allowed: {', '.join(map(repr, allowed))}. Pass one of these.")


def check_range(name: str, value: int, low: int, high: int, fix: str) -> None:
    """Raise `ConfigError` unless `value` is an int with `low <= value <= high`; `fix` says what to do."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}: got {value!r}, allowed: an integer from {low} to {high}. {fix}")


def _is_test(canonical: str) -> bool:
    return hashlib.blake2b(canonical.encode(), digest_size=4).digest()[0] % _TEST_SHARE == 0


@dataclass(frozen=True)
class AbstractTask(ABC):
    """A family of problems with a verifier and one privileged text per kind; see `TextTask` for those of text alone.

    Subclasses are final frozen dataclasses whose fields are the difficulty knobs. They implement the methods with a
    leading underscore plus `vocabulary`; the other public methods are final.

    `train` and `test` are disjoint by construction: a hash of the problem decides its split, whatever the seed and
    the knobs. `ood` problems are larger than any `train` or `test` problem of the same knobs.

    Args:
        seed: Chooses the stream of problems; it does not change which problems belong to `test`.
    """

    seed: int = 0

    name: ClassVar[str]
    description: ClassVar[str]
    privileged_kinds: ClassVar[tuple[str, ...]] = PRIVILEGED_KINDS
    default_kind: ClassVar[str] = "hints_without_execution"  # of `rows`, and of runs that name none

    # ---- what a task implements

    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """Every word that may occur in prompts, solutions and hints of this family, for any knobs."""

    @abstractmethod
    def completion_words(self, split: str = "test") -> int:
        """Length in words of the longest gold solution of `split`, end-of-sequence not counted."""

    @abstractmethod
    def _draw(self, rng: random.Random, split: str) -> Example:
        """One problem; `split` matters only for `ood` (larger)."""

    @abstractmethod
    def _problem(self, example: Example) -> str:
        """What decides the split of an example: equal for examples that pose the same problem."""

    @abstractmethod
    def _solves(self, words: Sequence[str], row: Mapping[str, Any]) -> bool:
        """Whether `words` (special tokens removed) solve the problem of a row."""

    @abstractmethod
    def _near_misses(self, example: Example) -> dict[str, str]:
        """Wrong completions that look right, by name."""

    @abstractmethod
    def _check_privileged(self, example: Example, hints: Mapping[str, Sequence[str]]) -> None:
        """Call `fail` if the words of a privileged text (`hints`, by kind) break the promise of their kind."""

    # ---- what a task may replace, if a problem is more than the words of its prompt

    def _columns(self, example: Example) -> dict[str, Any]:
        """Columns of a row beside those that every task has."""
        return {}

    def facts(self, example: Example) -> Any:
        """Everything about an example as JSON-serialisable values: what a model trained on it depends on."""
        return dataclasses.astuple(example)

    # ---- what every task has

    @final
    def example(self, split: str, index: int) -> Example:
        """The problem number `index` of `split`; a pure function of the task's fields and both arguments.

        Raises:
            ConfigError: if `split` is unknown, `index` is negative, or the knobs leave no problem for the split.
        """
        check_choice("split", split, SPLITS)
        check_range("index", index, 0, 2**62, "Count from 0.")
        rng = random.Random(f"{self.name}/{self.seed}/{split}/{index}")
        for _ in range(_MAX_DRAWS):
            example = self._draw(rng, split)
            if split == "ood" or _is_test(self._problem(example)) == (split == "test"):
                return example
        raise ConfigError(f"split: {split!r} holds no problem of {self!r}. Make the task larger.")

    @final
    def verify(self, completion: str, row: Mapping[str, Any], *, finished: bool = True) -> float:
        """Score of a completion: 1.0 if it solves the row's problem, else 0.0.

        Args:
            completion: Decoded text. If special tokens were kept, `<eos>` ends the solution and only padding may
                follow it.
            row: A mapping with the columns `prompt` and `answer`, as made by `rows` (and, for a visual task,
                `metadata`).
            finished: Whether the model ended by itself. Text cut by a length limit is never correct, and decoding
                with `skip_special_tokens=True` hides that, so the caller says it.
        """
        words = completion.split()
        if EOS_WORD in words:
            end = words.index(EOS_WORD)
            if any(word not in (EOS_WORD, PAD_WORD) for word in words[end:]):
                return 0.0
            words = words[:end]
        if not finished or not words:
            return 0.0
        return float(self._solves(words, row))

    @final
    def row(self, split: str, index: int, privileged_kind: str = "none") -> dict[str, Any]:
        """One dataset row; see `rows`."""
        check_choice("privileged_kind", privileged_kind, self.privileged_kinds)
        return self._row(self.example(split, index), privileged_kind)

    @final
    def rows(self, split: str, count: int, privileged_kind: str | None = None, start: int = 0) -> list[dict[str, Any]]:
        """Dataset rows `start .. start + count - 1` of `split`, with p of a kind (*optional*, `default_kind`).

        Columns: `prompt` (conversation with one user turn), `privileged_context` (str, `None` for kind `"none"`),
        `answer`, `solution`, `task` (name) and `metadata` (JSON text); visual tasks add `images` and `boxes`.

        Raises:
            ConfigError: if `split` or `privileged_kind` is unknown, or `count` or `start` is negative.
        """
        check_range("count", count, 0, 2**40, "Ask for at least 0 rows.")
        kind = self.default_kind if privileged_kind is None else privileged_kind
        return [self.row(split, index, kind) for index in range(start, start + count)]

    @final
    def _row(self, example: Example, privileged_kind: str) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": example.prompt}],
            "privileged_context": None if privileged_kind == "none" else example.privileged[privileged_kind],
            "answer": example.answer,
            "solution": example.solution,
            "task": self.name,
            "metadata": json.dumps(dict(example.metadata), sort_keys=True),
            **self._columns(example),
        }

    @final
    def validate(self, count: int = 64) -> dict[str, int]:
        """Prove on `count` problems per split that verifier, splits and hints keep their promises.

        Gold solutions score 1.0 and near misses 0.0; `train` and `test` share no canonical problem; the hints
        contain and withhold what their kind says; every word is in `vocabulary()`.

        Returns:
            How many of each were checked: `gold`, `near_misses`, `hints`, `disjoint`.

        Raises:
            TaskValidationError: on the first promise that does not hold, with the problem that shows it.
        """
        check_range("count", count, 1, 2**20, "Check at least one problem.")
        words = frozenset(self.vocabulary())
        checked = {"gold": 0, "near_misses": 0, "hints": 0, "disjoint": 0}
        canonical: dict[str, set[str]] = {split: set() for split in SPLITS}
        for split in SPLITS:
            others = [self.example(split, index) for index in range(count)]
            for index, example in enumerate(others):
                self._check_verifier(example, others[index - 1], checked)
                self._check_hints(example, words, checked)
                if len(example.solution.split()) > self.completion_words(split):
                    self.fail(f"a gold solution of {split} is longer than completion_words({split!r})", example)
                canonical[split].add(self._problem(example))
        if shared := canonical["train"] & canonical["test"]:
            raise TaskValidationError(f"{self.name}: train and test share {len(shared)} problems: {min(shared)!r}")
        checked["disjoint"] = len(canonical["train"]) + len(canonical["test"])
        return checked

    @final
    def fail(self, what: str, example: Example) -> None:
        """Raise `TaskValidationError`: `what` is wrong with an example."""
        raise TaskValidationError(f"{self.name}: {what}. Prompt: {example.prompt!r}, solution: {example.solution!r}")

    @final
    def _check_verifier(self, example: Example, other: Example, checked: dict[str, int]) -> None:
        row = self._row(example, "none")
        for gold in (example.solution, f"{example.solution} {EOS_WORD}", f"{example.solution} {EOS_WORD} {PAD_WORD}"):
            if self.verify(gold, row) != 1.0:
                self.fail(f"the gold completion {gold!r} does not score 1.0", example)
        if self.verify(example.solution, row, finished=False) != 0.0:
            self.fail("a completion that was cut by the length limit does not score 0.0", example)
        checked["gold"] += 1
        words = example.solution.split()
        common = {
            "empty": "",
            "end only": EOS_WORD,
            "answer alone": example.answer,
            "prompt echoed": example.prompt,
            "last word cut": " ".join(words[:-1]),
            "second half only": " ".join(words[len(words) // 2 + 1 :]),
            "trailing word": f"{example.solution} {words[0]}",
            "text after the end": f"{example.solution} {EOS_WORD} {words[0]}",
            "unknown last word": " ".join([*words[:-1], "<unk>"]),
            "said twice": f"{example.solution} {example.answer}",
            **{f"hint echoed ({kind})": text for kind, text in example.privileged.items()},
        }
        if self._problem(other) != self._problem(example) and other.solution != example.solution:
            common["solution of another problem"] = other.solution
        for name, wrong in {**common, **self._near_misses(example)}.items():
            if self.verify(wrong, row) != 0.0:
                self.fail(f"the near miss {name!r} does not score 0.0: {wrong!r}", example)
            checked["near_misses"] += 1

    @final
    def _check_hints(self, example: Example, words: frozenset[str], checked: dict[str, int]) -> None:
        if tuple(example.privileged) != self.privileged_kinds[1:]:
            kinds = self.privileged_kinds[1:]
            self.fail(f"privileged kinds are {tuple(example.privileged)}, expected {kinds}", example)
        hints = {kind: text.split() for kind, text in example.privileged.items()}
        self._check_privileged(example, hints)
        texts = [example.prompt, example.solution, *example.privileged.values()]
        if strange := {word for text in texts for word in text.split()} - words:
            self.fail(f"words outside vocabulary(): {sorted(strange)}", example)
        if any(text != " ".join(text.split()) for text in texts):
            self.fail("words are not separated by single spaces", example)
        checked["hints"] += len(hints)
