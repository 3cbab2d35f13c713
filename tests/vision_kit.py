"""Tiny untrained vision-language models of several families, each with a processor of its own class, made offline."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from dopd.trainer import DOPDConfig, DOPDTrainer
from dopd.vision import image_only

SIDE, PATCH = 32, 8  # pixels; merged two by two, an image is four tokens
COLOURS, SHAPES = ["red", "green", "blue"], ["circle", "square"]
WORDS = ["what", "how", "many", "is", "the", *COLOURS, *SHAPES, "left", "right", "of", "answer", "box", *"0123456789"]
PAD, EOS = "<pad>", "<eos>"


@dataclass(frozen=True)
class Family:
    """How to make one family's models.

    Attributes:
        special (`tuple`): its special tokens; the first stands for a piece of an image.
        image_turn (`str`): what its chat template writes for an image.
        processor (callable): tokenizer -> processor.
        model (callable): (tokenizer, hidden size) -> untrained model.
    """

    special: tuple[str, ...]
    image_turn: str
    processor: Callable[[Any], Any]
    model: Callable[[Any, int], Any]


def tokenizer_of(family: Family) -> Any:
    special = [PAD, EOS, "<unk>", "<bos>", *family.special]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS, ":"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(word, special=True, lstrip=True, rstrip=True) for word in special])
    named = {
        f"{name}_token": token
        for name, token in (
            ("image", "<image>"),
            ("boi", "<start_of_image>"),
            ("eoi", "<end_of_image>"),
            ("fake_image", "<fake_token_around_image>"),
            ("global_image", "<global-img>"),
            ("end_of_utterance", EOS),
        )
        if token in family.special or token == EOS
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token="<unk>",
        bos_token="<bos>",
        extra_special_tokens=named,
        padding_side="left",
        model_max_length=512,
        chat_template=_TEMPLATE.replace("IMAGE", family.image_turn),
    )


_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def _text(tokenizer: Any, hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": hidden // 2,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        **more,
    }


_PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def _qwen_processor(tokenizer: Any) -> Any:
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
        **_PIXELS,
    )
    return image_only(Qwen3VLProcessor)(
        image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )


def _qwen_model(tokenizer: Any, hidden: int) -> Any:
    half = hidden // 4  # half of the size of a head
    third = half // 3
    config = Qwen3VLConfig(
        text_config={
            **_text(tokenizer, hidden),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [half - 2 * third, third, third],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=_id(tokenizer, "<|image_pad|>"),
        video_token_id=_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=_id(tokenizer, "<|vision_end|>"),
    )
    return Qwen3VLForConditionalGeneration(config)


def _idefics_processor(image_class: Any, processor_class: Any, *, tiles: bool = False) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        images = image_class(
            do_image_splitting=tiles,
            size={"longest_edge": 2 * SIDE if tiles else SIDE},
            max_image_size={"longest_edge": SIDE},
            **_PIXELS,
        )
        return processor_class(
            image_processor=images,
            tokenizer=tokenizer,
            image_seq_len=(SIDE // PATCH // 2) ** 2,
            chat_template=tokenizer.chat_template,
        )

    return make


def _idefics_model(config_class: Any, model_class: Any) -> Callable[[Any, int], Any]:
    def make(tokenizer: Any, hidden: int) -> Any:
        config = config_class(
            text_config={"model_type": "llama", **_text(tokenizer, hidden)},
            vision_config=_vision(),
            image_token_id=_id(tokenizer, "<image>"),
            scale_factor=2,
            pad_token_id=tokenizer.pad_token_id,
        )
        return model_class(config)

    return make


def _llava_processor(tokenizer: Any) -> Any:
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True, **_PIXELS
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def _llava_model(tokenizer: Any, hidden: int) -> Any:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=LlamaConfig(**_text(tokenizer, hidden)),
        image_token_index=_id(tokenizer, "<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def _gemma_processor(tokenizer: Any) -> Any:
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}, **_PIXELS)
    return Gemma3Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )


def _gemma_model(tokenizer: Any, hidden: int) -> Any:
    config = Gemma3Config(
        text_config={**_text(tokenizer, hidden), "sliding_window": 64, "query_pre_attn_scalar": hidden // 2},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_vision()},
        mm_tokens_per_image=4,
        boi_token_index=_id(tokenizer, "<start_of_image>"),
        eoi_token_index=_id(tokenizer, "<end_of_image>"),
        image_token_index=_id(tokenizer, "<image>"),
    )
    return Gemma3ForConditionalGeneration(config)


_TILES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
_IDEFICS_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", *_TILES)
FAMILIES: dict[str, Family] = {
    "qwen3_vl": Family(
        ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
        "<|vision_start|><|image_pad|><|vision_end|>",
        _qwen_processor,
        _qwen_model,
    ),
    "idefics3": Family(
        _IDEFICS_TOKENS,
        "<image>",
        _idefics_processor(Idefics3ImageProcessorPil, Idefics3Processor),
        _idefics_model(Idefics3Config, Idefics3ForConditionalGeneration),
    ),
    "smolvlm": Family(
        _IDEFICS_TOKENS,
        "<image>",
        _idefics_processor(SmolVLMImageProcessorPil, image_only(SmolVLMProcessor)),
        _idefics_model(SmolVLMConfig, SmolVLMForConditionalGeneration),
    ),
    # Every image as a grid of tiles and once as a whole, as the published SmolVLM has it.
    "smolvlm_tiles": Family(
        _IDEFICS_TOKENS,
        "<image>",
        _idefics_processor(SmolVLMImageProcessorPil, image_only(SmolVLMProcessor), tiles=True),
        _idefics_model(SmolVLMConfig, SmolVLMForConditionalGeneration),
    ),
    "llava": Family(("<image>",), "<image>", _llava_processor, _llava_model),
    "gemma3": Family(
        ("<image>", "<start_of_image>", "<end_of_image>"), "<start_of_image>", _gemma_processor, _gemma_model
    ),
}


def processor(name: str) -> Any:
    return FAMILIES[name].processor(tokenizer_of(FAMILIES[name]))


def model(name: str, made: Any, hidden: int = 24, seed: int = 0) -> Any:
    """An untrained model whose logits are not all alike: the classes' own initialisation is made for large widths."""
    tokenizer = made.tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        result = FAMILIES[name].model(tokenizer, hidden)
    generator = torch.Generator().manual_seed(seed)
    for weight_name, weight in result.named_parameters():
        if weight.ndim >= 2:
            fan_in = weight[0].numel()
            std = 0.5 if "embed" in weight_name and "patch" not in weight_name else fan_in**-0.5
            torch.nn.init.normal_(weight, std=std, generator=generator)
    result.generation_config.eos_token_id = tokenizer.eos_token_id
    result.generation_config.pad_token_id = tokenizer.pad_token_id
    return result.eval()


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(text: str, *images: Any) -> list[dict[str, Any]]:
    places = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*places, {"type": "text", "text": text}]}]


def rows(count: int = 4) -> list[dict[str, Any]]:
    """Questions of different lengths about a picture each, and privileged boxes."""
    return [
        {
            "prompt": [{"role": "user", "content": "how many red " + "circle " * (n % 3) + "?"}],
            "images": [picture(n)],
            "privileged_context": f"box {n} 1 {n} 2 red circle" + " left" * (n % 2),
            "answer": str(n),
        }
        for n in range(count)
    ]


def trainer(name: str, folder: Path, method: str = "dopd", **options: Any) -> DOPDTrainer:
    """A trainer of two untrained models of one family; `options` go to `DOPDTrainer` where it knows them, else to
    `DOPDConfig`.
    """
    made = options.pop("processing_class", None) or processor(name)
    known = {
        "model": model(name, made, seed=0),
        "teacher_model": model(name, made, hidden=36, seed=1),
        "train_dataset": Dataset.from_list(rows()),
        "processing_class": made,
    }
    for key in (*known, "eval_dataset", "verifier", "peft_config", "teacher_processing_class"):
        if key in options:
            known[key] = options.pop(key)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "method": method,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 5,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return DOPDTrainer(args=DOPDConfig(**defaults | options), **known)
