"""Random numbers that are drawn beside a run and leave it as it is, and those of a step that is left and made again."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomStates:
    """The random states of this process, and of some devices.

    Other devices are left alone: a process may see many that it does not use.

    Attributes:
        python, numpy: of those modules.
        cpu (`Tensor`): of torch.
        devices (`dict[torch.device, Tensor]`): of torch on each device.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    devices: Mapping[torch.device, torch.Tensor]

    @classmethod
    def now(cls, *devices: torch.device) -> "RandomStates":
        """As they are, with those of `devices`."""
        there = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type not in ("cpu", "meta")
        }
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), there)

    @staticmethod
    def seed(seed: int, *devices: torch.device) -> None:
        """Begin anew from a number, below 2^32, on `devices` beside the CPU."""
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed is of all devices
        for device in devices:
            with torch.get_device_module(device).device(device):
                torch.get_device_module(device).manual_seed(seed)

    def restore(self) -> None:
        """Make them what they were."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def random_states_kept(*devices: torch.device) -> Iterator[None]:
    """Afterwards the random states of Python, NumPy, the CPU and `devices` are what they were."""
    before = RandomStates.now(*devices)
    try:
        yield
    finally:
        before.restore()
