"""Whether a model's passes give what they must, tried on a few tokens before anything is trained, answered or shown.

Shapes: B sequences, T completion tokens, H hidden size.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from dopd.errors import ModelError, ScoringError
from dopd.generation import runs, without_placeholders, words
from dopd.heads import Head
from dopd.lengths import shortest_switch
from dopd.scoring import (
    View,
    backbone_of,
    evaluation_mode,
    left_padded,
    random_state_kept,
    rounding,
    view_hidden_states,
    without_router_logits,
)
from dopd.trainer.context import context_of

# Two routes to the same logits differ by rounding alone. Half precision rounds at about 3 significant digits.
_SELF_KL_LIMIT = {torch.float64: 1e-9, torch.float32: 1e-5}
_SELF_KL_LIMIT_HALF = 5e-2
_LENGTHS, _STEPS = (2, 9, 5), 3  # prompts and completions of the trial
_NOISY_STEPS, _NOISY_TRIES = 24, 4  # tokens of a completion, and passes, that are looked through for noise

ViewForward = Callable[[Any, View, Tensor, Tensor], Tensor]


def check_kind(name: str, config: Any) -> None:
    """Refuse by its configuration alone what is no causal language model.

    Raises:
        ModelError: an encoder-decoder, whose answers are not behind their prompts in one sequence.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name}: {type(config).__name__} (model_type {config.model_type!r}) is an encoder-decoder. dopd scores an "
            "answer behind its prompt in one sequence: use a causal (decoder-only) language model"
        )


def check_passes(
    name: str,
    model: Any,
    *,
    half: bool = False,
    view: View | None = None,
    longest: int | None = None,
    as_features: bool = True,
) -> None:
    """Try one model's passes.

    Args:
        name (`str`): of the model, for messages.
        model: an unwrapped transformers model with whole parameters.
        half (`bool`): whether it computes in half precision although its weights are wider.
        view (`View`, *optional*): prompts with images, for a model that reads them.
        longest (`int`, *optional*): tokens of the longest sequence that will occur.
        as_features (`bool`): as in `view_hidden_states`.

    Raises:
        ModelError, ScoringError: naming the model and what is wrong with it.
    """
    with runs(name, model), evaluation_mode(model), torch.no_grad():
        route = partial(view_hidden_states, as_features=as_features)
        check_causal(name, model, view, hidden_states=route)
        check_rows_apart(name, model, view, hidden_states=route, half=half)
        if view is None:
            check_length(name, model, longest, half=half)


# --- What is scored is what the model says


@torch.no_grad()
def self_divergence(model: Any, hidden_states: ViewForward = view_hidden_states) -> float:
    """Largest KL, nats, between a model's own logits and those rebuilt from its hidden states and head.

    The same weights and the same prompt give 0 to rounding; anything else means that the loss would be taken on logits
    that the model never produces (a missed scale, soft cap or adapter).

    Args:
        model: a transformers model in evaluation mode.
        hidden_states (callable): (model, view, completion_ids, mask) -> (B, T, H), the route that scoring takes.
    """
    config = model.config.get_text_config()
    count = min(8, config.vocab_size)
    input_ids = torch.linspace(0, config.vocab_size - 1, count, device=model.device).long().unsqueeze(0)
    mask = torch.ones_like(input_ids)
    own = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **without_router_logits(model))
    view = View(input_ids[:, :1], mask[:, :1])
    rebuilt = Head.of_model(model).logits(hidden_states(model, view, input_ids[:, 1:], mask[:, 1:])).double()
    # The head gives placeholders of images no probability, the model's own does.
    both = (own.logits[:, :-1].double(), rebuilt)
    first, second = (without_placeholders(logits, model).log_softmax(-1) for logits in both)
    return float((first.exp() * (first - second)).sum(-1).abs().max())


