"""The views of a completion: one prompt with or without privileged context, followed by the very same token ids.

Shapes: B sequences, P prompt tokens (left-padded), T completion tokens (right-padded), H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from dopd.adapters import without_adapters
from dopd.errors import ModelError
from dopd.lengths import forget_longer_passes, same_regimes
from dopd.random_states import random_states_kept
from dopd.vision.media import FeatureCache, ImageSet, image_inputs
from dopd.vision.tokens import types_behind


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
        teachers (`tuple[str, ...]`): of each row, which of several teachers reads it; empty where there is one.
        lengths (`tuple[int]`): tokens of each prompt. These and the numbers are in the host's memory, so that nobody
            who asks waits for a device; they are looked up there, once, where they are left out.
        numbers (`tuple[int]`): of each row's prompt, the same for the same token ids; shorter prompts come first.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    images: tuple[ImageSet | None, ...] = ()
    token_types: Mapping[str, Tensor] = field(default_factory=dict)
    for_teacher: "View | None" = None
    teachers: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.prompt_ids) or len(self.numbers) != len(self.prompt_ids):
            prompts = unpadded(self.prompt_ids, self.prompt_mask)
            object.__setattr__(self, "lengths", tuple(map(len, prompts)))
            object.__setattr__(self, "numbers", _numbered(prompts))

    def rows(self, start: int, stop: int) -> "View":
        """Rows [start, stop), without the padding that none of them needs."""
        mask = self.prompt_mask[start:stop]
        longest = max(1, *self.lengths[start:stop])
        return View(
            self.prompt_ids[start:stop, -longest:],
            mask[:, -longest:],
            self.images[start:stop],
            {name: types[start:stop, -longest:] for name, types in self.token_types.items()},
            None if self.for_teacher is None else self.for_teacher.rows(start, stop),
            self.teachers[start:stop],
            self.lengths[start:stop],
            self.numbers[start:stop],
        )

    def at(self, rows: Sequence[int]) -> "View":
        """Some rows, in the order in which they are named, without the padding that none of them needs."""
        numbers = torch.tensor(rows, device=self.prompt_ids.device)
        picked = View(
            self.prompt_ids[numbers],
            self.prompt_mask[numbers],
            tuple(self.images[row] for row in rows) if self.images else (),
            {name: types[numbers] for name, types in self.token_types.items()},
            None if self.for_teacher is None else self.for_teacher.at(rows),
            tuple(self.teachers[row] for row in rows) if self.teachers else (),
            tuple(self.lengths[row] for row in rows),
            tuple(self.numbers[row] for row in rows),
        )
        return picked.rows(0, len(rows))

    @cached_property
    def prompt_lengths(self) -> Tensor:
        """Tokens of each prompt (B,)."""
        return self.prompt_mask.sum(1)

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
    lengths, numbers = tuple(map(len, sequences)), _numbered(sequences)
    return View(torch.tensor(ids, device=device), torch.tensor(mask, device=device), lengths=lengths, numbers=numbers)


def _numbered(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """For each prompt the place of its ids among the different ones."""
    keys = [(len(ids), tuple(ids)) for ids in prompts]
    places = {key: number for number, key in enumerate(sorted(set(keys)))}
    return tuple(places[key] for key in keys)


def columns_read(mask: Tensor) -> tuple[int, ...]:
    """Columns of each row (B,) up to the last that its mask (B, T) keeps, with one wait for a device."""
    numbers_T = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return tuple((mask.ne(0) * numbers_T).amax(1).tolist())  # a mask may leave tokens out in between


def unpadded(ids: Tensor, mask: Tensor) -> list[list[Any]]:
    """The tokens (or values) of each row that its mask keeps, with one wait for a device and not one for each row."""
    rows = zip(ids.tolist(), mask.tolist(), strict=True)
    return [[token for token, kept in zip(*row, strict=True) if kept] for row in rows]


def skipping_padding(
    forward: ViewForward,
    view: View,
    completion_ids: Tensor,
    completion_mask: Tensor,
    read: Sequence[int] | None = None,
) -> Tensor:
    """`forward` on the columns that some sequence reads; those left out come back as zeros, which nothing reads.

    Args:
        read (`list[int]`, *optional*): `columns_read` of the mask, where somebody has looked already.
    """
    num_tokens = completion_ids.shape[1]
    longest = max(1, *(columns_read(completion_mask) if read is None else read))
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
    pieces, read = [], columns_read(completion_mask)
    for start in range(0, completion_ids.shape[0], batch_size):
        part = slice(start, start + batch_size)
        hidden = skipping_padding(
            forward, view.rows(part.start, part.stop), completion_ids[part], completion_mask[part], read[part]
        )
        # The position before a completion token predicts it: the last prompt token is the first, the last token none.
        assert hidden.shape[:2] == completion_ids[part].shape, hidden.shape
        pieces.append(hidden)
    return torch.cat(pieces)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is back in the mode it was in, not in one mode for all."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def random_state_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Afterwards the random states of Python, NumPy, the CPU and the devices that hold the model are what they were."""
    return random_states_kept(*{parameter.device for parameter in model.parameters()})


