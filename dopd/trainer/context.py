"""How many tokens models read at once, by their configurations, and whether the views of a run fit."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from dopd.errors import ConfigError
from dopd.trainer.host import HostTrainer

# Kinds of rotary scaling whose `max_position_embeddings` is already the longer context.
_INCLUDED = ("default", "llama3", "longrope", "su", "proportional", "mrope")


def context_of(config: Any) -> int | None:
    """Tokens of prompt and completion together; `None` for a model without a limit (relative positions, a state).

    `max_position_embeddings` is the context before or after it is scaled, as the checkpoint's author liked. With
    `original_max_position_embeddings`, the context is that times the factor; without it, `max_position_embeddings`
    times the factor for the kinds that are meant for the original length (linear, dynamic, yarn).

    Args:
        config: of a model; of a vision-language model, its text part counts.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not limit:
        return None
    return max([limit, *(_scaled(limit, rope, text) for rope in _ropes(text))])


def _ropes(text: Any) -> Iterable[Mapping[str, Any]]:
    """The rotary parameters; not those by kind of layer, whose models count the longer context themselves."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return [rope] if not any(isinstance(value, Mapping) for value in rope.values()) else []


def _scaled(limit: int, rope: Mapping[str, Any], text: Any) -> int:
    factor = rope.get("factor") or 1.0
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if original:
        return int(original * factor)
    included = rope.get("rope_type", rope.get("type", "default")) in _INCLUDED
    return limit if included else int(limit * factor)


def common_context(models: Iterable[Any], max_context: int | None) -> int:
    """Tokens that every model reads: `max_context` where that is set, else what their configurations say.

    Raises:
        ConfigError: `max_context` is more than a model has positions for.
    """
    contexts = [(model, context_of(model.config)) for model in models]
    if max_context is None:
        return min([context for _, context in contexts if context], default=sys.maxsize)
    for model, context in contexts:
        if context and max_context > context and not _rotary(model.config.get_text_config()):
            raise ConfigError(
                f"max_context (={max_context}): {type(model).__name__} has learned positions for {context} tokens and "
                "no more. Lower it, or leave it out"
            )
    return max_context


def _rotary(text: Any) -> bool:
    return bool(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None))


def room_for_prompts(host: HostTrainer) -> int:
    """Most tokens of a prompt for which the models' context has room, in front of an answer."""
    context = common_context(host.loaded_models, host.args.max_context)
    if host.served is not None and host.served.context is not None:
        context = min(context, host.served.context)
    room = context - (host.max_completion_length or 0)
    if room < 1:
        raise ConfigError(
            f"max_completion_length (={host.max_completion_length}) leaves no room for a prompt in a context of "
            f"{context} tokens: lower it. Where the models read more than their configurations say, set max_context"
        )
    return room


def max_prompt_tokens(host: HostTrainer) -> int:
    """Most tokens that any view of a prompt may have.

    Raises:
        ConfigError: prompts and answers of the run do not fit into the models' context together.
    """
    room, limit = room_for_prompts(host), host.args.max_prompt_length
    if limit is not None and limit > room:
        raise ConfigError(
            f"max_prompt_length (={limit}) and max_completion_length (={host.max_completion_length}) do not "
            f"fit together into the models' context of {room + (host.max_completion_length or 0)} tokens: lower one of "
            "them. Where the models read more than their configurations say, set max_context"
        )
    return room if limit is None else limit
