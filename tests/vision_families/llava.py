"""Families that project the patches of a fixed or tiled picture: LLaVA and what came of it, InternVL, Pixtral."""

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import transformers as tf

from dopd.vision import image_only
from vision_families.base import PATCH, PIXELS, SIDE, Family, text, token_id, vision

_IMAGE = {"image_token": "<image>"}
_GRIDS = [[32, 64], [64, 32], [64, 64]]
_PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
_LONG = {"max_position_embeddings": 1024}
_WITH_VIDEO, _NAMED_VIDEO = ("<image>", "<video>"), {**_IMAGE, "video_token": "<video>"}


def _llava_processor(tokenizer: Any) -> Any:
    images = tf.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True, **PIXELS
    )
    return tf.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def _llava(tokenizer: Any, hidden: int) -> Any:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision()),
        text_config=tf.LlamaConfig(**text(tokenizer, hidden)),
        image_token_index=token_id(tokenizer, "<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return tf.LlavaForConditionalGeneration(config)


def _vipllava(tokenizer: Any, hidden: int) -> Any:
    config = tf.VipLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision()),
        text_config=tf.LlamaConfig(**text(tokenizer, hidden)),
        image_token_index=token_id(tokenizer, "<image>"),
        vision_feature_layers=[-1, -2],
    )
    return tf.VipLlavaForConditionalGeneration(config)


def _next_parts(tokenizer: Any) -> dict[str, Any]:
    images = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=_GRIDS,
        **PIXELS,
    )
    return {
        "image_processor": images,
        "tokenizer": tokenizer,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": tokenizer.chat_template,
    }


def _llava_next_processor(tokenizer: Any) -> Any:
    return tf.LlavaNextProcessor(**_next_parts(tokenizer))


def _llava_next_video_processor(tokenizer: Any) -> Any:
    return image_only(tf.LlavaNextVideoProcessor)(**_next_parts(tokenizer))


def _next_sizes(tokenizer: Any, hidden: int) -> dict[str, Any]:
    return {
        "vision_config": tf.CLIPVisionConfig(**vision()),
        "text_config": tf.LlamaConfig(**text(tokenizer, hidden, **_LONG)),
        "image_token_index": token_id(tokenizer, "<image>"),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "image_grid_pinpoints": _GRIDS,
        "image_seq_length": 16,
    }


def _llava_next(tokenizer: Any, hidden: int) -> Any:
    return tf.LlavaNextForConditionalGeneration(tf.LlavaNextConfig(**_next_sizes(tokenizer, hidden)))


def _llava_next_video(tokenizer: Any, hidden: int) -> Any:
    sizes = {**_next_sizes(tokenizer, hidden), "video_token_index": token_id(tokenizer, "<video>")}
    return tf.LlavaNextVideoForConditionalGeneration(tf.LlavaNextVideoConfig(**sizes))


def _deepseek_processor(tokenizer: Any) -> Any:
    images = tf.DeepseekVLImageProcessorPil(size={"height": SIDE, "width": SIDE}, min_size=14, **PIXELS)
    return tf.DeepseekVLProcessor(
        image_processor=images, tokenizer=tokenizer, num_image_tokens=16, chat_template=tokenizer.chat_template
    )


def _deepseek(tokenizer: Any, hidden: int) -> Any:
    config = tf.DeepseekVLConfig(
        text_config={"model_type": "llama", **text(tokenizer, hidden)},
        vision_config={"model_type": "siglip_vision_model", **vision()},
        image_token_id=token_id(tokenizer, "<image>"),
    )
    return tf.DeepseekVLForConditionalGeneration(config)


def _onevision_processor(tokenizer: Any) -> Any:
    images = tf.LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=_GRIDS, **PIXELS
    )
    return image_only(tf.LlavaOnevisionProcessor)(
        image_processor=images,
        tokenizer=tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


def _onevision(tokenizer: Any, hidden: int) -> Any:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision(), vision_use_head=False),
        text_config=tf.Qwen2Config(**text(tokenizer, hidden, "head_dim", **_LONG)),
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        image_grid_pinpoints=_GRIDS,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config)


def _internvl_processor(tokenizer: Any) -> Any:
    images = tf.GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=4, **PIXELS
    )
    return image_only(tf.InternVLProcessor)(
        image_processor=images, tokenizer=tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )


