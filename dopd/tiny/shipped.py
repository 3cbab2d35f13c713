"""Tiny models that come with dopd: the same weights on every machine, and no minutes of training.

One file for each model, in half precision, which loses nothing: pre-training rounds to it. It is unpacked once, into a
folder of the cache that transformers loads. A checkout of the repository has more of them (`lab.tiny`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from dopd.checkout import lab_module
from dopd.errors import ConfigError, ModelError
from dopd.files import make_folder, not_written
from dopd.tasks import get_task
from dopd.tiny.models import TinySpec, build_model
from dopd.tiny.sight import SightSpec, build_processor, build_sight_model
from dopd.tiny.tokenizer import build_tokenizer

CARD_NAME = "dopd_tiny.json"
FOLDER = Path(__file__).parent / "weights"


def cache_root() -> Path:
    """`$DOPD_CACHE` if set, else `~/.cache/dopd`."""
    return Path(os.environ.get("DOPD_CACHE") or Path.home() / ".cache" / "dopd")


def fingerprint(model: nn.Module) -> str:
    """Twelve hex digits of the weights: equal recipes give other weights on another kind of processor."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().float().numpy().tobytes())
    return digest.hexdigest()[:12]


def tiny_model_path(task: str, role: str, seed: int = 0) -> Path:
    """Folder of the tiny model `role` of `task`, in the cache; in a checkout, `lab` has or trains those that do not
    come with dopd.

    Args:
        task (`str`), role (`str`): as in `tiny:TASK/ROLE`.
        seed (`int`): of its pre-training.

    Raises:
        ConfigError: there is no such model.
    """
    files = sorted(FOLDER.glob("*.safetensors"))
    for file in files:
        if file.name.startswith(f"{task}-{role}-seed{seed}-"):
            return complete_folder(cache_root() / "tiny" / file.stem, functools.partial(unpack, file))
    lab = lab_module("tiny.cache")
    if lab is not None:
        return Path(lab.tiny_model_path(task, role, seed))
    models = ["tiny:{}/{}?{}".format(*file.stem.replace("-seed", "-seed=").split("-")) for file in files]
    raise ConfigError(
        f"no {role!r} of task {task!r} and seed {seed} comes with dopd, which has {', '.join(models)}: choose one of "
        "these, or start dopd in a checkout of the repository, which has and trains others"
    )


def complete_folder(final: Path, fill: Callable[[Path], Any], *, anew: bool = False) -> Path:
    """`final`, filled by `fill` unless it is there: it appears complete or not at all, so that an interrupted or a
    second, simultaneous process is harmless.

    Args:
        final (`Path`): of a model with its card.
        fill: writes into the empty folder that it is given.
        anew (`bool`): replace what is there.
    """
    if (final / CARD_NAME).is_file() and not anew:
        return final
    try:
        make_folder(final.parent)
        # On the same file system as the final place, since a rename is atomic only there.
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        try:
            fill(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except Exception as error:
        place = "another place for dopd's models (DOPD_CACHE)"
        if message := not_written(error, final.parent, choose=place):
            raise message from error
        raise
    try:
        if anew:
            shutil.rmtree(final, ignore_errors=True)
        try:
            partial.rename(final)
        except OSError:
            # Somebody else was faster; their model is as good as ours. Anything else is a real error.
            if not (final / CARD_NAME).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def unpack(path: Path, output_dir: Path) -> None:
    """Write the model of a file as a folder that transformers loads.

    Raises:
        ModelError: the file does not hold the weights that its card names.
    """
    with safe_open(path, framework="pt") as file:
        card = json.loads(file.metadata()["card"])
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
    processing_class: Any
    model: Any
    size = card["recipe"]["spec"]
    if "vision_size" in size:
        processing_class = build_processor(get_task(card["recipe"]["task"]).vocabulary())
        model = build_sight_model(SightSpec(**size), processing_class)
    else:
        processing_class = build_tokenizer()
        model = build_model(TinySpec(**size), processing_class)
    model.load_state_dict(weights)
    if fingerprint(model) != card["weights"]:
        raise ModelError(f"{path.name}: the weights are not those of its card ({card['weights']}). Install dopd anew")
    save(output_dir, model, processing_class, card)


def save(output_dir: str | Path, model: Any, processing_class: Any, card: Mapping[str, Any]) -> None:
    """Write model, tokenizer or processor, and card to `output_dir`, so that the `Auto` classes of transformers (for
    a processor without torchvision: `dopd.vision.load_processor`) load them.
    """
    model.save_pretrained(output_dir)
    processing_class.save_pretrained(output_dir)
    Path(output_dir, CARD_NAME).write_text(json.dumps(card, indent=2) + "\n")
