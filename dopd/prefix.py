"""Each prompt once: the rollouts of one prompt share its prefix, so its keys and values are computed a single time.

Exact to rounding, gradient included: a causal model's states at the prompt do not depend on what follows it. With G
rollouts of T tokens behind a prompt of P tokens, a forward pass runs over P + G T tokens in place of G (P + T).

Shapes: B sequences, U different prompts, P prompt tokens (left-padded), T completion tokens, H hidden size.
"""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import DynamicCache

from dopd.scoring import View, last_hidden_states

# What two routes to the same states may differ by, relative to the largest state: rounding alone.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_TOLERANCE_HALF = 5e-2


def different_prompts(view: View) -> tuple[Tensor, Tensor]:
    """Which prompts of a view differ.

    Returns:
        Rows of the first occurrence of each prompt (U,), and for every row the number of its prompt (B,).
    """
    # A padding token may also stand in a prompt, so the mask is part of what is compared.
    keys_BP = torch.where(view.prompt_mask != 0, view.prompt_ids, -1)
    _, prompt_B = torch.unique(keys_BP, dim=0, return_inverse=True)
    rows_B = torch.arange(len(prompt_B), device=prompt_B.device)
    first_U = rows_B.new_full((int(prompt_B.max()) + 1,), len(prompt_B)).scatter_reduce(0, prompt_B, rows_B, "amin")
    return first_U, prompt_B


def hidden_states_sharing_prompts(model: Any, view: View, completion_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Last hidden states at the positions that predict each completion token, every different prompt run once.

    Args:
        model: an unwrapped transformers text model.
        view (`View`): B prompts, of which some are equal.
        completion_ids (`LongTensor` (B, T)), completion_mask (`Tensor` (B, T)): as in `completion_hidden_states`.

    Returns:
        `Tensor` (B, T, H), with a gradient where gradients are enabled.
    """
    backbone = (model.base_model.model if is_peft_model(model) else model).base_model
    first_U, prompt_B = different_prompts(view)
    mask_UP = view.prompt_mask[first_U]
    cache = DynamicCache(config=backbone.config.get_text_config())
    prompts = backbone(
        input_ids=view.prompt_ids[first_U], attention_mask=mask_UP, past_key_values=cache, use_cache=True
    )
    # The last prompt token predicts the first completion token.
    first_B1H = prompts.last_hidden_state[prompt_B, -1:]
    if completion_ids.shape[1] == 1:
        return first_B1H
    cache = prompts.past_key_values
    cache.batch_select_indices(prompt_B)
    answers = backbone(
        input_ids=completion_ids[:, :-1],
        attention_mask=torch.cat([mask_UP[prompt_B], completion_mask[:, :-1].to(mask_UP.dtype)], dim=1),
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([first_B1H, answers.last_hidden_state], dim=1)


def architecture(model: Any) -> type:
    """The class of a model below its adapters."""
    return type(model.get_base_model() if is_peft_model(model) else model)


@torch.no_grad()
def shares_prompts_exactly(model: Any, *, half: bool) -> bool:
    """Whether this model gives the same hidden states when rollouts continue a cached prompt; tried on a small batch.

    Args:
        model: an unwrapped transformers text model in evaluation mode.
        half (`bool`): whether it computes in half precision.
    """
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.linspace(0, vocab_size - 1, 14, device=model.device).long()
    prompt_ids = torch.stack([ids[:5], ids[:5], ids[5:10]])
    prompt_mask = torch.ones_like(prompt_ids)
    prompt_mask[2, 0] = 0
    view = View(prompt_ids, prompt_mask)
    completion_ids = torch.stack([ids[10:13], ids[11:14], ids[8:11]])
    mask = torch.ones_like(completion_ids)
    plain = last_hidden_states(model, *view.followed_by(completion_ids, mask), 3)
    try:
        shared = hidden_states_sharing_prompts(model, view, completion_ids, mask)
    except (TypeError, ValueError, AttributeError, NotImplementedError, IndexError, RuntimeError):
        return False  # caches of another kind fail in their own ways
    limit = _TOLERANCE_HALF if half else _TOLERANCE.get(plain.dtype, _TOLERANCE_HALF)
    return bool((plain - shared).abs().max() <= limit * plain.abs().max())