def check_self_divergence(name: str, model: Any, *, half: bool = False) -> None:
    """Raise `ModelError` if `self_divergence` is more than rounding."""
    with runs(name, model), evaluation_mode(model):
        value = self_divergence(model)
    if math.isnan(value):
        raise ScoringError(f"{name}: its logits are not finite (NaN or infinite) on a few tokens: check the checkpoint")
    limit = _SELF_KL_LIMIT_HALF if half else _SELF_KL_LIMIT.get(model.dtype, _SELF_KL_LIMIT_HALF)
    if not value <= limit:
        raise ModelError(
            f"{name}: its logits and those rebuilt from its hidden states and output head differ by KL "
            f"{value:.3g} nats (limit {limit:g} for {model.dtype}). dopd does not know a post-processing step of "
            f"{type(model).__name__}"
        )


# --- No token is read by what stands before it


@torch.no_grad()
def check_causal(
    name: str,
    model: Any,
    view: View | None = None,
    *,
    hidden_states: ViewForward = view_hidden_states,
    gradients: bool = True,
) -> None:
    """Raise `ModelError` if what is scored depends on the tokens that it predicts, or on those behind them.

    The last token of every completion is replaced: the states before it must be the same, bit for bit. Where rounding
    depends on the batch (experts that get one token more), the gradient decides: it is 0 where nothing is read. So no
    limit has to be chosen, and half precision hides nothing.

    Args:
        view (`View`, *optional*): prompts to try; a few words if left out.
        hidden_states (callable): the route of scoring.
        gradients (`bool`): whether the gradient can be asked. Where it cannot (weights split over processes), experts
            may differ by rounding.
    """
    view = view or left_padded([words(model, count) for count in _LENGTHS], 0, model.device)
    some = words(model, _STEPS + 1)
    ids = torch.tensor([some[:_STEPS]] * len(view.prompt_ids), device=view.prompt_ids.device)
    others, mask = ids.clone(), torch.ones_like(ids)
    others[:, -1] = some[_STEPS]
    first, second = (hidden_states(model, view, tokens, mask) for tokens in (ids, others))
    if torch.equal(first, second):
        return
    if not bool(torch.isfinite(first).all()):
        raise ScoringError(f"{name}: its hidden states are not finite (NaN or infinite): check the checkpoint")
    difference = float((first - second).abs().max() / first.abs().max())
    if gradients:
        reads = _reads_the_last_token(model, view, ids, mask, hidden_states)
    else:
        reads = not (has_experts(model.config) and difference <= rounding(model))
    if reads:
        raise ModelError(
            f"{name}: {type(model).__name__} is not causal here: the states that predict a completion change by "
            f"{difference:.2g} of the largest when a token behind them is replaced, so every token would be scored by "
            "a model that has seen it. "
            + (
                "What its processor says of each token (token_type_ids) marks the completion as part of the prompt"
                if view.token_types
                else "Use a causal language model, or set is_decoder in its configuration"
            )
        )


