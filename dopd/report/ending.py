"""How a training ended: at its last step or early, why, and of which step its weights are."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dopd.report.records import RunRecord

# What `dopd.trainer.best` logs with an evaluation: the step of the best checkpoint, and evaluations without a gain.
BEST_STEP, WAITED = "best/step", "best/waited"
_STOP = {"metric": "accuracy_greedy", "patience": 3, "min_delta": 0.0}  # defaults of `early_stop`


@dataclass(frozen=True)
class Ending:
    """A training that is over.

    Attributes:
        step (`int`): its last one.
        planned (`int`, *optional*): `max_steps`, where it was set.
        early (`bool`): whether `early_stop` ended it.
        weights_of (`int`): the step whose weights the run left.
        why (`str`): in a sentence without a full stop; empty where it ended at its last step with the weights of it.
    """

    step: int
    planned: int | None
    early: bool
    weights_of: int
    why: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ending_of(run: RunRecord) -> Ending | None:
    """How a run ended; `None` while it is under way, as far as its records say."""
    step = max((record["step"] for record in run.metrics), default=0)
    planned = run.config.get("max_steps")
    planned = planned if isinstance(planned, int) and not isinstance(planned, bool) and planned > 0 else None
    stop, marks = _stop_of(run.config), [record for record in run.metrics if BEST_STEP in record]
    early = stop is not None and bool(marks) and marks[-1].get(WAITED, 0) >= stop["patience"]
    early = early and marks[-1]["step"] == step != planned
    summarised = any("train_runtime" in record and record["step"] == step for record in run.metrics)
    if not (early or run.result or (summarised if planned is None else step >= planned)):
        return None
    loads_best = stop is not None or run.config.get("load_best_model_at_end") is True
    best = int(marks[-1][BEST_STEP]) if loads_best and marks else 0
    weights_of = best or step
    parts = [_stopped(stop, step, planned)] if early and stop is not None else []
    if best:
        parts.append(
            f"the weights are those of step {best}, the best by {_metric(run, stop)}{_beside_start(run, stop)}"
        )
    return Ending(step, planned, early, weights_of, "; ".join(parts))


def weights_step(run: RunRecord) -> int | None:
    """The step whose weights a run left, where that is not its last; `None` otherwise, and while it is under way."""
    ending = ending_of(run)
    return None if ending is None or ending.weights_of == ending.step else ending.weights_of


def _stop_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    asked = config.get("early_stop")
    if not isinstance(asked, dict):
        return None
    read = _STOP | {name: asked[name] for name in _STOP if name in asked}
    numbers = all(isinstance(read[name], int | float) for name in ("patience", "min_delta"))
    return read if numbers else None


def _stopped(stop: Mapping[str, Any], step: int, planned: int | None) -> str:
    of = "" if planned is None else f" of {planned}"
    gain = f"of more than {stop['min_delta']:g} " if stop["min_delta"] else ""
    name = str(stop["metric"]).removeprefix("eval_")
    count = "1 evaluation" if stop["patience"] == 1 else f"{stop['patience']:g} evaluations in a row"
    return f"stopped early at step {step}{of}: {name} had no gain {gain}in {count}"


def _metric(run: RunRecord, stop: Mapping[str, Any] | None) -> str:
    name = run.config.get("metric_for_best_model") if stop is None else stop["metric"]
    return str(name).removeprefix("eval_")


def _beside_start(run: RunRecord, stop: Mapping[str, Any] | None) -> str:
    """That nothing was gained on the start, where accuracy says so."""
    name = f"eval_{_metric(run, stop)}"
    values = [record[name] for record in run.metrics if name in record]
    first = [record[name] for record in run.metrics if name in record and record["step"] == 0]
    if not name.startswith("eval_accuracy") or not first or max(values) > first[0]:
        return ""
    return f", which is no better than the start ({first[0]:.1%})"
