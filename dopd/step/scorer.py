"""Scorers: what a source of the table says about completions, from models in this process or from elsewhere.

Shapes: B completions, T completion tokens, H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from dopd.divergences import Support
from dopd.errors import ConfigError
from dopd.fused import score_tokens
from dopd.heads import Head
from dopd.sampling import check_ids
from dopd.scoring import View, evaluation_mode, generation_inputs, in_batches, left_padded, view_hidden_states
from dopd.sources import LIVE, TEACHER_SOURCES
from dopd.step.batch import SourceScores
from dopd.tables import RoutingTable
from dopd.vision.media import FeatureCache
from dopd.vocabulary import shared_vocab_size

ALL_SUPPORTS = frozenset(get_args(Support))


class Scorer(Protocol):
    """Scores completions behind the prompts of a view."""

    def supports(self, source: str) -> frozenset[str]:
        """Over which outcomes it can give a source as a target: `"full"` takes whole distributions, `"target_topk"` the
        most probable tokens, `"sampled"` the log-probs of the sampled tokens alone.
        """

    def score(self, source: str, view: View, completion_ids: Tensor, mask: Tensor) -> SourceScores:
        """What a source says about completions (B, T), without gradient."""

    def score_all(
        self, views: Mapping[str, View], completion_ids: Tensor, mask: Tensor
    ) -> Iterator[tuple[str, SourceScores]]:
        """What several sources say about completions (B, T), one after the other, in the order in which it is known.

        Args:
            views (`dict[str, View]`): source -> the prompts that it reads.
        """

    def head(self, source: str) -> Head:
        """The output head of a source whose hidden states a loss reads."""

    def target(self, source: str, hidden: Tensor, view: View) -> tuple[Tensor, Head]:
        """Hidden states (B, T, H) that the source gave to the rows of a view, and their head, as a loss reads them."""

    def forget(self) -> None:
        """Let go of heads: the micro-batches of what was scored last are over. Until then each is collected once."""


def check_scorer(table: RoutingTable, scorer: Scorer) -> None:
    """Raise `ConfigError` where a rule of the table takes its target over outcomes that the scorer cannot give."""
    for rule in table.rules:
        for source in sorted(rule.target_names - {LIVE}) if rule.weight else ():
            supports = scorer.supports(source)
            if rule.support not in supports:
                raise ConfigError(
                    f"method {table.name!r}: rule {rule.label!r} takes its target over support={rule.support!r}, and "
                    f"the scorer gives {', '.join(sorted(supports))} of {source}: choose another method or support, or "
                    "a scorer with the models in this process"
                )


class Models(Protocol):
    """The models behind the sources of a table."""

    @property
    def vocab_size(self) -> int:
        """Ids from 0 on that every model has; the others are no outcomes."""

    def source_model(self, source: str) -> AbstractContextManager[Any]:
        """The (wrapped) model of a source, with its weights in place."""

    def unwrapped(self, model: Any) -> Any:
        """A model without the wrapper that distributes it."""

    def through_wrapper(self, model: Any, method: Any, *arguments: Any) -> Any:
        """`method(unwrapped model, *arguments)`, run as the forward pass of the wrapper."""

    def hidden_states(self, model: Any, view: View, completion_ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states (B, T, H) that predict the completions, of an unwrapped model."""

    def before_scoring(self, source: str, model: Any, view: View) -> None:
        """Called with the unwrapped model and its whole weights, in front of every pass."""


