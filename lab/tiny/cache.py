"""Tiny models by task and role: packed in the package or the repository, or trained once, and kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from dopd.errors import ConfigError
from dopd.tasks import get_task
from dopd.tiny.shipped import CARD_NAME, cache_root, complete_folder, unpack
from lab.tiny.kits import make_kit
from lab.tiny.packing import packed_file
from lab.tiny.pretrain import pretrain
from lab.tiny.recipe import Recipe
from lab.tiny.recipes import RECIPES

# Raise it when the training loop, the tokenizer or the chat template changes: cached models are then made anew.
RECIPE_VERSION = 2


def get_recipe(task: str, role: str) -> Recipe:
    """The recipe of `role` (`"teacher"`, `"teacher_needs_p"` or `"student"`) for `task`.

    Raises:
        ConfigError: if there is no such task or role.
    """
    if task not in RECIPES:
        raise ConfigError(f"task: got {task!r}, allowed: {', '.join(RECIPES)}. Only these have tiny models.")
    if role not in RECIPES[task]:
        raise ConfigError(f"role: got {role!r}, allowed: {', '.join(RECIPES[task])}. Choose one of these.")
    return RECIPES[task][role]


def recipe_key(recipe: Recipe, seed: int) -> str:
    """Twelve hex digits that change with anything that decides the weights."""
    task = get_task(recipe.task, **recipe.knobs)
    parts: dict[str, Any] = {
        "version": RECIPE_VERSION,
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "vocabulary": sorted(make_kit(recipe).tokenizer.get_vocab().items()),
        "problems": [task.facts(task.example("train", index)) for index in range(8)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def model_fingerprint(folder: str | Path) -> str:
    """What identifies the weights in the folder of a tiny model; see `dopd.tiny.shipped.fingerprint`."""
    return str(json.loads(Path(folder, CARD_NAME).read_text())["weights"])


def tiny_model_path(
    task: str,
    role: str,
    seed: int = 0,
    *,
    recipe: Recipe | None = None,
    cache_dir: str | Path | None = None,
    num_problems: int = 256,
    train: bool = False,
) -> Path:
    """Folder of the tiny model `role` of `task`.

    If it is not in the cache it is taken from the package, where that has its weights, or trained (minutes).

    The folder appears complete or not at all, so an interrupted or a second, simultaneous training is harmless.

    Args:
        task: Name of a task in `RECIPES`.
        role: `"teacher"` (strong with and without hints), `"teacher_needs_p"` (strong with hints only) or
            `"student"` (weak without the plan, good with it).
        seed: Of the weights and the training problems.
        recipe (*optional*): Replaces the named recipe; `task` and `role` then only name the folder.
        cache_dir (*optional*): Replaces `cache_root()`.
        num_problems: Problems per accuracy in the card of a newly trained model.
        train: Train it here, whatever is in the cache or in the package.

    Raises:
        ConfigError: if `recipe` is not given and there is no such task or role.
    """
    recipe = get_recipe(task, role) if recipe is None else recipe
    name = f"{task}-{role}-seed{seed}-{recipe_key(recipe, seed)}"
    packed = None if train else packed_file(name)

    def fill(folder: Path) -> None:
        if packed is not None:
            unpack(packed, folder)
        else:
            pretrain(recipe, seed, folder, num_problems=num_problems, label=f"tiny {task} {role} (seed {seed})")

    root = Path(cache_root() if cache_dir is None else cache_dir)
    return complete_folder(root / "tiny" / name, fill, anew=train)
