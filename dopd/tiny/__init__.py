"""Tiny real language models for the embedded tasks: tokenizer, specs, pre-training and a cache."""

from dopd.tiny.cache import cache_root, get_recipe, tiny_model_path
from dopd.tiny.models import TinySpec, build_model
from dopd.tiny.pretrain import Recipe, measure_accuracy, pretrain, prompt_with_privilege, render_prompt
from dopd.tiny.recipes import RECIPES
from dopd.tiny.tokenizer import SEPARATOR, build_tokenizer, task_vocabulary

__all__ = [
    "RECIPES",
    "SEPARATOR",
    "Recipe",
    "TinySpec",
    "build_model",
    "build_tokenizer",
    "cache_root",
    "get_recipe",
    "measure_accuracy",
    "pretrain",
    "prompt_with_privilege",
    "render_prompt",
    "task_vocabulary",
    "tiny_model_path",
]
