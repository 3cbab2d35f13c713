"""The weights of the privileged student: the live student's (the paper's), its initial ones, or a moving average."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dopd.adapters import (
    AveragedLayer,
    check_change,
    has_adapters,
    is_linear_in_its_weights,
    layer_change,
    tuned_layers,
)
from dopd.errors import ConfigError, ModelError

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


class FrozenAnchor(AbstractAnchor):
    """The initial weights: a copy of what trains, put in the student's place for as long as it is scored.

    What does not train is shared. With adapters the copy is the adapters', and the student's own layers run them, so
    any adapter on any base will do, quantised or not. A resumed run makes the copy of a whole model again from the
    initial checkpoint, and reads that of adapters, which may have been drawn.
    """

    file = ANCHOR_FILE

    def __init__(self, student: nn.Module) -> None:
        self._student = student
        self._own = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
        self._held = {name: _frozen(weight.detach().clone()) for name, weight in self._own.items()}
        self._places = _places(student)
        self._adapters = has_adapters(student)

    @contextlib.contextmanager
    def scoring_model(self, student: nn.Module) -> Iterator[nn.Module]:
        self._follow()
        try:
            for name, weight in self._held.items():
                self._put(self._own[name], weight)
            yield student
        finally:
            for own in self._own.values():
                self._put(own, own)

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The copied weights by name."""
        return self._held

    @property
    def saves(self) -> bool:
        """Whether `save` writes the copies; otherwise a resumed run makes them again."""
        return self._adapters

    def _follow(self) -> None:
        """Go where the student went: some engines move or round it after the trainer was made."""
        self._find_again()
        for name, weight in self._held.items():
            own = self._own[name]
            if (weight.device, weight.dtype) != (own.device, own.dtype):
                weight.data = weight.data.to(own.device, own.dtype)

    def _put(self, own: nn.Parameter, weight: nn.Parameter) -> None:
        # Not values but tensors change place, so that a head read in here keeps its weight outside.
        for module, attribute in self._places[id(own)]:
            module._parameters[attribute] = weight

    def _find_again(self) -> None:
        """Look where the student's weights stand now: reading an adapter's checkpoint puts new ones in their place."""
        current = dict(self._student.named_parameters())
        for name, weight in current.items():
            if weight.requires_grad and name not in self._own:
                raise ModelError(
                    f"{name} trains, and did not when the trainer was made: the privileged student of an earlier time "
                    "has no copy of it. Choose what trains before you make the trainer"
                )
        if any(current[name] is not own for name, own in self._own.items()):
            self._own = {name: current[name] for name in self._own}
            self._places = _places(self._student)

    def after_step(self, student: nn.Module) -> None:
        pass

    def save(self, folder: Path) -> None:
        if self.saves:
            torch.save(self._state(), folder / self.file)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        if (folder / self.file).exists():
            self._restore(torch.load(folder / self.file, map_location="cpu", weights_only=True))

    def _state(self) -> Any:
        return {name: weight.detach() for name, weight in self._held.items()}

    def _restore(self, state: Any) -> None:
        for name, weight in self._held.items():
            weight.copy_(_of_name(state, name))


class InitialAnchor(FrozenAnchor):
    """The initial weights beside another privileged student, for rules that read them."""

    file = "initial_student.pt"


class SnapshotAnchor(FrozenAnchor):
    """A copy of what trains in the student, renewed every `steps` optimizer steps."""

    def __init__(self, student: nn.Module, steps: int) -> None:
        super().__init__(student)
        self._steps, self._since = steps, 0

    saves = True

    @torch.no_grad()
    def after_step(self, student: nn.Module) -> None:
        self._since += 1
        self._follow()
        if self._since == self._steps:
            for name, weight in self._held.items():
                weight.copy_(self._own[name])
            self._since = 0

    def save(self, folder: Path) -> None:
        torch.save({"since": self._since, "weights": self._state()}, folder / self.file)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        state = _saved(folder)
        self._since = state["since"]
        self._restore(state["weights"])


