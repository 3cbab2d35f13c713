"""Prompts to token ids and images, the same way for every view and for evaluation."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from dopd.data.blocks import check_blocks, image_in, is_image
from dopd.data.images import BrokenImageError, image_key, image_size, in_short, open_image
from dopd.data.rendering import (
    check_last_turn,
    check_unicode,
    rendered_turns,
    template_arguments,
)
from dopd.data.views import Prompt, with_turns
from dopd.errors import DataError, DopdError, ModelError
from dopd.scoring import View, left_padded
from dopd.vision.media import ImageSet
from dopd.vision.tokens import placeholder_texts

_TYPES = "token_type_ids"  # how fields that say something of every token end
# What else a processor says of tokens; labels are for a loss of the model's own.
_OF_TOKENS = ("input_ids", "attention_mask", "labels")


def reads_images(processing_class: Any) -> bool:
    """Whether this is the processor of a vision-language model, and not a tokenizer."""
    return isinstance(processing_class, ProcessorMixin)


def tokenizer_of(processing_class: Any) -> Any:
    return processing_class.tokenizer if reads_images(processing_class) else processing_class


def encode_view(
    processing_class: Any, prompts: list[Prompt], chat_template_kwargs: dict[str, Any], device: Any
) -> View:
    """Prompts as one `View`: token ids padded on the left and, with a processor, images beside them.

    Args:
        processing_class: a tokenizer, or the processor of a vision-language model.
        prompts (`list`): all texts, or all conversations (of which some may have images).
        chat_template_kwargs (`dict`): arguments of `apply_chat_template`, for example `{"enable_thinking": False}`.
        device: of the token ids. Images stay in the host's memory until a model reads them.
    """
    pad_id = tokenizer_of(processing_class).pad_token_id
    if not reads_images(processing_class):
        return left_padded(encode_prompts(processing_class, prompts, chat_template_kwargs), pad_id, device)
    encoded = _encode_each_once(processing_class, prompts, chat_template_kwargs)
    view = left_padded([one.ids for one in encoded], pad_id, device)
    names = dict.fromkeys(name for one in encoded for name in one.types)
    types = {name: left_padded([one.types[name] for one in encoded], 0, device).prompt_ids for name in names}
    return View(view.prompt_ids, view.prompt_mask, tuple(one.images for one in encoded), types)


def encode_prompts(
    processing_class: Any, prompts: list[Prompt], chat_template_kwargs: dict[str, Any]
) -> list[list[int]]:
    """Token ids of prompts that are all text or all conversations.

    Conversations get the generation prompt and the same chat-template arguments in every view (thinking off in one view
    and on in another would put the difference into the first token). Text gets whatever the tokenizer adds by itself.

    Args:
        processing_class: a tokenizer, or a processor.
        prompts (`list`): texts, or conversations.
        chat_template_kwargs (`dict`): arguments of `apply_chat_template`, for example `{"enable_thinking": False}`.
    """
    if not prompts:
        return []
    if reads_images(processing_class):
        return [one.ids for one in _encode_each_once(processing_class, prompts, chat_template_kwargs)]
    # Rollouts of one prompt stand side by side and repeat it.
    encoded: list[list[int]] = []
    for prompt, same in itertools.groupby(prompts):
        ids = _encode_text(processing_class, prompt, chat_template_kwargs)
        encoded += [ids] * len(list(same))
    return encoded


def _encode_text(tokenizer: Any, prompt: Prompt, options: Mapping[str, Any]) -> list[int]:
    if isinstance(prompt, str):
        check_unicode(prompt)
        # A text that a chat template has rendered begins with the token that the tokenizer would put before it.
        begins = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        with _tokenizing():
            ids = tokenizer(text=prompt, add_special_tokens=not begins)["input_ids"]
        # Some tokenizers end every text; an answer goes on where the prompt stops.
        while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
            ids = ids[:-1]
    else:
        turns, arguments, _ = _as_rendered(tokenizer, prompt, options)
        with _tokenizing():
            ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **arguments)["input_ids"]
    _check_beginning(tokenizer, ids)
    return ids


def _check_beginning(tokenizer: Any, ids: Sequence[int]) -> None:
    """Raise `DataError` where a prompt begins with two beginning-of-sequence tokens."""
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise DataError(
            f"column 'prompt': it begins with two {tokenizer.bos_token!r} tokens: the chat template or the text writes "
            "one and so does the tokenizer. Remove the one in the text"
        )


@contextmanager
def _tokenizing() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # some have no token for what they do not know, and raise what they like
        raise DataError(
            f"column 'prompt' or 'privileged_context': the tokenizer cannot read it: {in_short(error)}. Write it in "
            "words of its vocabulary, or take models whose tokenizer has an unknown token"
        ) from error


def _as_rendered(
    processing_class: Any, prompt: list[dict[str, Any]], options: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any], str]:
    """The turns of a conversation as its template reads them, the template's arguments, and what it makes of them."""
    if not reads_images(processing_class):
        return rendered_turns(processing_class, prompt, options)
    check_last_turn(prompt, options)
    turns = as_blocks(prompt)
    check_placeholders(processing_class, turns)
    return rendered_turns(processing_class, prompt, options, turns)


