"""Tiny real (vision-)language models for the embedded tasks: tokenizers, architectures, and those that are shipped."""

from dopd.tiny.models import TinySpec, build_model
from dopd.tiny.shipped import cache_root, tiny_model_path
from dopd.tiny.sight import SightSpec, build_processor, build_sight_model
from dopd.tiny.tokenizer import SEPARATOR, build_tokenizer, task_vocabulary

__all__ = [
    "SEPARATOR",
    "SightSpec",
    "TinySpec",
    "build_model",
    "build_processor",
    "build_sight_model",
    "build_tokenizer",
    "cache_root",
    "task_vocabulary",
    "tiny_model_path",
]
