"""Placeholder tokens: those that stand for a piece of an image or a video in a prompt, and are never said."""

from typing import Any

_ID_FIELDS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "audio_token_id",
    "audio_token_index",
)
_TEXT_FIELDS = ("image_token", "boi_token", "video_token", "audio_token")


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