class AverageAnchor(FrozenAnchor):
    """An exponential moving average of the student's effective weights.

    With adapters the average is taken of what they add to the weights of a layer, never of their factors apart: the
    product of averages is not the average. It stands beside that layer, which the student and its average share. Of a
    model in half precision it is kept in float32: one step moves it by less than such a model's numbers can show, so
    that it would never move.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student)
        self._decay = decay
        self._tuned = tuned_layers(student)
        self._changes: dict[str, dict[str, Tensor]] = {}
        self._stand_ins: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self._sums: list[tuple[nn.Parameter, nn.Parameter, dict[str, Tensor], str]] = []
        tried = set()
        for name, layer in self._tuned.items():
            kind = (type(layer), type(layer.get_base_layer()), str(getattr(layer, "lora_variant", None)))
            try:
                if kind not in tried:
                    check_change(layer)
                self._take_over(student, name, layer)
            except ModelError as error:
                raise ConfigError(
                    f"privileged_student='ema' averages weights, but {error}. Use privileged_student='frozen', "
                    "'snapshot' or 'current', which run the adapter itself, or plain LoRA"
                ) from error
            tried.add(kind)
        self._averages: dict[str, Tensor] = {
            name: weight.detach() if weight.dtype in _WIDE else weight.detach().float()
            for name, weight in self._held.items()
            if name in self._own
        }
        self._show()

    def _take_over(self, student: nn.Module, name: str, layer: Any) -> None:
        """Keep a tuned layer's change, and what gives its outputs with that change."""
        base: Any = layer.get_base_layer()
        change = self._changes[name] = layer_change(layer)
        of_base = {id(weight) for weight in base.parameters()}
        for inner, weight in layer.named_parameters(prefix=name):
            if inner in self._held and id(weight) not in of_base:
                del self._held[inner]  # an adapter's: its change is held instead
        parent, _, attribute = name.rpartition(".")
        stand_in: nn.Module = base
        if is_linear_in_its_weights(base):
            stand_in = AveragedLayer(base, change)
        else:  # takes the sum of weight and change
            for inner, weight in base.named_parameters():
                if inner in change:
                    held = _frozen(weight.detach().clone())
                    self._sums.append((weight, held, change, inner))
        self._stand_ins.append((student.get_submodule(parent), attribute, layer, stand_in))

    @contextlib.contextmanager
    def scoring_model(self, student: nn.Module) -> Iterator[nn.Module]:
        with super().scoring_model(student) as model:
            try:
                for parent, attribute, _, stand_in in self._stand_ins:
                    parent._modules[attribute] = stand_in
                for own, held, _, _ in self._sums:
                    self._put(own, held)
                yield model
            finally:
                for parent, attribute, layer, _ in self._stand_ins:
                    parent._modules[attribute] = layer
                for own, _, _, _ in self._sums:
                    self._put(own, own)

    def _follow(self) -> None:
        super()._follow()
        for name, average in self._averages.items():
            held = self._held[name]
            if average.device != held.device:
                self._averages[name] = average = average.to(held.device)
            if held.dtype == average.dtype:
                held.data = average
        for name, changes in self._changes.items():
            device = next(self._tuned[name].get_base_layer().parameters()).device
            for inner, average in changes.items():
                if average.device != device:
                    changes[inner] = average.to(device)  # the stand-in reads the same dictionary
        for own, held, _, _ in self._sums:
            if (held.device, held.dtype) != (own.device, own.dtype):
                held.data = held.data.to(own.device, own.dtype)

    saves = True

    @torch.no_grad()
    def after_step(self, student: nn.Module) -> None:
        self._follow()
        for name, average in self._averages.items():
            average.lerp_(self._own[name].to(average.dtype), 1.0 - self._decay)
        for name, layer in self._tuned.items():
            current = layer_change(layer)
            for inner, average in self._changes[name].items():
                average.lerp_(current[inner].to(average.dtype), 1.0 - self._decay)
        self._show()

    @torch.no_grad()
    def _show(self) -> None:
        """Give what is scored the averages that it does not hold itself."""
        for name, average in self._averages.items():
            if self._held[name].dtype not in _WIDE:
                self._held[name].copy_(average)
        for own, held, changes, inner in self._sums:
            held.copy_(own.to(changes[inner].dtype) + changes[inner])

    def save(self, folder: Path) -> None:
        torch.save(self._state(), folder / self.file)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        self._restore(_saved(folder))

    def _state(self) -> Any:
        return self._averages | {
            f"{name} + {inner}": average
            for name, changes in self._changes.items()
            for inner, average in changes.items()
        }

    def _restore(self, state: Any) -> None:
        for name, average in self._state().items():
            average.copy_(_of_name(state, name))
        self._show()


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _places(student: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each parameter stands, by its id: tied ones stand in several places."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in student.modules():
        for attribute, weight in module._parameters.items():
            if weight is not None:
                places.setdefault(id(weight), []).append((module, attribute))
    return places


def _saved(folder: Path) -> Any:
    path = folder / ANCHOR_FILE
    if not path.exists():
        raise ModelError(
            f"{folder} has no {ANCHOR_FILE}: it was not saved by a run whose privileged student is 'ema' or "
            "'snapshot', and its weights cannot be worked out again. Resume with the settings of the run "
            "that saved it"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def _of_name(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ModelError(
            f"{ANCHOR_FILE} of this checkpoint has no {name!r}: it was saved by a run that trained other weights, or "
            "by another version. Resume with the settings of the run that saved it"
        )
    return state[name]
