"""A teacher whose weights FSDP2 splits over processes, layer by layer, like the student's."""

import copy
import os
from typing import Any, Literal

from accelerate.utils import str_to_bool
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dopd.quantized import is_quantized
from dopd.settings import as_mapping
from dopd.trainer.config import DOPDConfig

Way = Literal["whole", "fsdp1", "fsdp2", "zero3"]


def way_of_splitting(args: DOPDConfig) -> Way:
    """How a run will split weights over processes, before there is anything that splits them."""
    if is_deepspeed_zero3_enabled():
        return "zero3"
    if args.fsdp:
        return "fsdp2" if int(as_mapping(args.fsdp_config).get("version", 2)) == 2 else "fsdp1"
    if str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        return "fsdp2" if os.environ.get("FSDP_VERSION", "1") == "2" else "fsdp1"
    return "whole"


def can_be_split(teacher: Any, args: DOPDConfig) -> bool:
    """Whether a teacher waits to be split: of packed weights FSDP2 keeps every process a whole copy."""
    return (
        way_of_splitting(args) == "fsdp2"
        and isinstance(teacher, nn.Module)
        and not any(map(is_quantized, teacher.modules()))
    )


def split(accelerator: Any, teacher: Any) -> Any:
    """Split a whole teacher: a process keeps its part of every weight, and layers are gathered as they run.

    Where `cpu_ram_efficient_loading` has left all processes but one without weights, they get theirs here.

    Args:
        accelerator (`Accelerator`): of a run with FSDP2.
        teacher: unwrapped; its own layers are the units, whatever family it is of.
    """
    teacher.requires_grad_(False)  # what trains would be widened to float32
    state = accelerator.state
    plugin, own = state.fsdp_plugin, copy.copy(state.fsdp_plugin)
    if own.transformer_cls_names_to_wrap is not None:  # the student's
        own.transformer_cls_names_to_wrap = list(getattr(teacher, "_no_split_modules", None) or [])
    state.fsdp_plugin = own
    try:
        return fsdp2_prepare_model(accelerator, teacher)
    finally:
        state.fsdp_plugin = plugin


def reshard(model: nn.Module) -> None:
    """Have every process keep no more than its part of the weights: last layers stay whole behind a pass, for a
    backward pass that scoring does not make.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
