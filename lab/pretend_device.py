"""A second device where there is none: tensors that say they are on it and hold CPU memory.

Values are exact. Inside of `Pretended` every operation that a real second device would refuse, because some of its
tensors are on the one and some on the other, is computed all the same and kept in `mixed`; and what would have the host
wait until the device has done all its work, because it needs a value or a size from there, is kept in `waits`. Nothing
is said of speed, kernels or memory. The backend stays registered for as long as the process lives: use it in a process
of its own.
"""

import collections
import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

# Operations that take an index from the CPU, or copy from one device to the other.
_CROSSING = {"index", "index_put", "index_put_", "_unsafe_index", "copy_", "_to_copy"}
_NAME = "pretend"
# Operations whose outcome, or its size, the host has to know.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
_BY_MASK = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}  # a mask becomes places first
mixed: collections.Counter[str] = collections.Counter()
waits: collections.Counter[str] = collections.Counter()


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_autocast_enabled(self) -> bool:
        return False

    def synchronize(self, *_: Any) -> None:
        pass

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()  # nothing is drawn there

    def set_rng_state(self, *_: Any) -> None:
        pass


class _OnDevice(Tensor):
    """A tensor on the pretended device, around one in CPU memory."""

    inner: Any

    @staticmethod
    def __new__(cls, inner: Tensor) -> "_OnDevice":
        outer: Any = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device(),
            requires_grad=False,
        )
        outer.inner = inner
        return outer

    def tolist(self) -> Any:
        waits[f"tolist at {_place()}"] += 1
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        mixed[f"numpy at {_place()}"] += 1
        return self.inner.numpy()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"on {_NAME}: {self.inner!r}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        return _computed(function, arguments, named or {})


class Pretended(TorchDispatchMode):
    """Inside, tensors are made on the device that they are asked for."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return _computed(function, arguments, named or {})


def device() -> torch.device:
    return torch.device(f"{_NAME}:0")


def register() -> None:
    """Have torch know the device."""
    _setup_privateuseone_for_python_backend(_NAME, backend_module=_Backend())
    library = torch.library.Library("aten", "IMPL")
    _KEPT.append(library)

    def strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
        return _OnDevice(torch.empty_strided(size, stride, dtype=dtype))

    def empty(size: Any, dtype: Any = None, **_: Any) -> Tensor:
        return _OnDevice(torch.empty(size, dtype=dtype))

    def copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
        _inner(target).copy_(_inner(source))
        return target

    library.impl("empty_strided", strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")


_KEPT: list[torch.library.Library] = []  # one that is collected takes its functions with it


def move(module: nn.Module) -> None:
    """A module's parameters and buffers onto the device, in place."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(_OnDevice(value.detach().clone()), value.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _OnDevice(buffer.detach().clone())


def cut_before(module: nn.Module, *, back: bool) -> None:
    """What `device_map` makes of a module on another device: what comes in is moved there; and what goes out back."""
    move(module)
    module.register_forward_pre_hook(lambda _, arguments: tuple(value.to(device()) for value in arguments))
    if back:
        module.register_forward_hook(lambda *called: called[-1].to("cpu"))


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, _OnDevice) else value


def _computed(function: Any, arguments: Any, named: dict[str, Any]) -> Any:
    name = function._schema.name.split("::")[-1]
    tensors = [value for value in tree_flatten((arguments, named))[0] if isinstance(value, Tensor)]
    on_device = any(isinstance(value, _OnDevice) for value in tensors)
    wanted = named.get("device")
    if wanted is not None:
        wanted = torch.device(wanted).type
        named = {**named, "device": torch.device("cpu"), **({"pin_memory": False} if "pin_memory" in named else {})}
    # A tensor of one number may be on the CPU everywhere.
    if on_device and name not in _CROSSING and any(not isinstance(one, _OnDevice) and one.dim() for one in tensors):
        mixed[f"{name} at {_place()}"] += 1
    if on_device and _waits(name, arguments, wanted):
        waits[f"{name} at {_place()}"] += 1
    output = function(*tree_map(_inner, arguments), **tree_map(_inner, named))
    if name == "_local_scalar_dense":
        return output
    if function._schema.is_mutable:
        for value in tensors:
            if isinstance(value, _OnDevice) and value.inner is output:
                return value
    goes_there = on_device if wanted is None else wanted == _NAME
    return tree_map(lambda one: _OnDevice(one) if goes_there and isinstance(one, Tensor) else one, output)


def _waits(name: str, arguments: Any, wanted: str | None) -> bool:
    """Whether the host waits for the device in an operation on its tensors."""
    if name == "_to_copy":
        return wanted == "cpu"
    if name == "copy_":
        return isinstance(arguments[0], _OnDevice) != isinstance(arguments[1], _OnDevice)
    if name == "repeat_interleave":
        return True  # its size is a sum of values
    if name in _BY_MASK:
        places = tree_flatten(arguments[1])[0]
        return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in places)
    return name in _WAITING


def _place() -> str:
    """The innermost line of dopd, or of a library that drives a model, that asked for an operation."""
    parts = ("/dopd/", "/trl/", "/transformers/", "/accelerate/", "/torch/optim/")
    for frame in reversed(traceback.extract_stack()):
        for part in parts:
            if part in frame.filename and "/tests/" not in frame.filename:
                return f"{part.strip('/')}/{frame.filename.rsplit(part, 1)[1]}:{frame.lineno}"
    return "?"
