"""What processes tell one another in a step."""

import math
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor


class Ranks(Protocol):
    """The processes of a run, each with a part of a step's completions."""

    @property
    def count(self) -> int:
        """How many there are."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, the same on each."""

    def gathered(self, values_N: Tensor) -> Tensor:
        """Values of the tokens of this rank (N',), or rows of numbers (N', K) -> those of all, the same on each."""


class Alone:
    """One process."""

    count = 1

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

    def total(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values, reduction="sum")

    def gathered(self, values_N: Tensor) -> Tensor:
        # Ranks hold different numbers of them.
        padded_N = self._accelerator.pad_across_processes(values_N, dim=0, pad_index=math.nan)
        gathered = self._accelerator.gather(padded_N)
        counts = self._accelerator.gather(torch.tensor([len(values_N)], device=values_N.device))
        longest = len(padded_N)
        return torch.cat([gathered[rank * longest : rank * longest + int(n)] for rank, n in enumerate(counts)])
