"""Real `Qwen3VLForConditionalGeneration` models, small enough to learn to see in minutes on one core."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from dopd.errors import ConfigError
from dopd.tasks.base import EOS_WORD, PAD_WORD
from dopd.tasks.drawing import IMAGE_SIZE
from dopd.tiny.models import TinySpec, initialise
from dopd.tiny.tokenizer import SEPARATOR, word_level
from dopd.vision import image_only

PATCH_SIZE = 8  # pixels
MERGE_SIZE = 2  # patches a side that become one image token: 16 of them, each as large as a cell of a scene
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE // MERGE_SIZE) ** 2
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_SPECIAL_TOKENS = (PAD_WORD, EOS_WORD, "<unk>", VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
_IMAGE_TURN = f"{VISION_START}{IMAGE_PAD}{VISION_END} "
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + _IMAGE_TURN + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} "
    + SEPARATOR
    + " {% generation %}"
    + _CONTENT
    + f" {EOS_WORD}"
    + "{% endgeneration %}{% else %}{% if not loop.first %} {% endif %}"
    + _CONTENT
    + "{% endif %}{% endfor %}{% if add_generation_prompt %} "
    + SEPARATOR
    + "{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class SightSpec(TinySpec):
    """Size of a tiny vision-language model: `TinySpec` for its decoder, and of its vision tower:

    Args:
        vision_layers: Layers of the vision tower; the decoder's first layer also reads the first of them.
        vision_size: Width of the vision tower, a multiple of 16.
        vision_mlp_ratio: Width of its MLP over `vision_size`.
    """

    vision_layers: int = 2
    vision_size: int = 64
    vision_mlp_ratio: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vision_layers", "vision_size", "vision_mlp_ratio"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, allowed: at least 1. Pass a positive integer.")
        if self.vision_size % 16:
            raise ConfigError(f"vision_size: got {self.vision_size}, allowed: a multiple of 16. Change it.")


def build_processor(words: Iterable[str]) -> Any:
    """An image-only Qwen3-VL processor with a word-level tokenizer over `words`, the separator and special tokens.

    Text is words separated by single spaces; an image of `IMAGE_SIZE` pixels is `IMAGE_TOKENS` tokens between two
    marks. Images are not resized: their sides must be multiples of 16 pixels.
    """
    tokenizer = word_level(
        (*_SPECIAL_TOKENS, SEPARATOR, *words),
        _SPECIAL_TOKENS,
        extra_special_tokens={
            "image_token": IMAGE_PAD,
            "video_token": VIDEO_PAD,
            "vision_bos_token": VISION_START,
            "vision_eos_token": VISION_END,
        },
        chat_template=_CHAT_TEMPLATE,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        do_resize=False,
        size={"shortest_edge": (PATCH_SIZE * MERGE_SIZE) ** 2, "longest_edge": (4 * IMAGE_SIZE) ** 2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return image_only(Qwen3VLProcessor)(image_processor=images, tokenizer=tokenizer, chat_template=_CHAT_TEMPLATE)


def build_sight_model(spec: SightSpec, processor: Any, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """An untrained model for `processor`; equal `spec`, vocabulary size and `seed` give equal weights.

    Weights start as those of `build_model`; positions in the image with standard deviation 0.5. The usual 0.02 for
    everything is far too small at these widths: such a model learns to guess from the text and stays there.
    """
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config=_text_config(spec, tokenizer),
                vision_config=_vision_config(spec),
                image_token_id=ids[IMAGE_PAD],
                video_token_id=ids[VIDEO_PAD],
                vision_start_token_id=ids[VISION_START],
                vision_end_token_id=ids[VISION_END],
                tie_word_embeddings=False,
            )
        )
    initialise(model, tokenizer, seed)
    return model


def _text_config(spec: SightSpec, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    head = spec.hidden_size // spec.num_heads
    side = head // 6  # rotary pairs for the row, and as many for the column; the rest is for time
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.mlp_ratio * spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_heads,
        "head_dim": head,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [head // 2 - 2 * side, side, side],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _vision_config(spec: SightSpec) -> dict[str, Any]:
    return {
        "depth": spec.vision_layers,
        "hidden_size": spec.vision_size,
        "intermediate_size": spec.vision_mlp_ratio * spec.vision_size,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": 2,
        "out_hidden_size": spec.hidden_size,
        "num_position_embeddings": (IMAGE_SIZE // PATCH_SIZE) ** 2,
        "deepstack_visual_indexes": [0],
    }
