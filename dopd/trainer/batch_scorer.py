"""The passes without gradient of one optimizer batch, and the routing decided from them for all ranks at once.

Shapes: B sequences of this rank, T completion tokens, H hidden size of a source.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dopd.assignment import Assignment, assign
from dopd.fused import TokenScores, measures, score_tokens
from dopd.heads import Head
from dopd.scoring import View, evaluation_mode, in_batches
from dopd.signals import SignalBatch
from dopd.sources import SOURCES
from dopd.tables import RoutingTable
from dopd.trainer.liveness import check_alive
from dopd.trainer.passes import check_causal

# Upper edges of the bins of the gap histogram, nats; the last bin has none. Fixed, so that steps and runs compare.
GAP_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0)


@dataclass(frozen=True)
class BatchScorer:
    """Scores the completions of one optimizer batch from every source that the table reads, and from no other.

    Attributes:
        table (`RoutingTable`): the method.
        kept_sources (`frozenset[str]`): sources whose hidden states the loss will read.
        accelerator: for the averages over ranks.
        source_model (callable): source name -> context with its (wrapped) model.
        redirect (callable): (wrapped model, method, *args) -> method(unwrapped model, *args), run as the
            wrapper's forward.
        hidden_states (callable): (unwrapped model, view, completion_ids, mask) -> (B, T, H).
        batch_size (`int`): sequences per forward pass.
        chunk_tokens (`int`, *optional*): tokens whose logits exist at a time.
        temperature (`float`): of the scored distributions.
        merged_ids (`list[int]`): tokens that count as one outcome where one of them was sampled.
        try_first (callable, *optional*): (source, unwrapped model, view), before that source is scored.
    """

    table: RoutingTable
    kept_sources: frozenset[str]
    accelerator: Any
    source_model: Callable[[str], AbstractContextManager[nn.Module]]
    redirect: Callable[..., Any]
    hidden_states: Callable[[Any, View, Tensor, Tensor], Tensor]
    batch_size: int
    chunk_tokens: int | None
    temperature: float
    merged_ids: Sequence[int] = ()
    try_first: Callable[[str, Any, View], None] | None = None

    def score(
        self, views: Mapping[str, View], completion_ids: Tensor, mask: Tensor, known: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What a micro-batch needs for its loss, and metrics of the whole batch.

        Args:
            views (`dict[str, View]`): those that `table.views` names.
            completion_ids (`LongTensor` (B, T)): the same in every view.
            mask (`Tensor` (B, T)): non-zero where a token is scored.
            known (`dict`, *optional*): fields of `SignalBatch` that are not scores, such as `rewards` and `step`.

        Returns:
            Tensors by name, each with a first dimension B (or none): `hidden/SOURCE`, the fields of `TokenScores` as
            `FIELD/SOURCE`, those of `Assignment.tensors`, `num_sequences`; and metrics by name.
        """
        batch: dict[str, Tensor] = {}
        scores: dict[str, TokenScores] = {}
        measured: dict[str, tuple[Tensor, Head]] = {}
        for source in sorted(self.table.sources):
            view = views[SOURCES[source].view]
            with self.source_model(source) as model, evaluation_mode(model), torch.no_grad():
                hidden, scores[source] = self.redirect(model, self._score_view, source, view, completion_ids, mask)
                if source in self.table.measured_sources:
                    measured[source] = (hidden, Head.of_model(self.accelerator.unwrap_model(model), self.temperature))
            vocab_size = self.accelerator.unwrap_model(model).config.get_text_config().vocab_size
            given = scores[source]
            moved = SOURCES[source].model != "teacher" and (known or {}).get("step", 0) > 0
            seen = {"ids": completion_ids, "hidden": hidden}
            check_alive(source, given.logprobs, given.entropy, mask, vocab_size, **seen, trained=moved)
            if source in self.kept_sources:
                batch[f"hidden/{source}"] = hidden
            batch |= {f"{f.name}/{source}": getattr(scores[source], f.name) for f in fields(TokenScores)}
        num_sequences = (mask != 0).any(1).sum()
        batch["num_sequences"] = self.accelerator.reduce(num_sequences, reduction="sum")
        batch_of_signals = SignalBatch(
            mask,
            {source: given.logprobs for source, given in scores.items()},
            {source: given.entropy for source, given in scores.items()},
            measures(self.table.measures, measured, mask, chunk_tokens=self.chunk_tokens),
            gather=self.gather_tokens,
            **(known or {}),
        )
        assignment = assign(self.table, batch_of_signals)
        return batch | assignment.tensors(), self.routing_metrics(assignment, mask)

    def gather_tokens(self, values_N: Tensor) -> Tensor:
        """Values of the tokens of this rank (N,) -> those of every rank."""
        padded_N = self.accelerator.pad_across_processes(values_N, dim=0, pad_index=math.nan)
        gathered = self.accelerator.gather(padded_N)
        counts = self.accelerator.gather(torch.tensor([len(values_N)], device=values_N.device))
        longest = len(padded_N)
        return torch.cat([gathered[rank * longest : rank * longest + int(n)] for rank, n in enumerate(counts)])

    def routing_metrics(self, assignment: Assignment, mask: Tensor) -> dict[str, float]:
        """The averages that routed a batch, and how its gaps are spread; nothing in an unrouted table."""
        thresholds = assignment.thresholds
        if thresholds is None or assignment.gap is None:
            return {}
        return {
            "threshold/gap": thresholds.gap,
            "threshold/confidence": thresholds.confidence,
            "prob/privileged_teacher": thresholds.teacher_prob,
            "prob/privileged_student": thresholds.student_prob,
        } | self.gap_histogram(assignment.gap, mask)

    def gap_histogram(self, gap: Tensor, mask: Tensor) -> dict[str, float]:
        """`gap_bin/EDGE`: share of the tokens of every rank whose gap is below EDGE and not below the edge before."""
        edges = torch.tensor(GAP_EDGES, dtype=gap.dtype, device=gap.device)
        bins_N = torch.bucketize(gap[mask != 0], edges, right=True)
        counts = self.accelerator.reduce(torch.bincount(bins_N, minlength=len(GAP_EDGES) + 1), reduction="sum")
        shares = (counts / counts.sum().clamp(min=1)).tolist()
        return {f"gap_bin/{edge:g}": share for edge, share in zip((*GAP_EDGES, math.inf), shares, strict=True)}

    def _score_view(
        self, model: Any, source: str, view: View, completion_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, TokenScores]:
        if self.try_first is not None:
            self.try_first(source, model, view)
        # Backbone passes and the head run inside one (redirected) forward, so a sharded head is collected once.
        forward = partial(self.hidden_states, model)
        hidden = in_batches(forward, view, completion_ids, mask, self.batch_size)
        head = Head.of_model(model, self.temperature)
        return hidden, score_tokens(
            hidden, head, completion_ids, mask, chunk_tokens=self.chunk_tokens, merged_ids=self.merged_ids
        )


