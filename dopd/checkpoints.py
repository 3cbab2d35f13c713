"""Checkpoints by name: whole models, adapters with the base that they were trained on, and the embedded tiny models."""

import json
import logging
import os
import stat
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import cached_file

from dopd.errors import ConfigError, ModelError, first_line
from dopd.layers import keep_layers
from dopd.names import check_name
from dopd.quantized import check_packing, compute_as_stored, is_quantized, packed_reason, quantization_config
from dopd.remote_code import only_if_asked
from dopd.settings import read_yaml_file
from dopd.vision import is_vision_config
from dopd.weights import REPORTING, adapter_errors, read_adapter, whole

logger = logging.getLogger(__name__)

TINY = "tiny:"
ADAPTER_FILE, RUN_FILE = "adapter_config.json", "config.yaml"
WHERE = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder")
_GENERATION_FILE = "generation_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Names inside of an adapted layer, of the layer itself and of copies of it.
_INSIDE_LAYERS = ("weight", "base_layer", "token_adapter", "original_module", "modules_to_save")
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def resolve_model(name: str) -> str:
    """A hub id or folder as it is; `tiny:TASK/ROLE?seed=N` as the folder of that embedded model."""
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
    try:
        return str(tiny_model_path(task, role, int(options.get("seed", "0"))))
    except ConfigError as error:
        raise ConfigError(f"model {name!r}: {error}") from error


