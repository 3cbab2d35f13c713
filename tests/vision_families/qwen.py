"""Families that pack the patches of all images into one sequence: Qwen2-VL to Qwen3.5, GLM-4V, Ernie, VideoLLaMA 3."""

from collections.abc import Callable
from typing import Any

import transformers as tf

from dopd.vision import image_only
from vision_families.base import PATCH, PIXELS, Family, text, token_id, vision

_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_GLM_TOKENS = (
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)


def _processor(processor_class: Any, image_class: Any, shortest: int, longest: int) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        images = image_class(
            patch_size=PATCH,
            temporal_patch_size=2,
            merge_size=2,
            size={"shortest_edge": shortest, "longest_edge": longest},
            **PIXELS,
        )
        return image_only(processor_class)(
            image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template
        )

    return make


def _ids(tokenizer: Any) -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: token_id(tokenizer, token) for name, token in zip(names, _TOKENS, strict=True)}


def _rope(hidden: int, **more: Any) -> dict[str, Any]:
    half = hidden // 4  # half of the size of a head
    third = half // 3
    sections = [half - 2 * third, third, third]
    return {"rope_type": "default", "rope_theta": 100.0, "mrope_section": sections, **more}


def _tower(hidden: int, **more: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": PATCH,
        "out_hidden_size": hidden,
        **more,
    }


def _qwen2_vl(tokenizer: Any, hidden: int) -> Any:
    config = tf.Qwen2VLConfig(
        text_config=text(tokenizer, hidden, "head_dim", rope_parameters=_rope(hidden)),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": hidden,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": PATCH,
        },
        **_ids(tokenizer),
    )
    return tf.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl(tokenizer: Any, hidden: int) -> Any:
    config = tf.Qwen2_5_VLConfig(
        text_config=text(tokenizer, hidden, "head_dim", rope_parameters=_rope(hidden)),
        vision_config=_tower(hidden, window_size=32, fullatt_block_indexes=[1]),
        **_ids(tokenizer),
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_tower(hidden: int, **more: Any) -> dict[str, Any]:
    return _tower(hidden, spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=16, **more)


def _qwen3_vl(tokenizer: Any, hidden: int) -> Any:
    config = tf.Qwen3VLConfig(
        text_config=text(tokenizer, hidden, rope_parameters=_rope(hidden, mrope_interleaved=True)),
        vision_config=_qwen3_tower(hidden, deepstack_visual_indexes=[0]),
        **_ids(tokenizer),
    )
    return tf.Qwen3VLForConditionalGeneration(config)


def _qwen3_vl_moe(tokenizer: Any, hidden: int) -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = tf.Qwen3VLMoeConfig(
        text_config=text(tokenizer, hidden, rope_parameters=_rope(hidden, mrope_interleaved=True), **experts),
        vision_config=_qwen3_tower(hidden, deepstack_visual_indexes=[0]),
        **_ids(tokenizer),
    )
    return tf.Qwen3VLMoeForConditionalGeneration(config)


def _qwen3_5(tokenizer: Any, hidden: int) -> Any:
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }
    rope = _rope(hidden, mrope_interleaved=True, partial_rotary_factor=1.0)
    config = tf.Qwen3_5Config(
        text_config=text(tokenizer, hidden, rope_parameters=rope, **linear),
        vision_config=_qwen3_tower(hidden),
        **_ids(tokenizer),
    )
    return tf.Qwen3_5ForConditionalGeneration(config)


def _glm4v(tokenizer: Any, hidden: int) -> Any:
    names = (
        "image_token_id",
        "video_token_id",
        "image_start_token_id",
        "image_end_token_id",
        "video_start_token_id",
        "video_end_token_id",
    )
    config = tf.Glm4vConfig(
        text_config=text(tokenizer, hidden, "head_dim", rope_parameters=_rope(hidden, partial_rotary_factor=1.0)),
        vision_config=_tower(hidden, image_size=32),
        **{name: token_id(tokenizer, token) for name, token in zip(names, _GLM_TOKENS, strict=True)},
    )
    return tf.Glm4vForConditionalGeneration(config)


