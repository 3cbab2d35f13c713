"""Counts the bytes of all tensors that are alive: what a device's allocator would hand out, without its rounding."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """Inside, `now` is what tensors made inside hold, and `peak` the most since `restart`. Memory inside of kernels
    is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def restart(self) -> int:
        """Bytes now; `peak` begins again there."""
        self.peak = self.now
        return self.now

    def hold(self, *tensors: Any) -> None:
        """Count tensors that were made outside, until they are freed."""
        for one in tensors:
            storage = one.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if not size or key in self._seen:
                continue
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.hold(*(one for one in tree_flatten(out)[0] if isinstance(one, torch.Tensor) and one.device.type != "meta"))
        return out
