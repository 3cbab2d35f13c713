"""How the catalogue writes conditions: method, tuned rate, options at tiny scale."""

import inspect
from collections.abc import Mapping
from typing import Any

from dopd.methods import METHODS
from lab.protocol import DEFAULT_RATE, tuned_rate
from lab.spec import MEASURED_TABLES, SFT, UNTRAINED, Condition, RunSpec

TOP_K = 8  # of some 80 words, for the paper's 128 of 150 thousand
FIXED_RATE = "Every method takes its own tuned learning rate."


def condition(
    label: str,
    method: str,
    *,
    options: Mapping[str, Any] | None = None,
    rate_of: str | None = None,
    teacher: str = "teacher",
    rate_teacher: str | None = None,
    rate_family: str = "dag",
    paper: Mapping[str, float] | None = None,
    x: float | None = None,
    group: str = "",
    **run: Any,
) -> Condition:
    """A condition with the method's tuned rate (or that of `rate_of`, with `rate_teacher`, on `rate_family`), its
    options at tiny scale, and the table that was measured where the method has another one by now.
    """
    rules = run.get("rules")
    own = {} if rules is not None else {**tiny_options(method), **MEASURED_TABLES.get(method, {})}
    merged = {**own, **(options or {})}
    rate = run.pop("learning_rate", None) or tuned_rate(rate_of or method, rate_teacher or teacher, rate_family)
    spec = RunSpec(method=method, options=merged, teacher=teacher, learning_rate=rate or DEFAULT_RATE, **run)
    return Condition(label=label, run=spec, paper=paper or {}, x=x, group=group, tuned=rate is not None)


def start(label: str = "start", **run: Any) -> Condition:
    """The student before training."""
    return Condition(label=label, run=RunSpec(method="start", **run))


def teacher_alone(label: str = "teacher", **run: Any) -> Condition:
    """The teacher, judged without p as the student is."""
    return Condition(label=label, run=RunSpec(method="teacher", **run))


def tiny_options(method: str) -> dict[str, Any]:
    """`top_k` scaled to the tiny vocabulary, where the method has that option."""
    if method in UNTRAINED or method == SFT or method not in METHODS:
        return {}
    return {"top_k": TOP_K} if "top_k" in inspect.signature(METHODS[method]).parameters else {}
