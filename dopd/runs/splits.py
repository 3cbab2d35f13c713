"""How a run splits things over devices: what `accelerate launch`, FSDP and DeepSpeed are told, read without starting
them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dopd.errors import ConfigError, first_line
from dopd.settings import as_mapping
from dopd.trainer import DOPDConfig


@dataclass(frozen=True)
class Split:
    """Over how many devices things are split; 1: each device has them whole.

    Attributes:
        name (`str`): of the way.
        devices (`int`): that share a step.
        weights, gradients, optimizer (`int`): of the student.
        teacher (`int`): the teacher's weights.
        gathers_whole (`bool`): split weights are put together for rollouts, all at a time.
    """

    name: str = "one device"
    devices: int = 1
    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    teacher: int = 1
    gathers_whole: bool = False

    @classmethod
    def named(cls, name: str, devices: int) -> "Split":
        """One of `ddp`, `zero1`, `zero2`, `zero3`, `fsdp1` and `fsdp2`, over a number of devices."""
        if devices == 1 or name == "ddp":
            return cls("one device" if devices == 1 else name, devices)
        level = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp1": 3, "fsdp2": 3}[name]
        weights, gradients, optimizer = (devices if level >= needed else 1 for needed in (3, 2, 1))
        teacher = devices if name in ("zero3", "fsdp2") else 1
        return cls(name, devices, weights, gradients, optimizer, teacher, gathers_whole=name == "zero3")


ONE_DEVICE = Split()


def split_of(config: DOPDConfig, launched: Mapping[str, Any], devices: int | None) -> Split:
    """The split of a run.

    Args:
        config (`DOPDConfig`): whose `fsdp` and `deepspeed` count where the launcher says nothing.
        launched (`dict`): what a configuration of accelerate says; empty without one.
        devices (`int`, *optional*): in place of the number in that configuration.

    Raises:
        ConfigError: a file of DeepSpeed that cannot be read.
    """
    count = devices or int(launched.get("num_processes") or 1)
    kind = str(launched.get("distributed_type") or "")
    stage = None
    if kind == "DEEPSPEED":
        of_launcher = as_mapping(launched.get("deepspeed_config"))
        stage = of_launcher.get("zero_stage") or _stage(of_launcher.get("deepspeed_config_file"))
    elif config.deepspeed:
        stage = _stage(config.deepspeed)
    if stage is not None:
        return Split.named(f"zero{stage}" if stage in (1, 2, 3) else "ddp", count)
    if kind == "FSDP":
        version = as_mapping(launched.get("fsdp_config")).get("fsdp_version", 1)
    else:
        version = as_mapping(config.fsdp_config).get("version", 2)
    return Split.named(f"fsdp{version}" if kind == "FSDP" or config.fsdp else "ddp", count)


def _stage(source: Any) -> int | None:
    """The stage of ZeRO in a configuration of DeepSpeed, or in the file that has it."""
    if source is None:
        return None
    if isinstance(source, str):
        try:
            source = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"deepspeed (={source!r}) is no file of JSON that can be read: {error}") from error
    return int(as_mapping(source.get("zero_optimization")).get("stage", 0))


def launch_file(path: str) -> dict[str, Any]:
    """What a configuration of accelerate says.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"accelerate_config (={path!r}) cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"accelerate_config (={path!r}) is no mapping: `accelerate config` writes one")
    return content
