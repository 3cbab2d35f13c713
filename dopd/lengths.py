"""Models whose rotation frequencies depend on how long the longest sequence of a pass is.

"longrope" (Phi-3) has two sets of frequencies and changes to the second one behind a length; "dynamic" (NTK scaling)
has others for every length behind one. A row beside a longer one, or a cached prompt, then gets other frequencies than
it has alone. So sequences run together only if they are of one regime: those that would get the same frequencies alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

_LONGROPE = ("longrope", "su")  # "su" is what Phi-3 called it at first
_DYNAMIC = "dynamic"


def _switches(config: Any) -> Iterator[tuple[str, int]]:
    """Of every kind of layer whose frequencies depend on the length: the kind of rotation, and the length behind which
    they do.
    """
    config = config.get_text_config()
    limit = int(getattr(config, "max_position_embeddings", None) or 0)
    for name in ("rope_parameters", "rope_scaling"):
        declared = getattr(config, name, None)
        if not isinstance(declared, Mapping):
            continue
        for rope in [declared, *(part for part in declared.values() if isinstance(part, Mapping))]:
            kind = str(rope.get("rope_type", rope.get("type", "")))
            if kind in _LONGROPE:
                original = rope.get("original_max_position_embeddings")
                yield kind, int(original or getattr(config, "original_max_position_embeddings", None) or limit)
            elif _DYNAMIC in kind:
                yield kind, limit


def shortest_switch(config: Any) -> int | None:
    """Tokens up to which a model has one set of frequencies; `None` if it has one set for all lengths."""
    return min((length for _, length in _switches(config)), default=None)


def regime(config: Any, length: int) -> tuple[int, ...]:
    """What sets of frequencies a sequence of `length` tokens gets: equal for equal sets, all 0 for the first set."""
    return tuple(
        0 if length <= switch else length if _DYNAMIC in kind else 1 for kind, switch in set(_switches(config))
    )


def is_first_regime(config: Any, length: int) -> bool:
    """Whether sequences up to `length` tokens all have the same frequencies."""
    return not any(regime(config, length))


def crossing(config: Any, starts: Sequence[int], ends: Sequence[int]) -> int:
    """Sequences that change their frequencies while they are drawn: from `starts` tokens (the prompt) to `ends`."""
    return sum(regime(config, start) != regime(config, end) for start, end in zip(starts, ends, strict=True))


def same_regimes(config: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Rows that may run together, as lists of row numbers."""
    if shortest_switch(config) is None:
        return [list(range(len(lengths)))]
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(regime(config, length), []).append(row)
    return list(groups.values())


def forget_longer_passes(model: nn.Module, config: Any) -> None:
    """Give a model with "dynamic" rotations the frequencies that it was made with.

    transformers keeps those of the longest pass so far, so without this scores would depend on what ran before.
    """
    if not any(_DYNAMIC in kind for kind, _ in _switches(config)):
        return
    for module in model.modules():
        first = getattr(module, "original_max_seq_len", None)
        if first is None:
            continue
        for name in [name for name in vars(module) | module._buffers if name.endswith("original_inv_freq")]:
            prefix = name.removesuffix("original_inv_freq")
            current = getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", getattr(module, name).to(current.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", first)
