"""Who can give a target distribution: a model's weights and the prompt that it reads.

A source is a name of `SOURCES`, or a product of several: exponents by name, for the normalised product of powers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from dopd.errors import ConfigError, did_you_mean

Anchor = Literal["current", "frozen", "ema", "snapshot"]
Model = Literal["teacher", "anchor", "initial", "student"]

# Prompts that a source can read: x alone, or x with one of these texts as privileged context.
PLAIN, PRIVILEGED, CONTRAST, PRAISE, CRITICISM = "plain", "privileged", "contrast", "praise", "criticism"
SELF = "self"  # the student's own answer to x as privileged context
# What a rule trains the student on: tokens of its answer or of the row's reference text, behind one of these prompts.
Text = Literal["rollout", "reference"]
TrainedView = Literal["plain", "privileged", "self"]
REFERENCE_COLUMN = "solution"  # of a dataset: the reference texts


@dataclass(frozen=True)
class SourceSpec:
    """Weights and view of a source.

    Attributes:
        model (`str`): `"teacher"`; `"anchor"`, the table's privileged student; `"initial"`, the student's first
            weights; `"student"`, the trained weights without gradient.
        view (`str`): the prompt that it reads.
        about (`str`): in words, for messages.
    """

    model: Model
    view: str
    about: str


SOURCES: dict[str, SourceSpec] = {
    "teacher": SourceSpec("teacher", PLAIN, "the teacher, reading the plain prompt"),
    "privileged_teacher": SourceSpec(
        "teacher", PRIVILEGED, "the teacher, reading the prompt with its privileged context"
    ),
    "privileged_student": SourceSpec(
        "anchor", PRIVILEGED, "the student, reading the prompt with its privileged context (no gradient)"
    ),
    "student": SourceSpec("student", PLAIN, "the student itself, reading the prompt that it learns to answer"),
    "reference": SourceSpec("initial", PLAIN, "the student's initial weights, reading the plain prompt"),
    "contrast_student": SourceSpec(
        "anchor", CONTRAST, "the privileged student, reading a wrong privileged context (column contrast_context)"
    ),
    "praised_teacher": SourceSpec("teacher", PRAISE, "the teacher, whose prompt announces a good answer"),
    "criticised_teacher": SourceSpec("teacher", CRITICISM, "the teacher, whose prompt announces a bad answer"),
    "privileged_reference": SourceSpec(
        "initial", PRIVILEGED, "the student's initial weights, reading the prompt with its privileged context"
    ),
    "self_student": SourceSpec("anchor", SELF, "the privileged student, reading the student's own answer"),
    "self_reference": SourceSpec("initial", SELF, "the student's initial weights, reading the student's own answer"),
}
# The columns of a dataset that these views read; other views bring their own text.
CONTEXT_COLUMNS = {PRIVILEGED: "privileged_context", CONTRAST: "contrast_context"}
TEACHER_SOURCES = frozenset(name for name, spec in SOURCES.items() if spec.model == "teacher")
ANCHOR_SOURCES = frozenset(name for name, spec in SOURCES.items() if spec.model == "anchor")
ROUTING_SOURCES = frozenset({"privileged_teacher", "privileged_student"})
LIVE = "student"  # its logits are those that the loss differentiates: nobody has to provide them


@dataclass(frozen=True)
class Exponent:
    """A power in a product of sources, moving linearly from `start` to `end` over the training.

    Attributes:
        start, end (`float`): at the first and at the last optimizer step.
    """

    start: float
    end: float

    def at(self, progress: float) -> float:
        """Its value at a share of the training between 0 and 1."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Target:
    """What a rule pulls the student towards: the product over sources of their probabilities to a power, normalised.

    Attributes:
        factors (`tuple[tuple[str, Exponent], ...]`): sources with their exponents; one source with exponent 1 is
            itself.
    """

    factors: tuple[tuple[str, Exponent], ...]

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.factors)

    @cached_property
    def single(self) -> str | None:
        """The source, where it is one and not a product."""
        if len(self.factors) == 1 and self.factors[0][1] == Exponent(1.0, 1.0):
            return self.factors[0][0]
        return None

    def exponents(self, progress: float) -> dict[str, float]:
        """Exponents at a share of the training, by source."""
        return {name: exponent.at(progress) for name, exponent in self.factors}

    def __str__(self) -> str:
        if self.single is not None:
            return self.single
        parts = (
            f"{name}^{exponent.start:g}" + ("" if exponent.start == exponent.end else f"..{exponent.end:g}")
            for name, exponent in self.factors
        )
        return " * ".join(parts)


def target_of(source: Any) -> Target:
    """The target that a rule's `source` describes: a name, or a mapping from names to exponents.

    Raises:
        ConfigError: an unknown name, or an exponent that is neither a number nor a mapping with `start` and `end`.
    """
    if not isinstance(source, str | Mapping):
        raise ConfigError(f"source (={source!r}) must be a name, or a mapping from names to exponents")
    factors = source if isinstance(source, Mapping) else {source: 1.0}
    if not factors:
        raise ConfigError("source (={}) must name at least one source")
    for name in factors:
        if not isinstance(name, str) or name not in SOURCES:
            raise ConfigError(
                f"source (={name!r}) must be one of {', '.join(map(repr, SOURCES))}.{did_you_mean(name, SOURCES)}"
            )
    target = Target(tuple((name, _exponent(name, factors[name])) for name in SOURCES if name in factors))
    for progress in (0.0, 1.0):
        if not sum(target.exponents(progress).values()) > 0:
            raise ConfigError(
                f"source (={source!r}): the exponents must sum to more than 0, or likely tokens become unlikely ones"
            )
    return target


def _exponent(name: str, value: Any) -> Exponent:
    ends = (value.get("start"), value.get("end")) if isinstance(value, Mapping) else (value, value)
    if isinstance(value, Mapping) and set(value) != {"start", "end"}:
        raise ConfigError(f"source: the exponent of {name} (={dict(value)!r}) must have exactly the keys start and end")
    for number in ends:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ConfigError(
                f"source: the exponent of {name} (={value!r}) must be a finite number, or {{start: .., end: ..}}"
            )
    return Exponent(float(ends[0]), float(ends[1]))  # type: ignore[arg-type]