def text_of(processing_class: Any, prompt: Prompt, options: Mapping[str, Any]) -> str:
    """The text that becomes token ids: a text itself, or what the chat template makes of a conversation.

    Args: as `encode_prompts`, for one prompt.
    """
    return prompt if isinstance(prompt, str) else _as_rendered(processing_class, prompt, options)[2]


@dataclass
class PromptLengths:
    """Counts the tokens of prompts without preparing every image for a model.

    How many tokens images stand for depends on their sizes and settings alone, so it is worked out once for each
    combination of these.

    Attributes:
        processing_class: a tokenizer or a processor.
        chat_template_kwargs (`dict`): as in training.
        vocab_size (`int`, *optional*): of the models; a token beyond it is an error.
    """

    processing_class: Any
    chat_template_kwargs: dict[str, Any]
    vocab_size: int | None = None
    _more: dict[tuple[tuple[tuple[int, int], ...], str], int] = field(default_factory=dict)

    def __call__(self, prompts: list[Prompt]) -> list[int]:
        if not reads_images(self.processing_class):
            return list(map(self._counted, encode_prompts(self.processing_class, prompts, self.chat_template_kwargs)))
        return [self._length(prompt) for prompt in prompts]

    def _counted(self, ids: Sequence[int]) -> int:
        if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
            token = max(ids)
            word = tokenizer_of(self.processing_class).convert_ids_to_tokens(token)
            raise DataError(
                f"a view of the prompt holds token {token} ({word!r}), and the models' vocabulary has "
                f"{self.vocab_size} tokens: the tokenizer was given tokens that the models lack. Call "
                "model.resize_token_embeddings(len(tokenizer)) for student and teacher and save them"
            )
        return len(ids)

    def _length(self, prompt: Prompt) -> int:
        if isinstance(prompt, str):
            return self._counted(_encode(self.processing_class, prompt, {}).ids)
        sizes = tuple(image_size(source) for source in image_sources(as_blocks(prompt)))
        text = text_of(self.processing_class, prompt, self.chat_template_kwargs)
        with _tokenizing():
            ids = self.processing_class.tokenizer(text, add_special_tokens=False)["input_ids"]
        length = self._counted(ids)
        # A row may set its processor otherwise; tools change the text alone.
        own = {name: value for name, value in getattr(prompt, "options", {}).items() if name != "tools"}
        key = (sizes, repr(own))
        if key not in self._more:
            whole = _encode(self.processing_class, prompt, self.chat_template_kwargs)
            self._more[key] = len(whole.ids) - length
        return length + self._more[key]


