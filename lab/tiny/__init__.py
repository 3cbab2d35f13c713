"""Tiny models of the embedded tasks: recipes, pre-training, and those that are trained once and kept."""

from lab.tiny.cache import get_recipe, model_fingerprint, recipe_key, tiny_model_path
from lab.tiny.kits import SightKit, TextKit, make_kit, prompt_with_privilege, render_prompt
from lab.tiny.pretrain import measure_accuracy, pretrain
from lab.tiny.recipe import Recipe, SightRecipe
from lab.tiny.recipes import RECIPES

__all__ = [
    "RECIPES",
    "Recipe",
    "SightKit",
    "SightRecipe",
    "TextKit",
    "get_recipe",
    "make_kit",
    "measure_accuracy",
    "model_fingerprint",
    "pretrain",
    "prompt_with_privilege",
    "recipe_key",
    "render_prompt",
    "tiny_model_path",
]
