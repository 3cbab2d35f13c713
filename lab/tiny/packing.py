"""Packed tiny models: one file for each, in half precision, which loses nothing, since pre-training rounds to it.

To pack a model anew after its recipe has changed: `python -m lab.tiny TASK ROLE SEED`.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from dopd.errors import ModelError
from dopd.tiny.shipped import CARD_NAME, FOLDER, fingerprint
from lab.tiny.kits import make_kit
from lab.tiny.recipe import Recipe

# Of models that experiments alone need; the others are in the package.
REPOSITORY_FOLDER = Path(__file__).parents[2] / "experiments" / "weights"


def packed_file(name: str) -> Path | None:
    """The weights of the model whose folder in the cache would be called `name`, if package or repository has them."""
    paths = [folder / f"{name}.safetensors" for folder in (FOLDER, REPOSITORY_FOLDER)]
    return next((path for path in paths if path.is_file()), None)


def pack(folder: Path, recipe: Recipe, target: Path) -> Path:
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