@dataclass(frozen=True)
class FixedModels:
    """A student and a teacher that nothing trains or distributes; implements `Models` and `WholeStudent`.

    Attributes:
        student, teacher: transformers models; sources of the student's anchor are the student itself.
        cache (`FeatureCache`): of image features of the student; the teacher's are its own.
        through (callable, *optional*): (teacher, method, *arguments) -> `method(teacher, *arguments)`, for a teacher
            whose passes something else has to begin.
    """

    student: Any
    teacher: Any = None
    cache: FeatureCache = field(default_factory=FeatureCache)
    through: Callable[..., Any] | None = None

    @property
    def vocab_size(self) -> int:
        return shared_vocab_size(model for model in (self.student, self.teacher) if model is not None)

    def source_model(self, source: str) -> AbstractContextManager[Any]:
        return nullcontext(self.teacher if source in TEACHER_SOURCES else self.student)

    def unwrapped(self, model: Any) -> Any:
        return model

    def through_wrapper(self, model: Any, method: Any, *arguments: Any) -> Any:
        if self.through is not None and model is self.teacher:
            return self.through(model, method, *arguments)
        return method(model, *arguments)

    def hidden_states(self, model: Any, view: View, completion_ids: Tensor, mask: Tensor) -> Tensor:
        if model is self.teacher and view.for_teacher is not None:
            view = view.for_teacher
        return view_hidden_states(model, view, completion_ids, mask, cache=self.cache)

    def before_scoring(self, source: str, model: Any, view: View) -> None:
        pass

    def whole_student(self) -> AbstractContextManager[Any]:
        return nullcontext(self.student)

    def generation_inputs(self, model: Any, view: View) -> Mapping[str, Any]:
        return generation_inputs(model, view, cache=self.cache)


def own_logprobs(model: Any, ids: Sequence[int]) -> Tensor:
    """Log-probs (L - 1,) that a model gives to a text of L tokens behind the first of them, nats, float64."""
    rest = torch.tensor([ids[1:]], device=model.device)
    scorer = LocalScorer(FixedModels(model), 1)
    scores = scorer.score(LIVE, left_padded([list(ids[:1])], 0, model.device), rest, torch.ones_like(rest))
    return scores.tokens.logprobs[0].cpu().double()


@dataclass(frozen=True)
class LocalScorer:
    """Scores with models of this process: hidden states of whole views, and one chunk of logits at a time.

    Attributes:
        models (`Models`): behind the sources.
        batch_size (`int`): sequences of a forward pass.
        temperature (`float`): of the scored distributions.
        chunk_tokens (`int`, *optional*): tokens whose logits exist at a time.
        merged_ids (`list[int]`): tokens that count as one outcome where one of them was sampled.
    """

    models: Models
    batch_size: int
    temperature: float = 1.0
    chunk_tokens: int | None = None
    merged_ids: Sequence[int] = ()
    _heads: dict[str, Head] = field(default_factory=dict)

    def supports(self, source: str) -> frozenset[str]:
        return ALL_SUPPORTS

    def score_all(
        self, views: Mapping[str, View], completion_ids: Tensor, mask: Tensor
    ) -> Iterator[tuple[str, SourceScores]]:
        self.forget()
        for source in sorted(views):
            yield source, self.score(source, views[source], completion_ids, mask)

    def score(self, source: str, view: View, completion_ids: Tensor, mask: Tensor) -> SourceScores:
        with self.models.source_model(source) as model, evaluation_mode(model), torch.no_grad():
            return self.models.through_wrapper(model, self._passes, source, view, completion_ids, mask)

    def target(self, source: str, hidden: Tensor, view: View) -> tuple[Tensor, Head]:
        return hidden, self.head(source)

    def head(self, source: str) -> Head:
        if source not in self._heads:
            self._heads[source] = self.whole_head(source)
        return self._heads[source]

    def forget(self) -> None:
        self._heads.clear()

    def whole_head(self, source: str) -> Head:
        """The head of the model that is a source's now, whole; where weights are split, it is collected for this."""
        with self.models.source_model(source) as model, torch.no_grad():
            # A part of a split weight is another model's once the context is left.
            return Head.of_model(self.models.unwrapped(model), self.temperature, self.models.vocab_size).gathered()

    def _passes(self, model: Any, source: str, view: View, completion_ids: Tensor, mask: Tensor) -> SourceScores:
        # Backbone passes and the head run inside one forward of the wrapper, so a sharded head is collected once.
        check_ids(view.prompt_ids, model)  # an answer of the student's may be shown in it
        self.models.before_scoring(source, model, view)
        forward = partial(self.models.hidden_states, model)
        hidden = in_batches(forward, view, completion_ids, mask, self.batch_size)
        head = Head.of_model(model, self.temperature, self.models.vocab_size)
        options = {"chunk_tokens": self.chunk_tokens, "merged_ids": self.merged_ids}
        tokens = score_tokens(hidden, head, completion_ids, mask, **options)
        return SourceScores(tokens, hidden, head.vocab_size)
