"""What TRL's GRPO hands to reward functions of its run: the trainer's state, and a function that logs metrics."""

from collections import defaultdict
from typing import Any

from accelerate.utils import gather_object

from dopd.errors import ScoringError
from dopd.trainer.host import HostTrainer


class RewardLogs:
    """Gives reward functions `trainer_state` and `log_metric`, and keeps the metrics that they log of a batch."""

    def __init__(self, host: HostTrainer) -> None:
        self._host = host
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def __call__(self) -> dict[str, Any]:
        return {"trainer_state": self._host.state, "log_metric": self._log_metric}

    def taken(self) -> dict[str, float]:
        """The mean of every metric that some process logged since the last call, the same on each."""
        if not self._host.judge.functions:
            return {}
        mine = {name: (sum(values), len(values)) for name, values in self._metrics.items()}
        self._metrics.clear()
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for of_rank in gather_object([mine]):
            for name, (total, count) in of_rank.items():
                sums[name][0] += total
                sums[name][1] += count
        return {name: total / count for name, (total, count) in sorted(sums.items())}

    def _log_metric(self, name: str, value: float) -> None:
        try:
            self._metrics[str(name)].append(float(value))
        except (TypeError, ValueError):
            raise ScoringError(f"log_metric({name!r}, {value!r}): the value must be a number") from None
