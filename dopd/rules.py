"""A distillation method as data: one row for each kind of token, saying what it is taught and how hard.

The trainer, the reference loss and the fused losses read these rows; none of them knows a method or a regime by name.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from dopd.divergences import DivergenceKind, Support, Tail, check_choice, check_support
from dopd.errors import ConfigError
from dopd.routing import Regime

Source = Literal["teacher", "privileged_teacher", "privileged_student"]
Anchor = Literal["current", "frozen", "ema"]

SOURCES: dict[str, str] = {
    "teacher": "the teacher, reading the plain prompt",
    "privileged_teacher": "the teacher, reading the prompt with its privileged context",
    "privileged_student": "the student, reading the prompt with its privileged context (no gradient)",
}
TEACHER_SOURCES = frozenset({"teacher", "privileged_teacher"})
PRIVILEGED_SOURCES = frozenset({"privileged_teacher", "privileged_student"})
ROUTING_SOURCES = PRIVILEGED_SOURCES


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row of a routing table: the signal that a token of `regime` receives.

    Attributes:
        regime (`Regime`, `str` or `int`, *optional*): the tokens that the row is for; `None` is every token.
        source (`str`): who gives the target distribution, one of `SOURCES`.
        divergence (`str`): `"forward_kl"`, `"reverse_kl"` or `"js"`, between the plain student and the target.
        support (`str`): `"full"`, `"student_topk"`, `"target_topk"` or `"sampled"`.
        tail (`str`): what becomes of the mass outside a top-k support, `"bucket"` or `"renormalize"`.
        top_k (`int`): K of a top-k support.
        weight (`float`): factor on the divergence; 0 leaves the tokens out of the loss (not out of its denominator).

    Raises:
        ConfigError: a row that cannot work, with the reason and the fix.
    """

    regime: Regime | None = None
    source: Source
    divergence: DivergenceKind = "reverse_kl"
    support: Support = "full"
    tail: Tail = "bucket"
    top_k: int = 128
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "regime", _as_regime(self.regime))
        try:
            check_choice("source", self.source, Source)
            check_choice("divergence", self.divergence, DivergenceKind)
            check_support(self.divergence, self.support, self.top_k, self.tail)
            if self.support.endswith("topk") and self.top_k == 1 and self.tail == "renormalize":
                raise ConfigError(
                    "top_k=1 with tail='renormalize' compares a single outcome of probability 1, so nothing would be "
                    "learned. Use tail='bucket' or a larger top_k"
                )
            if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
                raise ConfigError(f"weight (={self.weight!r}) must be a number")
            if not (math.isfinite(self.weight) and self.weight >= 0):
                raise ConfigError(f"weight (={self.weight}) must be finite and at least 0")
        except ConfigError as error:
            raise ConfigError(f"row {self.label!r}: {error}") from None

    @property
    def label(self) -> str:
        """The regime's name, or `all` for a row that takes every token."""
        return "all" if self.regime is None else self.regime.name