def _internvl(tokenizer: Any, hidden: int) -> Any:
    config = tf.InternVLConfig(
        vision_config=vision(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
        text_config={"model_type": "qwen2", **text(tokenizer, hidden, "head_dim")},
        image_token_id=token_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return tf.InternVLForConditionalGeneration(config)


_AYA_TOKENS = ("<|IMG_PATCH|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL")
_AYA_TOKENS += tuple(f"TILE_{number}" for number in range(1, 5))


def _aya_processor(tokenizer: Any) -> Any:
    images = tf.GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=4, **PIXELS
    )
    return tf.AyaVisionProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        img_size=SIDE,
        downsample_factor=2,
        chat_template=tokenizer.chat_template,
    )


def _aya(tokenizer: Any, hidden: int) -> Any:
    """Its language model declares a scale of the logits, which the whole model does not apply."""
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision(), vision_use_head=False),
        text_config=tf.Cohere2Config(**text(tokenizer, hidden), logit_scale=0.0625, sliding_window=64),
        image_token_index=token_id(tokenizer, "<|IMG_PATCH|>"),
    )
    return tf.AyaVisionForConditionalGeneration(config)


def pixtral_processor_class() -> Any:
    """transformers' own class, which asks for torchvision without using it beside its image processor."""
    from transformers.models.pixtral import image_processing_pil_pixtral
    from transformers.utils import import_utils

    place = "transformers.models.pixtral.image_processing_pixtral"
    with (
        mock.patch.dict(sys.modules, {place: image_processing_pil_pixtral}),
        mock.patch.object(import_utils, "is_torchvision_available", lambda: True),
    ):
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    return PixtralProcessor


def _pixtral_processor(merge: int) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        images = tf.PixtralImageProcessorPil(
            size={"longest_edge": 64}, patch_size={"height": PATCH, "width": PATCH}, **PIXELS
        )
        return pixtral_processor_class()(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=PATCH,
            spatial_merge_size=merge,
            chat_template=tokenizer.chat_template,
        )

    return make


def _pixtral_tower() -> dict[str, Any]:
    return {"model_type": "pixtral", **vision(image_size=64)}


def _pixtral(tokenizer: Any, hidden: int) -> Any:
    config = tf.LlavaConfig(
        vision_config=_pixtral_tower(),
        text_config={"model_type": "mistral", **text(tokenizer, hidden)},
        image_token_index=token_id(tokenizer, "[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return tf.LlavaForConditionalGeneration(config)


def _mistral3(tokenizer: Any, hidden: int) -> Any:
    config = tf.Mistral3Config(
        vision_config=_pixtral_tower(),
        text_config={"model_type": "mistral", **text(tokenizer, hidden)},
        image_token_index=token_id(tokenizer, "[IMG]"),
        spatial_merge_size=2,
    )
    return tf.Mistral3ForConditionalGeneration(config)


FAMILIES = {
    # The last hidden state of its tower does not pass through the last norm, which is for the pooled output.
    "llava": Family(("<image>",), "<image>", _llava_processor, _llava, _IMAGE, unused=("post_layernorm",)),
    "llava_next": Family(("<image>",), "<image>", _llava_next_processor, _llava_next, _IMAGE),
    "llava_next_video": Family(_WITH_VIDEO, "<image>", _llava_next_video_processor, _llava_next_video, _NAMED_VIDEO),
    "vipllava": Family(("<image>",), "<image>", _llava_processor, _vipllava, _IMAGE),
    "deepseek_vl": Family(("<image>",), "<image>", _deepseek_processor, _deepseek, _IMAGE),
    "llava_onevision": Family(_WITH_VIDEO, "<image>", _onevision_processor, _onevision, _NAMED_VIDEO),
    "internvl": Family(
        ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        "<IMG_CONTEXT>",
        _internvl_processor,
        _internvl,
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "aya_vision": Family(_AYA_TOKENS, "<image>", _aya_processor, _aya),
    "pixtral": Family(_PIXTRAL_TOKENS, "[IMG]", _pixtral_processor(1), _pixtral, reloads=False),
    "mistral3": Family(_PIXTRAL_TOKENS, "[IMG]", _pixtral_processor(2), _mistral3, reloads=False),
}
