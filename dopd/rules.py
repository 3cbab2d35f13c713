"""One rule of a method: which tokens it is for, what they are taught, and how hard.

The trainer, the reference loss and the fused losses read rules; none of them knows a method or a regime by name.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from torch import Tensor

from dopd.divergences import DivergenceKind, Support, Tail, Variant, check_support
from dopd.errors import ConfigError, check_choice
from dopd.kinds import WITHOUT_TARGET, check_divergence
from dopd.routing import Regime
from dopd.settings import SettingsError, check, check_attributes, settings_of, settings_of_call
from dopd.signals import SIGNALS, Signal, SignalBatch, signal_values
from dopd.sources import LIVE, Target, Text, TrainedView, target_of

_BOUNDS = ("top", "bottom", "above", "below")


@dataclass(frozen=True)
class SignalUse:
    """A signal with its options.

    Attributes:
        name (`str`): the name of a signal (`dopd.register_signal`).
        options (`tuple[tuple[str, Any], ...]`): what to change in it.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def signal(self) -> Signal:
        """What is registered under the name."""
        return SIGNALS.find(self.name)

    def compute(self, batch: SignalBatch) -> Tensor:
        """Its values (B, T)."""
        return signal_values(self.name, batch, dict(self.options))

    def to_value(self) -> str | dict[str, Any]:
        """As a YAML file has it."""
        return {"signal": self.name, **dict(self.options)} if self.options else self.name

    @classmethod
    def of(cls, field_name: str, value: Any) -> "SignalUse":
        """From a name, or from a mapping with the key `signal` and options of that signal."""
        if isinstance(value, cls):
            return value
        options = dict(value) if isinstance(value, Mapping) else {"signal": value}
        name = options.pop("signal", None)
        compute = SIGNALS.find(name, f"{field_name}: signal").compute
        allowed = list(inspect.signature(compute).parameters)[1:]
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            raise ConfigError(
                f"{field_name}: signal {name!r} has no option {', '.join(map(str, unknown))}; it has "
                f"{', '.join(allowed) or 'none'}"
            )
        options, problems = check(options, settings_of_call(compute), f"{field_name}: signal {name!r}")
        if problems:
            raise SettingsError(problems)
        return cls(str(name), tuple(sorted(options.items())))


