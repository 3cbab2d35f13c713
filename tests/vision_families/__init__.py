"""Untrained vision-language models of many families, of their own transformers classes, and their processors."""

from vision_families import gemma, idefics, llava, qwen
from vision_families.base import Family, tokenizer_of

FAMILIES: dict[str, Family] = {**qwen.FAMILIES, **idefics.FAMILIES, **llava.FAMILIES, **gemma.FAMILIES}

__all__ = ["FAMILIES", "Family", "tokenizer_of"]
