"""Named signals: functions from a scored batch to a number of every token. Shapes: B sequences, T completion tokens."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from dopd.errors import ConfigError, DopdError, ScoringError, first_line
from dopd.guests import as_guest
from dopd.interrupts import Stopped
from dopd.registry import Registry, place_of
from dopd.signals.batch import SignalBatch
from dopd.signals.measures import MEASURES
from dopd.sources import SOURCES


@dataclass(frozen=True)
class Signal:
    """A number of every token, computed before the loss.

    Attributes:
        compute (callable): (batch, **options) -> (B, T); what it says where the mask is 0 is not read.
        about (`str`): in words, with its equation.
        sources (`frozenset[str]`): whose scores of the sampled tokens it reads.
        entropies (`frozenset[str]`): whose entropies it reads among these.
        measures (`frozenset[str]`): which measures it reads.
        needs_rewards (`bool`): whether it reads rewards, on whatever scale they are.
        needs_scores (`bool`): whether it reads which answers are right by the verifier.
    """

    compute: Callable[..., Tensor]
    about: str
    sources: frozenset[str] = frozenset()
    measures: frozenset[str] = frozenset()
    needs_rewards: bool = False
    needs_scores: bool = False
    entropies: frozenset[str] = frozenset()


SIGNALS: Registry[Signal] = Registry("signal")
AnyCompute = TypeVar("AnyCompute", bound=Callable[..., Tensor])


def register_signal(
    name: str,
    about: str = "",
    *,
    sources: Iterable[str] = (),
    measures: Iterable[str] = (),
    needs_rewards: bool = False,
    needs_scores: bool = False,
    entropies: Iterable[str] | None = None,
) -> Callable[[AnyCompute], AnyCompute]:
    """Register a signal: the decorated function gets a `SignalBatch` and returns a number of every token, (B, T).

    Rules read it by name in `select`, `scale` and `advantage`; its other arguments are the signal's options. What it
    returns where the mask is 0 is not read. What it takes of the whole batch (an average, an extreme, a rank) it takes
    of `batch.everywhere(values)`, which has the tokens of all processes.

    Args:
        name (`str`): the name.
        about (`str`, *optional*): in words, with its equation.
        sources (`list[str]`): keys of `batch.logprobs` and `batch.entropies` that it reads (`dopd.sources.SOURCES`).
        measures (`list[str]`): keys of `batch.measures` that it reads (`dopd.signals.MEASURES`).
        needs_rewards (`bool`): whether it reads `batch.rewards`, on whatever scale they are.
        needs_scores (`bool`): whether it reads `batch.scores`, the verifier's, in [0, 1].
        entropies (`list[str]`, *optional*): which of `sources` it reads the entropies of; all of them if left out. A
            teacher on a server gives none.

    Raises:
        ConfigError: a name that other code has, or a source or measure that does not exist.
    """

    entropies = sources if entropies is None else entropies
    reads = [frozenset({asked} if isinstance(asked, str) else asked) for asked in (sources, measures, entropies)]
    available: tuple[Iterable[str], ...] = (SOURCES, MEASURES, sorted(reads[0]))
    for what, asked, names in zip(("sources", "measures", "entropies"), reads, available, strict=True):
        if asked - set(names):
            raise ConfigError(f"signal {name!r}: {what} (={sorted(asked)}) must be among {', '.join(names)}")

    def register(compute: AnyCompute) -> AnyCompute:
        signal = Signal(compute, about, reads[0], reads[1], needs_rewards, needs_scores, reads[2])
        SIGNALS.register(name, signal, compute)
        return compute

    return register


class _DeclaredScores(dict[str, Tensor]):
    """Scores that a signal was registered with; others are refused by name, also where the table happens to have them:
    beside other rules, or in another table, they would be missing.
    """

    def __init__(self, signal: str, field: str, argument: str, scores: Mapping[str, Tensor], asked: Iterable[str]):
        super().__init__({name: values for name, values in scores.items() if name in asked})
        self._words = f"signal {signal!r} reads batch.{field}[{{!r}}] and is not registered with it: add {argument}="

    def __missing__(self, name: str) -> Tensor:
        raise ConfigError(f"{self._words.format(name)}{sorted({*self, name})!r} to its register_signal")


class _DeclaredBatch(SignalBatch):
    """A batch with what a signal was registered with."""

    _undeclared: Mapping[str, str]  # attribute -> what is said of it

    def __getattribute__(self, name: str) -> Any:
        if name in ("rewards", "scores"):
            undeclared = object.__getattribute__(self, "_undeclared")
            if name in undeclared:
                raise ConfigError(undeclared[name])
        return object.__getattribute__(self, name)


def _declared(name: str, signal: Signal, batch: SignalBatch) -> SignalBatch:
    sources = signal.sources
    declared = object.__new__(_DeclaredBatch)
    vars(declared).update(vars(batch))
    vars(declared).update(
        logprobs=_DeclaredScores(name, "logprobs", "sources", batch.logprobs, sources),
        entropies=_DeclaredScores(
            name,
            "entropies",
            "sources" if signal.entropies == sources else "entropies",
            batch.entropies,
            signal.entropies,
        ),
        measures=_DeclaredScores(name, "measures", "measures", batch.measures, signal.measures),
        _undeclared={
            field: f"signal {name!r} reads batch.{field} and is not registered with it: add needs_{field}=True to its "
            "register_signal"
            for field, is_declared in (("rewards", signal.needs_rewards), ("scores", signal.needs_scores))
            if not is_declared
        },
    )
    return declared


def signal_values(name: str, batch: SignalBatch, options: Mapping[str, Any]) -> Tensor:
    """A signal's values (B, T).

    Raises:
        ConfigError: it reads what it was not registered with.
        ScoringError: its code raises, or returns something of another shape.
    """
    signal = SIGNALS.find(name)
    try:
        with as_guest(f"signal {name!r}"):
            values = signal.compute(_declared(name, signal, batch), **options)
    except (DopdError, torch.OutOfMemoryError, Stopped):
        raise
    except (Exception, SystemExit) as error:  # which would end a run as if it were done
        reads = f"sources={sorted(signal.sources)}, measures={sorted(signal.measures)}"
        raise ScoringError(
            f"signal {name!r}, {place_of(signal.compute)}, raises {type(error).__name__}: {first_line(error)}. A batch "
            f"has what it was registered with: {reads}"
        ) from error
    if not isinstance(values, Tensor) or values.shape != batch.mask.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ScoringError(
            f"signal {name!r}, {place_of(signal.compute)}, returns {got}: it must return a tensor (B, T) "
            f"{tuple(batch.mask.shape)}"
        )
    return values