@dataclass(frozen=True)
class Select:
    """The tokens that a rule is for, by a signal.

    Attributes:
        use (`SignalUse`): the signal.
        bound (`str`): `"top"` or `"bottom"` (the share of the batch's tokens with the largest or smallest values;
            ties at the boundary are kept), `"above"` or `"below"` (a value, not included).
        value (`float`): the share, or the value.
    """

    use: SignalUse
    bound: str
    value: float

    def to_value(self) -> dict[str, Any]:
        """As a YAML file has it."""
        return {"signal": self.use.name, **dict(self.use.options), self.bound: self.value}

    @classmethod
    def of(cls, value: Any) -> "Select":
        """From a mapping with the key `signal`, its options, and exactly one of top, bottom, above and below."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"select (={value!r}) must be a mapping such as {{signal: student_entropy, top: 0.5}}")
        bounds = [bound for bound in _BOUNDS if bound in value]
        if len(bounds) != 1:
            raise ConfigError(f"select (={dict(value)!r}) must have exactly one of {', '.join(_BOUNDS)}")
        use = SignalUse.of("select", {key: item for key, item in value.items() if key not in _BOUNDS})
        (bound,) = bounds
        number = _number(f"select: {bound}", value[bound])
        if bound in ("top", "bottom") and not 0.0 < number <= 1.0:
            raise ConfigError(f"select: {bound} (={number}) must be in (0, 1]: the share of tokens to keep")
        return cls(use, bound, number)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule of a routing table: the signal that some tokens receive.

    Attributes:
        regime (`Regime`, `str` or `int`, *optional*): the regime that the rule is for; `None` is every token.
        source (`str` or `dict[str, float]`, *optional*): who gives the target distribution, one of `SOURCES`, or a
            product: exponents by source (an exponent may be `{start: .., end: ..}`, linear over the training, or have
            bounds: `{power: .., over: SOURCE, clip: [low, high]}`, see `dopd.sources.target_of`). None for a divergence
            without a target.
        divergence (`str`): between the student and the target: the name of one (`dopd.register_divergence`);
            `"policy_gradient"`; or `"nll"`, -log S(y) of the text's token, which is supervised fine-tuning.
        support (`str`): `"full"`, `"student_topk"`, `"target_topk"` or `"sampled"`.
        tail (`str`): what becomes of the mass outside a top-k support: `"bucket"`, `"renormalize"`, `"truncate"` or
            `"sampled"` (see `dopd.divergence`).
        top_k (`int`): K of a top-k support.
        weight (`float`): factor on the divergence; 0 leaves the tokens out of the loss (not out of its denominator).
        name (`str`): what statistics call the rule; its regime, or `all`, if left out.
        select (`dict`, *optional*): only tokens that a signal picks: `{signal: NAME, top: 0.5}` (or bottom, above,
            below); the others stay in the loss's denominator.
        scale (`str` or `dict`, *optional*): a signal that multiplies the weight, token by token.
        advantage (`str` or `dict`, *optional*): the signal that is the advantage of `"policy_gradient"`.
        text (`str`): whose tokens the rule is for: `"rollout"`, the student's own answer, or `"reference"`, the row's
            reference text (column `solution`); rows without one receive nothing from the rule.
        view (`str`): the prompt in front of them that the student is trained on: `"plain"`, `"privileged"` (with the
            row's privileged context) or `"self"` (with the student's own answer in its place).
        outcomes_of (`str`, *optional*): a source of a product whose K most probable tokens, with `tail`, are the
            outcomes that the product is taken over; else it is taken over the vocabulary, and K are its own.
        beta, clamp, cap, clip: see `dopd.divergences.Variant`.

    Raises:
        ConfigError: a rule that cannot work, with the reason and the fix.
    """

    regime: Regime | None = None
    source: Any = None
    divergence: DivergenceKind = "reverse_kl"
    support: Support = "full"
    tail: Tail = "bucket"
    top_k: int = 128
    weight: float = 1.0
    name: str = ""
    select: Any = None
    scale: Any = None
    advantage: Any = None
    beta: float = 0.5
    clamp: float | None = None
    cap: float | None = None
    clip: Any = None
    text: Text = "rollout"
    view: TrainedView = "plain"
    outcomes_of: str | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "regime", _regime_of(self.regime))
            check_attributes(self, {name: settings_of(Rule)[name] for name in _TYPED})
            check_choice("text", self.text, Text)
            check_choice("view", self.view, TrainedView)
            self._check_divergence()
            self._check_target()
            self._check_outcomes()
            self._read_signals()
            if not (math.isfinite(_number("weight", self.weight)) and self.weight >= 0):
                raise ConfigError(f"weight (={self.weight}) must be finite and at least 0")
        except ConfigError as error:
            raise ConfigError(f"rule {self._shown_label()!r}: {error}") from None

    def _check_divergence(self) -> None:
        check_divergence("divergence", self.divergence)
        check_support(self.divergence, self.support, self.top_k, self.tail)
        if self.support.endswith("topk") and self.top_k == 1 and self.tail == "renormalize":
            raise ConfigError(
                "top_k=1 with tail='renormalize' compares a single outcome of probability 1, so nothing would be "
                "learned. Use tail='bucket' or a larger top_k"
            )
        if self.clip is not None:
            if not isinstance(self.clip, list | tuple) or len(self.clip) != 2:
                raise ConfigError(f"clip (={self.clip!r}) must be a pair (lowest, highest)")
            low, high = (
                math.copysign(math.inf, sign) if b is None else _number("clip", b)
                for sign, b in zip((-1, 1), self.clip, strict=True)
            )
            object.__setattr__(self, "clip", (low, high))
        self.variant.check(self.divergence, self.support)

    def _check_target(self) -> None:
        if check_divergence("divergence", self.divergence) in WITHOUT_TARGET:
            if self.source is not None:
                raise ConfigError(
                    f"source (={self.source!r}): divergence={self.divergence!r} reads no target; leave it out"
                )
            return
        if self.source is None:
            raise ConfigError(f"source is missing: divergence={self.divergence!r} compares the student with a target")
        if target_of(self.source).single == LIVE:
            raise ConfigError(
                "source='student' alone is the trained distribution itself: divergence and gradient would be 0. "
                "Use it in a product, or source='privileged_student'"
            )

    def _check_outcomes(self) -> None:
        estimated = self.support == "sampled" or self.tail == "sampled"
        if estimated and self.divergence not in WITHOUT_TARGET and (self.text, self.view) != ("rollout", "plain"):
            where = f"text (={self.text!r})" if self.text != "rollout" else f"view (={self.view!r})"
            what = "support" if self.support == "sampled" else "tail"
            raise ConfigError(
                f"{what}='sampled' estimates a divergence from tokens that the trained distribution has drawn, and "
                f"{where} has others: use support='full', 'student_topk' or 'target_topk' (with another tail), or "
                "divergence='nll'"
            )
        if self.tail == "sampled" and not (self.clamp is None and self.cap is None):
            raise ConfigError("tail='sampled' estimates the unbounded divergence: leave clamp and cap out")
        target = self.target
        if target is not None and self.support == "sampled" and any(factor.centre for factor in target.factors):
            raise ConfigError(
                "source: centre takes a mean over the vocabulary, which support='sampled' does not read: use another "
                "support"
            )
        if self.outcomes_of is None:
            return
        if target is None or target.single is not None or self.outcomes_of not in target.names:
            raise ConfigError(
                f"outcomes_of (={self.outcomes_of!r}) must be one of the sources of a product, got source "
                f"{self.source!r}. The K most probable tokens of a single source are support='target_topk'"
            )
        if self.support != "target_topk" or self.tail == "sampled":
            raise ConfigError(
                f"outcomes_of (={self.outcomes_of!r}) names whose tokens support='target_topk' takes, with tail "
                f"'bucket', 'renormalize' or 'truncate'; got support={self.support!r}, tail={self.tail!r}"
            )

    def _read_signals(self) -> None:
        for name in ("scale", "advantage"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, SignalUse.of(name, getattr(self, name)))
        if self.select is not None:
            object.__setattr__(self, "select", Select.of(self.select))
        if (self.advantage is None) == (self.divergence == "policy_gradient"):
            raise ConfigError(
                f"advantage (={self.advantage!r}) names the signal of divergence='policy_gradient', and of no other "
                f"(got divergence={self.divergence!r})"
            )

    def _shown_label(self) -> str:
        """The label, also of a rule whose regime is none."""
        return self.name or str(getattr(self.regime, "name", "all" if self.regime is None else self.regime))

    @cached_property
    def label(self) -> str:
        """The rule's name, its regime, or `all` for a rule that takes every token."""
        return self.name or ("all" if self.regime is None else self.regime.name)

    @cached_property
    def target(self) -> Target | None:
        """What the rule pulls towards; `None` without a target."""
        return None if self.source is None else target_of(self.source)

    @cached_property
    def target_names(self) -> frozenset[str]:
        """Sources of the target that somebody has to provide (the trained student itself is there anyway)."""
        return frozenset() if self.target is None else self.target.names - {LIVE}

    @cached_property
    def variant(self) -> Variant:
        """The options of the divergence."""
        return Variant(self.beta, self.clamp, self.cap, self.clip)

    @cached_property
    def uses(self) -> list[SignalUse]:
        """The signals that the rule reads."""
        picked = [] if self.select is None else [self.select.use]
        return [*picked, *(use for use in (self.scale, self.advantage) if use is not None)]

    def to_dict(self) -> dict[str, Any]:
        """The rule as a plain dict, ready for YAML; what has its default is left out, but for the basic fields."""
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _ALWAYS or value != item.default:
                values[item.name] = value.to_value() if hasattr(value, "to_value") else value
        values["regime"] = None if self.regime is None else self.regime.name
        if self.clip is not None:
            values["clip"] = [None if math.isinf(bound) else bound for bound in self.clip]
        return values


_TYPED = ("name", "beta", "clamp", "cap", "outcomes_of")  # the others are read in several forms
_ALWAYS = ("regime", "source", "divergence", "support", "tail", "top_k", "weight")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} (={value!r}) must be a number")
    return float(value)


def _regime_of(value: Any) -> Regime | None:
    if value is None or isinstance(value, Regime):
        return value
    if isinstance(value, str) and value in Regime.__members__:
        return Regime[value]
    if isinstance(value, int) and not isinstance(value, bool) and value in list(Regime):
        return Regime(value)
    allowed = ", ".join(regime.name for regime in Regime)
    raise ConfigError(f"regime (={value!r}) must be one of {allowed}, or left out for every token")
