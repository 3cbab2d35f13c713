"""Monitors: numbers of a training's answers that say early that something goes wrong, with the limit of each, and what
to do beyond it. One table for the warnings of a training, its report and its curves.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dopd.report.records import RunRecord
from dopd.wording import COPIED_WORDS, copies_hint, speaks_of_hint

FEW = 3  # logged steps at either end that are compared
COPIES, SPEAKS, LOOPS = "leak/copies_hint", "leak/speaks_of_hint", "repetition/looping_ratio"
PRIVILEGED_KL = "eval_privileged_kl"
LENGTH, CLIPPED = "completions/mean_length", "completions/clipped_ratio"
_LEAKS = (COPIES, SPEAKS)

Trace = Mapping[str, Any]  # a record of `trace.jsonl`


@dataclass(frozen=True)
class Monitor:
    """What is watched of one metric.

    Attributes:
        limit (`float`): how far the mean of the last logged steps may be above that of the first: a difference of
            shares; or a factor, and its inverse.
        title, what, advice (`str`): what is wrong, what answers then do, and what to change.
        is_factor (`bool`): whether the limit is a factor.
        unit (`str`): of the metric where it is no share of answers; such a rise is worth a note.
    """

    limit: float
    title: str
    what: str
    advice: str
    is_factor: bool = False
    unit: str = ""

    def beyond(self, values: Sequence[float], limit: float | None) -> tuple[float, float] | None:
        """Means of the first and of the last logged values, where they are farther apart than a limit; `None` where
        they are not, without a limit, and while there are fewer than twice three.
        """
        if limit is None or len(values) < 2 * FEW:
            return None
        start, end = statistics.fmean(values[:FEW]), statistics.fmean(values[-FEW:])
        by_factor = start > 0 and (end > limit * start or end < start / limit)
        return (start, end) if (by_factor if self.is_factor else end - start > limit) else None

    def edges(self, values: Sequence[float], limit: float | None) -> dict[str, float]:
        """Where the limit stands in the curve of these values, by what it is called; empty without one."""
        if limit is None or len(values) < FEW:
            return {}
        start = statistics.fmean(values[:FEW])
        if not self.is_factor:
            return {"limit": start + limit}
        return {"upper limit": start * limit, "lower limit": start / limit}


MONITORS: Mapping[str, Monitor] = {
    COPIES: Monitor(
        0.05,
        "the hint leaks into answers",
        f"repeat {COPIED_WORDS} or more words in a row of their privileged context that the prompt does not have",
        "Shorten p to a plan without the wording of an answer, or try a lower `learning_rate`; a `privileged_kind` "
        "without the solution where a task has one.",
    ),
    SPEAKS: Monitor(
        0.05,
        "answers speak of a hint",
        "mention a hint that the student does not see",
        "Say in `privileged_template` that the answer must stand without the hint, and leave words such as 'hint' out "
        "of it; then try a lower `learning_rate`.",
    ),
    LOOPS: Monitor(
        0.1,
        "answers end in loops",
        "end in a loop: one block of tokens, four times or more in a row",
        "Look at the last answers, then lower `learning_rate` to a third; where the teacher loops at the same places, "
        "take another `teacher_model_name_or_path`, or a shorter `max_completion_length`.",
    ),
    CLIPPED: Monitor(
        0.2,
        "answers are cut more often",
        "are cut at `max_completion_length`",
        "Raise `max_completion_length` if answers reason more and accuracy rises; if they repeat themselves or do not "
        "come to an end, lower `learning_rate`.",
    ),
    LENGTH: Monitor(
        1.5,
        "answers change their length",
        "have another length than at the start",
        "Compare the last answers with the first: longer ones that repeat themselves, or shorter ones without their "
        "reasoning, ask for a lower `learning_rate` or a p that says less of the answer.",
        is_factor=True,
        unit="tokens",
    ),
    PRIVILEGED_KL: Monitor(
        0.05,
        "the student with p moves from its start",
        "the divergence of the student that reads p from where it began",
        "Its targets move with it: lower `learning_rate`, or try `privileged_student: ema` or `privileged_student: "
        "frozen`.",
        unit="nats per token",
    ),
}


def limits_of(config: Mapping[str, Any]) -> dict[str, float | None]:
    """The limits of a run, by metric; `None` where nothing is warned of.

    Args:
        config (`dict`): of the run, with `monitor_limits` if it has its own.
    """
    own = config.get("monitor_limits")
    own = own if isinstance(own, dict) else {}
    limits: dict[str, float | None] = {name: monitor.limit for name, monitor in MONITORS.items()}
    return limits | {
        name: value
        for name, value in own.items()
        if name in limits and (value is None or isinstance(value, int | float))
    }


def monitored(run: RunRecord) -> Iterator[tuple[str, str, str, str]]:
    """Level (`bad` or `note`), title, text and advice of what is beyond its limit in a run, but for lengths: by what
    was logged of all its rollouts; leaks of a run that logged none, by its traced completions.
    """
    limits = limits_of(run.config)
    for name in (*_LEAKS, LOOPS, PRIVILEGED_KL):
        monitor, (steps, values) = MONITORS[name], run.series(name)
        found = monitor.beyond(values, limits[name])
        if found is not None:
            start, end = found
            where = f"(`{name}` at steps {steps[0]} to {steps[-1]})."
            text = f"{end:.0%} of the last rollouts {monitor.what}; {start:.0%} of the first {where}"
            if monitor.unit:
                text = f"{monitor.what} went from {start:.3g} to {end:.3g} {monitor.unit} {where}"
            yield "note" if monitor.unit else "bad", monitor.title, text, monitor.advice
        elif not values and name in _IN_TRACE:
            yield from (("bad", *leak) for leak in _traced(run.trace, monitor, _IN_TRACE[name], limits[name]))


def _traced(
    trace: Sequence[Trace], monitor: Monitor, leaks: Callable[[Trace], bool], limit: float | None
) -> Iterator[tuple[str, str, str]]:
    """A leak in the traced completions of a run.

    An untrained student that solves a problem as p does repeats some of its words, too: where completions from before
    training were traced, only what goes beyond their share is a leak.
    """
    records = [record for record in trace if record.get("privileged_context")]
    before = [record for record in records if record["step"] == 0]  # written by the untrained student
    after = [record for record in records if record["step"] > 0]
    hits = [record for record in after if leaks(record)]
    share, by_chance = len(hits) / max(len(after), 1), sum(map(leaks, before)) / max(len(before), 1)
    if limit is not None and share - by_chance > limit:
        earlier = f"; {by_chance:.0%} before training" if before else ""
        text = (
            f"{len(hits)} of {len(after)} traced completions ({share:.0%}{earlier}) {monitor.what} (first at step "
            f"{hits[0]['step']})."
        )
        yield monitor.title, text, monitor.advice


def _answer(record: Trace) -> str:
    return "".join(token["text"] for token in record["tokens"])


_IN_TRACE: dict[str, Callable[[Trace], bool]] = {
    COPIES: lambda record: copies_hint(_answer(record), str(record["privileged_context"]), record["prompt"]),
    SPEAKS: lambda record: speaks_of_hint(_answer(record), record["prompt"]),
}
