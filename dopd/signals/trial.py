"""Signals are users' code: each is tried on a made-up batch before anything is loaded.

Shapes: B sequences, T completion tokens, V vocabulary.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from dopd.errors import ConfigError, DopdError
from dopd.random_states import random_states_kept
from dopd.registry import place_of
from dopd.signals.batch import SignalBatch
from dopd.signals.measures import MEASURES, take_measure
from dopd.signals.registry import SIGNALS, signal_values
from dopd.sources import CONTRAST, PRIVILEGED, SOURCES

_LENGTHS, _VOCABULARY = (5, 3, 4, 1), 7


def made_up_batch(views: Collection[str]) -> SignalBatch:
    """Two answers to each of two prompts, with scores of every source.

    Args:
        views (`set[str]`): the prompts that somebody reads, as `RoutingTable.views`.
    """
    places_T = torch.arange(max(_LENGTHS))
    mask = (places_T < torch.tensor(_LENGTHS).unsqueeze(1)).long()
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(_VOCABULARY, mask.shape, generator=generator)
    logits = {name: torch.randn(*mask.shape, _VOCABULARY, generator=generator) for name in SOURCES}
    logprobs_BTV = {name: values.log_softmax(-1) for name, values in logits.items()}
    flat = {name: values.flatten(0, 1) for name, values in logits.items()}
    return SignalBatch(
        mask,
        {name: values.gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1) for name, values in logprobs_BTV.items()},
        {name: -(values.exp() * values).sum(-1) for name, values in logprobs_BTV.items()},
        {name: take_measure(name, flat).view(mask.shape) for name in MEASURES},
        rewards=torch.tensor([1.5, -0.5, 0.0, 1.0], dtype=torch.float64),
        scores=torch.tensor([1.0, 0.0, 0.0, 0.5], dtype=torch.float64),
        has_privileged=torch.tensor([True, True, False, False]) if PRIVILEGED in views else None,
        has_contrast=torch.tensor([True, True, False, False]) if CONTRAST in views else None,
        num_generations=2,
    )


def try_signal(name: str, options: Mapping[str, Any], views: Collection[str], *, compared: bool) -> None:
    """Compute a signal of a made-up batch; the random states are left as they were.

    Args:
        name (`str`), options (`dict`): of the signal.
        views (`set[str]`): as of `made_up_batch`.
        compared (`bool`): whether its values are only compared, and may be infinite.

    Raises:
        ConfigError: its code raises, reads what it was not registered with, or returns no number for every token.
    """
    batch = made_up_batch(views)
    try:
        with torch.no_grad(), random_states_kept():
            values_N = signal_values(name, batch, options)[batch.keep].double()
    except DopdError as error:
        raise ConfigError(f"{error} (on a made-up batch of {len(batch.mask)} answers)") from error
    wrong_N = torch.isnan(values_N) if compared else ~torch.isfinite(values_N)
    if bool(wrong_N.any()):
        place, kind = place_of(SIGNALS.find(name).compute), "number" if compared else "finite number"
        raise ConfigError(
            f"signal {name!r}, {place}, gives {float(values_N[wrong_N][0])} at {int(wrong_N.sum())} of {len(values_N)} "
            f"scored tokens of a made-up batch: it must give a {kind} for each"
        )