# What two routes to the same numbers may differ by, relative to the largest number: rounding alone.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}
_ROUNDING_HALF = 5e-2


def rounding(model: Any, *, half: bool = False) -> float:
    """What two routes to a model's states or logits may differ by, relative to the largest of them.

    Args:
        half (`bool`): whether it computes in half precision although its weights are wider.
    """
    if half or torch.is_autocast_enabled(model.device.type) or getattr(model, "is_quantized", False):
        return _ROUNDING_HALF
    return _ROUNDING.get(model.dtype, _ROUNDING_HALF)


def backbone_of(model: Any) -> Any:
    """A transformers model below its language-model head and its adapters.

    Raises:
        ModelError: it has no such part.
    """
    whole = without_adapters(model)
    if whole.base_model is not whole:
        return whole.base_model
    # Llama4ForCausalLM names a part that it does not have, and transformers then gives the model itself.
    parts = [part for part in whole.children() if isinstance(part, PreTrainedModel)]
    if len(parts) != 1:
        raise ModelError(
            f"{type(whole).__name__} has no backbone below its output head that dopd can find: use a causal language "
            "model of transformers"
        )
    return parts[0]


class Balance:
    """Collects the load-balancing loss that a mixture of experts computes of its passes, weighted by their tokens."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._tokens: list[Tensor] = []

    @property
    def found(self) -> bool:
        """Whether a model gave any."""
        return bool(self._losses)

    @property
    def loss(self) -> Tensor:
        """The loss, a scalar with the graph of the passes."""
        tokens = torch.stack(self._tokens)
        return (torch.stack(self._losses) * tokens / tokens.sum()).sum()

    def hidden_states(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Last hidden states (B, L, H) of a pass of the whole model, whose own code computes the loss."""
        whole, kept = without_adapters(model), list[Tensor]()
        # Of a vocabulary's logits one position is enough; they are not read.
        few = {"logits_to_keep": 1} if "logits_to_keep" in signature(whole.forward).parameters else {}

        def keep(module: Any, arguments: Any, output: Any) -> None:
            kept.append(output.last_hidden_state)

        handle = backbone_of(model).register_forward_hook(keep)
        try:
            loss = getattr(whole(**inputs, **few, output_router_logits=True), "aux_loss", None)
        finally:
            handle.remove()
        if isinstance(loss, Tensor):
            self._losses.append(loss)
            self._tokens.append(inputs["attention_mask"].sum())
        return kept[-1]


@torch.no_grad()
def _unpadded_lengths(view: View, completion_mask: Tensor) -> list[int]:
    return (view.prompt_lengths + completion_mask.ne(0).sum(1)).tolist()