def has_experts(config: Any) -> bool:
    """Whether tokens are sent to experts, so that a pass computes a token in a group that depends on the others."""
    config = config.get_text_config()
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _reads_the_last_token(model: Any, view: View, ids: Tensor, mask: Tensor, hidden_states: ViewForward) -> bool:
    """Whether a state that is scored has a gradient with respect to the last token's embedding, in any row."""
    for row in range(len(ids)):
        kept: list[Tensor] = []

        def keep(module: Any, arguments: Any, output: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[-1]

        handle = model.get_input_embeddings().register_forward_hook(keep)
        try:
            with torch.enable_grad():
                part = view.at([row])
                hidden = hidden_states(model, part, ids[row : row + 1], mask[row : row + 1])
                weights = torch.linspace(0.5, 1.5, hidden.numel(), device=hidden.device).view_as(hidden)
                gradients = torch.autograd.grad((hidden.float() * weights).sum(), kept, allow_unused=True)
        finally:
            handle.remove()
        # One row, so the tokens are in order whether the batch is the first dimension or the second (XLNet).
        tokens = [gradient.flatten(0, -2) for gradient in gradients if gradient is not None]
        length = part.lengths[0] + ids.shape[1]
        if not tokens or any(len(gradient) != length or bool(gradient[-1].any()) for gradient in tokens):
            return True
    return False


# --- No row changes another one


@torch.no_grad()
def check_rows_apart(
    name: str,
    model: Any,
    view: View | None = None,
    *,
    hidden_states: ViewForward = view_hidden_states,
    half: bool = False,
) -> None:
    """Raise `ModelError` unless a short sequence beside a longer one has the states that it has alone.

    Args: as `check_causal` and `check_passes`.
    """
    view = view or left_padded([words(model, count) for count in _LENGTHS], 0, model.device)
    ids = torch.tensor([words(model, _STEPS)] * len(view.prompt_ids), device=view.prompt_ids.device)
    counts = torch.arange(len(ids), device=ids.device).unsqueeze(1) % _STEPS + 1
    mask = (torch.arange(_STEPS, device=ids.device) < counts).long()
    together = hidden_states(model, view, ids, mask)
    for row, count in enumerate(mask.sum(1).tolist()):
        alone = hidden_states(model, view.at([row]), ids[row : row + 1, :count], mask[row : row + 1, :count])[0]
        largest = float(alone.abs().max())
        if largest == 0:
            raise ModelError(f"{name}: the states of {type(model).__name__} are zero everywhere: are its weights zero?")
        difference = float((alone - together[row, :count]).abs().max()) / largest
        if not difference <= rounding(model, half=half):
            raise ModelError(
                f"{name}: {type(model).__name__} gives a sequence other states beside a longer one than alone (by "
                f"{difference:.2g} of the largest): padding behind a sequence changes it, so batches cannot be scored"
            )


@torch.no_grad()
def training_noise(model: Any, view: View | None = None, *, hidden_states: ViewForward = view_hidden_states) -> float:
    """How far the states of the trained view are from those that are scored: training mode to evaluation mode, relative
    to the largest state. Rounding, unless something is left out or shaken in training mode.

    Args: as `check_causal`.
    """
    view = view or left_padded([words(model, count) for count in _LENGTHS], 0, model.device)
    # Noise may touch a few tokens alone, such as those whose experts are nearly as likely as one another.
    ids = torch.tensor([words(model, _NOISY_STEPS)] * len(view.prompt_ids), device=view.prompt_ids.device)
    mask = torch.ones_like(ids)
    noise = 0.0
    with evaluation_mode(model):
        scored = hidden_states(model, view, ids, mask)
        model.train()
        with random_state_kept(model):
            for _ in range(_NOISY_TRIES):
                trained = hidden_states(model, view, ids, mask)
                noise = max(noise, float((scored - trained).abs().max() / scored.abs().max()))
    return noise


@torch.no_grad()
def check_length(name: str, model: Any, longest: int | None = None, *, half: bool = False) -> None:
    """Raise `ModelError` if a text model's states depend on how far the longest sequence reaches, and no configuration
    says so.

    A few tokens run with the last one at the next position, and at the last position that will occur.
    """
    backbone = backbone_of(model)
    limits = [limit for limit in (longest, context_of(model.config)) if limit]
    parameters = signature(backbone.forward).parameters
    if shortest_switch(model.config) is not None or not limits or "position_ids" not in parameters:
        return  # scored apart, or nothing to try
    if hasattr(backbone, "get_rope_index"):
        return  # a vision-language model read with a tokenizer: its positions have several dimensions
    ids = torch.tensor([words(model, _LENGTHS[1])], device=model.device)
    near = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    far = near.clone()
    far[0, -1] = max(min(limits) - 1, ids.shape[1] - 1)
    fixed: Mapping[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    first, second = (
        backbone(input_ids=ids, position_ids=positions, **fixed).last_hidden_state[:, :-1] for positions in (near, far)
    )
    difference = float((first - second).abs().max() / first.abs().max())
    if not difference <= rounding(model, half=half):
        raise ModelError(
            f"{name}: {type(model).__name__} gives the first tokens of a sequence other states when the last one "
            f"stands at position {int(far[0, -1])} (by {difference:.2g} of the largest): its positions depend on the "
            "length, in a way that its configuration does not say (dopd knows the rope types longrope and dynamic). "
            "Sequences of different lengths cannot be scored together; use a model with fixed frequencies"
        )