_ERNIE_NAMED = {
    f"{what}_token": f"<|{what.upper()}|>"
    for what in ("image", "video", "image_start", "image_end", "video_start", "video_end")
}


def _ernie_processor(tokenizer: Any) -> Any:
    images = tf.Ernie4_5_VLMoeImageProcessorPil(
        patch_size=PATCH, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, **PIXELS
    )
    return image_only(tf.Ernie4_5_VLMoeProcessor)(
        image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )


def _ernie(tokenizer: Any, hidden: int) -> Any:
    half = hidden // 4
    sections = [half // 3] * 3 if half % 3 == 0 and half // 3 % 2 == 0 else [half // 2, half // 2, half % 2]
    experts = {
        "moe_intermediate_size": [32, 32],
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": sections},
    }
    tower = _tower(hidden, spatial_merge_size=2, temporal_merge_size=2)
    tower.pop("out_hidden_size")
    config = tf.Ernie4_5_VLMoeConfig(
        text_config=text(tokenizer, hidden, "head_dim", **experts),
        vision_config=tower,
        **{f"{name}_id": token_id(tokenizer, token) for name, token in _ERNIE_NAMED.items()},
    )
    return tf.Ernie4_5_VLMoeForConditionalGeneration(config)


def _video_llama_processor(tokenizer: Any) -> Any:
    images = tf.VideoLlama3ImageProcessorPil(patch_size=PATCH, merge_size=1, min_tokens=4, max_tokens=64, **PIXELS)
    return image_only(tf.VideoLlama3Processor)(
        image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )


def _video_llama(tokenizer: Any, hidden: int) -> Any:
    tower = vision()
    tower.pop("image_size")
    config = tf.VideoLlama3Config(
        text_config={"model_type": "qwen2", **text(tokenizer, hidden, "head_dim")},
        vision_config=tower,
        image_token_id=token_id(tokenizer, "<image>"),
        video_token_id=token_id(tokenizer, "<video>"),
    )
    return tf.VideoLlama3ForConditionalGeneration(config)


_GLM = ("<|begin_of_image|><|image|><|end_of_image|>", 512, 8192)
_QWEN = (tf.Qwen2VLImageProcessorPil, 16 * 16, 64 * 64)
FAMILIES = {
    "qwen3_vl": Family(_TOKENS, _IMAGE, _processor(tf.Qwen3VLProcessor, *_QWEN), _qwen3_vl),
    "qwen2_vl": Family(_TOKENS, _IMAGE, _processor(tf.Qwen2VLProcessor, *_QWEN), _qwen2_vl),
    "qwen2_5_vl": Family(_TOKENS, _IMAGE, _processor(tf.Qwen2_5_VLProcessor, *_QWEN), _qwen2_5_vl),
    "qwen3_vl_moe": Family(_TOKENS, _IMAGE, _processor(tf.Qwen3VLProcessor, *_QWEN), _qwen3_vl_moe),
    # Its linear layers keep a state; its tokenizer is of one class whatever a folder says.
    "qwen3_5": Family(
        _TOKENS,
        _IMAGE,
        _processor(tf.Qwen3VLProcessor, *_QWEN),
        _qwen3_5,
        shares_prompts=False,
        reloads=False,
    ),
    "glm4v": Family(_GLM_TOKENS, _GLM[0], _processor(tf.Glm4vProcessor, tf.Glm4vImageProcessorPil, *_GLM[1:]), _glm4v),
    "ernie4_5_vl_moe": Family(
        tuple(_ERNIE_NAMED.values()),
        "<|IMAGE_START|><|IMAGE|><|IMAGE_END|>",
        _ernie_processor,
        _ernie,
        _ERNIE_NAMED,
    ),
    "video_llama_3": Family(
        ("<image>", "<video>"),
        "<image>",
        _video_llama_processor,
        _video_llama,
        {"image_token": "<image>", "video_token": "<video>"},
    ),
}