def view_hidden_states(
    model: Any,
    view: View,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    cache: FeatureCache | None = None,
    as_features: bool = True,
    balance: Balance | None = None,
) -> Tensor:
    """Hidden states (B, T, H) that predict the completions behind the prompts of a view, images included.

    Every sequence runs as if it were alone. Its first token stands at the first position and padding behind its last
    one, where no causal model looks, so learned positions and recurrent states need nothing of their own. Sequences
    that would change one another's rotation frequencies run apart.

    Args:
        model: an unwrapped transformers model.
        view (`View`): B prompts.
        completion_ids (`LongTensor` (B, T)), completion_mask (`Tensor` (B, T)): shared by every view.
        cache (`FeatureCache`, *optional*): image features made earlier with the same weights.
        as_features (`bool`): whether each different image is encoded once; `False` hands pixels over for every row.
        balance (`Balance`, *optional*): gets the load-balancing loss of a mixture of experts.
    """
    groups = same_regimes(model.config, _unpadded_lengths(view, completion_mask))
    if len(groups) == 1:
        return _hidden_states(model, view, completion_ids, completion_mask, cache, as_features, balance)
    parts = [
        _hidden_states(model, view.at(rows), completion_ids[rows], completion_mask[rows], cache, as_features, balance)
        for rows in groups
    ]
    order = torch.tensor([row for rows in groups for row in rows], device=completion_ids.device)
    return torch.cat(parts)[order.argsort()]


def _hidden_states(
    model: Any,
    view: View,
    completion_ids: Tensor,
    completion_mask: Tensor,
    cache: FeatureCache | None,
    as_features: bool,
    balance: Balance | None,
) -> Tensor:
    """`view_hidden_states` of sequences that may run together."""
    backbone = backbone_of(model)
    ids, mask = view.followed_by(completion_ids, completion_mask)
    starts_B1 = (view.prompt_mask.shape[1] - view.prompt_lengths).unsqueeze(1)
    length = int(mask.sum(1).max())
    columns_BL = torch.arange(length, device=ids.device) + starts_B1
    inside_BL = columns_BL < ids.shape[1]
    columns_BL = columns_BL.clamp(max=ids.shape[1] - 1)
    mask = mask.gather(1, columns_BL) * inside_BL
    types = types_behind(without_adapters(model), view.token_types, completion_ids.shape[1])
    types = {name: values.gather(1, columns_BL) * mask for name, values in types.items()}
    forget_longer_passes(backbone, model.config)
    inputs = {
        "input_ids": ids.gather(1, columns_BL),
        "attention_mask": mask,
        "use_cache": False,
        **types,
        **image_inputs(backbone, view.images, view.prompt_ids, cache=cache, as_features=as_features),
    }
    if balance is None:
        hidden = backbone(**inputs, **without_router_logits(backbone)).last_hidden_state
    else:
        hidden = balance.hidden_states(model, inputs)
    # The position before a completion token predicts it. Behind a shorter completion nothing is read.
    steps_T = torch.arange(completion_ids.shape[1], device=ids.device)
    places_BT = (view.prompt_lengths.unsqueeze(1) - 1 + steps_T).clamp(min=0, max=length - 1)
    hidden = hidden.to(ids.device)  # a `device_map` may have the last layers elsewhere
    return hidden.gather(1, places_BT.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def without_router_logits(model: Any) -> dict[str, bool]:
    """An argument that keeps a mixture of experts from returning its routers' logits, which no score reads."""
    if not hasattr(model.config.get_text_config(), "output_router_logits"):
        return {}
    whole = without_adapters(model)
    return {"output_router_logits": False} if "output_router_logits" in signature(whole.forward).parameters else {}


def generation_inputs(
    model: Any, view: View, *, cache: FeatureCache | None = None, as_features: bool = True
) -> dict[str, Any]:
    """Keyword arguments of `generate` for the prompts of a view, each different image encoded once.

    Args:
        model: an unwrapped transformers model.
        view (`View`): B prompts.
        cache (`FeatureCache`, *optional*): keeps the image features for the passes that follow.
        as_features (`bool`): as in `view_hidden_states`.
    """
    images = image_inputs(backbone_of(model), view.images, view.prompt_ids, cache=cache, as_features=as_features)
    images |= without_router_logits(model)
    return {"input_ids": view.prompt_ids, "attention_mask": view.prompt_mask, **view.token_types, **images}
