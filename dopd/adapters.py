"""What the weights of a model with adapters amount to. PEFT says it: no formula of an adapter is repeated here."""

import copy
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dopd.errors import ConfigError, ModelError
from dopd.interrupts import TooLongError, alarm_after
from dopd.quantized import is_quantized, whole_weight
from dopd.settings import quoted

# Adapters that act outside of the weights of the layers that are run here, or not as their authors meant.
_UNUSABLE = {
    "ADALORA": "its rank is set by calls in a training loop of its own, which no trainer here makes, and its penalty "
    "is part of the model's own loss, which is not used",
    "POLY": "it reads a task id with every row",
    "XLORA": "it runs the model twice with weights chosen for every row",
    "SHADOW": "it runs a second model beside the first",
}
_TRIAL_NOISE = 0.3  # of random adapters: what multiplies 8-bit outputs must be seen to round otherwise
_NAMES = ("model.layers.0.self_attn.q_proj", "model.language_model.layers.10.mlp.down_proj")  # that models have
_LONGEST = 5  # seconds, for every name of a model
_INSTEAD = "use LoRA (LoraConfig) or another adapter of weights"


def has_adapters(model: Any) -> bool:
    """Whether an unwrapped model is one of peft. Every pass asks; accelerate's answer searches the disk each time."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def without_adapters(model: Any) -> Any:
    """The transformers model inside one of peft (adapters stay in its layers), or the model itself."""
    return model.base_model.model if has_adapters(model) else model


def check_adapter_config(config: Any) -> None:
    """Refuse an adapter that cannot be trained here, by name, before anything is loaded.

    Args:
        config (`peft.PeftConfig`): of the adapter.

    Raises:
        ConfigError: its vectors stand before the prompt, its head is read elsewhere, or it needs a loop of its own.
    """
    from peft import PromptLearningConfig

    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if isinstance(config, PromptLearningConfig) or kind in ("CARTRIDGE", "ADAPTION_PROMPT"):
        raise ConfigError(
            f"peft_config: {kind} puts trained vectors beside the prompt in place of changing weights, and every view "
            f"here has a prompt of its own that shares its prefix: {_INSTEAD}"
        )
    if kind in _UNUSABLE:
        raise ConfigError(f"peft_config: {kind} cannot be trained here: {_UNUSABLE[kind]}. Instead, {_INSTEAD}")
    if getattr(config, "alora_invocation_tokens", None):
        raise ConfigError(
            "peft_config: alora_invocation_tokens cannot be used here: PEFT looks for them in a pass of the whole "
            "model, and the loss reads the states below the head, where the adapter would never act. Leave them out, "
            "for LoRA that acts on every token"
        )
    targets = getattr(config, "target_modules", None)
    check_patterns(config, _NAMES)
    names = [targets] if isinstance(targets, str) else list(targets or ())
    if any(name.split(".")[-1] in ("lm_head", "embed_out", "output_layer") for name in names):
        raise ConfigError(
            f"peft_config: target_modules (={sorted(names)}) names the output head, whose weight the loss reads as a "
            "whole. Leave it out, or train it whole: modules_to_save=['lm_head']"
        )


def check_patterns(config: Any, names: Iterable[str]) -> None:
    """Try an adapter's regular expressions on names of modules.

    Raises:
        ConfigError: one that cannot be read, or that takes seconds: PEFT would hang.
    """
    for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field, None)
        for pattern in [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, dict) else ():
            message = f"peft_config: {field} (={quoted(pattern)}) is no regular expression"
            try:
                with alarm_after(_LONGEST, f"peft_config: {field} (={quoted(pattern)})"):
                    for name in names:
                        re.fullmatch(pattern, name)
            except (re.error, RecursionError, OverflowError) as error:
                raise ConfigError(f"{message} ({error}). Several names are a list") from None
            except TooLongError:
                raise ConfigError(
                    f"{message} that ends: it was tried for {_LONGEST} seconds. Name the modules in a list instead"
                ) from None


# --- Tuned layers


def tuned_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer of every place where adapters change a layer; of layers around layers, the outermost."""
    if not has_adapters(model):
        return {}
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and _is_tuned(module):
            found[name] = module
    return found


def _is_tuned(module: nn.Module) -> bool:
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Rows of trainable tokens are weights themselves, as modules_to_save are.
    return isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)


