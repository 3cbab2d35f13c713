"""The weights of the privileged student: the live student's (the paper's), its initial ones, or a moving average."""

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dopd.errors import ConfigError, ModelError
from dopd.scoring import has_adapters
from dopd.sources import SOURCES
from dopd.tables import RoutingTable

ANCHOR_FILE = "privileged_student.pt"
_WIDE = (torch.float32, torch.float64)


class AbstractAnchor(ABC):
    """Gives the model that the privileged student's scores are read from."""

    @abstractmethod
    def scoring_model(self, student: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """The (wrapped) model to score with, inside the context; `student` is the wrapped trained model."""

    @abstractmethod
    def after_step(self, student: nn.Module) -> None:
        """Called after every optimizer step with the unwrapped student."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what a resumed run cannot work out again."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""


class CurrentAnchor(AbstractAnchor):
    """The live student: nothing to keep."""

    @contextlib.contextmanager
    def scoring_model(self, student: nn.Module) -> Iterator[nn.Module]:
        yield student

    def after_step(self, student: nn.Module) -> None:
        pass

    def save(self, folder: Path) -> None:
        pass

    def load(self, folder: Path) -> None:
        pass


class FrozenAnchor(CurrentAnchor):
    """The initial weights, as a copy that nothing trains. A resumed run makes it again from the initial checkpoint."""

    def __init__(self, initial: nn.Module) -> None:
        self._model = initial

    @contextlib.contextmanager
    def scoring_model(self, student: nn.Module) -> Iterator[nn.Module]:
        yield self._model


class AverageAnchor(AbstractAnchor):
    """An exponential moving average of the student's effective weights.

    With LoRA the average is taken of base + B A, never of A and B apart: the product of averages is not the average.
    Of a model in half precision it is kept in float32 beside the model: one step moves it by less than such a model's
    numbers can show, so that it would never move.
    """

    def __init__(self, initial: nn.Module, decay: float) -> None:
        self._model = initial
        self._decay = decay
        self._averages = {
            name: weight.detach() if weight.dtype in _WIDE else weight.detach().float()
            for name, weight in initial.named_parameters()
        }

    @contextlib.contextmanager
    def scoring_model(self, student: nn.Module) -> Iterator[nn.Module]:
        yield self._model

    @torch.no_grad()
    def after_step(self, student: nn.Module) -> None:
        current = dict(effective_weights(student))
        for name, average in self._averages.items():
            average.lerp_(current[name].to(average.dtype), 1.0 - self._decay)
        self._show()

    def _show(self) -> None:
        """Give the model the averages that it does not hold itself."""
        for name, weight in self._model.named_parameters():
            if weight.dtype not in _WIDE:
                weight.data.copy_(self._averages[name])

    def save(self, folder: Path) -> None:
        torch.save(self._averages, folder / ANCHOR_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        self._restore(self._saved(folder))

    def _restore(self, averages: Mapping[str, Tensor]) -> None:
        for name, average in self._averages.items():
            average.copy_(averages[name])
        self._show()

    @staticmethod
    def _saved(folder: Path) -> Any:
        path = folder / ANCHOR_FILE
        if not path.exists():
            raise ModelError(
                f"{folder} has no {ANCHOR_FILE}: it was not saved by a run whose privileged student is 'ema' or "
                "'snapshot', and its weights cannot be worked out again. Resume with the settings of the run "
                "that saved it"
            )
        return torch.load(path, map_location="cpu", weights_only=True)


class SnapshotAnchor(AverageAnchor):
    """A copy of the student's effective weights, renewed every `steps` optimizer steps."""

    def __init__(self, initial: nn.Module, steps: int) -> None:
        super().__init__(initial, decay=0.0)
        self._steps, self._since = steps, 0

    def after_step(self, student: nn.Module) -> None:
        self._since += 1
        if self._since == self._steps:
            super().after_step(student)
            self._since = 0

    def save(self, folder: Path) -> None:
        torch.save({"since": self._since, "weights": self._averages}, folder / ANCHOR_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        state = self._saved(folder)
        self._since = state["since"]
        self._restore(state["weights"])


def make_anchor(
    kind: str, student: nn.Module, *, sharded: bool, decay: float = 0.98, snapshot_steps: int = 10
) -> AbstractAnchor:
    """The anchor of a routing table.

    Args:
        kind (`str`): `"current"`, `"frozen"`, `"ema"` or `"snapshot"`.
        student (`nn.Module`): the unwrapped student with its initial weights, on its device.
        sharded (`bool`): whether parameters will be split over ranks.
        decay (`float`): decay per optimizer step of `"ema"`.
        snapshot_steps (`int`): optimizer steps after which `"snapshot"` is renewed.

    Raises:
        ConfigError: a copy of the weights is asked for where no rank holds them whole.
    """
    if kind == "current":
        return CurrentAnchor()
    if sharded:
        raise ConfigError(
            f"privileged_student={kind!r}, or a method that reads the student's initial weights, keeps a whole "
            "copy of the "
            "student, which FSDP and ZeRO-3 never hold in one place. Use privileged_student='current' and a method "
            "without 'reference', or DDP / ZeRO-1 / ZeRO-2"
        )
    initial = plain_copy(student)
    if kind == "snapshot":
        return SnapshotAnchor(initial, snapshot_steps)
    return FrozenAnchor(initial) if kind == "frozen" else AverageAnchor(initial, decay)


def anchors_of(
    table: RoutingTable, args: Any, student: nn.Module, *, sharded: bool
) -> tuple[AbstractAnchor, AbstractAnchor]:
    """The privileged student of a table, and the student's initial weights where the table reads them.

    Args:
        table (`RoutingTable`): the method; its own decay or interval goes before the config's.
        args (`DOPDConfig`): the config.
        student (`nn.Module`), sharded (`bool`): see `make_anchor`.
    """
    anchor = make_anchor(
        table.anchor,
        student,
        sharded=sharded,
        decay=args.ema_decay if table.ema_decay is None else table.ema_decay,
        snapshot_steps=args.snapshot_steps if table.snapshot_steps is None else table.snapshot_steps,
    )
    reads_initial = any(SOURCES[source].model == "initial" for source in table.sources)
    return anchor, make_anchor("frozen" if reads_initial else "current", student, sharded=sharded)


def plain_copy(student: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode, with adapters merged into the weights."""
    model: Any = copy.deepcopy(student)
    if has_adapters(model):
        model = model.merge_and_unload()
    return model.requires_grad_(False).eval()


def effective_weights(student: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the student as `plain_copy` names them, each adapter's contribution added to its base
    weight.
    """
    if not has_adapters(student):
        yield from student.named_parameters()
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = student.base_model.model
    tuned: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    for name, module in tuned.items():
        base: Any = module.get_base_layer()
        deltas = [module.get_delta_weight(adapter) for adapter in module.active_adapters]
        yield f"{name}.weight", base.weight + sum(deltas)
        if getattr(base, "bias", None) is not None:
            yield f"{name}.bias", base.bias
    for name, parameter in model.named_parameters():
        if not any(name.startswith(f"{prefix}.") for prefix in tuned):
            yield name, parameter
