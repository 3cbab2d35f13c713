"""Placeholder tokens, which stand for a piece of an image or a video in a prompt and are never said; token types."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from dopd.errors import ModelError

_ID_FIELDS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "audio_token_id",
    "audio_token_index",
)
_TEXT_FIELDS = ("image_token", "img_patch_token", "boi_token", "video_token", "audio_token")


def placeholder_ids(config: Any) -> list[int]:
    """Ids of a model's placeholder tokens that its head has a logit for; none for a text model.

    A sampled placeholder would stand where no image is, so these tokens can be neither sampled nor scored.

    Args:
        config: of a transformers model.
    """
    vocab_size = config.get_text_config().vocab_size
    values = {getattr(config, name, None) for name in _ID_FIELDS}
    return sorted(value for value in values if isinstance(value, int) and 0 <= value < vocab_size)


def placeholder_texts(processor: Any) -> list[str]:
    """Placeholder tokens as a processor finds them in a rendered prompt."""
    tokens = {getattr(owner, name, None) for owner in (processor, processor.tokenizer) for name in _TEXT_FIELDS}
    return sorted(str(token) for token in tokens if token)


def types_behind(model: Any, types: Mapping[str, Tensor], num_tokens: int) -> dict[str, Tensor]:
    """Token types (B, P + T) of prompts with T completion tokens behind them.

    The type of a completion token is the one that the model's own `generate` appends: 0 is text to most families, and
    to PaliGemma the prefix, whose tokens read what comes after them.

    Args:
        model: a transformers model with `generate`, without adapters around it.
        types (`dict[str, Tensor]`): of the prompts, each (B, P); a name ends in `token_type_ids`.
        num_tokens (`int`): T.

    Raises:
        ModelError: its `generate` does not say what the type of a completion token is.
    """
    if not types:
        return {}
    continued = model._update_model_kwargs_for_generation(ModelOutput(), dict(types), is_encoder_decoder=False)
    return {
        name: torch.cat([values, _type_behind(model, name, values, continued[name]).expand(-1, num_tokens)], dim=1)
        for name, values in types.items()
    }


def _type_behind(model: Any, name: str, prompt: Tensor, continued: Tensor) -> Tensor:
    if continued.shape[1] == prompt.shape[1] + 1:
        return continued[:, -1:]
    if "mm_" in name:  # multimodal: 0 is text in every family, and `generate` leaves the field out behind the prompt
        return prompt.new_zeros(len(prompt), 1)
    raise ModelError(
        f"{type(model).__name__}: its processor gives {name!r} of every token of a prompt, and its generate does not "
        "say what a completion token has there, so completions cannot be scored as they are sampled. Use another model"
    )
