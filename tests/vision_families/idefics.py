"""Families with a row of images for each prompt: Idefics2, Idefics3, SmolVLM."""

from collections.abc import Callable
from typing import Any

import transformers as tf

from dopd.vision import image_only
from vision_families.base import EOS, PATCH, PIXELS, SIDE, Family, text, token_id, vision

_TILES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", *_TILES)
_NAMED = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": EOS,
}


def _processor(image_class: Any, processor_class: Any, *, tiles: bool = False) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        images = image_class(
            do_image_splitting=tiles,
            size={"longest_edge": 2 * SIDE if tiles else SIDE},
            max_image_size={"longest_edge": SIDE},
            **PIXELS,
        )
        return processor_class(
            image_processor=images,
            tokenizer=tokenizer,
            image_seq_len=(SIDE // PATCH // 2) ** 2,
            chat_template=tokenizer.chat_template,
        )

    return make


def _model(config_class: Any, model_class: Any) -> Callable[[Any, int], Any]:
    def make(tokenizer: Any, hidden: int) -> Any:
        config = config_class(
            text_config={"model_type": "llama", **text(tokenizer, hidden)},
            vision_config=vision(),
            image_token_id=token_id(tokenizer, "<image>"),
            scale_factor=2,
            pad_token_id=tokenizer.pad_token_id,
        )
        return model_class(config)

    return make


def _idefics2_processor(tokenizer: Any) -> Any:
    images = tf.Idefics2ImageProcessorPil(
        do_image_splitting=False, size={"shortest_edge": 24, "longest_edge": 64}, **PIXELS
    )
    return tf.Idefics2Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )


def _idefics2(tokenizer: Any, hidden: int) -> Any:
    perceiver = {
        "hidden_size": hidden,
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }
    config = tf.Idefics2Config(
        vision_config=vision(image_size=64),
        perceiver_config=perceiver,
        text_config={"model_type": "mistral", **text(tokenizer, hidden)},
        image_token_id=token_id(tokenizer, "<image>"),
    )
    return tf.Idefics2ForConditionalGeneration(config)


_SMOLVLM = (tf.SmolVLMImageProcessorPil, image_only(tf.SmolVLMProcessor))
_SMOLVLM_MODEL = _model(tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration)
FAMILIES = {
    "idefics3": Family(
        _TOKENS,
        "<image>",
        _processor(tf.Idefics3ImageProcessorPil, tf.Idefics3Processor),
        _model(tf.Idefics3Config, tf.Idefics3ForConditionalGeneration),
        _NAMED,
    ),
    "smolvlm": Family(_TOKENS, "<image>", _processor(*_SMOLVLM), _SMOLVLM_MODEL, _NAMED),
    # Every image as a grid of tiles and once as a whole, as the published SmolVLM has it.
    "smolvlm_tiles": Family(_TOKENS, "<image>", _processor(*_SMOLVLM, tiles=True), _SMOLVLM_MODEL, _NAMED),
    "idefics2": Family(
        ("<image>", "<fake_token_around_image>", EOS),
        "<image>",
        _idefics2_processor,
        _idefics2,
        {
            "image_token": "<image>",
            "image_boundary_token": "<fake_token_around_image>",
            "end_of_utterance_token": EOS,
        },
    ),
}
