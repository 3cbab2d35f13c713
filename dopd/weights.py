"""Weights read from files: every one of them is the file's, and every tensor of the file has its place."""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dopd.adapters import has_adapters
from dopd.bases import check_base
from dopd.errors import DopdError, ModelError, first_line

logger = logging.getLogger(__name__)

_NO_FRACTIONS = "are whole numbers or truth values in it, where the model has weights"
# Arguments of `from_pretrained` by which `whole` can say what is wrong with a checkpoint.
REPORTING = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def whole(path: str, model: Any, report: Mapping[str, Any]) -> Any:
    """The model, if every weight of it is the checkpoint's and every tensor of the checkpoint found its place.

    Args:
        path (`str`): the checkpoint, for the message.
        model: as it was loaded; transformers gives a weight that it does not find random numbers.
        report (`dict`): what `from_pretrained(..., output_loading_info=True)` says of it.

    Raises:
        ModelError: tensors are missing, have other shapes, or are unexpected; or all of them are zero.
    """
    wrong = {
        "are missing from it, and would be random": sorted(report.get("missing_keys") or ()),
        "have another shape in it": sorted(map(str, report.get("mismatched_keys") or ())),
        "are in it and not in the model": sorted(report.get("unexpected_keys") or ()),
        _NO_FRACTIONS: sorted(_without_fractions(Path(path), model)),
    }
    found = _sentences(wrong)
    if found:
        raise ModelError(
            f"checkpoint {path!r} is not one of {type(model).__name__}: {found}. Was it saved from another "
            "class, or cut off while it was written? Save it anew from the model that it belongs to"
        )
    named = dict(model.named_parameters())
    _check_finite(f"checkpoint {path!r}", named)
    if not any(value.is_meta or bool(value.detach().any()) for value in named.values()):
        raise ModelError(
            f"checkpoint {path!r} holds nothing but zeros: its file was never filled, or is damaged. Save it "
            "anew, or fetch it anew"
        )
    _untied_as_loaded(path, model)
    return model


def _untied_as_loaded(path: str, model: Any) -> None:
    """Have the configuration say that embeddings are not tied where the checkpoint has two matrices in spite of it.

    transformers keeps both; other readers of what a run saves would go by the configuration, and drop one.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = [c for c in (model.config, model.config.get_text_config()) if getattr(c, "tie_word_embeddings", False)]
    if not tied or inputs is None or outputs is None or outputs.weight is inputs.weight:
        return
    if inputs.weight.is_meta or torch.equal(inputs.weight, outputs.weight):
        return
    for config in tied:
        config.tie_word_embeddings = False
    logger.warning(
        f"checkpoint {path!r} has different matrices for input and output embeddings, although its config.json ties "
        "them (tie_word_embeddings): both are used, and what is saved of it says so"
    )


def _without_fractions(folder: Path, model: Any) -> list[str]:
    """Tensors that a folder's files hold as whole numbers, and that are weights of a model that is not quantised: they
    would be read as if they were what was trained.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return []
    weights = {name for name, weight in model.named_parameters() if weight.is_floating_point()}
    found = []
    for file in folder.glob("*.safetensors") if folder.is_dir() else ():
        with safe_open(file, framework="pt") as stored:
            names = weights.intersection(stored.keys())
            found += [name for name in names if not stored.get_slice(name).get_dtype().startswith(("F", "BF"))]
    return found


def _check_finite(what: str, named: Mapping[str, torch.Tensor]) -> None:
    """Raise `ModelError` for weights that are not finite, also where no trial would look (a row of the embeddings)."""
    bad = [name for name, value in named.items() if not _is_finite(value)]
    if bad:
        raise ModelError(
            f"{what} has weights that are not finite (NaN or infinite) in {len(bad)} tensors ({', '.join(bad[:3])}"
            f"{', ...' if len(bad) > 3 else ''}): the run that saved it diverged, or its file is damaged. Take an "
            "earlier checkpoint, or fetch it anew"
        )


