"""What processes tell one another in a step."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from dopd.errors import ScoringError


class Ranks(Protocol):
    """The processes of a run, each with a part of a step's completions."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def number(self) -> int:
        """Of this process, from 0 on."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, the same on each."""

    def gathered(self, values_N: Tensor) -> Tensor:
        """Values of the tokens of this rank (N',), or rows of numbers (N', K) -> those of all, the same on each."""


class Alone:
    """One process."""

    count, number = 1, 0

    def total(self, values: Tensor) -> Tensor:
        return values

    def gathered(self, values_N: Tensor) -> Tensor:
        return values_N


class AcceleratorRanks:
    """The processes of an accelerator."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @property
    def count(self) -> int:
        return self._accelerator.num_processes

    @property
    def number(self) -> int:
        return self._accelerator.process_index

    def total(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values, reduction="sum")

    def gathered(self, values_N: Tensor) -> Tensor:
        # Ranks hold different numbers of them.
        padded_N = self._accelerator.pad_across_processes(values_N, dim=0, pad_index=math.nan)
        gathered = self._accelerator.gather(padded_N)
        counts = self._accelerator.gather(torch.tensor([len(values_N)], device=values_N.device))
        longest = len(padded_N)
        return torch.cat([gathered[rank * longest : rank * longest + int(n)] for rank, n in enumerate(counts)])


class Remembering:
    """Ranks whose answers are kept, in the order in which they were asked, for `Replayed`.

    Attributes:
        answers (`list[Tensor]`): the answers.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.answers: list[Tensor] = []

    @property
    def count(self) -> int:
        return self._ranks.count

    @property
    def number(self) -> int:
        return self._ranks.number

    def total(self, values: Tensor) -> Tensor:
        return self._kept(self._ranks.total, values)

    def gathered(self, values_N: Tensor) -> Tensor:
        return self._kept(self._ranks.gathered, values_N)

    def _kept(self, ask: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        self.answers.append(ask(values).detach().clone())
        return self.answers[-1].clone()


class Replayed:
    """Tells other completions what a step's processes told one another, so that they are looked at with the numbers of
    that step and not with their own.

    Args:
        step (`Remembering`): the ranks of that step.
    """

    def __init__(self, step: Remembering) -> None:
        self._answers = iter(step.answers)
        self.count, self.number = step.count, 0

    def total(self, values: Tensor) -> Tensor:
        return self._next()

    def gathered(self, values_N: Tensor) -> Tensor:
        return self._next()

    def _next(self) -> Tensor:
        answer = next(self._answers, None)
        if answer is not None:
            return answer.clone()
        raise ScoringError(
            "a signal asked for numbers of the whole batch more often than at the step whose numbers are shown: call "
            "everywhere() equally often for every batch, as several processes need it too"
        )
