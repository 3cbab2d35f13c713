"""Random numbers that are drawn beside a run, and leave it as it is."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch


@contextmanager
def random_states_kept(*devices: torch.device) -> Iterator[None]:
    """Afterwards the random states of Python, NumPy, the CPU and `devices` are what they were.

    Other devices are left alone: a process may see many that it does not use.
    """
    kinds = sorted({device.type for device in devices} - {"cpu", "meta"})
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in kinds:
            own = [device for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(own, device_type=kind))
        yield
