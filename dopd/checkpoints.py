"""Checkpoints by name: whole models, adapters with the base that they were trained on, and the embedded tiny models."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils.peft_utils import find_adapter_config_file

from dopd.errors import ConfigError, ModelError, first_line
from dopd.quantized import is_quantized
from dopd.vision import is_vision_config

TINY = "tiny:"
ADAPTER_FILE, RUN_FILE = "adapter_config.json", "config.yaml"
WHERE = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder")
# What `from_pretrained` is told so that `whole` can say what is wrong with a checkpoint.
REPORTING = {"output_loading_info": True, "ignore_mismatched_sizes": True}
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
QUANTIZATION = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
)


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


def where_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say which files of a checkpoint are meant."""
    return {name: options[name] for name in WHERE if name in options}


# --- Adapters


def adapter_config(path: str, **where: Any) -> dict[str, Any] | None:
    """What `adapter_config.json` of a folder or hub id says; `None` where there is none, as for a whole model."""
    if Path(path).is_dir():
        file: Any = Path(path) / ADAPTER_FILE
        found = file if file.is_file() else None
    else:
        try:
            found = find_adapter_config_file(path, revision=where.get("revision"))
        except Exception:  # no such name: the reader of the model says what is wrong
            found = None
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def base_of(path: str, **where: Any) -> str | None:
    """The checkpoint that an adapter was trained on, as a folder or hub id; `None` for a whole model.

    Raises:
        ModelError: it is not said, or not there.
    """
    config = adapter_config(path, **where)
    if config is None:
        return None
    named = config.get("base_model_name_or_path")
    # A run's own config names it in words that are true on every machine, such as tiny:dag/student.
    for candidate in (named, _run_beside(path).get("model_name_or_path")):
        if candidate and candidate.startswith(TINY):
            return resolve_model(candidate)
        if candidate and (Path(candidate).is_dir() or not _is_place(candidate)):
            return str(candidate)
    if named and (Path(path) / named).is_dir():
        return str(Path(path) / named)
    raise ModelError(
        f"{path!r} is an adapter, and its base model (base_model_name_or_path={named!r} in {ADAPTER_FILE}) is not "
        "here: put it there, or write into that file where it is"
    )


def _is_place(name: str) -> bool:
    """Whether a name can only be a folder: no hub id starts so, or has so many parts."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1


def _run_beside(path: str) -> dict[str, Any]:
    """The settings of the run that left a folder, which lie in it or, for `checkpoint-N`, above it; none if unknown."""
    folder = Path(path)
    for place in (folder, folder.parent) if folder.is_dir() else ():
        if (place / RUN_FILE).is_file():
            try:
                values = yaml.safe_load((place / RUN_FILE).read_text(encoding="utf-8"))
            except yaml.YAMLError:
                values = None
            return values if isinstance(values, dict) and "model_name_or_path" in values else {}
    return {}


def files_of(path: str) -> str:
    """Where a checkpoint's tokenizer is: an adapter's own folder, or its base's where that has none."""
    base = base_of(path)
    if base is None or any((Path(path) / name).is_file() for name in _TOKENIZER_FILES):
        return path
    return files_of(base)


def config_of(path: str, **where: Any) -> Any:
    """The configuration of a model by folder or hub id; of an adapter's base for an adapter."""
    base = base_of(path, **where)
    return AutoConfig.from_pretrained(path, **where) if base is None else config_of(base)


# --- Models


def load(path: str, *, trainable: bool = False, merged: bool = False, **options: Any) -> Any:
    """A causal or vision-language model, or one of peft for an adapter's folder.

    Args:
        path (`str`): a folder or hub id.
        trainable (`bool`): whether an adapter goes on training.
        merged (`bool`): whether an adapter becomes part of the weights.
        options: as of `from_pretrained`.

    Raises:
        ModelError, ConfigError: an adapter's base is not there, or an adapter cannot be merged. Whatever else the
            readers of checkpoints raise is passed on.
    """
    where = where_of(options)
    base_name = base_of(path, **where)
    if base_name is None:
        config = AutoConfig.from_pretrained(path, **where)
        family: Any = AutoModelForImageTextToText if is_vision_config(config) else AutoModelForCausalLM
        return whole(path, *family.from_pretrained(path, **{**options, **REPORTING}))
    run = _run_beside(path)
    given = {name: value for name, value in options.items() if name != "revision"}
    if "quantization_config" not in given and (packed := quantization_config(run)) is not None:
        given["quantization_config"] = packed
    base = load(base_name, merged=True, **given)
    if run.get("student_keep_layers") is not None:
        base = keep_layers(base, run["student_keep_layers"])
    return _with_adapter(path, base, trainable=trainable, merged=merged)


def whole(path: str, model: Any, report: Mapping[str, Any]) -> Any:
    """The model, if every weight of it is the checkpoint's and every tensor of the checkpoint found its place.

    Args:
        path (`str`): the checkpoint, for the message.
        model: as it was loaded; transformers gives a weight that it does not find random numbers.
        report (`dict`): what `from_pretrained(..., output_loading_info=True)` says of it.

    Raises:
        ModelError: tensors are missing, have other shapes, or are unexpected.
    """
    wrong = {
        "are missing from it, and would be random": sorted(report.get("missing_keys") or ()),
        "have another shape in it": sorted(map(str, report.get("mismatched_keys") or ())),
        "are in it and not in the model": sorted(report.get("unexpected_keys") or ()),
    }
    found = [f"{len(names)} tensors {what} ({_some(names)})" for what, names in wrong.items() if names]
    if found:
        raise ModelError(
            f"checkpoint {path!r} is not one of {type(model).__name__}: {'; '.join(found)}. Was it saved from another "
            "class, or cut off while it was written? Save it anew from the model that it belongs to"
        )
    return model


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _with_adapter(path: str, base: Any, *, trainable: bool, merged: bool) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise ConfigError(f"{path!r} is an adapter, which needs peft: pip install 'dopd[lora]'") from None
    rows = _saved_rows(path, base)
    if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)  # what the adapter holds takes their place
    if merged:
        if any(map(is_quantized, base.modules())):
            raise ConfigError(
                f"{path!r} is an adapter on quantised weights, into which it cannot be merged exactly. Go on training "
                "it (use_peft: false), or load its base unquantised (load_in_4bit: false, load_in_8bit: false)"
            )
        untie(base)
    model = PeftModel.from_pretrained(base, path, is_trainable=trainable)
    if not merged:
        return model
    made = model.merge_and_unload()
    made.config._name_or_path = made.name_or_path = path  # what an adapter on top of it names as its base
    return made


def _saved_rows(path: str, base: Any) -> int | None:
    """Rows of the embeddings that an adapter brings, because tokens were added; `None` if it brings none."""
    from peft.utils import load_peft_weights

    saved = load_peft_weights(path, device="cpu")
    width = base.get_input_embeddings().weight.shape[1]
    for name, weight in saved.items():
        place = name.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2]
        if place in ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out") and weight.shape[1:] == (width,):
            return int(weight.shape[0])
    return None


def untie(model: Any) -> None:
    """Give input and output embeddings a matrix each: merging an adapter into one must not change the other."""
    output = model.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=output.weight.requires_grad)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def quantization_config(values: Mapping[str, Any]) -> Any:
    """What `load_in_4bit`, `load_in_8bit` and the like ask of bitsandbytes, in TRL's words; `None` for nothing.

    Raises:
        ConfigError: both at once, an unknown kind, or bitsandbytes is missing.
    """
    from trl import ModelConfig, get_quantization_config

    asked = {name: values[name] for name in QUANTIZATION if values.get(name) is not None}
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
