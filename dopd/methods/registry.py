"""The registry of methods: what each is called, where it is from, and how its table is made."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from dopd.errors import ConfigError
from dopd.settings import SettingsError, check, settings_of_call
from dopd.sources import Anchor
from dopd.tables import RoutingTable

Confidence = Literal["high", "medium", "low"]
Build = Callable[..., RoutingTable]


@dataclass(frozen=True)
class Card:
    """What is known of a method beside its rows.

    Attributes:
        about (`str`): what it does, in a line.
        source (`str`): paper or code.
        equation (`str`): what a token's loss is; S student, T teacher, y the sampled token, S(.|p) with privileged
            context.
        confidence (`str`): `"high"` (read in the paper or its code), `"medium"` (from reports that agree), or `"low"`.
        departures (`str`): where the table differs from the source, or what the source leaves open.
    """

    about: str
    source: str
    equation: str
    confidence: Confidence = "high"
    departures: str = ""

    def __post_init__(self) -> None:
        assert self.confidence in get_args(Confidence), self.confidence
        assert self.departures or self.confidence != "low", "a low confidence says what is not known"

    @property
    def note(self) -> str:
        """Source and departures, as a table carries them."""
        return self.source + (f"; DEPARTURE: {self.departures}" if self.departures else "")


METHODS: dict[str, Build] = {}
CARDS: dict[str, Card] = {}


def method(name: str, card: Card) -> Callable[[Build], Build]:
    """Register the function that builds a method's table; its keyword arguments are the method's options."""

    def register(build: Build) -> Build:
        METHODS[name], CARDS[name] = build, card
        build.__doc__ = build.__doc__ or f"{card.about} ({card.source})."
        return build

    return register


def table(name: str, /, **options: Any) -> RoutingTable:
    """The routing table of a named method.

    Args:
        name (`str`): a key of `METHODS`, such as `"dopd"` or `"vanilla"`.
        options: what that method lets one change, for example `top_k=64, tail="renormalize"` for `"dopd"`; and
            `anchor`, the weights of the privileged student, for any method that reads it.

    Raises:
        ConfigError: an unknown name or option, or an option with a value that cannot work.
    """
    if name not in METHODS:
        close = sorted(difflib.get_close_matches(str(name), METHODS, n=2))
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ConfigError(f"method (={name!r}) must be one of {', '.join(METHODS)}.{hint}")
    allowed = list(inspect.signature(METHODS[name]).parameters)
    anchor = None if "anchor" in allowed or name.startswith("dopd_") else options.pop("anchor", None)
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ConfigError(f"method {name!r} has no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}")
    options, problems = check(options, settings_of_call(METHODS[name]), f"method_options of {name}")
    if problems:
        raise SettingsError(problems)
    built = METHODS[name](**options)
    if CARDS[name].confidence == "low":
        built = replace(built, unverified=CARDS[name].departures)
    return built if anchor is None or anchor == built.anchor else _anchored(built, anchor)


def _anchored(built: RoutingTable, anchor: Anchor) -> RoutingTable:
    """A table whose privileged student has other weights than its method's; the name says so."""
    return replace(
        built,
        name=f"{built.name}_{anchor}",
        anchor=anchor,
        ema_decay=None,
        snapshot_steps=None,
        source_note=f"{built.source_note}; DEPARTURE: {anchor} privileged student",
    )
