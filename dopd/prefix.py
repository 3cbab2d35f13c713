"""Each prompt once: the rollouts of one prompt share its prefix, so its keys and values are computed a single time.

Exact to rounding, gradient included: a causal model's states at the prompt do not depend on what follows it. With G
rollouts of T tokens behind a prompt of P tokens, a forward pass runs over P + G T tokens in place of G (P + T).

Shapes: B sequences, U different prompts, P prompt tokens (left-padded), T completion tokens, H hidden size.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dopd.adapters import without_adapters
from dopd.lengths import forget_longer_passes, shortest_switch
from dopd.scoring import View, backbone_of, rounding, view_hidden_states, without_router_logits
from dopd.vision.media import FeatureCache, different_sets, image_inputs
from dopd.vision.tokens import placeholder_ids


def different_prompts(view: View) -> tuple[list[int], list[int]]:
    """Which prompts of a view differ.

    Returns:
        Rows of the first occurrence of each prompt (U,), and for every row the number of its prompt (B,).
    """
    pictures = different_sets(view.images)[1] if view.images else [0] * len(view.numbers)
    keys = list(zip(view.numbers, pictures, strict=True))
    different = sorted(set(keys))
    numbers = {key: number for number, key in enumerate(different)}
    return [keys.index(key) for key in different], [numbers[key] for key in keys]


def hidden_states_sharing_prompts(
    model: Any, view: View, completion_ids: Tensor, completion_mask: Tensor, *, cache: FeatureCache | None = None
) -> Tensor:
    """Last hidden states at the positions that predict each completion token, every different prompt run once.

    Args:
        model: an unwrapped transformers model.
        view (`View`): B prompts, of which some are equal.
        completion_ids (`LongTensor` (B, T)), completion_mask (`Tensor` (B, T)): as in `view_hidden_states`.
        cache (`FeatureCache`, *optional*): image features made earlier with the same weights.

    Returns:
        `Tensor` (B, T, H), with a gradient where gradients are enabled.
    """
    backbone = backbone_of(model)
    forget_longer_passes(backbone, model.config)
    first, prompt_of_row = different_prompts(view)
    first_U, prompt_B = (torch.tensor(rows, device=view.prompt_ids.device) for rows in (first, prompt_of_row))
    ids_UP, mask_UP = view.prompt_ids[first_U], view.prompt_mask[first_U]
    images = tuple(view.images[row] for row in first) if view.images else ()
    types = {name: values[first_U] for name, values in view.token_types.items()}
    pictures = image_inputs(backbone, images, ids_UP, cache=cache) if images else {}
    fixed = {"use_cache": True, **without_router_logits(backbone)}
    positions_UP, offset_U = _positions(backbone, ids_UP, mask_UP, types, pictures)
    kept = DynamicCache(config=backbone.config.get_text_config())
    kept_as = _cache_argument(backbone)
    prompts = backbone(
        input_ids=ids_UP,
        attention_mask=mask_UP,
        **{kept_as: kept},
        **fixed,
        **types,
        **pictures,
        **positions_UP,
    )
    # The last prompt token predicts the first completion token.
    device = completion_ids.device  # a `device_map` may have the last layers elsewhere
    first_B1H = prompts.last_hidden_state.to(device)[prompt_B, -1:]
    if completion_ids.shape[1] == 1:
        return first_B1H
    kept.batch_select_indices(prompt_B)
    mask_BL = torch.cat([mask_UP[prompt_B], completion_mask[:, :-1].to(mask_UP.dtype)], dim=1)
    answers = backbone(
        input_ids=completion_ids[:, :-1],
        attention_mask=mask_BL,
        **{kept_as: kept},
        **fixed,
        **_positions_behind(backbone, mask_BL, offset_U, prompt_B, completion_ids.shape[1] - 1),
    )
    return torch.cat([first_B1H, answers.last_hidden_state.to(device)], dim=1)


def _cache_argument(backbone: Any) -> str:
    """What the model calls its cache; transformers 5.24 gave it another name."""
    return "cache" if "cache" in inspect.signature(backbone.forward).parameters else "past_key_values"


# Families whose positions have several dimensions keep the offset between tokens and positions on the model object,
# where any pass in between replaces it. So positions are given to both passes, and that offset is never read.


def _positions(
    backbone: Any, ids_UP: Tensor, mask_UP: Tensor, types: Mapping[str, Tensor], pictures: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Positions of the prompts as arguments, and how far the positions behind a prompt are from its token count (U,),
    which only families with several dimensions need. Prompts are padded on the left here, for the cache has no gaps.
    """
    text_UP = _token_positions(mask_UP)
    if not hasattr(backbone, "get_rope_index"):
        return ({"position_ids": text_UP} if _takes_positions(backbone) else {}), None
    if "image_grid_thw" not in pictures:
        return {"position_ids": text_UP.expand(4, -1, -1)}, torch.zeros_like(text_UP[:, 0])
    seen_3UP, offset_U1 = backbone.get_rope_index(
        ids_UP, image_grid_thw=pictures["image_grid_thw"], attention_mask=mask_UP, **types
    )
    return {"position_ids": torch.cat([text_UP.unsqueeze(0), seen_3UP])}, offset_U1.view(-1)