def _is_finite(value: torch.Tensor) -> bool:
    if value.is_meta or not value.is_floating_point() or value.dtype.itemsize < 2 or not value.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(value.detach()))  # NaN is both ends


def _sentences(wrong: Mapping[str, list[str]]) -> str:
    return "; ".join(
        f"{len(names)} tensors {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in wrong.items()
        if names
    )


def read_adapter(path: str, model: Any, name: str = "default") -> None:
    """Give an adapter of a model of peft the weights of a file, in the precision that it has.

    Args:
        path (`str`): a folder.
        model (`peft.PeftModel`): with an adapter of the file's configuration.
        name (`str`): of the adapter in the model.

    Raises:
        ModelError: tensors are missing, have other shapes, or are unexpected; or the file cannot be read; or the
            adapter was trained on other weights than those below it (`dopd.bases`).
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    with adapter_errors(path):
        mapping = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None)
        saved = load_peft_weights(path, device="cpu", key_mapping=mapping)
        state = model.state_dict()
        own = get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=False)
        # PEFT translates names, also those of earlier versions, and says what it did not find.
        report: Any = set_peft_model_state_dict(model, saved, adapter_name=name)
    absent = {id(state[key]) for key in report.missing_keys if key in state}
    wrong = {
        "are missing from it, and would be random": sorted(key for key, value in own.items() if id(value) in absent),
        "are in it and not in the model": sorted(key for key in report.unexpected_keys if not _is_copy(key, saved)),
        _NO_FRACTIONS: sorted(key for key, value in saved.items() if not value.is_floating_point()),
    }
    found = _sentences(wrong)
    if found:
        raise ModelError(_not_whole(path, found))
    _check_finite(f"adapter {path!r}", saved)
    check_base(path, model)


def _is_copy(key: str, saved: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor is the second of two: PEFT writes twice what it trains of resized or tied embeddings."""
    if not {"modules_to_save", "token_adapter"} & set(key.split(".")):
        return False
    return any(name != key and torch.equal(value, saved[key]) for name, value in saved.items())


class adapter_errors:
    """Inside, what PEFT raises of an adapter's files becomes a `ModelError` that names the adapter."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, DopdError):
            return
        if isinstance(error, KeyError):
            found = f"{error.args[0]} is missing from it"
        else:  # torch lists what does not fit behind a first line that says nothing
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            found = next((line for line in lines if line.startswith("size mismatch")), first_line(error))
            found = f"{type(error).__name__}: {found}"
        raise ModelError(_not_whole(self._path, found)) from error


def _not_whole(path: str, found: str) -> str:
    return (
        f"adapter {path!r} does not fit its configuration or its base: {found}. Was it cut off while it was written, "
        "or does adapter_config.json belong to another? Save it anew, or take an earlier checkpoint"
    )


def read_weights(folder: str, model: Any) -> None:
    """Give a model the weights of a checkpoint that was saved from one like it, in the precision that it has.

    Whole models go through the reader of their family, for files may hold other tensors than models do (experts one
    by one, and stacked); adapters through PEFT's.

    Raises:
        ModelError: tensors are missing, have other shapes, or are unexpected; or the checkpoint cannot be read.
    """
    if has_adapters(model):
        for name in model.peft_config:
            inside = Path(folder) / name
            read_adapter(str(inside if name != "default" and inside.is_dir() else folder), model, name)
        return
    # As wide as the widest, for a model may hold a few weights wider than the others.
    widest = max((weight.dtype for weight in model.parameters()), key=lambda dtype: dtype.itemsize)
    try:
        loaded, report = type(model).from_pretrained(
            folder, config=copy.deepcopy(model.config), dtype=widest, **REPORTING
        )
    except Exception as error:  # readers of checkpoints fail in many ways
        raise ModelError(
            f"checkpoint {folder!r} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    whole(folder, loaded, report)
    with torch.no_grad():
        model.load_state_dict(loaded.state_dict())
