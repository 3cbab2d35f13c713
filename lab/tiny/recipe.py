"""What decides the weights of a tiny model, as data."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dopd.errors import ConfigError
from dopd.tasks import TASKS
from dopd.tasks.base import check_choice
from dopd.tiny.models import TinySpec

_DEFAULT_KINDS = {"none": 4.0, "hints_without_execution": 3.0, "hints_with_execution": 1.0, "final_answer": 1.0}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one tiny model is made: everything that decides its weights, together with a seed.

    Args:
        task: Name of a registered task.
        knobs: Difficulty of the problems the model is measured on (fields of the task's class).
        levels: Knobs that replace those of `knobs`, one entry drawn per step with equal chance; the easy levels are
            what makes the hard one learnable in minutes. Repeat an entry to weigh it.
        kinds: Relative frequency of each privileged kind, drawn per step.
        spec: Size of the model.
        steps: Optimizer updates. A fixed count, not a time, so that equal seeds give equal weights.
        batch_size: Problems per update.
        learning_rate: Peak rate of Muon (layer matrices) and AdamW (everything else).
    """

    task: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    levels: tuple[Mapping[str, Any], ...] = ({},)
    kinds: Mapping[str, float] = field(default_factory=lambda: dict(_DEFAULT_KINDS))
    spec: TinySpec = field(default_factory=TinySpec)
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        check_choice("task", self.task, tuple(TASKS))
        for name in ("steps", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, allowed: more than 0. Pass a positive number.")
        for kind, weight in self.kinds.items():
            check_choice("kinds", kind, TASKS[self.task].privileged_kinds)
            if weight < 0:
                raise ConfigError(f"kinds[{kind!r}]: got {weight}, allowed: 0 or more. Use 0 to leave a kind out.")
        if not self.levels or sum(self.kinds.values()) <= 0:
            raise ConfigError("levels, kinds: got nothing to draw from, allowed: at least one each. Name one.")

    def draw(self, step: int, rng: random.Random) -> tuple[Mapping[str, Any], str]:
        """Knobs and privileged kind of the problems of a step."""
        level = self.levels[rng.randrange(len(self.levels))]
        kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        return {**self.knobs, **level}, kind


@dataclass(frozen=True, kw_only=True)
class HintedRecipe(Recipe):
    """A recipe whose problems with privileged text have other difficulties: for a student that is good at what the
    text tells, and was seldom or never asked the same without it.

    Args:
        hinted_levels: Levels of the problems with privileged text; `levels` where there are none.
    """

    hinted_levels: tuple[Mapping[str, Any], ...] = ()

    def draw(self, step: int, rng: random.Random) -> tuple[Mapping[str, Any], str]:
        """Knobs and privileged kind of the problems of a step."""
        knobs, kind = super().draw(step, rng)
        if kind == "none" or not self.hinted_levels:
            return knobs, kind
        return {**self.knobs, **rng.choice(self.hinted_levels)}, kind


@dataclass(frozen=True, kw_only=True)
class SightRecipe(HintedRecipe):
    """A recipe that first teaches a vision-language model to see.

    Args:
        grounding_steps: The first so many steps, on problems with the knobs `grounding` and without privileged text.
            Learnt on their own, seeing takes a few hundred steps; learnt among questions and privileged texts, from
            which one can guess, it takes many times as long.
        grounding: Knobs of those problems.
        plain_steps: The first so many steps, those of grounding included, show no privileged text: a small model that
            reads boxes before it finds things in an image may never learn the latter.
    """

    grounding_steps: int = 0
    plain_steps: int = 0
    grounding: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("grounding_steps", "plain_steps"):
            if not 0 <= (value := getattr(self, name)) < self.steps:
                raise ConfigError(f"{name}: got {value}, allowed: 0 to steps - 1 = {self.steps - 1}. Lower it.")

    def draw(self, step: int, rng: random.Random) -> tuple[Mapping[str, Any], str]:
        """Knobs and privileged kind of the problems of a step."""
        knobs, kind = Recipe.draw(self, step, rng) if step < self.plain_steps else super().draw(step, rng)
        if step < self.grounding_steps:
            return {**self.knobs, **self.grounding}, "none"
        return knobs, "none" if step < self.plain_steps else kind


@dataclass(frozen=True, kw_only=True)
class MixedRecipe(Recipe):
    """A recipe whose model learns several text tasks at once.

    Args:
        others: Recipes of the further tasks, of which tasks, knobs, levels and kinds count.
        shares: Relative shares of the steps, of the recipe's own task and of the others; equal ones if left out.
    """

    others: tuple[Recipe, ...] = ()
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shares and (len(self.shares) != len(self.others) + 1 or min(self.shares) <= 0):
            raise ConfigError(
                f"shares: got {self.shares}, allowed: one number above 0 for the own task and for each of "
                f"{len(self.others)} others. Leave it out for equal shares."
            )
        names = [self.task, *(other.task for other in self.others)]
        if len(set(names)) != len(names):
            raise ConfigError(f"others: got the tasks {', '.join(names)}, allowed: each once. Leave one out.")

    def draw(self, step: int, rng: random.Random) -> tuple[Mapping[str, Any], str]:
        """Knobs and privileged kind of the problems of a step."""
        (other,) = rng.choices((None, *self.others), self.shares or None)
        if other is None:
            return super().draw(step, rng)
        knobs, kind = other.draw(step, rng)
        return {"name": other.task, **knobs}, kind
