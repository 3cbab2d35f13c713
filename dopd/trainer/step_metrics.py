"""Sums that a step collects from its micro-batches, added up over ranks once per optimizer step."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dopd.loss import stats_of


class StepSums:
    """Adds up `RoutedLoss.sums` of micro-batches; `reduce` adds them up over ranks and returns the step's
    statistics.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """The statistics of `RoutedLoss.stats` for the whole optimizer batch; nothing collected gives nothing."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        total = accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum")
        self._sums = {}
        return stats_of(dict(zip(names, total.tolist(), strict=True)))


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
