"""A student made of some layers of a model: weights, configuration, and what its checkpoint will be opened as."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dopd.errors import ConfigError

_PLAIN = bool | int | float | str | None
_OF_THE_MOMENT = ("layer_idx", "training", "gradient_checkpointing")
_NOT_OF_LAYERS = ("_id", "_ids", "architectures")


def keep_layers(model: Any, layers: list[int]) -> Any:
    """A student made of some decoder layers of a model, in order; embeddings, norms and head stay.

    Raises:
        ConfigError: a layer that the model does not have; layers that no configuration of the family describes, so
            that the student's checkpoint would be opened as another model.
    """
    decoder, config = model.get_decoder(), model.config.get_text_config()
    count = config.num_hidden_layers
    name = _list_of_layers(decoder, count)
    if not layers or any(not 0 <= layer < count for layer in layers):
        raise ConfigError(f"student_keep_layers (={layers}) must name layers of the model: 0 to {count - 1}")
    setattr(decoder, name, nn.ModuleList(getattr(decoder, name)[layer] for layer in layers))
    _describe(config, layers, count)
    _compare(getattr(decoder, name), getattr(_as_opened(model, layers).get_decoder(), name), layers)
    return model


def _list_of_layers(decoder: nn.Module, count: int) -> str:
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return name
    raise ConfigError(
        f"student_keep_layers: no list of the {count} layers that the configuration declares is in "
        f"{type(decoder).__name__}, so none can be left out"
    )


def _describe(config: Any, layers: Sequence[int], count: int) -> None:
    """Make a configuration that of the kept layers: one value for each layer, or the numbers of some of them."""
    config.num_hidden_layers = len(layers)
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name.endswith(_NOT_OF_LAYERS) or not isinstance(value, list) or not value:
            continue
        if len(value) == count:
            setattr(config, name, [value[layer] for layer in layers])
        elif "layer" in name and all(isinstance(one, int) and 0 <= one < count for one in value):
            setattr(config, name, [layers.index(one) for one in value if one in layers])


def _as_opened(model: Any, layers: Sequence[int]) -> Any:
    """The model that the configuration describes, without weights."""
    base = getattr(model, "get_base_model", lambda: model)()  # of an adapter
    try:
        with torch.device("meta"):
            return type(base)(model.config)
    except Exception as error:  # each family reads its configuration in its own way
        raise ConfigError(
            f"student_keep_layers (={list(layers)}): {type(base).__name__} cannot be made of these layers: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error


def _compare(kept: nn.ModuleList, opened: nn.ModuleList, layers: Sequence[int]) -> None:
    """Raise `ConfigError` where a kept layer is of another kind than the one that stands there once the checkpoint is
    opened; number the kept ones as those are, which is how a cache finds their slots.
    """
    for index, (mine, theirs) in enumerate(zip(kept, opened, strict=True)):
        for path, module in theirs.named_modules():
            own = mine.get_submodule(path) if _has(mine, path) else None
            found = _difference(own, module)
            if found:
                raise ConfigError(
                    f"student_keep_layers (={list(layers)}): layer {layers[index]} would be layer {index} of the "
                    f"student, and its checkpoint would open as another model: {path or 'the layer'} {found}. Keep "
                    "layers that stand at a place of their own kind"
                )
            if own is not None and hasattr(module, "layer_idx"):
                own.layer_idx = module.layer_idx


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def _difference(own: Any, opened: nn.Module) -> str:
    """How a module differs from the one that takes its place, in words; packed and adapted ones are left alone."""
    is_leaf = next(opened.children(), None) is None
    if type(own) is not type(opened):
        return "" if is_leaf and own is not None else f"is {type(own).__name__}, not {type(opened).__name__}"
    for name, value in vars(opened).items():
        mine = vars(own).get(name)
        if name.startswith("_") or name in _OF_THE_MOMENT or not isinstance(value, _PLAIN):
            continue
        if isinstance(mine, _PLAIN) and mine != value:
            return f"has {name}={mine!r}, not {value!r}"
    return ""
