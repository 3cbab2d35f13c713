"""Tiny models that come with the package or with the repository: the same weights on every machine, and no minutes of
training.

One file for each model, in half precision, which loses nothing: pretraining rounds to it. To ship a model anew after
its recipe has changed: `python -m dopd.tiny TASK ROLE SEED`.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from dopd.errors import ModelError
from dopd.tiny.kits import make_kit
from dopd.tiny.pretrain import CARD_NAME, fingerprint, save
from dopd.tiny.recipe import Recipe

FOLDER = Path(__file__).parent / "weights"
# Of models that experiments alone need; an installed package does not have it.
REPOSITORY_FOLDER = Path(__file__).parents[2] / "experiments" / "weights"


def shipped_file(name: str) -> Path | None:
    """The weights of the model whose folder in the cache would be called `name`, if package or repository has them."""
    paths = [folder / f"{name}.safetensors" for folder in (FOLDER, REPOSITORY_FOLDER)]
    return next((path for path in paths if path.is_file()), None)


def unpack(path: Path, recipe: Recipe, seed: int, output_dir: Path) -> None:
    """Write a shipped model as a folder that transformers loads.

    Raises:
        ModelError: the file does not hold the weights that its card names.
    """
    with safe_open(path, framework="pt") as file:
        card = json.loads(file.metadata()["card"])
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
    kit = make_kit(recipe)
    model = kit.build_model(recipe.spec, seed)
    model.load_state_dict(weights)
    if fingerprint(model) != card["weights"]:
        raise ModelError(f"{path.name}: the weights are not those of its card ({card['weights']}). Install dopd anew")
    save(output_dir, model, kit.processing_class, card)


def pack(folder: Path, recipe: Recipe, target: Path = FOLDER) -> Path:
    """Write the file of a trained model.

    Args:
        folder (`Path`): of the trained model, as `tiny_model_path` gives it.
        recipe (`Recipe`): that it was trained by.
        target (`Path`): folder of the file.

    Raises:
        ModelError: half precision would change the weights.
    """
    card = json.loads((folder / CARD_NAME).read_text())
    model = type(make_kit(recipe).build_model(recipe.spec, 0)).from_pretrained(folder, dtype="float32")
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    if fingerprint(model) != card["weights"]:
        raise ModelError(f"{folder}: half precision would change the weights. Train the model anew")
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{folder.name}.safetensors"
    save_file(weights, path, metadata={"card": json.dumps(card)})
    return path
