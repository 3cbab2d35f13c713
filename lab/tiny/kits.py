"""What pretraining needs to know of a kind of model: how to build it, and how problems become its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from dopd.tasks import AbstractTask, Example, get_task
from dopd.tasks.scenes import SceneExample
from dopd.tiny.models import TinySpec, build_model
from dopd.tiny.sight import (
    IMAGE_PAD,
    IMAGE_TOKENS,
    VISION_END,
    VISION_START,
    SightSpec,
    build_processor,
    build_sight_model,
)
from dopd.tiny.tokenizer import SEPARATOR, build_tokenizer
from dopd.vision.tokens import placeholder_ids
from lab.tiny.recipe import Recipe

_IGNORED = -100
_GREY = 232  # of blank images: between the backgrounds of scenes


def prompt_with_privilege(prompt: str, privileged_context: str | None) -> str:
    """What a privileged model reads: the prompt, a space and the hint; the prompt alone where there is no hint."""
    return prompt if privileged_context is None else f"{prompt} {privileged_context}"


def render_prompt(processing_class: Any, text: str, num_images: int = 0) -> str:
    """Images and then `text` as one user turn in the chat template, with the generation prompt.

    Args:
        processing_class: A tokenizer or, for images, a processor.
    """
    content: Any = text
    if num_images:
        content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": text}]
    conversation = [{"role": "user", "content": content}]
    return str(processing_class.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))


class Kit(Protocol):
    """A kind of tiny model.

    Attributes:
        processing_class: Its tokenizer or processor, which is saved beside the model.
        tokenizer: The tokenizer.
        reads_images: Whether blank images make a difference to it.
    """

    processing_class: Any
    tokenizer: Any
    reads_images: bool

    def build_model(self, spec: TinySpec, seed: int) -> Any: ...

    def batch(self, task: AbstractTask, kind: str, start: int, size: int) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the model, right-padded, and `targets` [B, T] with -100 outside the completion, for the training
        problems from `start` on, with privileged text of a kind.
        """
        ...

    def prompts(self, rows: Sequence[Mapping[str, Any]], *, blank: bool = False) -> dict[str, Tensor]:
        """Inputs of `generate`, left-padded, for the prompts of dataset rows with their privileged text.

        Args:
            blank: Put a grey image in the place of every image.
        """
        ...

    def sampling(self, model: Any) -> dict[str, Any]:
        """Further arguments of `generate`."""
        ...


class TextKit:
    """Causal language models over the words of the text tasks."""

    reads_images = False

    def __init__(self) -> None:
        self.processing_class = self.tokenizer = build_tokenizer()
        self._before: list[int] = []  # ids in front of a prompt

    def build_model(self, spec: TinySpec, seed: int) -> Any:
        return build_model(spec, self.tokenizer, seed)

    def batch(self, task: AbstractTask, kind: str, start: int, size: int) -> tuple[dict[str, Tensor], Tensor]:
        return self.encode([task.example("train", index) for index in range(start, start + size)], kind)

    def encode(self, examples: Sequence[Example], kind: str) -> tuple[dict[str, Tensor], Tensor]:
        """`batch` for given examples."""
        words = self.tokenizer.get_vocab()
        prompts, completions = [], []
        for example in examples:
            text = prompt_with_privilege(example.prompt, None if kind == "none" else example.privileged[kind])
            prompts.append([*self._before, *(words[word] for word in text.split()), words[SEPARATOR]])
            completions.append([words[word] for word in example.solution.split()] + [words[self.tokenizer.eos_token]])
        length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)) - 1
        input_ids = torch.full((len(prompts), length), self.tokenizer.pad_token_id)
        targets = torch.full((len(prompts), length), _IGNORED)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            sequence = prompt + completion
            input_ids[i, : len(sequence) - 1] = torch.tensor(sequence[:-1])
            targets[i, len(prompt) - 1 : len(sequence) - 1] = torch.tensor(completion)
        # Padding on the right needs no mask in a causal model: nothing that is read comes after it.
        return {"input_ids": input_ids}, targets

    def prompts(self, rows: Sequence[Mapping[str, Any]], *, blank: bool = False) -> dict[str, Tensor]:
        texts = [render_prompt(self.tokenizer, _text(row)) for row in rows]
        return dict(self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False))

    def sampling(self, model: Any) -> dict[str, Any]:
        return {}


class SightKit(TextKit):
    """Vision-language models over the words of one visual task, with one image in front of every prompt."""

    reads_images = True

    def __init__(self, words: Sequence[str]) -> None:
        self.processing_class = build_processor(words)
        self.tokenizer = self.processing_class.tokenizer
        ids = self.tokenizer.get_vocab()
        self._image_id = ids[IMAGE_PAD]
        self._before = [ids[VISION_START], *[self._image_id] * IMAGE_TOKENS, ids[VISION_END]]

    def build_model(self, spec: TinySpec, seed: int) -> Any:
        assert isinstance(spec, SightSpec)
        return build_sight_model(spec, self.processing_class, seed)

    def encode(self, examples: Sequence[Example], kind: str) -> tuple[dict[str, Tensor], Tensor]:
        inputs, targets = super().encode(examples, kind)
        input_ids = inputs["input_ids"]
        images = [image for example in examples if isinstance(example, SceneExample) for image in example.images]
        return {
            **inputs,
            # Positions are counted from the mask and the types; without them the image would be read as a line of text.
            "attention_mask": (input_ids != self.tokenizer.pad_token_id).long(),
            "mm_token_type_ids": (input_ids == self._image_id).int(),
            **self.processing_class.image_processor(images, return_tensors="pt"),
        }, targets

    def prompts(self, rows: Sequence[Mapping[str, Any]], *, blank: bool = False) -> dict[str, Tensor]:
        texts = [render_prompt(self.processing_class, _text(row), len(row["images"])) for row in rows]
        images = [[_blank(image) if blank else image for image in row["images"]] for row in rows]
        return dict(self.processing_class(images=images, text=texts, return_tensors="pt", padding=True))

    def sampling(self, model: Any) -> dict[str, Any]:
        return {"suppress_tokens": placeholder_ids(model.config)}


def make_kit(recipe: Recipe) -> Kit:
    """The kit of a recipe's models, by the class of its `spec`."""
    return SightKit(get_task(recipe.task).vocabulary()) if isinstance(recipe.spec, SightSpec) else TextKit()


def _text(row: Mapping[str, Any]) -> str:
    return prompt_with_privilege(row["prompt"][0]["content"], row["privileged_context"])


def _blank(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size, (_GREY,) * 3)
