"""What the packed weights of a quantised model are."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from dopd.errors import ConfigError, ModelError, first_line

_ASKED = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
)


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is packed, so that its numbers are not the weight's."""
    weight = module._parameters.get("weight")
    if weight is None:
        return any(hasattr(module, name) for name in ("W_q", "qweight", "packed_weight"))
    kind = type(weight)
    if kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith(("torchao.", "optimum.")):
        return True
    return type(weight.data).__module__.startswith(("torchao.", "optimum."))


def packed_by(config: Any) -> str | None:
    """How a checkpoint says that its weights are packed, by the name that transformers has for it; `None` for none."""
    declared = getattr(config, "quantization_config", None)
    get = declared.get if isinstance(declared, dict) else partial(getattr, declared)
    for bits in (4, 8):
        if get(f"load_in_{bits}bit", False):  # of bitsandbytes, which calls both by one name
            return f"bitsandbytes_{bits}bit"
    method = get("quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def packed_reason(config: Any, reason: str) -> str:
    """Why a checkpoint cannot be read, in words that say how its weights are packed, if they are."""
    method = packed_by(config)
    if method is None:
        return reason
    return (
        f"its weights are packed (quantization_config.quant_method={method!r} in its config.json), and here they "
        f"cannot be unpacked: {reason.rstrip('.')}. Take the same model unpacked (load_in_4bit=true packs a student "
        "here), or install what is missing"
    )


def check_packing(path: str, config: Any) -> None:
    """Raise `ModelError` where a checkpoint says that its weights are packed in a way that transformers does not know:
    it would go on as if they were not.

    Args:
        path (`str`): the checkpoint, for the message.
        config: its configuration.
    """
    method, supported = packed_by(config), sorted(AUTO_QUANTIZATION_CONFIG_MAPPING)
    if method is not None and method not in supported:
        raise ModelError(
            f"checkpoint {path!r}: quantization_config.quant_method (={method!r}) must be one of "
            f"{', '.join(supported)}: remove quantization_config from config.json if its weights are not packed"
        )


@torch.no_grad()
def whole_weight(module: Any) -> Tensor:
    """The weight of a quantised layer as its forward pass reads it.

    Raises:
        ModelError: nobody here knows how it is packed.
    """
    weight: Any = getattr(module, "weight", None)
    try:
        if type(weight).__name__ == "Params4bit":
            return _of_four_bits(weight)
        if type(weight).__name__ == "Int8Params":
            scale = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
            return weight.data.float() * scale.to(weight.device).view(-1, 1) / 127
        if isinstance(weight, Tensor):
            return weight.dequantize()
        return module.dequantize()
    except Exception as error:  # packed in a way that nobody here knows
        raise ModelError(
            f"the weight of a {type(module).__name__} cannot be read as numbers ({type(error).__name__}: {error}): "
            "quantise with bitsandbytes (load_in_4bit, load_in_8bit), or load the model in half precision"
        ) from error


def _of_four_bits(weight: Any) -> Tensor:
    from bitsandbytes import functional

    packed, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # bitsandbytes packs anew for passes on a CPU
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
    return functional.dequantize_4bit(packed, state)


def compute_as_stored(model: nn.Module) -> None:
    """Let four-bit layers on a CPU compute with the very weights that they hold.

    A pass without gradient packs them for a kernel of its own, for good: it rounds their scales to bfloat16, has no
    gradient, and cannot take every shape. A student would be scored by other numbers than it is trained by.
    """
    module: Any
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        weight: Any = module.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes import functional

            weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(
                weight.data, weight.quant_state
            )


def rounded_alike(module: Any, weight: Tensor) -> Tensor:
    """What a quantised layer would hold of a weight, had it been given that one.

    Raises:
        ModelError: nobody here knows how it rounds.
    """
    packed = module.weight
    if type(packed).__name__ == "Int8Params":
        half = weight.detach().to(torch.float16).float()  # as bitsandbytes does
        scale = half.abs().amax(1, keepdim=True).clamp(min=1e-30)
        return (half * 127 / scale).round() * scale / 127
    if type(packed).__name__ != "Params4bit":
        raise ModelError(f"nobody here knows how a {type(module).__name__} rounds")
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.detach().to(packed.device, packed.quant_state.dtype),
        blocksize=packed.quant_state.blocksize,
        compress_statistics=packed.quant_state.nested,
        quant_type=packed.quant_state.quant_type,
    )
    return functional.dequantize_4bit(codes, state)


def quantization_config(values: Mapping[str, Any]) -> Any:
    """What `load_in_4bit`, `load_in_8bit` and the like ask of bitsandbytes, in TRL's words; `None` for nothing.

    Raises:
        ConfigError: both at once, an unknown kind, or bitsandbytes is missing.
    """
    from trl import ModelConfig, get_quantization_config

    asked = {name: values[name] for name in _ASKED if values.get(name) is not None}
    if not (asked.get("load_in_4bit") or asked.get("load_in_8bit")):
        return None
    try:
        import bitsandbytes  # noqa: F401

        dtype = values.get("dtype") or "float32"
        return get_quantization_config(ModelConfig(**asked, dtype="bfloat16" if dtype == "auto" else dtype))
    except ImportError:
        raise ConfigError("load_in_4bit and load_in_8bit need bitsandbytes: pip install 'dopd[quantized]'") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{', '.join(f'{key} (={value!r})' for key, value in asked.items())}: {first_line(error)}"
        ) from None
