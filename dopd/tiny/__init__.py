"""Tiny real (vision-)language models for the embedded tasks: tokenizers, specs, pre-training and a cache."""

from dopd.tiny.cache import cache_root, get_recipe, model_fingerprint, tiny_model_path
from dopd.tiny.kits import SightKit, TextKit, make_kit, prompt_with_privilege, render_prompt
from dopd.tiny.models import TinySpec, build_model
from dopd.tiny.pretrain import measure_accuracy, pretrain
from dopd.tiny.recipe import Recipe, SightRecipe
from dopd.tiny.recipes import RECIPES
from dopd.tiny.sight import SightSpec, build_processor, build_sight_model
from dopd.tiny.tokenizer import SEPARATOR, build_tokenizer, task_vocabulary

__all__ = [
    "RECIPES",
    "SEPARATOR",
    "Recipe",
    "SightKit",
    "SightRecipe",
    "SightSpec",
    "TextKit",
    "TinySpec",
    "build_model",
    "build_processor",
    "build_sight_model",
    "build_tokenizer",
    "cache_root",
    "get_recipe",
    "make_kit",
    "measure_accuracy",
    "model_fingerprint",
    "pretrain",
    "prompt_with_privilege",
    "render_prompt",
    "task_vocabulary",
    "tiny_model_path",
]
