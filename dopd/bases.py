"""Which weights an adapter was trained on: a few numbers of each lie beside it, and are compared where it is loaded."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dopd.adapters import has_adapters
from dopd.errors import ModelError
from dopd.files import read_plain, replace_file

BASE_FILE = "dopd_base.json"
_COUNT = 4  # numbers of each weight
_ROUNDING = 2.0**-7, 1e-6  # relative and absolute: of the same weights in another precision
_IN_LAYERS = (".base_layer", ".original_module")
_AS_GIVEN = (True, False, "gaussian", None)  # ways to start an adapter that leave the weights below it alone

Marks = dict[str, dict[str, Any]]  # name of a weight -> its shape, and numbers of it


def marks_of_base(model: Any) -> Marks:
    """What the weights are known again by that the adapters of a model stand on.

    Nothing is known of whole models, of adapters that change the weights below them when they start (PiSSA: started
    again, it changes them otherwise), and of weights that are split over processes.
    """
    return dict(_marks(model)) if has_adapters(model) and leaves_base_alone(model) else {}


def leaves_base_alone(model: Any) -> bool:
    """Whether the adapters of a model started without a change of the weights below them."""
    return all(getattr(config, "init_lora_weights", True) in _AS_GIVEN for config in model.peft_config.values())


def write_base(folder: Path, marks: Marks) -> None:
    """Write down which weights adapters stand on (`marks_of_base`), beside each that was saved in a folder."""
    places = [file.parent for file in (*folder.glob("adapter_config.json"), *folder.glob("*/adapter_config.json"))]
    for place in places if marks else ():
        replace_file(place / BASE_FILE, (json.dumps({"format": 1, "weights": marks}) + "\n").encode())


def check_base(path: str, model: Any) -> None:
    """Compare the weights below an adapter with those that it was trained on, where its folder says which they are.

    Args:
        path (`str`): the adapter's folder.
        model (`peft.PeftModel`): with the adapter on its base.

    Raises:
        ModelError: they are others.
    """
    before, now = _read(Path(path) / BASE_FILE), dict(_marks(model))
    common = [name for name, mark in before.items() if name in now and now[name]["shape"] == mark.get("shape")]
    others = [name for name in common if not _is_same(before[name].get("values"), now[name]["values"])]
    if others:
        raise ModelError(
            f"adapter {path!r} was trained on another model than {str(model.get_base_model().name_or_path)!r}: "
            f"{len(others)} of {len(common)} weights are others ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}). Write into its adapter_config.json where the right one is "
            f"(base_model_name_or_path, revision), or delete {BASE_FILE} beside it to use this one all the same"
        )


def _marks(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """A few numbers of every weight that is not trained, by the name that it has without adapters."""
    for name, weight in model.get_base_model().named_parameters():
        if weight.requires_grad or isinstance(weight, DTensor) or weight.is_meta:
            continue
        if not weight.is_floating_point() or weight.dtype.itemsize < 2 or not weight.numel():
            continue
        if not set(name.split(".")).isdisjoint(model.peft_config):  # of an adapter
            continue
        for part in _IN_LAYERS:
            name = name.replace(part, "")
        flat = weight.detach().reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, _COUNT, device=flat.device, dtype=torch.float64).long()
        yield name, {"shape": list(weight.shape), "values": flat[places].tolist()}


def _is_same(before: Any, now: list[float]) -> bool:
    if not isinstance(before, list) or not all(isinstance(value, int | float) for value in before):
        return True  # nothing that could be compared
    relative, absolute = _ROUNDING
    return len(before) != len(now) or all(
        abs(one - other) <= absolute + relative * abs(one) for one, other in zip(before, now, strict=True)
    )


def _read(file: Path) -> Mapping[str, dict[str, Any]]:
    try:
        marker = json.loads(read_plain(file))
    except (OSError, ValueError, RecursionError):
        return {}
    marks = marker.get("weights") if isinstance(marker, dict) and marker.get("format") == 1 else None
    return {name: mark for name, mark in marks.items() if isinstance(mark, dict)} if isinstance(marks, dict) else {}
