"""Models by name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from dopd.checkpoints import (
    TINY,
    check_adapter_files,
    config_of,
    files_of,
    load,
    origin_of,
    reason_of,
    resolve_model,
    where_of,
)
from dopd.data.encode import tokenizer_of
from dopd.errors import ConfigError, DopdError, ModelError, first_line
from dopd.names import check_name
from dopd.progress import is_watched
from dopd.runs.hub import unreachable
from dopd.settings import quoted
from dopd.trainer.config import BASE
from dopd.trainer.host_settings import LOADING
from dopd.trainer.passes import check_kind
from dopd.vision import is_vision_config, load_processor
from dopd.vocabulary import check_has_words

__all__ = [
    "TINY",
    "check_model",
    "load_model",
    "load_processing_class",
    "load_teacher",
    "load_tokenizer",
    "resolve_model",
]


def load_model(
    name: str, *, dtype: str = "float32", trainable: bool = False, merged: bool = False, **options: Any
) -> Any:
    """A causal or vision-language model from a hub id, a folder (of a run with an adapter, too) or a `tiny:` reference.

    Args:
        trainable, merged (`bool`): of an adapter, see `dopd.checkpoints.load`.
        options: as of `from_pretrained`, for example `revision`; its `dtype` goes before the other.

    Raises:
        ModelError: it cannot be read.
    """
    path = resolve_model(name)
    dtype = options.pop("dtype", None) or dtype
    precision = dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if precision != "auto" and not isinstance(precision, torch.dtype):
        raise ConfigError(f"dtype (={dtype!r}) must be auto, float32, bfloat16 or float16")
    check_model(path, **where_of(options))
    try:
        check_kind(f"model {name!r}", config_of(path, **where_of(options)))
        with _bar_of_loading(name):
            return load(path, trainable=trainable, merged=merged, dtype=precision, **options)
    except Exception as error:
        fields = {field: value for field, value in options.items() if field not in LOADING}
        if fields:
            reason = str(error) if isinstance(error, DopdError) else f"{type(error).__name__}: {first_line(error)}"
            raise ConfigError(
                f"model_init_kwargs (={quoted(fields)}) change the configuration that {name!r} was saved with, and it "
                f"cannot be read so: leave out what does not fit its weights. {reason}"
            ) from error
        if isinstance(error, DopdError):
            raise
        # Readers of checkpoints fail in many ways (OSError, ValueError, SafetensorError, KeyError, RuntimeError).
        raise ModelError(f"model {name!r} cannot be read: {reason_of(error, path, **where_of(options))}") from error


def load_teacher(name: str, student_name: str, *, dtype: str = "float32") -> Any:
    """A teacher by name; `base` is what the adapter of a student stands on.

    Raises:
        ModelError, ConfigError: as `load_model`; a student without an adapter has no base.
    """
    if name != BASE:
        return load_model(name, dtype=dtype)
    origin = origin_of(resolve_model(student_name))
    if origin is None:
        raise ConfigError(f"teacher (={BASE!r}): {student_name!r} has no adapter, and so no base: name the teacher")
    return load_model(origin[0], dtype=dtype, **origin[1])


@contextmanager
def _bar_of_loading(name: str) -> Iterator[None]:
    """Inside, the host shows how far it is with the weights, where somebody watches; tiny models are there at once."""
    shown = is_watched() and not name.startswith(TINY) and not logging.is_progress_bar_enabled()
    if shown:
        logging.enable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.disable_progress_bar()


def check_model(path: str, **where: Any) -> None:
    """Raise `ModelError` for a hub id that is neither in the cache nor on a hub that can be reached, of an adapter's
    base too.
    """
    if not os.path.isdir(path):  # which may be that of a tokenizer alone
        check_name(path)
    reason = unreachable(path, "model", **where)
    if reason:
        raise ModelError(f"model {path!r} cannot be read: {reason}")
    origin = origin_of(path, **where)
    if origin is not None:
        check_model(origin[0], **origin[1])


def check_files(name: str, **where: Any) -> None:
    """Compare the names and shapes of a folder's tensors with its model, without reading a weight.

    Args:
        name (`str`): a folder; what is on a hub or another machine, or is still to be made, is left alone.
        where: as of `from_pretrained`, which files are meant.

    Raises:
        ModelError, ConfigError: as `load_model`, as far as that can be seen without weights.
    """
    if "://" in name:
        check_name(name)
    if not os.path.isdir(name):
        return
    origin = origin_of(name, **where)
    if origin is not None:
        check_adapter_files(name, **where)
        check_files(origin[0], **origin[1])
    elif getattr(config_of(name, **where), "quantization_config", None) is None:  # packing needs a device
        load_model(name, dtype="auto", device_map="meta", **where)


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer of a model, padding on the left; options as of `from_pretrained`."""
    path = resolve_model(name)
    check_model(path, **where_of(options))
    try:
        place, where = files_of(path, **where_of(options))
        tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left", **where)
        if isinstance(tokenizer.model_max_length, str):
            raise TypeError(f"model_max_length (={tokenizer.model_max_length!r}) must be a number")
        check_has_words(tokenizer)
        return tokenizer
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {name!r} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error


def load_processing_class(name: str, **options: Any) -> Any:
    """The tokenizer of a text model, or the processor of a vision-language model; padding on the left.

    Raises:
        ModelError: it cannot be read, or needs a package that is not here.
    """
    path = resolve_model(name)
    check_model(path, **where_of(options))
    try:
        sees = is_vision_config(config_of(path, **where_of(options)))
        place, where = files_of(path, **where_of(options))
        processor = load_processor(place, **where) if sees else load_tokenizer(name, **options)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the processor of {name!r} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    tokenizer = tokenizer_of(processor)
    tokenizer.padding_side = "left"
    return processor
