"""The registry of methods: what each is called, where it is from, and how its table is built."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from dopd.errors import ConfigError, DopdError, check_choice, first_line
from dopd.guests import as_guest
from dopd.interrupts import Stopped
from dopd.kinds import DIVERGENCES, OF_THE_TOKEN
from dopd.registry import Registry, files_of, place_of
from dopd.settings import SettingsError, check, settings_of_call
from dopd.sources import Anchor
from dopd.tables import RoutingTable

Confidence = Literal["high", "medium", "low"]
Build = Callable[..., RoutingTable]
AnyBuild = TypeVar("AnyBuild", bound=Build)


@dataclass(frozen=True)
class Card:
    """A method's description: its source, its equation, and how sure we are of both.

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
        check_choice("confidence", self.confidence, Confidence)
        if self.confidence == "low" and not self.departures:
            raise ConfigError("confidence (='low') needs departures: what the source leaves open")

    @property
    def note(self) -> str:
        """Source and departures, as a table carries them."""
        return self.source + (f"; DEPARTURE: {self.departures}" if self.departures else "")


METHODS: Registry[Build] = Registry("method", lambda name, build: register_method(name)(build))
CARDS: dict[str, Card] = {}


def register_method(
    name: str,
    about: str = "",
    source: str = "",
    equation: str = "",
    confidence: Confidence = "high",
    departures: str = "",
) -> Callable[[AnyBuild], AnyBuild]:
    """Register a method: the decorated function returns a `dopd.RoutingTable`; its arguments are the method's options.

    Args:
        name (`str`): what `method`, `--method` and `dopd.table` call it.
        about (`str`, *optional*): what it does, in a line; the first line of the function's docstring if left out.
        source, equation, confidence, departures (`str`, *optional*): see `Card`.

    Raises:
        ConfigError: a name that other code has, or code that is no function.
    """

    def register(build: AnyBuild) -> AnyBuild:
        if not inspect.isfunction(build):  # a builtin has no arguments that can be read, or none that are options
            raise ConfigError(
                f"method (={name!r}) is {place_of(build)}, of type {type(build).__name__}: it must be a function, "
                "written with def, that returns a dopd.RoutingTable"
            )
        card = Card(about or (inspect.getdoc(build) or "").partition("\n")[0], source, equation, confidence, departures)
        METHODS.register(name, build, build)
        CARDS[name] = card
        build.__doc__ = build.__doc__ or f"{card.about} ({card.source})."
        return build

    return register


def table(name: str, /, **options: Any) -> RoutingTable:
    """The routing table of a named method.

    Args:
        name (`str`): a key of `METHODS`, such as `"dopd"` or `"vanilla"`; or a function of your own that returns a
            table, as `package.module:function` or `./file.py:function`.
        options: what that method lets one change, for example `top_k=64, tail="renormalize"` for `"dopd"`; and
            `anchor`, the weights of the privileged student, for any method that reads it.

    Raises:
        ConfigError: an unknown name or option, or an option with a value that cannot work.
    """
    registered = METHODS.resolve(name)
    build, card = METHODS[registered], CARDS[registered]
    allowed = list(inspect.signature(build).parameters)
    anchor = None if "anchor" in allowed or registered.startswith("dopd_") else options.pop("anchor", None)
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ConfigError(
            f"method {name!r} has no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}. "
            "Options of another method are left out by method_options={} (--method_options '{}')"
        )
    options, problems = check(options, settings_of_call(build), f"method_options of {name}")
    if problems:
        raise SettingsError(problems)
    built = _built(name, build, options)
    built = replace(
        built,
        source_note=built.source_note or card.note,
        unverified=card.departures if card.confidence == "low" else built.unverified,
    )
    return built if anchor is None or anchor == built.anchor else _anchored(built, anchor)


def own_code(name: str | None, table: RoutingTable) -> str:
    """The files of users' code that a table is made of or reads, with checksums, or `"none"`.

    Args:
        name (`str`, *optional*): of the method; `None` for rules that a user wrote.
        table (`RoutingTable`): the table.
    """
    codes = [] if name is None else [METHODS.code[METHODS.resolve(name)]]
    kinds = {DIVERGENCES.resolve(rule.divergence) for rule in table.rules} - set(OF_THE_TOKEN)
    codes += [DIVERGENCES.code[kind] for kind in sorted(kinds)]
    return files_of([*codes, *(use.signal.compute for rule in table.rules for use in rule.uses)])


def _built(name: str, build: Build, options: Mapping[str, Any]) -> RoutingTable:
    try:
        with as_guest(f"method {name!r}"):
            built = build(**options)
    except (DopdError, Stopped):
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"method (={name!r}), {place_of(build)}, raises {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(built, RoutingTable):
        raise ConfigError(
            f"method (={name!r}), {place_of(build)}, returns {type(built).__name__}: it must return a dopd.RoutingTable"
        )
    return built


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
