"""The views of a completion: one prompt with or without privileged context, followed by the very same token ids.

Shapes: B sequences, P prompt tokens (left-padded), T completion tokens (right-padded), H hidden size.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dopd.errors import ScoringError
from dopd.vision.media import FeatureCache, ImageSet, image_inputs
from dopd.vision.tokens import types_behind

# (input_ids (B, P + T), attention_mask (B, P + T), T) -> hidden states (B, T, H) that predict the completion tokens
Forward = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class View:
    """A prompt as one model reads it. Each view has its own prompt length; completion ids are shared by all.

    Attributes:
        prompt_ids (`LongTensor` (B, P)): left-padded; image tokens expanded.
        prompt_mask (`LongTensor` (B, P)): 0 at padding.
        images (`tuple`): of each row, an `ImageSet` or `None`; empty where no row can have images.
        token_types (`dict[str, Tensor]`): what a vision-language processor says of every token (B, P), 0 at padding.
        for_teacher (`View`, *optional*): the same prompts as the teacher's own processor encodes them, where it does
            so otherwise than the student's.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    images: tuple[ImageSet | None, ...] = ()
    token_types: Mapping[str, Tensor] = field(default_factory=dict)
    for_teacher: "View | None" = None

    def rows(self, start: int, stop: int) -> "View":
        """Rows [start, stop), without the padding that none of them needs."""
        mask = self.prompt_mask[start:stop]
        longest = max(int(mask.sum(1).max()), 1)
        return View(
            self.prompt_ids[start:stop, -longest:],
            mask[:, -longest:],
            self.images[start:stop],
            {name: types[start:stop, -longest:] for name, types in self.token_types.items()},
            None if self.for_teacher is None else self.for_teacher.rows(start, stop),
        )

    def followed_by(self, completion_ids: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask (B, P + T) of the prompts with their completions behind them."""
        mask = completion_mask.to(self.prompt_mask.dtype)
        return torch.cat([self.prompt_ids, completion_ids], dim=1), torch.cat([self.prompt_mask, mask], dim=1)


# (view of B prompts, completion_ids (B, T), completion_mask (B, T)) -> the same hidden states
ViewForward = Callable[[View, Tensor, Tensor], Tensor]


def left_padded(sequences: list[list[int]], pad_id: int, device: torch.device) -> View:
    """Prompts of different lengths as one `View`."""
    longest = max(map(len, sequences))
    ids = [[pad_id] * (longest - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return View(torch.tensor(ids, device=device), torch.tensor(mask, device=device))


def skipping_padding(forward: ViewForward, view: View, completion_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """`forward` on the columns that some sequence reads; those left out come back as zeros, which nothing reads."""
    num_tokens = completion_ids.shape[1]
    longest = max(int(completion_mask.ne(0).any(0).sum()), 1)  # completions are padded on the right
    trimmed = view.rows(0, completion_ids.shape[0])
    hidden = forward(trimmed, completion_ids[:, :longest], completion_mask[:, :longest])
    return functional.pad(hidden, (0, 0, 0, num_tokens - longest))


@torch.no_grad()
def in_batches(
    forward: ViewForward, view: View, completion_ids: Tensor, completion_mask: Tensor, batch_size: int
) -> Tensor:
    """Last hidden states at the positions that predict each completion token, `batch_size` sequences at a time.

    Args:
        forward (`ViewForward`): runs one model's backbone on some sequences.
        view (`View`): the prompt that this model reads.
        completion_ids (`LongTensor` (B, T)), completion_mask (`Tensor` (B, T)): shared by every view.
        batch_size (`int`): sequences per forward pass.

    Returns:
        `Tensor` (B, T, H) in the model's own precision.
    """
    pieces = []
    for start in range(0, completion_ids.shape[0], batch_size):
        part = slice(start, start + batch_size)
        hidden = skipping_padding(
            forward, view.rows(part.start, part.stop), completion_ids[part], completion_mask[part]
        )
        # The position before a completion token predicts it: the last prompt token is the first, the last token none.
        assert hidden.shape[:2] == completion_ids[part].shape, hidden.shape
        pieces.append(hidden)
    return torch.cat(pieces)


def completion_hidden_states(
    forward: Forward, view: View, completion_ids: Tensor, completion_mask: Tensor, batch_size: int
) -> Tensor:
    """`in_batches` for a model that reads prompt and completion as one sequence."""

    def whole_sequences(part: View, ids: Tensor, mask: Tensor) -> Tensor:
        return forward(*part.followed_by(ids, mask), ids.shape[1])

    return in_batches(whole_sequences, view, completion_ids, completion_mask, batch_size)


def check_alive(source: str, logprobs: Tensor, entropy: Tensor, mask: Tensor, vocab_size: int) -> None:
    """Raise `ScoringError` if a source's scores cannot come from a working model.

    A uniform distribution (weights lost on the way, an untrained head) or one constant log-prob for every token teaches
    nothing, and looks like a loss all the same.

    Args:
        source (`str`): its name, for the message.
        logprobs, entropy (`Tensor` (B, T)): scores of the sampled tokens, nats.
        mask (`Tensor` (B, T)): non-zero where a token is scored.
        vocab_size (`int`): size of the vocabulary.
    """
    values, entropies = logprobs[mask != 0].double(), entropy[mask != 0].double()
    if values.numel() < 8:
        return
    if not bool(torch.isfinite(entropies).all()):
        raise ScoringError(f"{source}: its distributions are not finite (NaN or infinite logits): check the checkpoint")
    uniform = torch.log(torch.tensor(float(vocab_size))).item()
    if float(entropies.min()) > uniform - 1e-3:
        raise ScoringError(
            f"{source} is dead: its distribution is uniform over {vocab_size} tokens at all {values.numel()} scored "
            "positions. Its weights are not those of a trained model: check the checkpoint path and any offloading"
        )
    # Answers of one token to one prompt are scored at one position: there, equal scores say nothing.
    several_positions = int((mask != 0).sum(1).max()) > 1
    if several_positions and float(values.std()) < 1e-6 and float(entropies.std()) < 1e-6:
        raise ScoringError(
            f"{source} is dead: log-prob {float(values[0]):.4f} and the same entropy for all {values.numel()} scored "
            "tokens. Its output does not depend on its input: check the checkpoint"
        )


def has_adapters(model: Any) -> bool:
    """Whether an unwrapped model is one of peft. Every pass asks; accelerate's answer searches the disk each time."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def without_adapters(model: Any) -> Any:
    """The transformers model inside one of peft (adapters stay in its layers), or the model itself."""
    return model.base_model.model if has_adapters(model) else model


def backbone_of(model: Any) -> Any:
    """A transformers model below its language-model head and its adapters."""
    return without_adapters(model).base_model


def last_hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor, num_keep: int) -> Tensor:
    """Hidden states (B, num_keep, H) of a transformers text model that predict the last `num_keep` tokens."""
    hidden = backbone_of(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return hidden[:, -num_keep - 1 : -1]


def view_hidden_states(
    model: Any,
    view: View,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    cache: FeatureCache | None = None,
    as_features: bool = True,
) -> Tensor:
    """Hidden states (B, T, H) that predict the completions behind the prompts of a view, images included.

    Args:
        model: an unwrapped transformers model.
        view (`View`): B prompts.
        completion_ids (`LongTensor` (B, T)), completion_mask (`Tensor` (B, T)): shared by every view.
        cache (`FeatureCache`, *optional*): image features made earlier with the same weights.
        as_features (`bool`): whether each different image is encoded once; `False` hands pixels over for every row.
    """
    backbone = backbone_of(model)
    input_ids, attention_mask = view.followed_by(completion_ids, completion_mask)
    output = backbone(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
        **types_behind(without_adapters(model), view.token_types, completion_ids.shape[1]),
        **image_inputs(backbone, view.images, view.prompt_ids, cache=cache, as_features=as_features),
    )
    return output.last_hidden_state[:, -completion_ids.shape[1] - 1 : -1]


def generation_inputs(model: Any, view: View, *, cache: FeatureCache | None = None) -> dict[str, Any]:
    """Keyword arguments of `generate` for the prompts of a view, each different image encoded once.

    Args:
        model: an unwrapped transformers model.
        view (`View`): B prompts.
        cache (`FeatureCache`, *optional*): keeps the image features for the passes that follow.
    """
    images = image_inputs(backbone_of(model), view.images, view.prompt_ids, cache=cache)
    return {"input_ids": view.prompt_ids, "attention_mask": view.prompt_mask, **view.token_types, **images}