def where_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say which files of a checkpoint are meant."""
    return {name: options[name] for name in WHERE if name in options}


# --- Adapters


def adapter_config(path: str, **where: Any) -> dict[str, Any] | None:
    """What `adapter_config.json` of a folder or hub id says; `None` where there is none, as for a whole model.

    Raises:
        ModelError: it cannot be read, or names no base that could be one.
    """
    place = adapter_place(path, **where)
    if place is None:
        return None
    config = _json_mapping(place / ADAPTER_FILE)
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(name), str | None):
            raise ModelError(f"{str(place / ADAPTER_FILE)!r}: {name} (={config[name]!r}) must be a text or null")
    return config


def _json_mapping(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{str(file)!r} cannot be read: {type(error).__name__}: {first_line(error)}. Fetch or save it anew"
        ) from None
    if not isinstance(values, dict):
        raise ModelError(f"{str(file)!r} must hold a mapping, and holds a {type(values).__name__}")
    return values


def adapter_place(path: str, **where: Any) -> Path | None:
    """The folder on this machine with an adapter's configuration; `None` where there is none, as for a whole model.

    PEFT saves an adapter that is not called `default` in a folder of its name.

    Raises:
        ModelError: there are several.
    """
    if not os.path.isdir(path):
        try:
            found = _file(path, ADAPTER_FILE, where)
        except Exception:  # no such name: the reader of the model says what is wrong
            found = None
        return None if found is None else Path(found).parent
    folder = Path(path, where.get("subfolder") or "")
    if (folder / ADAPTER_FILE).is_file():
        return folder
    if (folder / "config.json").is_file():
        return None
    inside = [file.parent for file in sorted(folder.glob(f"*/{ADAPTER_FILE}"))]
    inside = [place for place in inside if not place.name.startswith("checkpoint-")]
    if len(inside) > 1:
        raise ModelError(
            f"{path!r} holds the adapters {', '.join(place.name for place in inside)}, and nothing says which of them "
            "act: name the folder of one"
        )
    return inside[0] if inside else None


def _file(path: str, name: str, where: Mapping[str, Any]) -> str | None:
    """A file of a folder or hub id on this machine, fetched if need be; `None` where there is none."""
    return cached_file(
        path,
        name,
        **{key: value for key, value in where.items() if key != "trust_remote_code" and value is not None},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def origin_of(path: str, **where: Any) -> tuple[str, dict[str, Any]] | None:
    """The base of an adapter as a folder or hub id, and the arguments of `from_pretrained` that say which of its files
    are meant; `None` for a whole model.

    Raises:
        ModelError: it is not said, not there, or in the end the adapter itself; or in its folder, or a base's, stands
            something that is no file and would be waited for.
    """
    first = base = _base_of(path, **where)
    seen = [_real_folder(path)]
    while base is not None:
        folder = _real_folder(base[0])
        if folder is not None and folder in seen:
            raise ModelError(f"{path!r} is an adapter, and its base is, in the end, itself: name a whole model as base")
        seen.append(folder)
        base = _base_of(base[0], **base[1])
    return first


def _real_folder(path: str) -> Path | None:
    """The folder of a model on this machine, in which every entry is a file or a folder: reading a pipe never ends."""
    try:
        entries = list(os.scandir(path)) if os.path.isdir(path) else []
    except OSError:
        entries = []
    for entry in entries:
        try:
            mode = entry.stat().st_mode  # of what a link leads to, as in the hub's cache
        except OSError:
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ModelError(f"{entry.path!r} is a pipe or a device, and no file of a model: remove it")
    return Path(path).resolve() if entries else None


def _base_of(path: str, **where: Any) -> tuple[str, dict[str, Any]] | None:
    config = adapter_config(path, **where)
    if config is None:
        return None
    named = config.get("base_model_name_or_path")
    # The adapter's own revision and folder say nothing of its base.
    where = {name: value for name, value in where.items() if name not in ("revision", "subfolder")}
    if config.get("revision"):
        where["revision"] = config["revision"]
    # A run's own config names it in words that are true on every machine, such as tiny:dag/student.
    for candidate in (named, _run_beside(path).get("model_name_or_path")):
        if candidate and candidate.startswith(TINY):
            return resolve_model(candidate), where
        for place in (candidate, Path(path) / candidate) if candidate else ():
            if Path(place).is_dir():
                return str(place), where
        if candidate and not _is_place(candidate):
            return str(candidate), where
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
                values = read_yaml_file(place / RUN_FILE)
            except ConfigError:
                return {}
            return values if isinstance(values.get("model_name_or_path"), str) else {}
    return {}


def files_of(path: str, **where: Any) -> tuple[str, dict[str, Any]]:
    """Where a checkpoint's tokenizer is, and the arguments of its readers that say the rest: with an adapter, or with
    its base where the adapter has none.
    """
    origin = origin_of(path, **where)
    if origin is None or any(_file(path, name, where) for name in _TOKENIZER_FILES):
        return path, only_if_asked(where)
    return files_of(origin[0], **origin[1])


def config_of(path: str, **where: Any) -> Any:
    """The configuration of a model by folder or hub id; of an adapter's base for an adapter.

    Raises:
        ModelError: the name can be none, or see `origin_of`.
    """
    origin = origin_of(path, **where)
    if origin is not None:
        return config_of(origin[0], **origin[1])
    check_name(path, where.get("subfolder"))
    return AutoConfig.from_pretrained(path, **only_if_asked(where))


# --- Models


def family_of(path: str, **where: Any) -> Any:
    """The class that reads a whole model by folder or hub id."""
    config = AutoConfig.from_pretrained(path, **only_if_asked(where))
    check_packing(path, config)
    return AutoModelForImageTextToText if is_vision_config(config) else AutoModelForCausalLM


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
    origin = origin_of(path, **where)
    if origin is None:
        _check_generation_config(path, where)
        read = whole(path, *family_of(path, **where).from_pretrained(path, **only_if_asked(options), **REPORTING))
        compute_as_stored(read)
        return read
    _warn_of_other_base(path, origin[0], _run_beside(path))
    kept, packed = _made_of_base(path)
    loading = {name: value for name, value in options.items() if name not in WHERE}
    if "quantization_config" not in loading and packed is not None:
        loading["quantization_config"] = packed
    base = load(origin[0], merged=True, **loading, **origin[1])
    if kept is not None:
        base = keep_layers(base, kept)
    return _with_adapter(path, where, base, trainable=trainable, merged=merged)


def _made_of_base(path: str, later: frozenset[str] = frozenset()) -> tuple[list[int] | None, Any]:
    """Layers of its base that an adapter's run kept, and how it packed them: itself, or an earlier run whose adapter it
    went on training.
    """
    run, seen = _run_beside(path), later | {os.path.realpath(path)}
    kept, packed = run.get("student_keep_layers"), quantization_config(run)
    student = run.get("model_name_or_path", "")
    goes_on = student and not run.get("use_peft") and (Path(student) / ADAPTER_FILE).is_file()
    if not goes_on or os.path.realpath(student) in seen:
        return kept, packed
    earlier, packed_earlier = _made_of_base(student, seen)
    if earlier is not None:
        kept = earlier if kept is None else [earlier[layer] for layer in kept]
    return kept, packed if packed is not None else packed_earlier


def _warn_of_other_base(path: str, base: str, run: Mapping[str, Any]) -> None:
    """Warn where an adapter's base is another folder than the one that its run was trained from."""
    trained = run.get("model_name_or_path", "")
    trained = resolve_model(trained) if trained.startswith(TINY) else trained
    if not (os.path.isdir(trained) and os.path.isdir(base)):
        return
    places = (trained, *(origin_of(trained) or ())[:1])
    if not any(os.path.samefile(base, place) for place in places if os.path.isdir(place)):
        logger.warning(
            f"adapter {path!r} is put on {base!r}, which its {ADAPTER_FILE} names, and was trained on {trained!r}, as "
            f"the {RUN_FILE} beside it says: if they are not the same model, it answers as neither"
        )