def scores_of(batch: Mapping[str, Tensor], source: str) -> TokenScores:
    """The `TokenScores` of a source, from a (micro-)batch that `BatchScorer.score` filled."""
    return TokenScores(**{f.name: batch[f"{f.name}/{source}"] for f in fields(TokenScores)})


def make_scorer(trainer: Any) -> BatchScorer:
    """The scorer of a `DOPDTrainer`."""
    args = trainer.args

    def redirect(wrapped: nn.Module, method: Any, *arguments: Any) -> Any:
        unwrapped = trainer.accelerator.unwrap_model(wrapped)
        return trainer._forward_redirection(wrapped, unwrapped, method, unwrapped, *arguments)

    tried = set[str]()

    def causal(source: str, model: Any, view: View) -> None:
        """Once for each source: here the weights of a split model are whole, on every process at the same time."""
        if source not in tried:
            tried.add(source)
            check_causal(source, model, view.rows(0, 1), hidden_states=trainer.view_hidden_states, gradients=False)

    split = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return BatchScorer(
        table=trainer.table,
        # The reference loss makes its own scores from logits; the others read scores where no row reads logits.
        kept_sources=trainer.table.target_sources,
        accelerator=trainer.accelerator,
        source_model=trainer.source_model,
        redirect=redirect,
        hidden_states=trainer.view_hidden_states,
        batch_size=args.per_device_scoring_batch_size or 4 * args.per_device_train_batch_size,
        chunk_tokens=args.loss_chunk_tokens,
        temperature=args.temperature,
        # All tokens that end an answer, if the table scores them as one outcome.
        merged_ids=sorted(trainer.eos_token_ids) if trainer.table.merge_ends else (),
        try_first=causal if split else None,
    )
