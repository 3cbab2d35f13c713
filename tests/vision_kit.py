"""Tiny untrained vision-language models of several families, each with a processor of its own class, made offline."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from vision_families import FAMILIES, Family, tokenizer_of
from vision_families.base import COLOURS, EOS, PAD, PATCH, SHAPES, SIDE, WORDS
from vision_families.gemma import MLLAMA

from dopd.trainer import DOPDConfig, DOPDTrainer

__all__ = ["COLOURS", "EOS", "FAMILIES", "LAYOUTS", "PAD", "PATCH", "SHAPES", "SIDE", "WORDS", "Family"]


# One of each way to lay images out: packed patches, a row per prompt (whole and in tiles), an entry per image.
LAYOUTS = ["qwen3_vl", "idefics3", "smolvlm", "smolvlm_tiles", "llava", "gemma3"]


def family(name: str) -> Family:
    return MLLAMA if name == "mllama" else FAMILIES[name]


def processor(name: str) -> Any:
    return family(name).processor(tokenizer_of(family(name)))


def model(name: str, made: Any, hidden: int = 24, seed: int = 0) -> Any:
    """An untrained model whose logits are not all alike: the classes' own initialisation is made for large widths."""
    tokenizer = made.tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        result = family(name).model(tokenizer, hidden)
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
        "model": options.pop("model", None) or model(name, made, seed=0),
        "teacher_model": options.pop("teacher_model", None) or model(name, made, hidden=36, seed=1),
        "train_dataset": Dataset.from_list(rows()),
        "processing_class": made,
    }
    for key in ("train_dataset", "eval_dataset", "verifier", "peft_config", "teacher_processing_class"):
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