def is_linear_in_its_weights(base: nn.Module) -> bool:
    """Whether the outputs of two such layers add up to the output of a layer with the sum of their weights."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(base, nn.Linear | nn.Embedding | Conv1D | nn.modules.conv._ConvNd)


@torch.no_grad()
def layer_change(layer: Any) -> dict[str, Tensor]:
    """What the active adapters of a tuned layer add to each weight of the layer below, in float32 or wider.

    Raises:
        ModelError: PEFT cannot say it.
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper) and not layer.lora_variant:
        return _lora_change(layer)
    base = layer.get_base_layer()
    try:
        twin = _twin(layer, _plain(base))
        before = {name: weight.detach().clone() for name, weight in twin.get_base_layer().named_parameters()}
        for module in reversed(list(twin.modules())):  # of layers around layers each
            if _is_tuned(module):
                module.merge()
        after = dict(twin.get_base_layer().named_parameters())  # some exchange the layer itself
        return {name: after[name].detach() - weight for name, weight in before.items()}
    except Exception as error:  # each of PEFT's methods fails in its own way where it cannot merge
        raise _unmergeable(layer, f"{type(error).__name__}: {error}") from error


def _lora_change(layer: Any) -> dict[str, Tensor]:
    base = layer.get_base_layer()
    twin = _twin(layer, base)
    active = [name for name in twin.active_adapters if name in twin.scaling]
    parts = [twin.get_delta_weight(name) for name in active]
    change = {"weight": torch.stack(parts).sum(0)} if parts else {}
    biases = [
        twin.lora_B[name].bias * twin.scaling[name]
        for name in active
        if name in twin.lora_B and twin.lora_B[name].bias is not None
    ]
    return change | ({"bias": torch.stack(biases).sum(0)} if biases else {})


def _twin(layer: Any, base: nn.Module) -> Any:
    """A copy of a tuned layer on another layer, its adapters in float32 or wider."""
    twin = copy.deepcopy(layer, {id(layer.get_base_layer()): base}).eval()
    dtype = torch.promote_types(_dtype(base), torch.float32)
    for module in twin.modules():
        if module is twin or module in set(base.modules()):
            continue
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_floating_point():
                module._parameters[name] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if is_quantized(layer.get_base_layer()) and not is_quantized(base):
        _as_on_plain_weights(twin)
    return twin


def _as_on_plain_weights(twin: Any) -> None:
    """PEFT has layers of their own for some ways of quantising, and a part of the layer for others."""
    if getattr(twin, "quantization_backend", None) is not None:
        twin.quantization_backend = None
        return
    package, _, file = type(twin).__module__.rpartition(".")
    if file == "layer":
        return
    twin.__class__ = getattr(sys.modules[f"{package}.layer"], "Linear")  # noqa: B009 - a module of PEFT's
    for name in ("fan_in_fan_out", "is_target_conv_1d_layer"):
        if not hasattr(twin, name):
            setattr(twin, name, False)


def _dtype(module: nn.Module) -> torch.dtype:
    kinds = {weight.dtype for weight in module.parameters() if weight.is_floating_point()}
    return torch.float64 if torch.float64 in kinds else torch.float32


def _plain(base: nn.Module) -> nn.Module:
    """A copy of a layer with its weights whole, in float32 or wider."""
    if not is_quantized(base):
        return copy.deepcopy(base).to(torch.promote_types(_dtype(base), torch.float32)).requires_grad_(False)
    weight = whole_weight(base).detach().float()
    bias = getattr(base, "bias", None)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return plain


def _unmergeable(layer: Any, reason: str) -> ModelError:
    return ModelError(
        f"PEFT cannot say which weights {type(layer).__module__}.{type(layer).__name__} on "
        f"{type(layer.get_base_layer()).__name__} amounts to ({reason})"
    )


@torch.no_grad()
def check_change(layer: Any) -> None:
    """Raise `ModelError` unless a layer with random adapters computes what `layer_change` says that it does.

    Fresh adapters change nothing, so the weights at the start of a run show no difference.
    """
    base = layer.get_base_layer()
    inputs = _inputs(base)
    if inputs is None:
        return
    _leave_behind_what_training_does(layer, inputs)
    layer_change(layer)
    twin = copy.deepcopy(layer).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in twin.named_parameters():
        if weight.requires_grad and weight.is_floating_point() and "base_layer" not in name.split("."):
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            # In full precision: it is the formula that is tried, not the rounding of an adapter in half precision.
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32)) + _TRIAL_NOISE * noise
    own = twin(inputs).double()
    stand_in = AveragedLayer(twin.get_base_layer(), layer_change(twin))
    rebuilt = stand_in(inputs).double()
    rounding = 0.05 if _dtype_of(base).itemsize == 2 else 1e-3
    if not bool((own - rebuilt).abs().max() <= rounding * own.abs().max()):
        raise _unmergeable(layer, "its merged weights do not give what the layer gives")