def _positions_behind(
    backbone: Any, mask_BL: Tensor, offset_U: Tensor | None, prompt_B: Tensor, num_tokens: int
) -> dict[str, Tensor]:
    text_BT = _token_positions(mask_BL)[:, -num_tokens:]
    if offset_U is None:
        return {"position_ids": text_BT} if _takes_positions(backbone) else {}
    seen_BT = text_BT + offset_U[prompt_B].unsqueeze(1)
    return {"position_ids": torch.stack([text_BT, seen_BT, seen_BT, seen_BT])}


def _takes_positions(backbone: Any) -> bool:
    return "position_ids" in inspect.signature(backbone.forward).parameters


def _token_positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def architecture(model: Any) -> type:
    """The class of a model below its adapters."""
    return type(without_adapters(model))


@torch.no_grad()
def shares_prompts_exactly(model: Any, *, half: bool, view: View | None = None, longest: int | None = None) -> bool:
    """Whether this model gives the same hidden states when rollouts continue a cached prompt; tried on a small batch.

    Models whose layers look back a limited way are tried behind that limit, if sequences of a run get there. Where
    frequencies depend on the length, nothing is shared behind the shortest one that changes them (`dopd.lengths`).

    Args:
        model: an unwrapped transformers model in evaluation mode.
        half (`bool`): whether it computes in half precision.
        view (`View`, *optional*): three prompts to try, two of them equal; a few tokens if left out. A vision-language
            model is tried with images.
        longest (`int`, *optional*): tokens of the longest sequence that will occur.
    """
    config = model.config.get_text_config()
    device = model.device
    if view is None:
        length = _trial_length(config, longest)
        ids = torch.linspace(0, config.vocab_size - 1, length + 9, device=device).long()
        prompt_ids = torch.stack([ids[:length], ids[:length], ids[5 : length + 5]])
        prompt_mask = torch.ones_like(prompt_ids)
        prompt_mask[2, : length - 4] = 0
        view = View(prompt_ids, prompt_mask)
    ids = torch.linspace(0, config.vocab_size - 1, 14, device=device).long()
    completion_ids = torch.stack([ids[10:13], ids[11:14], ids[8:11]])
    if view.images:  # a placeholder cannot stand in a completion
        completion_ids[torch.isin(completion_ids, torch.tensor(placeholder_ids(model.config), device=ids.device))] = 1
    mask = torch.ones_like(completion_ids)
    plain = view_hidden_states(model, view, completion_ids, mask, as_features=False)
    try:
        shared = hidden_states_sharing_prompts(model, view, completion_ids, mask)
    except (TypeError, ValueError, AttributeError, NotImplementedError, IndexError, RuntimeError):
        return False  # caches of another kind fail in their own ways
    return bool((plain - shared).abs().max() <= rounding(model, half=half) * plain.abs().max())


_TRIAL_PROMPT, _LONGEST_TRIAL = 5, 8192  # tokens


def _trial_length(config: Any, longest: int | None) -> int:
    """Tokens of a prompt to try: some more than the widest window that sequences of the run fill."""
    names = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size", "local_attention")
    windows = [value for value in (getattr(config, name, None) for name in names) if isinstance(value, int)]
    reach = min(longest or _LONGEST_TRIAL, _LONGEST_TRIAL)
    switch = shortest_switch(config)
    reach = reach if switch is None else min(reach, switch)
    filled = [window for window in windows if 0 < window + 4 <= reach - 3]
    return max([_TRIAL_PROMPT, *(window + 4 for window in filled)])