def _check_generation_config(path: str, where: Mapping[str, Any]) -> None:
    """Raise `ModelError` for one that cannot be read: transformers goes on without it, and so without its ends."""
    file = _file(path, _GENERATION_FILE, where)
    if file is None:
        return
    values = _json_mapping(Path(file))
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = values.get(name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            raise ModelError(f"{file!r}: {name} (={value!r}) must be a token id (eos_token_id: one or several)")


def _with_adapter(path: str, where: Mapping[str, Any], base: Any, *, trainable: bool, merged: bool) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise ConfigError(f"{path!r} is an adapter, which needs peft: pip install 'dopd[lora]'") from None
    for name in _ADAPTER_WEIGHTS:
        if _file(path, name, where) is not None:  # on a hub, it is fetched beside the configuration
            break
    place = str(adapter_place(path, **where))
    rows = _saved_rows(place, base)
    if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)  # what the adapter holds takes their place
    if merged:
        if any(map(is_quantized, base.modules())):
            raise ConfigError(
                f"{path!r} is an adapter on quantised weights, into which it cannot be merged exactly. Go on training "
                "it (use_peft: false), or load its base unquantised (load_in_4bit: false, load_in_8bit: false)"
            )
        untie(base)
    with adapter_errors(path):
        model = PeftModel.from_pretrained(base, place, is_trainable=trainable)
    read_adapter(place, model)
    if not merged:
        return model
    whole_model = model.merge_and_unload()
    whole_model.config._name_or_path = whole_model.name_or_path = path  # what an adapter on top of it names as its base
    return whole_model


def check_adapter_files(path: str, **where: Any) -> None:
    """Raise `ModelError` for an adapter's folder whose weights are not there, or whose file is torn."""
    place = adapter_place(path, **where)
    files = [place / name for name in _ADAPTER_WEIGHTS if place is not None and (place / name).is_file()]
    if not files:
        raise ModelError(f"{path!r} is an adapter without weights: it has none of {', '.join(_ADAPTER_WEIGHTS)}")
    with adapter_errors(path):
        if files[0].suffix == ".safetensors":
            with safe_open(files[0], framework="pt"):
                pass


def _saved_rows(path: str, base: Any) -> int | None:
    """Rows of the embeddings that an adapter brings, because tokens were added; `None` if it brings none."""
    from peft.utils import load_peft_weights

    with adapter_errors(path):
        saved = load_peft_weights(path, device="cpu")
    width = base.get_input_embeddings().weight.shape[1]
    for name, weight in saved.items():
        parts = [part for part in name.split(".") if part not in _INSIDE_LAYERS]
        place = parts[-1] if parts else ""
        if place in ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out") and weight.shape[1:] == (width,):
            return int(weight.shape[0])
    return None


def untie(model: Any) -> None:
    """Give input and output embeddings a matrix each: merging an adapter into one must not change the other."""
    output = model.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=output.weight.requires_grad)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def reason_of(error: Exception, path: str | None = None, **where: Any) -> str:
    """What a reader of checkpoints did not like, with the file where that is not the weights or the configuration; of
    a checkpoint whose `path` is given, that they are packed.
    """
    places = [Path(frame.filename).parts[-2:] for frame in traceback.extract_tb(error.__traceback__)]
    if ("generation", "configuration_utils.py") in places:
        return f"its generation_config.json contradicts itself, correct it there: {first_line(error)}"
    reason = f"{type(error).__name__}: {first_line(error)}"
    try:
        return reason if path is None else packed_reason(config_of(path, **where), reason)
    except Exception:  # there is none that says how
        return reason
