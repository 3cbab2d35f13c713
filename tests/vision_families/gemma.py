"""Families whose prompts read parts of themselves in both directions: Gemma 3, Gemma 4, PaliGemma; and Mllama."""

from typing import Any

import torch
import transformers as tf

from dopd.vision import image_only
from vision_families.base import PATCH, PIXELS, SIDE, Family, text, token_id, vision

_GEMMA3_NAMED = {"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_GEMMA4_NAMED = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}


def _siglip(**more: Any) -> dict[str, Any]:
    return {"model_type": "siglip_vision_model", "vision_use_head": False, **vision(), **more}


def _gemma3_processor(tokenizer: Any) -> Any:
    images = tf.Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}, **PIXELS)
    return tf.Gemma3Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )


def _gemma3(tokenizer: Any, hidden: int) -> Any:
    config = tf.Gemma3Config(
        text_config=text(tokenizer, hidden, sliding_window=64, query_pre_attn_scalar=hidden // 2),
        vision_config=_siglip(),
        mm_tokens_per_image=4,
        boi_token_index=token_id(tokenizer, "<start_of_image>"),
        eoi_token_index=token_id(tokenizer, "<end_of_image>"),
        image_token_index=token_id(tokenizer, "<image>"),
    )
    return tf.Gemma3ForConditionalGeneration(config)


def _gemma4_processor(tokenizer: Any) -> Any:
    images = tf.Gemma4ImageProcessorPil(patch_size=PATCH, max_soft_tokens=70, pooling_kernel_size=3)
    return image_only(tf.Gemma4Processor)(
        feature_extractor=tf.Gemma4AudioFeatureExtractor(),
        image_processor=images,
        tokenizer=tokenizer,
        image_seq_length=70,
        chat_template=tokenizer.chat_template,
    )


def _gemma4(tokenizer: Any, hidden: int) -> Any:
    ids = {
        f"{name}_id": token_id(tokenizer, _GEMMA4_NAMED[name])
        for name in ("image_token", "boi_token", "eoi_token", "audio_token", "boa_token", "video_token")
    }
    language = {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": len(tokenizer),
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "use_bidirectional_attention": "vision",
        "global_head_dim": hidden // 2,
        "max_position_embeddings": 1024,
    }
    tower = {
        **vision(head_dim=16, num_key_value_heads=2, position_embedding_size=256),
        "pooling_kernel_size": 3,
    }
    tower.pop("image_size")
    config = tf.Gemma4Config(
        text_config=text(tokenizer, hidden, **language),
        vision_config=tower,
        audio_config=None,
        eoa_token_index=token_id(tokenizer, _GEMMA4_NAMED["eoa_token"]),
        **ids,
    )
    return tf.Gemma4ForConditionalGeneration(config)


def _paligemma_processor(tokenizer: Any) -> Any:
    images = tf.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, **PIXELS)
    images.image_seq_length = 16
    return tf.PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template)


def _paligemma(tokenizer: Any, hidden: int) -> Any:
    config = tf.PaliGemmaConfig(
        vision_config=_siglip(projection_dim=hidden),
        text_config={"model_type": "gemma", **text(tokenizer, hidden)},
        image_token_index=token_id(tokenizer, "<image>"),
        projection_dim=hidden,
        hidden_size=hidden,
    )
    return tf.PaliGemmaForConditionalGeneration(config)


def _mllama_processor(tokenizer: Any) -> Any:
    images = tf.MllamaImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_image_tiles=4, **PIXELS)
    return tf.MllamaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template)


def _mllama(tokenizer: Any, hidden: int) -> Any:
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 64,
        "image_size": SIDE,
        "patch_size": PATCH,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0],
    }
    language = text(tokenizer, hidden, "head_dim", cross_attention_layers=[1], num_hidden_layers=3, bos_token_id=3)
    config = tf.MllamaConfig(
        vision_config=tower, text_config=language, image_token_index=token_id(tokenizer, "<|image|>")
    )
    model = tf.MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name and weight.numel() == 1:
                weight.fill_(1.0)  # at 0 images are not read
    return model


FAMILIES = {
    "gemma3": Family(tuple(_GEMMA3_NAMED.values()), "<start_of_image>", _gemma3_processor, _gemma3, _GEMMA3_NAMED),
    "gemma4": Family(tuple(_GEMMA4_NAMED.values()), "<|image|>", _gemma4_processor, _gemma4, _GEMMA4_NAMED),
    # Type 0 is the prefix, which is read in both directions; 1 is the answer.
    "paligemma": Family(
        ("<image>",),
        "<image>",
        _paligemma_processor,
        _paligemma,
        {"image_token": "<image>"},
        suffix_type=1,
        needs_image=True,
    ),
}
# Its tokens say which images they read (cross_attention_mask).
MLLAMA = Family(("<|image|>", "<|python_tag|>"), "<|image|>", _mllama_processor, _mllama, {"image_token": "<|image|>"})
