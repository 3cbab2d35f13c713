"""Tasks whose problems are text alone: the prompt says everything, and p comes in the usual four kinds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from dopd.tasks.base import AbstractTask, Example


def prompt_text(row: Mapping[str, Any]) -> str:
    """Text of a row's `prompt`, which is a conversation (its user turns are joined) or a plain string."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    return " ".join(str(message["content"]) for message in prompt if message["role"] == "user")


@dataclass(frozen=True)
class TextTask(AbstractTask):
    """A task whose verifier and split need the prompt and the answer only."""

    @abstractmethod
    def _canonical(self, prompt: str) -> str:
        """A form that is equal for prompts that pose the same problem (order of facts must not matter)."""

    @abstractmethod
    def _is_correct(self, words: Sequence[str], prompt: str, answer: str) -> bool:
        """Whether `words` (special tokens removed) solve the problem of `prompt`."""

    @abstractmethod
    def _secrets(self, example: Example) -> frozenset[str]:
        """Words that `hints_without_execution` must not contain: intermediate values and the answer."""

    @final
    def canonical(self, row: Mapping[str, Any]) -> str:
        """A text that is equal for rows that pose the same problem; the order of facts does not matter."""
        return self._canonical(prompt_text(row))

    @final
    def _problem(self, example: Example) -> str:
        return self._canonical(example.prompt)

    @final
    def _solves(self, words: Sequence[str], row: Mapping[str, Any]) -> bool:
        return self._is_correct(words, prompt_text(row), str(row["answer"]))

    @final
    def _check_privileged(self, example: Example, hints: Mapping[str, Sequence[str]]) -> None:
        for kind in ("final_answer", "hints_with_execution"):
            if example.answer not in hints[kind]:
                self.fail(f"{kind} does not contain the answer {example.answer!r}", example)
        if leaked := self._secrets(example) & set(hints["hints_without_execution"]):
            self.fail(f"hints_without_execution reveals {sorted(leaked)}", example)
        if example.answer not in self._secrets(example):
            self.fail("the answer is not among the secrets", example)
        if len(hints["summarised_hint"]) > len(hints["hints_without_execution"]):
            self.fail("summarised_hint is longer than hints_without_execution", example)
