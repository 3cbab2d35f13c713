"""Named routing tables. A method is rows and a source; nothing here runs."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from dopd.divergences import DivergenceKind, Support, Tail
from dopd.errors import ConfigError
from dopd.routing import Regime
from dopd.rules import Rule
from dopd.sources import Anchor
from dopd.tables import RoutingTable

PAPER = "arXiv 2606.30626"


def dopd(
    *,
    top_k: int = 128,
    tail: Tail = "bucket",
    strong_weight: float = 1.0,
    light_weight: float = 0.6,
    weak_weight: float = 0.3,
    anchor: Anchor = "current",
    trim: float = 0.05,
) -> RoutingTable:
    """The paper's four rows: Section 3.3, weights b_l = 0.6 and b_w = 0.3, K = 128, the live privileged student.

    DEPARTURE under another name: with `anchor` "frozen" or "ema" the table is called `dopd_frozen` or `dopd_ema`.
    """

    def light(regime: Regime, source: str, weight: float) -> Rule:
        return Rule(regime=regime, source=source, support="student_topk", tail=tail, top_k=top_k, weight=weight)

    return RoutingTable(
        name="dopd" if anchor == "current" else f"dopd_{anchor}",
        rules=(
            light(Regime.LH, "privileged_teacher", light_weight),
            light(Regime.LL, "privileged_student", weak_weight),
            Rule(regime=Regime.HT, source="privileged_teacher", divergence="js", support="full", weight=strong_weight),
            light(Regime.HS, "privileged_student", light_weight),
        ),
        anchor=anchor,
        trim=trim,
        source_note=f"{PAPER}, Section 3.3"
        + ("" if anchor == "current" else f"; DEPARTURE: {anchor} privileged student"),
    )


def _anchored(anchor: Anchor) -> Callable[..., RoutingTable]:
    def build(**options: Any) -> RoutingTable:
        return dopd(anchor=anchor, **options)

    # The options of `dopd`, with its defaults, but for the one that the name has settled.
    signature = inspect.signature(dopd)
    options = [parameter for name, parameter in signature.parameters.items() if name != "anchor"]
    build.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    build.__doc__ = f"DOPD with the privileged student `{anchor}`. DEPARTURE from the paper, whose is the live one."
    return build


def _uniform(name: str, source: str, source_note: str) -> Callable[..., RoutingTable]:
    def build(
        *,
        divergence: DivergenceKind = "reverse_kl",
        support: Support = "full",
        top_k: int = 128,
        tail: Tail = "bucket",
        anchor: Anchor = "current",
    ) -> RoutingTable:
        rule = Rule(source=source, divergence=divergence, support=support, top_k=top_k, tail=tail)
        return RoutingTable(name=name, rules=(rule,), anchor=anchor, source_note=source_note)

    build.__doc__ = f"{source_note}."
    return build


METHODS: dict[str, Callable[..., RoutingTable]] = {
    "dopd": dopd,
    "dopd_frozen": _anchored("frozen"),
    "dopd_ema": _anchored("ema"),
    "vanilla": _uniform("vanilla", "teacher", "Vanilla OPD: the plain teacher teaches every token, reverse KL"),
    "privileged_teacher": _uniform(
        "privileged_teacher",
        "privileged_teacher",
        f"Naive privileged OPD, teacher only ({PAPER}, Figure 3): every token",
    ),
    "privileged_student": _uniform(
        "privileged_student",
        "privileged_student",
        f"Naive privileged self-distillation ({PAPER}, Figure 3): every token",
    ),
}


def table(name: str, **options: Any) -> RoutingTable:
    """The routing table of a named method.

    Args:
        name (`str`): a key of `METHODS`, such as `"dopd"` or `"vanilla"`.
        options: what that method lets one change, for example `top_k=64, tail="renormalize"` for `"dopd"`.

    Raises:
        ConfigError: an unknown name or option, or an option with a value that cannot work.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"method (={name!r}) must be one of {', '.join(METHODS)}.{hint}")
    allowed = list(inspect.signature(METHODS[name]).parameters)
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ConfigError(f"method {name!r} has no option {', '.join(unknown)}; it has {', '.join(allowed)}")
    return METHODS[name](**options)