@dataclass(frozen=True, kw_only=True)
class RoutingTable:
    """The rows of one method, exhaustive and exclusive: either one row for every token, or one for each regime.

    Attributes:
        name (`str`): what logs and reports call the method.
        rules (`tuple[Rule, ...]`): the rows.
        anchor (`str`): the weights of the privileged student: `"current"` (the paper's), `"frozen"` (initial weights)
            or `"ema"` (an exponential moving average).
        trim (`float`): fraction of tokens with the largest gaps that the batch averages leave out.
        source_note (`str`): where the method comes from.

    Raises:
        ConfigError: rows that overlap, leave a regime out, or cannot work together.
    """

    name: str
    rules: tuple[Rule, ...]
    anchor: Anchor = "current"
    trim: float = 0.05
    source_note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        check_choice("anchor", self.anchor, Anchor)
        if isinstance(self.trim, bool) or not isinstance(self.trim, int | float) or not 0.0 <= self.trim < 1.0:
            raise ConfigError(f"table {self.name!r}: trim (={self.trim!r}) must be a number in [0, 1)")
        if not self.rules:
            raise ConfigError(f"table {self.name!r} has no rows: give it one without a regime, or one for each regime")
        labels = [rule.label for rule in self.rules]
        if "all" in labels and len(labels) > 1:
            raise ConfigError(
                f"table {self.name!r}: a row without a regime takes every token and must be alone, got {labels}"
            )
        doubled = sorted({label for label in labels if labels.count(label) > 1})
        if doubled:
            raise ConfigError(
                f"table {self.name!r}: {', '.join(doubled)} has several rows; a token has exactly one target"
            )
        missing = [regime.name for regime in Regime if self.routed and regime.name not in labels]
        if missing:
            raise ConfigError(
                f"table {self.name!r} has no row for {', '.join(missing)}; weight=0 leaves those tokens out"
            )
        if not any(rule.weight for rule in self.rules):
            raise ConfigError(
                f"table {self.name!r}: every weight is 0, nothing would be learned; give one row a weight above 0"
            )
        if self.anchor != "current" and "privileged_student" not in self.sources:
            raise ConfigError(
                f"table {self.name!r}: anchor={self.anchor!r} names the weights of the privileged student, which no "
                "row reads. Leave anchor='current', or use a row with source='privileged_student'"
            )

    @property
    def routed(self) -> bool:
        """Whether tokens are told apart by regime, which takes log-probs of both privileged views."""
        return self.rules[0].regime is not None

    @property
    def target_sources(self) -> frozenset[str]:
        """Sources whose distribution some row with a weight reads."""
        return frozenset(rule.source for rule in self.rules if rule.weight)

    @property
    def routing_sources(self) -> frozenset[str]:
        """Sources whose log-probs of the sampled tokens decide the regime."""
        return ROUTING_SOURCES if self.routed else frozenset()

    @property
    def sources(self) -> frozenset[str]:
        """Every source that one step must score; nothing else is scored."""
        return self.target_sources | self.routing_sources

    @property
    def needs_teacher(self) -> bool:
        return bool(self.sources & TEACHER_SOURCES)

    @property
    def needs_privileged(self) -> bool:
        """Whether some source reads privileged context."""
        return bool(self.sources & PRIVILEGED_SOURCES)

    def row_of(self, regime: int) -> Rule:
        """The row of a regime's number, as it stands in the tensor that routing returns (0 in an unrouted table)."""
        if not self.routed:
            return self.rules[0]
        return next(rule for rule in self.rules if rule.regime == regime)

    def labelled_rows(self) -> list[tuple[int, Rule]]:
        """(number in the regimes tensor, row), in the order of the numbers."""
        if not self.routed:
            return [(0, self.rules[0])]
        return [(int(regime), self.row_of(regime)) for regime in Regime]

    def check_provided(self, provided: Iterable[str]) -> None:
        """Raise `ConfigError` if a source that the table scores is not among `provided`."""
        missing = sorted(self.sources - set(provided))
        if missing:
            raise ConfigError(
                f"table {self.name!r} needs {', '.join(f'{name} ({SOURCES[name]})' for name in missing)}, and nobody "
                f"provides it; provided: {', '.join(sorted(provided)) or 'nothing'}"
            )

    def to_rows(self) -> list[dict[str, Any]]:
        """The rows as plain dicts, ready for YAML."""
        return [asdict(rule) | {"regime": None if rule.regime is None else rule.regime.name} for rule in self.rules]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], *, name: str = "custom", **options: Any) -> "RoutingTable":
        """A table from plain dicts, as a YAML file has them.

        Raises:
            ConfigError: an unknown or missing key, named with the row.
        """
        allowed = [field.name for field in fields(Rule)]
        rules = []
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ConfigError(f"rules[{index}] (={row!r}) must be a mapping with the keys {', '.join(allowed)}")
            unknown = sorted(set(row) - set(allowed))
            if unknown:
                raise ConfigError(f"rules[{index}]: unknown key {', '.join(unknown)}; allowed: {', '.join(allowed)}")
            if "source" not in row:
                raise ConfigError(f"rules[{index}]: source is missing; one of {', '.join(SOURCES)}")
            rules.append(Rule(**row))
        return cls(name=name, rules=tuple(rules), **options)

    def describe(self) -> str:
        """The table as aligned text, for `--dry-run` and logs."""
        header = ["regime", "target", "divergence", "support", "weight"]
        body = [
            [rule.label, rule.source, rule.divergence, _support_text(rule), f"{rule.weight:g}"] for rule in self.rules
        ]
        widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [header, *body]
        ]
        routing = f"routed by the privilege advantage gap, trim {self.trim:g}" if self.routed else "not routed"
        anchor = f", privileged student: {self.anchor}" if "privileged_student" in self.sources else ""
        return "\n".join([f"{self.name}: {routing}{anchor}", *(f"  {line}" for line in lines)])


def _as_regime(value: Any) -> Regime | None:
    if value is None or isinstance(value, Regime):
        return value
    if isinstance(value, str) and value in Regime.__members__:
        return Regime[value]
    if isinstance(value, int) and not isinstance(value, bool) and value in list(Regime):
        return Regime(value)
    allowed = ", ".join(regime.name for regime in Regime)
    raise ConfigError(f"regime (={value!r}) must be one of {allowed}, or left out for every token")


def _support_text(rule: Rule) -> str:
    return f"{rule.support} {rule.top_k}, {rule.tail}" if rule.support.endswith("topk") else rule.support


assert set(SOURCES) == set(get_args(Source))
