"""A distillation method as data: rules, exclusive by regime or added up, and where their contexts come from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from dopd.errors import ConfigError, check_choice
from dopd.routing import Regime
from dopd.rules import Rule
from dopd.signals import MEASURES, try_signal
from dopd.sources import (
    ANCHOR_SOURCES,
    CONTEXT_COLUMNS,
    CONTRAST,
    LIVE,
    PLAIN,
    PRIVILEGED,
    ROUTING_SOURCES,
    SELF,
    SOURCES,
    TEACHER_SOURCES,
    Anchor,
    Text,
    TrainedView,
)

Context = Literal["column", "sibling", "none"]
Siblings = Literal["first", "random"]
StudentView = Literal["plain", "privileged"]


@dataclass(frozen=True, kw_only=True)
class RoutingTable:
    """The rules of one method: one for each regime (a token has exactly one of these), and rules without a regime,
    which add up.

    Attributes:
        name (`str`): what logs and reports call the method.
        rules (`tuple[Rule, ...]`): the rules.
        anchor (`str`): the weights of the privileged student: `"current"` (the paper's), `"frozen"` (initial weights),
            `"ema"` (an exponential moving average) or `"snapshot"` (a copy of the student, renewed every so many
            steps).
        ema_decay (`float`, *optional*), snapshot_steps (`int`, *optional*): of those two, where the method has its own.
        trim (`float`): fraction of tokens with the largest gaps that the batch averages leave out.
        context (`str`): where the privileged context comes from: `"column"` (`privileged_context` of the dataset),
            `"sibling"` (a right rollout of the same prompt, never the row's own) or `"none"`.
        contrast (`str`): the same for the contrasting, wrong context (column `contrast_context`; a wrong rollout).
        siblings (`str`): which of the fitting rollouts a context from siblings is: the `"first"`, or a `"random"` one
            for each rollout (settled by the rollouts' texts, so that a step that is repeated draws the same).
        siblings_end (`bool`): wrong contexts from siblings are rollouts that ended by themselves, and were not cut.
        num_contrast (`int`): most wrong contexts from siblings, of which log-probs of the sampled tokens are the log of
            the mean probability.
        student_view (`str`): the prompt that the student answers and is trained on; `"privileged"` is a control.
        rollout_growth (`tuple[int, int]`, *optional*): (start, growth): at optimizer step s answers end after
            start + growth * s tokens.
        merge_ends (`bool`): score all end-of-sequence tokens as one outcome, in every view.
        source_note (`str`): where the method comes from.
        unverified (`str`): what the publication leaves open; a run that trains with the table says so.

    Raises:
        ConfigError: rules that overlap, leave a regime out, or cannot work together.
    """

    name: str
    rules: tuple[Rule, ...]
    anchor: Anchor = "current"
    ema_decay: float | None = None
    snapshot_steps: int | None = None
    trim: float = 0.05
    context: Context = "column"
    contrast: Context = "column"
    siblings: Siblings = "first"
    siblings_end: bool = False
    num_contrast: int = 1
    student_view: StudentView = "plain"
    rollout_growth: tuple[int, int] | None = None
    merge_ends: bool = False
    source_note: str = ""
    unverified: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        check_choice("anchor", self.anchor, Anchor)
        check_choice("context", self.context, Context)
        check_choice("contrast", self.contrast, Context)
        check_choice("siblings", self.siblings, Siblings)
        check_choice("student_view", self.student_view, StudentView)
        if isinstance(self.trim, bool) or not isinstance(self.trim, int | float) or not 0.0 <= self.trim < 1.0:
            raise ConfigError(f"table {self.name!r}: trim (={self.trim!r}) must be a number in [0, 1)")
        self._check_rules()
        self._check_contrasts()
        self._try_signals()
        if self.merge_ends and any(rule.support != "sampled" for rule in self.rules):
            raise ConfigError(
                f"table {self.name!r}: merge_ends scores the sampled token alone; give every rule support='sampled'"
            )
        if self.student_view != PLAIN and any(rule.view != PLAIN for rule in self.rules):
            raise ConfigError(
                f"table {self.name!r}: student_view={self.student_view!r} is the prompt of every rule: give all of "
                "them view='plain', or leave student_view out"
            )
        if self.anchor != "current" and not self.sources & ANCHOR_SOURCES:
            raise ConfigError(
                f"table {self.name!r}: anchor={self.anchor!r} names the weights of the privileged student, which no "
                "rule reads. Leave anchor='current', or use a rule with source='privileged_student'"
            )

    def _check_contrasts(self) -> None:
        if isinstance(self.num_contrast, bool) or not isinstance(self.num_contrast, int) or self.num_contrast < 1:
            raise ConfigError(f"table {self.name!r}: num_contrast (={self.num_contrast!r}) must be a number from 1 on")
        whole = sorted(name for name in self.target_sources | self.measured_sources if SOURCES[name].view == CONTRAST)
        if self.num_contrast > 1 and (self.contrast != "sibling" or whole):
            raise ConfigError(
                f"table {self.name!r}: num_contrast (={self.num_contrast}) takes several wrong rollouts "
                "(contrast='sibling'), and averages log-probs of sampled tokens alone: "
                + (f"some rule reads all of {', '.join(whole)}. " if whole else f"got contrast={self.contrast!r}. ")
                + "Leave num_contrast at 1"
            )

    def _check_rules(self) -> None:
        if not self.rules:
            raise ConfigError(f"table {self.name!r} has no rules: give it one without a regime, or one for each regime")
        regimes = [rule.regime.name for rule in self.rules if rule.regime is not None]
        doubled = sorted({regime for regime in regimes if regimes.count(regime) > 1})
        if doubled:
            raise ConfigError(
                f"table {self.name!r}: {', '.join(doubled)} has several rules; give a regime's tokens exactly one"
            )
        labels = [rule.label for rule in self.rules]
        same = sorted({label for label in labels if labels.count(label) > 1})
        if same:
            raise ConfigError(
                f"table {self.name!r}: several rules are called {', '.join(same)}; rules without a regime add up, "
                "so give each a name of its own"
            )
        trained = {(rule.text, rule.view) for rule in self.rules if rule.regime is not None}
        if len(trained) > 1:
            raise ConfigError(
                f"table {self.name!r}: rules by regime have {'; '.join(map(', '.join, sorted(trained)))} as text and "
                "view, and a token has exactly one of these rules: give all of them one text and one view"
            )
        missing = [regime.name for regime in Regime if regimes and regime.name not in regimes]
        if missing:
            raise ConfigError(
                f"table {self.name!r} has no rule for {', '.join(missing)}; weight=0 leaves those tokens out"
            )
        if not any(rule.weight for rule in self.rules):
            raise ConfigError(
                f"table {self.name!r}: every weight is 0, nothing would be learned; give one rule a weight above 0"
            )

    def _try_signals(self) -> None:
        for rule in self.rules:
            for use in rule.uses:
                compared = rule.select is not None and use is rule.select.use
                try:
                    try_signal(use.name, dict(use.options), self.views, compared=compared)
                except ConfigError as error:
                    raise ConfigError(f"table {self.name!r}, rule {rule.label!r}: {error}") from error

    @cached_property
    def parts(self) -> "list[RoutingTable]":
        """The table by what the student is trained on: tables whose rules have one text and one view, in the order in
        which these appear. Each has a mean of its own, over the tokens of its texts; the table's loss is their sum.
        """
        if len({(rule.text, rule.view) for rule in self.rules}) == 1:
            return [self]
        parts: dict[tuple[str, str], list[Rule]] = {}
        for rule in self.rules:
            parts.setdefault((rule.text, rule.view), []).append(rule)
        # The whole table says which weights are behind a source: a part may read none of the privileged student.
        return [
            replace(self, rules=tuple(rules), anchor="current", ema_decay=None, snapshot_steps=None)
            for rules in parts.values()
            if any(rule.weight for rule in rules)
        ]

    @cached_property
    def shown(self) -> "RoutingTable":
        """The part that a look at single completions shows: what the answers to the plain prompt receive, if there is
        such a part."""
        trained: list[tuple[str, str]] = [("rollout", PLAIN), ("rollout", PRIVILEGED), ("rollout", SELF)]
        found = [part for key in trained for part in self.parts if (part.text, part.view) == key]
        return (found or self.parts)[0]

    @property
    def text(self) -> Text:
        """Whose tokens the rules of a part are for."""
        return self._only_part.rules[0].text

    @property
    def view(self) -> TrainedView:
        """The prompt that the student is trained on by the rules of a part."""
        return self._only_part.rules[0].view

    @property
    def _only_part(self) -> "RoutingTable":
        if self.parts == [self]:
            return self
        trained = "; ".join(f"text {part.text}, view {part.view}" for part in self.parts)
        raise ConfigError(
            f"table {self.name!r} trains on several texts or views ({trained}): score each of table.parts and take its "
            "loss; the table's loss is their sum"
        )

    def view_of(self, source: str) -> str:
        """The prompt that a source reads in a part: the student's is the one that it is trained on."""
        return self.view if source == LIVE else SOURCES[source].view

    @cached_property
    def routed(self) -> bool:
        """Whether tokens are sorted by regime, which takes log-probs of both privileged views."""
        return any(rule.regime is not None for rule in self.rules)

    @cached_property
    def rule_groups(self) -> list[list[tuple[int, Rule]]]:
        """Groups of (index of the rule, rule) in which a token has one rule at most: the regimes' rules together, every
        other rule alone. Groups add up.
        """
        routed = [(index, rule) for index, rule in enumerate(self.rules) if rule.regime is not None]
        others = [[(index, rule)] for index, rule in enumerate(self.rules) if rule.regime is None]
        return ([routed] if routed else []) + others

    @cached_property
    def target_sources(self) -> frozenset[str]:
        """Sources whose distribution some rule with a weight reads."""
        return frozenset().union(*(rule.target_names for rule in self.rules if rule.weight))

    @cached_property
    def routing_sources(self) -> frozenset[str]:
        """Sources whose log-probs of the sampled tokens decide the regime."""
        return ROUTING_SOURCES if self.routed else frozenset()

    @cached_property
    def measures(self) -> frozenset[str]:
        """Measures of whole distributions that some signal reads."""
        return frozenset().union(*(use.signal.measures for rule in self.rules for use in rule.uses))

    @cached_property
    def measured_sources(self) -> frozenset[str]:
        """Sources whose whole distribution some measure reads."""
        return frozenset().union(*(MEASURES[name].sources for name in self.measures))

    @cached_property
    def scored_sources(self) -> frozenset[str]:
        """Sources whose log-probs of the sampled tokens decide regimes or signals."""
        signals = (use.signal.sources for rule in self.rules for use in rule.uses)
        return self.routing_sources.union(*signals)

    @cached_property
    def sources(self) -> frozenset[str]:
        """Every source that one step must score; nothing else is scored."""
        return self.target_sources | self.scored_sources | self.measured_sources

    @cached_property
    def views(self) -> frozenset[str]:
        """The prompts that the sources read."""
        return frozenset(part.view_of(name) for part in self.parts for name in {*part.sources, LIVE})

    @property
    def trains_on_rollouts_alone(self) -> bool:
        """Whether every rule is for the student's own answers to the plain prompt."""
        return all((rule.text, rule.view) == ("rollout", PLAIN) for rule in self.rules)

    @property
    def context_columns(self) -> list[str]:
        """Columns of a dataset, beside that of privileged context, which views of the table read."""
        origins = {CONTRAST: self.contrast}
        named = [view for view in CONTEXT_COLUMNS if view != PRIVILEGED and origins.get(view, "column") == "column"]
        return [CONTEXT_COLUMNS[view] for view in named if view in self.views]

    @cached_property
    def needs_references(self) -> bool:
        """Whether some rule is for the tokens of reference texts."""
        return any(rule.text == "reference" for rule in self.rules)

    @cached_property
    def needs_rollouts(self) -> bool:
        """Whether somebody reads the student's answers: a rule, a view that shows one, or a judge."""
        own = any(rule.text == "rollout" for rule in self.rules)
        return own or self.is_judged or SELF in self.views

    @cached_property
    def needs_teacher(self) -> bool:
        return bool(self.sources & TEACHER_SOURCES)

    @cached_property
    def needs_privileged(self) -> bool:
        """Whether some source, or the student itself, reads the dataset's privileged context."""
        reads = PRIVILEGED in self.views and self.context == "column"
        return reads or self.student_view == "privileged"

    @cached_property
    def needs_rewards(self) -> bool:
        """Whether a signal reads rewards."""
        return any(use.signal.needs_rewards for rule in self.rules for use in rule.uses)

    @cached_property
    def needs_scores(self) -> bool:
        """Whether it matters which rollouts are right: to a signal, or where a view shows a right or wrong one."""
        siblings = "sibling" in (self.context, self.contrast) and bool(self.views - {PLAIN, SELF})
        return siblings or any(use.signal.needs_scores for rule in self.rules for use in rule.uses)

    @cached_property
    def is_judged(self) -> bool:
        """Whether rollouts have to be judged before the loss."""
        return self.needs_rewards or self.needs_scores

    def rollout_limit(self, step: int) -> int | None:
        """Most tokens of an answer at an optimizer step; `None` without a schedule of the table's own."""
        return None if self.rollout_growth is None else self.rollout_growth[0] + self.rollout_growth[1] * step

    def check_provided(self, provided: Iterable[str], *, decided: bool = False) -> None:
        """Raise `ConfigError` if a source that a part reads is not among `provided`; the trained student always is.

        Args:
            provided: names of sources.
            decided (`bool`): the assignment is there already, so that only targets are read.
        """
        part = self._only_part
        needed = part.target_sources if decided else part.sources
        missing = sorted(needed - set(provided) - {LIVE})
        if missing:
            raise ConfigError(
                f"table {self.name!r} needs {', '.join(f'{name} ({SOURCES[name].about})' for name in missing)}, "
                f"and nobody provides it; provided: {', '.join(sorted(provided)) or 'nothing'}"
            )

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rules as plain dicts, ready for YAML."""
        return [rule.to_dict() for rule in self.rules]

    @classmethod
    def from_dicts(cls, rules: Iterable[Mapping[str, Any]], *, name: str = "custom", **options: Any) -> "RoutingTable":
        """A table from plain dicts, as a YAML file has them.

        Raises:
            ConfigError: an unknown or missing key, named with the rule.
        """
        allowed = [field.name for field in fields(Rule)]
        built = []
        for index, rule in enumerate(rules):
            if not isinstance(rule, Mapping):
                raise ConfigError(f"rules[{index}] (={rule!r}) must be a mapping with the keys {', '.join(allowed)}")
            unknown = sorted(set(rule) - set(allowed))
            if unknown:
                raise ConfigError(f"rules[{index}]: unknown key {', '.join(unknown)}; allowed: {', '.join(allowed)}")
            try:
                built.append(Rule(**rule))
            except ConfigError as error:
                raise ConfigError(f"rules[{index}], {error}") from None
        return cls(name=name, rules=tuple(built), **options)

    def describe(self) -> str:
        """The table as aligned text, for `--dry-run` and logs."""
        rows = self.cells()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.heading(), *(f"  {line}" for line in lines)])

    def cells(self) -> list[list[str]]:
        """The rules in words: names of columns, then a row for each rule."""
        header = ["rule", "target", "divergence", "support", "weight"]
        rows = [
            [rule.label, str(rule.target or "-"), _divergence_text(rule), _support_text(rule), _weight_text(rule)]
            for rule in self.rules
        ]
        if self.trains_on_rollouts_alone:
            return [header, *rows]
        return [[*header, "text", "view"], *([*row, r.text, r.view] for row, r in zip(rows, self.rules, strict=True))]

    def heading(self) -> str:
        """Name, routing and anchor in a line."""
        routing = f"routed by the privilege advantage gap, trim {self.trim:g}" if self.routed else "not routed"
        anchor = f", privileged student: {self.anchor}" if self.sources & ANCHOR_SOURCES else ""
        return f"{self.name}: {routing}{anchor}"


def _divergence_text(rule: Rule) -> str:
    options = [f"beta {rule.beta:g}"] if rule.beta != 0.5 else []
    options += [f"{name} {getattr(rule, name):g}" for name in ("clamp", "cap") if getattr(rule, name) is not None]
    options += [f"clip {rule.clip[0]:g}..{rule.clip[1]:g}"] if rule.clip is not None else []
    options += [f"of {rule.advantage.name}"] if rule.advantage is not None else []
    return " ".join([rule.divergence, *options])


def _support_text(rule: Rule) -> str:
    return f"{rule.support} {rule.top_k}, {rule.tail}" if rule.support.endswith("topk") else rule.support


def _weight_text(rule: Rule) -> str:
    text = f"{rule.weight:g}"
    if rule.scale is not None:
        text += f" * {rule.scale.name}"
    if rule.select is not None:
        text += f" where {rule.select.use.name} {rule.select.bound} {rule.select.value:g}"
    return text