def as_blocks(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation with every content as a list of blocks, which is what processors read, without empty fields."""
    turns = [
        {
            **message,
            "content": [{"type": "text", "text": message["content"]}]
            if isinstance(message["content"], str)
            # Datasets give every block of a column the same fields, None where a block has no such field.
            else [
                {"type": "text", **{name: value for name, value in block.items() if value is not None}}
                for block in message["content"] or []
            ],
        }
        for message in prompt
    ]
    return with_turns(prompt, turns)


def image_sources(prompt: Prompt) -> list[Any]:
    """What the image blocks of a conversation hold, in order."""
    if isinstance(prompt, str):
        return []
    contents = [message["content"] for message in prompt if isinstance(message["content"], list)]
    return [image_in(block) for content in contents for block in content if is_image(block)]


def check_placeholders(processor: Any, prompt: Prompt) -> None:
    """Raise `DataError` where the text of a prompt holds a token that stands for an image, or a block no picture."""
    tokens = placeholder_texts(processor)
    if isinstance(prompt, str):
        texts = [prompt]
    else:
        check_blocks(prompt)
        texts = [block.get("text", "") for message in as_blocks(prompt) for block in message["content"]]
    found = next((token for text in texts for token in tokens if token in text), None)
    if found:
        raise DataError(
            f"column 'prompt' or 'privileged_context': the text holds {found!r}, which stands for an image and may not "
            "be written. Remove it; to say where an image goes, use a {'type': 'image'} block"
        )


@dataclass(frozen=True)
class _Encoded:
    """One prompt: its token ids, what the processor says of each, and its images."""

    ids: list[int]
    types: Mapping[str, list[int]]
    images: ImageSet | None


def _encode_each_once(processor: Any, prompts: Sequence[Prompt], options: dict[str, Any]) -> list[_Encoded]:
    """Rollouts of one prompt repeat it: it is opened and encoded a single time."""
    encoded: dict[str, _Encoded] = {}
    keys = [
        json.dumps([prompt, getattr(prompt, "options", None)], default=image_key, sort_keys=True) for prompt in prompts
    ]
    for place, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
        if key not in encoded:
            try:
                encoded[key] = _encode(processor, prompt, options)
            except DataError as error:
                raise type(error)(f"prompt {place} of a batch of {len(prompts)}: {error}") from error
    return [encoded[key] for key in keys]


def _encode(processor: Any, prompt: Prompt, options: dict[str, Any]) -> _Encoded:
    if isinstance(prompt, str):
        check_placeholders(processor, prompt)
        keys: list[str] = []
    else:
        prompt = with_turns(prompt, _as_rendered(processor, prompt, options)[0])
        keys = [image_key(source) for source in image_sources(prompt)]
    output = _processed(processor, prompt, options)
    fields: dict[str, Tensor] = {
        name: torch.as_tensor(value)
        for name, value in output.items()
        if name not in _OF_TOKENS and not name.endswith(_TYPES)
    }
    _check_of_images(processor, prompt, options, fields, output["input_ids"].shape)
    types = {name: value[0].tolist() for name, value in output.items() if name.endswith(_TYPES)}
    # Another processor makes other fields of the same images.
    images = ImageSet((str(id(processor)), *keys), fields) if keys else None
    return _Encoded(output["input_ids"][0].tolist(), types, images)


def _processed(processor: Any, prompt: Prompt, options: dict[str, Any]) -> Mapping[str, Any]:
    opened = prompt if isinstance(prompt, str) else _opened(prompt)
    try:
        if isinstance(prompt, str):
            return dict(processor(text=[prompt], return_tensors="pt"))
        arguments = template_arguments(processor, prompt, options)
        output = processor.apply_chat_template(
            [opened], tokenize=True, return_dict=True, return_tensors="pt", **arguments
        )
        return dict(output)
    except (DopdError, ImportError):
        raise
    except Exception as error:  # of one row: its shape, its number of images, a prompt without any, ...
        sizes = [f"{picture.width} x {picture.height}" for picture in image_sources(opened)]
        raise BrokenImageError(
            f"{type(processor).__name__} cannot read the prompt with its {len(sizes)} images "
            f"({', '.join(sizes) or 'none'}): {in_short(error)}"
        ) from error


def _check_of_images(
    processor: Any, prompt: Prompt, options: dict[str, Any], fields: Mapping[str, Tensor], shape: Sequence[int]
) -> None:
    """Refuse a field that says something of every token: a completion would need it too, and nobody knows what.

    A field with as many entries as the prompt has tokens may be one of images by chance; it is, if it stays as long
    when the text gets longer.
    """
    length = shape[-1]
    suspects = {name: value.shape for name, value in fields.items() if length in value.shape}
    if not suspects:
        return
    longer: Prompt
    if isinstance(prompt, str):
        longer = prompt + " ."
    else:
        first, *rest = prompt
        longer = with_turns(prompt, [{**first, "content": [*first["content"], {"type": "text", "text": " ."}]}, *rest])
    again = _processed(processor, longer, options)
    other = again["input_ids"].shape[-1]
    for name, sizes in suspects.items():
        pairs = zip(sizes, torch.as_tensor(again[name]).shape, strict=True)
        if other != length and (length, other) in pairs:
            raise ModelError(
                f"{type(processor).__name__} says {name!r} of every token of a prompt, and dopd does not know what a "
                "completion token has there (known are fields that end in 'token_type_ids'): images of this family "
                "cannot be read. Use a model of another family (docs/how-to/vision.md lists those that were tried)"
            )


def _opened(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": open_image(image_in(block))} if is_image(block) else block
                for block in message["content"]
            ],
        }
        for message in blocks
    ]
