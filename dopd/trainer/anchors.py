"""Which weights the privileged student of a run has, and how they are kept."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from dopd.adapters import has_adapters
from dopd.errors import ConfigError
from dopd.sources import SOURCES
from dopd.tables import RoutingTable
from dopd.trainer.anchor import (
    AbstractAnchor,
    AverageAnchor,
    CurrentAnchor,
    FrozenAnchor,
    InitialAnchor,
    SnapshotAnchor,
)
from dopd.trainer.config import DOPDConfig
from dopd.trainer.sharded_anchor import ShardedAnchor


@dataclass(frozen=True)
class Sharding:
    """How a student's weights are split over processes.

    Attributes:
        way (`str`): `"whole"`; `"fsdp2"`, each process can reach its own part; `"other"`, it cannot.
        rank (`int`): of this process.
    """

    way: Literal["whole", "fsdp2", "other"] = "whole"
    rank: int = 0


def make_anchor(
    kind: str, student: nn.Module, *, sharding: Sharding, decay: float = 0.98, snapshot_steps: int = 10
) -> AbstractAnchor:
    """The anchor of a routing table.

    Args:
        kind (`str`): `"current"`, `"frozen"`, `"ema"` or `"snapshot"`; `"initial"` for the student's initial weights
            beside any of them.
        student (`nn.Module`): the unwrapped student with its initial weights, on its device.
        sharding (`Sharding`): how its weights will be split over processes.
        decay (`float`): decay per optimizer step of `"ema"`.
        snapshot_steps (`int`): optimizer steps after which `"snapshot"` is renewed.

    Raises:
        ConfigError: a copy of weights that cannot be reached where they are split.
    """
    if kind == "current":
        return CurrentAnchor()
    if sharding.way == "other":
        raise ConfigError(
            f"privileged_student={kind!r}, or a method that reads the student's initial weights, keeps a copy of what "
            "trains in the student, which FSDP 1 and ZeRO-3 never hold where it can be copied. Use "
            "privileged_student='current' and a method without 'reference', or FSDP 2 (fsdp_config: {version: 2}), DDP "
            "or ZeRO-2"
        )
    if sharding.way == "fsdp2":
        if kind == "ema" and has_adapters(student):
            raise ConfigError(
                "privileged_student='ema' averages what adapters add to whole weights, which FSDP splits. Use "
                "privileged_student='snapshot' or 'frozen', or DDP"
            )
        return ShardedAnchor(kind, sharding.rank, decay, snapshot_steps)
    if kind == "snapshot":
        return SnapshotAnchor(student, snapshot_steps)
    if kind == "ema":
        return AverageAnchor(student, decay)
    return FrozenAnchor(student) if kind == "frozen" else InitialAnchor(student)


def anchors_of(
    table: RoutingTable, args: DOPDConfig, student: nn.Module, sharding: Sharding
) -> tuple[AbstractAnchor, AbstractAnchor]:
    """The privileged student of a table, and the student's initial weights where the table reads them.

    Args:
        table (`RoutingTable`): the method; its own decay or interval goes before the config's.
        args (`DOPDConfig`): the config.
        student (`nn.Module`), sharding (`Sharding`): see `make_anchor`.
    """
    anchor = make_anchor(
        table.anchor,
        student,
        sharding=sharding,
        decay=args.ema_decay if table.ema_decay is None else table.ema_decay,
        snapshot_steps=args.snapshot_steps if table.snapshot_steps is None else table.snapshot_steps,
    )
    reads_initial = any(SOURCES[source].model == "initial" for source in table.sources)
    initial = make_anchor("initial" if reads_initial else "current", student, sharding=sharding)
    return anchor, initial
