"""Sums that a step collects from its micro-batches, added up over ranks once per optimizer step."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dopd.loss import stats_of
from dopd.ranks import Ranks
from dopd.routing import Regime
from dopd.tables import RoutingTable

logger = logging.getLogger(__name__)

COLLAPSE_SHARE = 0.99  # one regime with more of the tokens than this: the routing says nothing


def warn_of_collapse(stats: Mapping[str, float], table: RoutingTable, step: int) -> None:
    """Warn where one regime has nearly all tokens of a step."""
    if not table.routed:
        return
    for name, share in stats.items():
        if name.startswith("share/") and name[6:] in Regime.__members__ and share > COLLAPSE_SHARE:
            logger.warning(
                f"step {step}: {share:.1%} of the tokens are in regime {name[6:]}, so the routing says almost nothing. "
                "Are teacher and student the checkpoints you meant, and does p tell them anything?"
            )


def warn_of_missing_ends(metrics: Mapping[str, float], limit: int, ends: Sequence[int], step: int) -> None:
    """Warn, at steps 0, 1, 2, 4, 8, ..., where no answer of a batch ends, and none was cut at the limit: the engine
    takes off what ended them.

    Args:
        metrics (`dict`): of `rollout_metrics`.
        limit (`int`): most tokens of an answer.
        ends (`list[int]`): end-of-sequence tokens.
        step (`int`): optimizer steps made before.
    """
    if step & (step - 1) or metrics["completions/eos_ratio"] > 0 or metrics["completions/max_length"] >= limit:
        return
    logger.warning(
        f"step {step}: no answer ends with an end-of-sequence token ({', '.join(map(str, ends))}) although all have "
        f"fewer than {limit} tokens: the rollout engine leaves that token out. Answers without an end score 0 with "
        "every verifier, and the student does not learn to end one: have the engine return it as an answer's last token"
    )


class StepSums:
    """Adds up `RoutedLoss.sums` of micro-batches; `reduce` adds them up over ranks and returns the step's
    statistics.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()

    @property
    def whole(self) -> dict[str, Tensor]:
        """What was added up since the last reduction, by name."""
        return self._sums

    def reduce(self, ranks: Ranks) -> dict[str, float]:
        """The statistics of `RoutedLoss.stats` for the whole optimizer batch; nothing collected gives nothing."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        total = ranks.total(torch.stack([self._sums[name] for name in names]))
        self._sums = {}
        sums = dict(zip(names, total.tolist(), strict=True))
        gradients = {name: sums.pop(name) for name in names if name.startswith("gradient/")}
        whole = sum(gradients.values()) or 1.0
        return stats_of(sums) | {name: value / whole for name, value in gradients.items()}

    def add_gradients(self, hidden: Tensor, regimes: Tensor, table: RoutingTable) -> None:
        """Add, when the gradient arrives, its norm at the last hidden state of every token, by the token's row.

        Their shares say which tokens move the student; the head's own gradient is not counted.

        Args:
            hidden (`Tensor` (B, T, H)): hidden states that the loss was made from.
            regimes (`LongTensor` (B, T)): -1 where nothing is scored.
            table (`RoutingTable`): the method.
        """

        def add(gradient: Tensor) -> None:
            norms = torch.linalg.vector_norm(gradient.detach(), dim=-1, dtype=torch.float64)  # no copy of (B, T, H)
            for rule in table.rules:
                if rule.regime is not None:
                    share = norms.masked_fill(regimes != int(rule.regime), 0.0).sum()
                    self.add({f"gradient/{rule.label}": share})

        hidden.register_hook(add)


class StepClock:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Seconds of every phase since the last reading."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
