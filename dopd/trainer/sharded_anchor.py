"""Privileged students where FSDP2 splits the weights: each process keeps those of its own shards.

What is done to whole weights is done to each number alone (copies, moving averages), so the shard of an average is the
average of the shards.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dopd.errors import ModelError
from dopd.trainer.anchor import ANCHOR_FILE, AbstractAnchor, InitialAnchor
from dopd.trainer.sharded_teacher import reshard

_WIDE = (torch.float32, torch.float64)


class ShardedAnchor(AbstractAnchor):
    """Copies of a process's shards, put in the student's place for as long as it is scored.

    They are made when the student is scored first, for it is split behind its trainer's back: before that no step has
    changed it. While it is scored, its own shards lie in the copies.

    Args:
        kind (`str`): as of `dopd.trainer.anchors.make_anchor`.
        rank (`int`): of this process, for the name of its file.
        decay (`float`), steps (`int`): of `"ema"` and `"snapshot"`.
    """

    def __init__(self, kind: str, rank: int, decay: float, steps: int) -> None:
        self._kind, self._decay, self._steps, self._since = kind, decay, steps, 0
        name = InitialAnchor.file if kind == "initial" else ANCHOR_FILE
        self.file = f"{Path(name).stem}_{rank}.pt"
        self._held: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def scoring_model(self, student: nn.Module) -> Iterator[nn.Module]:
        with torch.no_grad():
            before = {name: self._exchange(name, shard) for name, shard in self._shards(student).items()}
        try:
            yield student
        finally:
            with torch.no_grad():
                for name, shard in self._shards(student).items():
                    own = before[name]
                    self._exchange(name, shard) if own is None else shard.copy_(own)

    @torch.no_grad()
    def after_step(self, student: nn.Module) -> None:
        if self._kind not in ("ema", "snapshot"):
            return
        own = self._shards(student)
        self._since += 1
        if self._kind == "ema":
            for name, average in self._held.items():
                average.lerp_(own[name].to(average.dtype), 1.0 - self._decay)
        elif self._since == self._steps:
            self._since = 0
            for name, weight in self._held.items():
                weight.copy_(own[name])

    def save(self, folder: Path) -> None:
        torch.save({"since": self._since, "weights": self._held}, folder / self.file)

    def load(self, folder: Path) -> None:
        path = folder / self.file
        if not path.exists():
            raise ModelError(
                f"{folder} has no {self.file}: it was not saved by a run with such a privileged student on as many "
                "processes, and its weights cannot be worked out again. Resume with the settings of the run that saved "
                "it"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._since, self._held = state["since"], state["weights"]

    def _exchange(self, name: str, shard: Tensor) -> Tensor | None:
        """Put a shard in the place of its copy, and the other way round; returned where the copy has no room for it."""
        held, before = self._held[name], shard.clone()
        shard.copy_(held)
        if held.dtype != shard.dtype:  # an average in float32 would lose its digits
            return before
        held.copy_(before)
        return None

    @torch.no_grad()
    def _shards(self, student: nn.Module) -> dict[str, Tensor]:
        """This process's part of each weight that trains; copies are made of them the first time."""
        reshard(student)  # whole weights from before would be scored, or trained
        trained = {name: weight.detach() for name, weight in student.named_parameters() if weight.requires_grad}
        own = {name: one.to_local() if isinstance(one, DTensor) else one for name, one in trained.items()}
        if not self._held:
            self._held = {name: self._first_copy(shard) for name, shard in own.items()}
        if own.keys() != self._held.keys():
            raise ModelError(
                f"{self.file} holds other weights than those that train here ({len(self._held)} and {len(own)}): "
                "resume with the settings of the run that saved it, and choose what trains before you make the trainer"
            )
        self._held = {name: self._held[name].to(shard.device) for name, shard in own.items()}
        return own

    def _first_copy(self, shard: Tensor) -> Tensor:
        return shard.float() if self._kind == "ema" and shard.dtype not in _WIDE else shard.clone()
