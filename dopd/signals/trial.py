"""Signals are users' code: each is tried on made-up batches before anything is loaded.

Shapes: B sequences, T completion tokens, V vocabulary.
"""

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dopd.errors import ConfigError, DopdError
from dopd.random_states import random_states_kept
from dopd.registry import place_of
from dopd.signals.batch import SignalBatch
from dopd.signals.measures import MEASURES, take_measure
from dopd.signals.registry import SIGNALS, signal_values
from dopd.sources import CONTRAST, PRIVILEGED, SOURCES

_LENGTHS, _VOCABULARY = (5, 3, 4, 1), 7
# (steps, share of the training that is over, answers to a prompt, in words): what schedules and groups may fail at.
_MOMENTS = (
    (0, 0.0, 2, "at the first step"),
    (1000, 1.0, 2, "at the last step (progress 1)"),
    (0, 0.0, 1, "with one answer to each prompt (num_generations 1), as an evaluation has them"),
)


def made_up_batch(views: Collection[str], *, step: int = 0, progress: float = 0.0, group: int = 2) -> SignalBatch:
    """Four answers with scores of every source.

    Args:
        views (`set[str]`): the prompts that somebody reads, as `RoutingTable.views`.
        step (`int`), progress (`float`): of the batch.
        group (`int`): answers to a prompt.
    """
    mask, logprobs, entropies, measures = _scores()
    return SignalBatch(
        mask.clone(),
        {name: values.clone() for name, values in logprobs.items()},
        {name: values.clone() for name, values in entropies.items()},
        {name: values.clone() for name, values in measures.items()},
        rewards=torch.tensor([1.5, -0.5, 0.0, 1.0], dtype=torch.float64),
        scores=torch.tensor([1.0, 0.0, 0.0, 0.5], dtype=torch.float64),
        has_privileged=torch.tensor([True, True, False, False]) if PRIVILEGED in views else None,
        has_contrast=torch.tensor([True, True, False, False]) if CONTRAST in views else None,
        num_generations=group,
        step=step,
        progress=progress,
    )


@cache
def _scores() -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The mask (B, T), and log-probs, entropies and measures (B, T) by name."""
    places_T = torch.arange(max(_LENGTHS))
    mask = (places_T < torch.tensor(_LENGTHS).unsqueeze(1)).long()
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(_VOCABULARY, mask.shape, generator=generator)
    logits = {name: torch.randn(*mask.shape, _VOCABULARY, generator=generator) for name in SOURCES}
    logprobs_BTV = {name: values.log_softmax(-1) for name, values in logits.items()}
    flat = {name: values.flatten(0, 1) for name, values in logits.items()}
    return (
        mask,
        {name: values.gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1) for name, values in logprobs_BTV.items()},
        {name: -(values.exp() * values).sum(-1) for name, values in logprobs_BTV.items()},
        {name: take_measure(name, flat).view(mask.shape) for name in MEASURES},
    )


def try_signal(name: str, options: Mapping[str, Any], views: Collection[str], *, compared: bool) -> None:
    """Compute a signal of made-up batches: of the first and the last step, and of single answers; the random states are
    left as they were.

    Args:
        name (`str`), options (`dict`): of the signal.
        views (`set[str]`): as of `made_up_batch`.
        compared (`bool`): whether its values are only compared, and may be infinite.

    Raises:
        ConfigError: its code raises, reads what it was not registered with, or returns no number for every token.
    """
    for step, progress, group, when in _MOMENTS:
        batch = made_up_batch(views, step=step, progress=progress, group=group)
        about = f"a made-up batch of {len(batch.mask)} answers, {when}"
        try:
            with torch.no_grad(), random_states_kept():
                values_N = signal_values(name, batch, options)[batch.keep].double()
        except DopdError as error:
            raise ConfigError(f"{error} (on {about})") from error
        wrong_N = torch.isnan(values_N) if compared else ~torch.isfinite(values_N)
        if bool(wrong_N.any()):
            place, kind = place_of(SIGNALS.find(name).compute), "number" if compared else "finite number"
            raise ConfigError(
                f"signal {name!r}, {place}, gives {float(values_N[wrong_N][0])} at {int(wrong_N.sum())} of "
                f"{len(values_N)} scored tokens of {about}: it must give a {kind} for each"
            )
