"""Models by name."""

from typing import Any
from urllib.parse import parse_qs

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from dopd.data.encode import tokenizer_of
from dopd.errors import ConfigError, ModelError, first_line
from dopd.runs.hub import unreachable
from dopd.trainer.passes import check_kind
from dopd.vision import is_vision_config, load_processor

TINY = "tiny:"


def resolve_model(name: str) -> str:
    """A hub id or folder as it is; `tiny:TASK/ROLE?seed=N` as the folder of that embedded model, trained if need be."""
    if not name.startswith(TINY):
        return name
    from dopd.tiny import tiny_model_path

    reference, _, query = name[len(TINY) :].partition("?")
    task, slash, role = reference.partition("/")
    options = {key: values[-1] for key, values in parse_qs(query, keep_blank_values=True).items()}
    if not slash or set(options) - {"seed"} or not options.get("seed", "0").isdigit():
        raise ConfigError(
            f"model {name!r} must look like tiny:TASK/ROLE or tiny:TASK/ROLE?seed=1, for example tiny:dag/student"
        )
    return str(tiny_model_path(task, role, int(options.get("seed", "0"))))


def load_model(name: str, *, dtype: str = "float32") -> Any:
    """A causal or vision-language model from a hub id, a folder or a `tiny:` reference.

    Raises:
        ModelError: it cannot be read.
    """
    path = resolve_model(name)
    precision = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if precision is None:
        raise ConfigError(f"dtype (={dtype!r}) must be auto, float32, bfloat16 or float16")
    check_model(path)
    try:
        config = AutoConfig.from_pretrained(path)
        check_kind(f"model {name!r}", config)
        family: Any = AutoModelForImageTextToText if is_vision_config(config) else AutoModelForCausalLM
        return family.from_pretrained(path, dtype=precision)
    except ModelError:
        raise
    except Exception as error:
        # Readers of checkpoints fail in many ways (OSError, ValueError, SafetensorError, KeyError, RuntimeError).
        raise ModelError(f"model {name!r} cannot be read: {type(error).__name__}: {first_line(error)}") from error


def check_model(path: str) -> None:
    """Raise `ModelError` for a hub id that is neither in the cache nor on a hub that can be reached."""
    reason = unreachable(path, "model")
    if reason:
        raise ModelError(f"model {path!r} cannot be read: {reason}")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, padding on the left."""
    path = resolve_model(name)
    check_model(path)
    try:
        return AutoTokenizer.from_pretrained(path, padding_side="left")
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {name!r} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error


def load_processing_class(name: str) -> Any:
    """The tokenizer of a text model, or the processor of a vision-language model; padding on the left.

    Raises:
        ModelError: it cannot be read, or needs a package that is not here.
    """
    path = resolve_model(name)
    check_model(path)
    try:
        sees = is_vision_config(AutoConfig.from_pretrained(path))
        made = load_processor(path) if sees else load_tokenizer(name)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the processor of {name!r} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    tokenizer = tokenizer_of(made)
    tokenizer.padding_side = "left"
    return made


def keep_layers(model: Any, layers: list[int]) -> Any:
    """A student made of some decoder layers of a model, in order; embeddings, norms and head stay.

    Raises:
        ConfigError: a layer that the model does not have.
    """
    decoder = model.get_decoder()
    count = len(decoder.layers)
    if not layers or any(not 0 <= layer < count for layer in layers):
        raise ConfigError(f"student_keep_layers (={layers}) must name layers of the model: 0 to {count - 1}")
    decoder.layers = nn.ModuleList(decoder.layers[layer] for layer in layers)
    config = model.config.get_text_config()
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    for index, layer in enumerate(decoder.layers):
        # The key-value cache of generation finds a layer's slot by this number.
        layer.self_attn.layer_idx = index
    return model
