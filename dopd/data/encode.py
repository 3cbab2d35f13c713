"""Prompts to token ids, the same way for every view and for evaluation."""

from typing import Any

from dopd.data.privileged import Prompt


def encode_prompts(
    processing_class: Any, prompts: list[Prompt], chat_template_kwargs: dict[str, Any]
) -> list[list[int]]:
    """Token ids of prompts that are all text or all conversations.

    Conversations get the generation prompt and the same chat-template arguments in every view (thinking off in one view
    and on in another would put the difference into the first token). Text gets whatever the tokenizer adds by itself.

    Args:
        processing_class: a tokenizer.
        prompts (`list`): texts, or conversations.
        chat_template_kwargs (`dict`): arguments of `apply_chat_template`, for example `{"enable_thinking": False}`.
    """
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        return processing_class(text=prompts)["input_ids"]
    encoded = processing_class.apply_chat_template(
        conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_template_kwargs
    )
    return encoded["input_ids"]
