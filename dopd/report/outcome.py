"""What a run came to: accuracies before its first step and after its last."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dopd.report.headline import last_evaluation
from dopd.report.records import RunRecord
from dopd.statistics import Interval

WITHOUT_PRIVILEGED = ("accuracy_greedy", "accuracy_sampled")
_WORDS = {
    "accuracy_greedy": "greedy accuracy without p",
    "accuracy_sampled": "sampled accuracy without p",
    "accuracy_blank": "greedy accuracy on grey images",
    "accuracy_privileged": "greedy accuracy WITH p",
}


@dataclass(frozen=True)
class Change:
    """An accuracy on held-out prompts, in [0, 1], with Wilson's 95% intervals over prompts.

    Attributes:
        name (`str`): of the metric.
        words (`str`): what it is.
        start (`Interval`, *optional*): before the first step, where it was measured.
        end (`Interval`): after the last step, or at the last evaluation.
        num_start, num_end (`int`): prompts of the two evaluations.
    """

    name: str
    words: str
    start: Interval | None
    end: Interval
    num_start: int
    num_end: int


def changes(run: RunRecord, names: Sequence[str] = tuple(_WORDS)) -> list[Change]:
    """Accuracies of a run at its start and its end; empty if it was never evaluated.

    Args:
        run (`RunRecord`): the run.
        names: of metrics; those that were measured are returned, in this order.
    """
    end = last_evaluation(run)
    first = [record for record in run.metrics if record["step"] == 0]
    start = last_evaluation(replace(run, metrics=first, result={}))
    before, after = (found.get("intervals", {}) for found in (start, end))
    counts = [int(found.get("metrics", {}).get("num_prompts", 0)) for found in (start, end)]
    return [
        Change(
            name, _WORDS[name], Interval(**before[name]) if name in before else None, Interval(**after[name]), *counts
        )
        for name in names
        if name in after
    ]
