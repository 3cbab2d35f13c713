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
PARTIAL, CONTEXT_ONLY = "partial", "context_only"  # a part of p as privileged context; p without x
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
    "partial_student": SourceSpec(
        "anchor", PARTIAL, "the privileged student, reading a part of the privileged context (column partial_context)"
    ),
    "context_student": SourceSpec(
        "anchor", CONTEXT_ONLY, "the privileged student, reading the privileged context without the question"
    ),
    "praised_teacher": SourceSpec("teacher", PRAISE, "the teacher, whose prompt announces a good answer"),
    "criticised_teacher": SourceSpec("teacher", CRITICISM, "the teacher, whose prompt announces a bad answer"),
    "privileged_reference": SourceSpec(
        "initial", PRIVILEGED, "the student's initial weights, reading the prompt with its privileged context"
    ),
    "self_student": SourceSpec("anchor", SELF, "the privileged student, reading the student's own answer"),
    "self_reference": SourceSpec("initial", SELF, "the student's initial weights, reading the student's own answer"),
}
TEACHER_COLUMN = "teacher_id"  # of a dataset: which of several teachers reads a row
# The columns of a dataset that these views read; other views bring their own text.
CONTEXT_COLUMNS = {PRIVILEGED: "privileged_context", CONTRAST: "contrast_context", PARTIAL: "partial_context"}
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
class Factor:
    """A factor of a product of sources: bound(log P_name - log P_over) times a power, in logarithms.

    Attributes:
        name (`str`): the source P_name.
        exponent (`Exponent`): the power.
        over (`str`, *optional*): the source P_over; without one, bound(log P_name).
        centre (`bool`): subtract the mean, under the product of the factors without `over`, before the bounds.
        clip (`tuple[float, float]`, *optional*): lowest and highest value, nats.
        squash (`float`, *optional*): c of c tanh(value / c), nats.
    """

    name: str
    exponent: Exponent
    over: str | None = None
    centre: bool = False
    clip: tuple[float, float] | None = None
    squash: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a power of a probability, without bounds."""
        return self.over is None and self.clip is None and self.squash is None

    def __str__(self) -> str:
        base = self.name if self.over is None else f"{self.name}/{self.over}"
        if self.centre:
            base = f"centred({base})"
        if self.clip is not None:
            base = f"clip({base}, {self.clip[0]:g}..{self.clip[1]:g})"
        if self.squash is not None:
            base = f"squash({base}, {self.squash:g})"
        start, end = self.exponent.start, self.exponent.end
        return f"{base}^{start:g}" + ("" if start == end else f"..{end:g}")


@dataclass(frozen=True)
class Target:
    """What a rule pulls the student towards: the product over sources of their probabilities to a power, normalised.

    Attributes:
        factors (`tuple[Factor, ...]`): sources with their exponents and bounds; one source with exponent 1 is itself.
    """

    factors: tuple[Factor, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        over = {factor.over for factor in self.factors if factor.over is not None}
        return frozenset({factor.name for factor in self.factors} | over)

    @cached_property
    def single(self) -> str | None:
        """The source, where it is one and not a product."""
        if len(self.factors) == 1 and self.factors[0] == Factor(self.factors[0].name, Exponent(1.0, 1.0)):
            return self.factors[0].name
        return None

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is made of powers alone, so that normalisers of the factors fall out of it."""
        return all(factor.is_plain for factor in self.factors)

    def __str__(self) -> str:
        return self.single if self.single is not None else " * ".join(map(str, self.factors))


def target_of(source: Any) -> Target:
    """The target that a rule's `source` describes: a name, or a mapping from names to exponents.

    An exponent is a number, `{start: .., end: ..}`, or a mapping with `power` (either of these) and some of `over` (a
    source to divide by), `centre`, `clip` (a pair) and `squash`: see `Factor`.

    Raises:
        ConfigError: an unknown name, an exponent of another form, or bounds that cannot work.
    """
    if not isinstance(source, str | Mapping):
        raise ConfigError(f"source (={source!r}) must be a name, or a mapping from names to exponents")
    factors = source if isinstance(source, Mapping) else {source: 1.0}
    if not factors:
        raise ConfigError("source (={}) must name at least one source")
    for name in factors:
        _check_name("source", name)
    target = Target(tuple(_factor(name, factors[name]) for name in SOURCES if name in factors))
    for progress in (0.0, 1.0):
        # A ratio that is bounded orders tokens within its bounds: what gives a distribution is the other factors.
        if not sum(factor.exponent.at(progress) for factor in target.factors if factor.over is None) > 0:
            raise ConfigError(
                f"source (={source!r}): the exponents must sum to more than 0 (those of factors with "
                "'over' do not count), or likely tokens become unlikely ones"
            )
    return target


def _check_name(field: str, name: Any) -> None:
    if not isinstance(name, str) or name not in SOURCES:
        raise ConfigError(
            f"{field} (={name!r}) must be one of {', '.join(map(repr, SOURCES))}.{did_you_mean(name, SOURCES)}"
        )


_FACTOR_KEYS = {"power", "over", "centre", "clip", "squash"}


def _factor(name: str, value: Any) -> Factor:
    if not isinstance(value, Mapping) or not set(value) & _FACTOR_KEYS:
        return Factor(name, _exponent(name, value))
    if set(value) - _FACTOR_KEYS or "power" not in value:
        raise ConfigError(
            f"source: the factor of {name} (={dict(value)!r}) takes power, and besides over, centre, clip and squash"
        )
    over, centre, clip, squash = (value.get(key) for key in ("over", "centre", "clip", "squash"))
    if over is not None:
        _check_name(f"source: {name}: over", over)
        if over == name:
            raise ConfigError(f"source: {name}: over (={over!r}) must be another source: the ratio would be 1")
        if clip is None and squash is None:
            raise ConfigError(
                f"source: {name}: over (={over!r}) needs clip: [low, high] or squash: c. Without bounds give "
                f"{over} an exponent of its own, the negative one"
            )
    if centre not in (None, True, False) or (centre and squash is None and clip is None):
        raise ConfigError(
            f"source: {name}: centre (={centre!r}) must be true or false, and true needs clip or squash: without "
            "bounds a mean falls out of the normalised product"
        )
    if squash is not None and not (_number(f"source: {name}: squash", squash) > 0):
        raise ConfigError(f"source: {name}: squash (={squash!r}) must be above 0, nats")
    return Factor(name, _exponent(name, value["power"]), over, bool(centre), _bounds(name, clip), squash)


def _bounds(name: str, clip: Any) -> tuple[float, float] | None:
    if clip is None:
        return None
    if not isinstance(clip, list | tuple) or len(clip) != 2:
        raise ConfigError(f"source: {name}: clip (={clip!r}) must be a pair (lowest, highest), nats; null is no bound")
    low, high = (
        sign * math.inf if bound is None else _number(f"source: {name}: clip", bound)
        for sign, bound in zip((-1, 1), clip, strict=True)
    )
    if not low < high:
        raise ConfigError(f"source: {name}: clip (={clip!r}) must have its lowest value below its highest")
    return low, high


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ConfigError(f"{field} (={value!r}) must be a number")
    return float(value)


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
