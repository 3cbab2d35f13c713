"""The images of prompts as a model reads them, and each different one through the vision tower once.

Shapes: B rows (sequences), S different image sets among them, N image tokens, H hidden size of the language model.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dopd.errors import ModelError

# Read beside the features: positions of image tokens are made from it.
_POSITION_FIELDS = ("image_grid_thw",)
_FEATURES = "mm_encoder_outputs"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one prompt, as its processor gave them, apart from its text.

    Attributes:
        key (`tuple`): equal for equal images through the same processor.
        fields (`dict[str, Tensor]`): what the processor made of these images alone (`pixel_values`, and beside it
            `image_grid_thw`, `pixel_attention_mask`, `image_sizes`, ... as the family has it). The first dimension
            counts patches, tiles, images or the one prompt, so the fields of several sets are joined along it.
    """

    key: tuple[str, ...]
    fields: Mapping[str, Tensor]


def different_sets(rows: Sequence[ImageSet | None]) -> tuple[list[ImageSet], list[int]]:
    """The different sets in the order of their first row, and for every row the number of its set (-1 for none)."""
    numbers: dict[tuple[str, ...], int] = {}
    sets: list[ImageSet] = []
    row_numbers = []
    for row in rows:
        if row is not None and row.key not in numbers:
            numbers[row.key] = len(sets)
            sets.append(row)
        row_numbers.append(-1 if row is None else numbers[row.key])
    return sets, row_numbers


def joined(sets: Sequence[ImageSet], device: Any) -> dict[str, Tensor]:
    """The fields of several sets as one batch: joined along the first dimension, the others padded with zeros.

    This is the slicing rule of every family: packed patches (Qwen) and one entry per image (LLaVA, Gemma 3) have equal
    further dimensions and are only joined; a row per prompt (Idefics3, SmolVLM) is padded to the most and the largest
    images, as its processor does.
    """
    return {name: _joined([one.fields[name] for one in sets]).to(device) for name in (sets[0].fields if sets else ())}


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size for have, want in zip(tensor.shape[1:], shape, strict=True) for size in (want - have, 0)]
        padded.append(functional.pad(tensor, missing[::-1]) if any(missing) else tensor)
    return torch.cat(padded)


@dataclass(frozen=True)
class Features:
    """What the vision tower made of one image set.

    Attributes:
        levels (`list[Tensor]` (N, H)): at the input of the language model, then what deeper layers add (Qwen3-VL).
        kind (`type`): the output class of the family.
        as_tensor (`bool`): whether the family reads one tensor, and not a list of them.
    """

    levels: list[Tensor]
    kind: type
    as_tensor: bool

    @staticmethod
    def together(rows: Sequence["Features"]) -> Any:
        """The features of several rows as the output that the backbone's forward reads."""

        def packed(level: Sequence[Tensor]) -> Any:
            return torch.cat(list(level)).unsqueeze(0) if rows[0].as_tensor else list(level)

        pooled, *deeper = map(packed, zip(*(row.levels for row in rows), strict=True))
        return rows[0].kind(pooler_output=pooled, **({"deepstack_features": deeper} if deeper else {}))


@dataclass
class FeatureCache:
    """Features of image sets that stay valid while a model's weights do; kept only for passes without gradient."""

    _kept: dict[tuple[Any, ...], Features] = field(default_factory=dict)

    def get(self, backbone: nn.Module, image_set: ImageSet) -> Features | None:
        return None if torch.is_grad_enabled() else self._kept.get(self._place(backbone, image_set))

    def put(self, backbone: nn.Module, image_set: ImageSet, features: Features) -> None:
        if not torch.is_grad_enabled():
            self._kept[self._place(backbone, image_set)] = features

    def clear(self) -> None:
        """Forget everything: the weights are about to change."""
        self._kept.clear()

    @staticmethod
    def _place(backbone: nn.Module, image_set: ImageSet) -> tuple[Any, ...]:
        # Mixed precision rounds features otherwise than full precision does.
        precision = torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
        return (id(backbone), backbone.training, precision, *image_set.key)


def takes_features(backbone: Any) -> bool:
    """Whether a backbone can be given the features of its images in place of the images."""
    return hasattr(backbone, "get_image_features") and _FEATURES in inspect.signature(backbone.forward).parameters


def image_inputs(
    backbone: Any,
    rows: Sequence[ImageSet | None],
    prompt_ids: Tensor,
    *,
    cache: FeatureCache | None = None,
    as_features: bool = True,
) -> dict[str, Any]:
    """Keyword arguments for a forward pass (or `generate`) over rows with these images; none for rows without.

    Each different set goes through the vision tower once, however many rows show it, and its features are handed out
    to them; the gradient of every row reaches the tower.

    Args:
        backbone: the model below the language-model head.
        rows (`list[ImageSet]`): of the B rows; `None` where a row has no images.
        prompt_ids (`LongTensor` (B, P)): their prompts, placeholders expanded.
        cache (`FeatureCache`, *optional*): of this step.
        as_features (`bool`): `False` hands over pixels, for a backbone that takes nothing else.

    Raises:
        ModelError: the prompts have more or fewer image tokens than the vision tower gives features.
    """
    sets, numbers = different_sets(rows)
    if not sets:
        return {}
    device = prompt_ids.device
    shown = [number for number in numbers if number >= 0]
    every_row = [row for row in rows if row is not None]
    if not (as_features and takes_features(backbone)):
        return joined(every_row, device)
    positions = joined([ImageSet(row.key, _named(row.fields, _POSITION_FIELDS)) for row in every_row], device)
    tokens_B = (prompt_ids == backbone.config.image_token_id).sum(1).tolist()
    counts = [tokens_B[numbers.index(number)] for number in range(len(sets))]
    parts = [None if cache is None else cache.get(backbone, image_set) for image_set in sets]
    missing = [n for n, part in enumerate(parts) if part is None]
    if missing:
        encoded = _encode(backbone, [sets[n] for n in missing], [counts[n] for n in missing], device)
        for n, part in zip(missing, encoded, strict=True):
            parts[n] = part
            if cache is not None:
                cache.put(backbone, sets[n], part)
    kept = [part for part in parts if part is not None]
    return {**positions, _FEATURES: {"image": Features.together([kept[number] for number in shown])}}


def _named(fields: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: fields[name] for name in names if name in fields}


def _encode(backbone: Any, sets: Sequence[ImageSet], counts: Sequence[int], device: Any) -> list[Features]:
    parameters = inspect.signature(backbone.get_image_features).parameters
    fields = {name: value for name, value in joined(sets, device).items() if name in parameters}
    output = backbone.get_image_features(**fields, return_dict=True)
    levels = [_flat(output.pooler_output), *map(_flat, getattr(output, "deepstack_features", None) or [])]
    if levels[0].shape[0] != sum(counts):
        raise ModelError(
            f"{type(backbone).__name__} makes {levels[0].shape[0]} features of images that stand for {sum(counts)} "
            "tokens in their prompts: the processor is not this model's (patch size, merging or image size differ)"
        )
    as_tensor = isinstance(output.pooler_output, Tensor)
    pieces = zip(*(level.split(list(counts)) for level in levels), strict=True)
    return [Features(list(piece), type(output), as_tensor) for piece in pieces]


def _flat(features: Any) -> Tensor:
    if isinstance(features, Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([feature.reshape(-1, feature.shape[-1]) for feature in features])