def _leave_behind_what_training_does(layer: nn.Module, inputs: Tensor) -> None:
    """Some layers keep what a pass with gradients computed, and cannot be copied from then on."""
    before = {module: module.training for module in layer.modules()}
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        layer.train()(inputs)
    for module, training in before.items():
        module.training = training


def _inputs(base: nn.Module) -> Tensor | None:
    weight: Any = getattr(base, "weight", None)
    if isinstance(base, nn.Embedding):
        return torch.arange(min(16, base.num_embeddings), device=weight.device)
    if not is_linear_in_its_weights(base) or isinstance(base, nn.modules.conv._ConvNd):
        return None
    size: Any = getattr(base, "in_features", None) or weight.shape[0]
    inputs = torch.randn(4, size, generator=torch.Generator().manual_seed(1))
    return inputs.to(weight.device, _dtype_of(base))


def _dtype_of(base: Any) -> torch.dtype:
    compute = getattr(base, "compute_dtype", None)
    if compute is not None:
        return compute
    return base.weight.dtype if base.weight.is_floating_point() else torch.float32


class AveragedLayer(nn.Module):
    """A layer and a change of its weights that is kept apart: half precision would round a small change away, and
    quantised weights have no room for it.

    Args:
        base (`nn.Module`): the layer of the student itself, which goes on computing as it does.
        change (`dict[str, Tensor]`): what is added to its weights, in the shapes of the plain layer's.
    """

    def __init__(self, base: nn.Module, change: dict[str, Tensor]) -> None:
        super().__init__()
        self.base_layer = base
        self.change = change
        plain = base
        if is_quantized(base):
            size, width = change["weight"].shape
            plain = nn.Linear(width, size, bias="bias" in change, device="meta")
        self._plain = [plain]  # in a list: it is no part of this module

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return getattr(self.base_layer, "bias", None)

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = self.base_layer(inputs, *args, **kwargs)
        kind = inputs.dtype if inputs.is_floating_point() else own.dtype
        change = {name: value.to(kind) for name, value in self.change.items()}
        # A bias of the layer that nothing changes is added once, above.
        for name, weight in self._plain[0].named_parameters():
            if name not in change:
                change[name] = torch.zeros(weight.shape, dtype=kind, device=own.device)
        return own + torch.func.functional_call(self._plain[0], change, (inputs, *args), kwargs).to(own.dtype)


# --- Whole models


@dataclass(frozen=True)
class EffectiveWeight:
    """A weight as its model would hold it without adapters and quantisation; it is made when it is asked for.

    Attributes:
        make (callable): () -> the weight.
        module (`nn.Module`, *optional*): the layer, if its weight is packed.
        tuned (`bool`): whether adapters act on it, so that it is right to rounding alone.
    """

    make: Callable[[], Tensor]
    module: Any = None
    tuned: bool = False


def effective_weights(model: Any) -> dict[str, EffectiveWeight]:
    """Weights by the names that they would have without adapters and quantisation, with what those do to them.

    A weight that two places share stands at each of them: adapters may change one and not the other.
    """
    return dict(_weights(without_adapters(model), ""))


def _weights(module: Any, prefix: str) -> Iterator[tuple[str, EffectiveWeight]]:
    if sys.modules.get("peft") is not None:
        from peft.tuners.trainable_tokens import TrainableTokensLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        rows = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        if isinstance(rows, TrainableTokensLayer):
            for name, weight in _weights(rows.get_base_layer(), prefix):
                merged = EffectiveWeight(partial(rows.get_merged_weights, rows.active_adapters), tuned=True)
                yield name, merged if name == f"{prefix}weight" else weight
            return
        if isinstance(module, ModulesToSaveWrapper):
            active = [name for name in module.active_adapters if name in module.modules_to_save]
            yield from _weights(module.modules_to_save[active[0]] if active else module.original_module, prefix)
            return
        if _is_tuned(module):
            for name, weight in _weights(module.get_base_layer(), prefix):
                yield name, replace(weight, make=partial(_tuned, module, name.removeprefix(prefix), weight), tuned=True)
            return
    if is_quantized(module):
        yield f"{prefix}weight", EffectiveWeight(partial(whole_weight, module), module)
    for name, parameter in module._parameters.items():
        if parameter is not None and not (name == "weight" and is_quantized(module)):
            yield prefix + name, EffectiveWeight(partial(_itself, parameter))
    for name, child in module._modules.items():
        if child is not None:
            yield from _weights(child, f"{prefix}{name}.")


def _itself(weight: Tensor) -> Tensor:
    return weight


def _tuned(layer: Any, name: str, weight: EffectiveWeight) -> Tensor:
    own, change = weight.make(), layer_change(layer).get(name)
    return own if change is None else own.to(change.dtype) + change
