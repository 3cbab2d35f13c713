"""The routed loss a chunk of tokens at a time, with its gradient taken in the forward.

Shapes: B sequences, T completion tokens, P = B * T positions, H hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dopd.assignment import Assignment, assign
from dopd.fused.chunk_pass import ChunkPass
from dopd.fused.products import working_head
from dopd.fused.scores import TokenScores, measures, score
from dopd.fused.targets import Target
from dopd.fused.tiles import TileOperations
from dopd.heads import Head, widened, working_dtype
from dopd.loss import RoutedLoss, routing_sums, sequence_mean
from dopd.routing import UNROUTED
from dopd.rules import Rule
from dopd.signals import SignalBatch
from dopd.sources import LIVE
from dopd.tables import RoutingTable

_UNTAUGHT = -2  # a token that no rule of a group teaches and whose entropy is still measured


@cache
def _entropy() -> Rule:
    return Rule(divergence="entropy", weight=0.0)  # it tries its divergence, which no import should do


@dataclass(frozen=True)
class _Batch:
    """What the loss is asked about, besides the student: see `dopd.fused.fused_routed_loss`."""

    targets: Mapping[str, tuple[Tensor, Head]]
    completion_ids: Tensor
    mask: Tensor
    table: RoutingTable
    num_sequences: float | None


class _ChunkedLoss(torch.autograd.Function):
    """Runs a chunk pass; the backward hands out the gradients that it took, times what arrives from above."""

    @staticmethod
    def forward(
        ctx: Any, hidden_BTH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, chunk_pass: ChunkPass, batch: _Batch
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        chunk_pass.wants = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        chunk_pass.run()
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in (hidden_BTH, weight_VH, bias_V)]
        # In the dtype of what they are gradients of: the widened sums are freed here, not kept until the backward.
        ctx.save_for_backward(
            _in_dtype_of(chunk_pass.grad_hidden_PH, hidden_BTH),
            _in_dtype_of(chunk_pass.grad_weight_VH, weight_VH),
            _in_dtype_of(chunk_pass.grad_bias_V, bias_V),
        )
        chunk_pass.grad_hidden_PH = chunk_pass.grad_weight_VH = chunk_pass.grad_bias_V = None
        return _loss(chunk_pass, batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        if grad_loss is None:
            return (None,) * 5
        # Multiplying makes a second (V, H) tensor. On a CPU, where looking costs no wait, a factor of 1 is skipped.
        same = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0
        scaled = [
            None if grad is None else (grad if same else grad * grad_loss).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def chunked_routed_loss(
    student_hidden: Tensor,
    student_head: Head,
    targets: Mapping[str, tuple[Tensor, Head]],
    completion_ids: Tensor,
    mask: Tensor,
    table: RoutingTable,
    *,
    operations: TileOperations,
    chunk_tokens: int | None,
    assignment: Assignment | None,
    num_sequences: float | None,
    scores: Mapping[str, TokenScores],
    merged_ids: Sequence[int] = (),
) -> RoutedLoss:
    """`dopd.fused.fused_routed_loss`, from arguments that have been checked.

    Args:
        operations (`TileOperations`): what is done to a tile of logits.
    """
    batch = _Batch(targets, completion_ids, mask, table, num_sequences)
    weight, bias, heads = _working_heads(student_hidden, student_head, batch)
    if assignment is None:
        available = _deciding_scores(batch, student_hidden, heads, scores, operations, chunk_tokens, merged_ids)
        assignment = assign(table, _signals(batch, student_hidden, heads, available, chunk_tokens))
    else:
        available = dict(scores)
    assignment.check(mask, table)

    dtype = heads["student"].weight.dtype
    scale_BT = _loss_scale(mask, num_sequences, widened(dtype), student_hidden.device)
    sources = {
        name: Target(_states(targets, heads, name), heads.get(name), available.get(name))
        for name in table.target_sources
    }
    losses: list[Tensor] = []
    per_rule: dict[int, Tensor] = {}
    clamped: dict[int, Tensor] = {}
    entropy_BT: Tensor | None = None
    for position, group in enumerate(table.rule_groups):
        numbers_BT = _numbers(group, assignment, everyone=position == 0)
        advantage_BT = assignment.advantages.get(group[0][0])
        factors = _factors(group, assignment, scale_BT)
        with torch.autocast(student_hidden.device.type, enabled=False):
            chunk_pass = ChunkPass(
                hidden_PH=student_hidden.detach().to(dtype).flatten(0, 1),
                head=heads["student"],
                targets=sources,
                # A padding id may lie outside the vocabulary.
                ids_P=torch.where(mask != 0, completion_ids, 0).flatten(),
                numbers_P=numbers_BT.flatten(),
                rules=dict(group) | {_UNTAUGHT: _entropy()},
                scale_P=scale_BT.flatten(),
                factor_P=None if factors is None else factors.flatten(),
                advantage_P=None if advantage_BT is None else advantage_BT.flatten(),
                progress=assignment.progress,
                merged_ids=tuple(merged_ids),
                operations=operations,
                chunk_tokens=chunk_tokens,
            )
            if torch.is_grad_enabled():
                losses.append(_ChunkedLoss.apply(student_hidden, weight, bias, chunk_pass, batch))
            else:
                chunk_pass.run()
                losses.append(_loss(chunk_pass, batch))
        values_BT = chunk_pass.value_P.view(mask.shape)
        entropy_BT = chunk_pass.entropy_P.view(mask.shape) if entropy_BT is None else entropy_BT
        per_rule |= {index: values_BT.masked_fill(numbers_BT != index, 0.0) for index, _ in group}
        clamped_BT = chunk_pass.clamped_P.view(mask.shape)
        clamped |= {index: clamped_BT & (numbers_BT == index) for index, rule in group if rule.clamp is not None}
    assert entropy_BT is not None
    ordered = [per_rule[index] for index in sorted(per_rule)]
    sums = routing_sums(table, assignment, ordered, entropy_BT, clamped)
    return RoutedLoss(sum(losses[1:], losses[0]), torch.stack(ordered).sum(0), assignment.regimes, sums)


def _states(targets: Mapping[str, tuple[Tensor, Head]], heads: Mapping[str, Head], name: str) -> Tensor | None:
    """Hidden states (P, H) of a source in the dtype of its working head; `None` where its scores alone are there."""
    return targets[name][0].detach().to(heads[name].weight.dtype).flatten(0, 1) if name in targets else None


def _numbers(group: list[tuple[int, Rule]], assignment: Assignment, *, everyone: bool) -> Tensor:
    """Index of the rule of a group that teaches each token (B, T). A token that none teaches is left out (-1), but for
    the group that sees everyone, because the student's entropy is averaged over all tokens."""
    number_BT = torch.where(assignment.regimes == UNROUTED, UNROUTED, _UNTAUGHT if everyone else UNROUTED)
    for index, rule in group:
        number_BT = torch.where(assignment.chosen(index, rule), index, number_BT)
    return number_BT


def _factors(group: list[tuple[int, Rule]], assignment: Assignment, like_BT: Tensor) -> Tensor | None:
    """Factors on the weights of a group's rules (B, T); `None` where all are 1."""
    if not any(index in assignment.factors for index, _ in group):
        return None
    factors_BT = torch.ones_like(like_BT)
    for index, rule in group:
        if index in assignment.factors:
            chosen_BT = assignment.chosen(index, rule)
            factors_BT = torch.where(chosen_BT, assignment.factors[index].to(like_BT.dtype), factors_BT)
    return factors_BT


def _working_heads(
    student_hidden: Tensor, student_head: Head, batch: _Batch
) -> tuple[Tensor, Tensor | None, dict[str, Head]]:
    """The student's whole weight and bias, for autograd, and working heads: each tensor is gathered and cast once."""
    whole = student_head.gathered()
    heads = {"student": working_head(whole, working_dtype(student_hidden))}
    cast = {(id(student_head.weight), heads["student"].weight.dtype): heads["student"].weight}
    for source in sorted((batch.table.sources & set(batch.targets)) - {LIVE}):
        hidden, head = batch.targets[source]
        key = (id(head.weight), working_dtype(hidden))
        if key not in cast:
            cast[key] = head.gathered().weight.detach().to(key[1])
        heads[source] = working_head(replace(head, weight=cast[key]), key[1])
    return whole.weight, whole.bias, heads


def _deciding_scores(
    batch: _Batch,
    student_hidden: Tensor,
    heads: Mapping[str, Head],
    scores: Mapping[str, TokenScores],
    operations: TileOperations,
    chunk_tokens: int | None,
    merged_ids: Sequence[int],
) -> dict[str, TokenScores]:
    """The scores that the caller has, and those that the table decides by besides."""
    available = dict(scores)
    for source in sorted(batch.table.scored_sources - set(available)):
        hidden = student_hidden if source == LIVE else batch.targets[source][0]
        available[source] = score(
            hidden,
            heads[source],
            batch.completion_ids,
            batch.mask,
            operations=operations,
            chunk_tokens=chunk_tokens,
            merged_ids=merged_ids,
        )
    return available


def _signals(
    batch: _Batch,
    student_hidden: Tensor,
    heads: Mapping[str, Head],
    scores: Mapping[str, TokenScores],
    chunk_tokens: int | None,
) -> SignalBatch:
    """What the table decides by, for a batch that is whole."""
    measured = {
        name: (student_hidden if name == LIVE else batch.targets[name][0], heads[name])
        for name in batch.table.measured_sources
    }
    return SignalBatch(
        batch.mask,
        {name: one.logprobs for name, one in scores.items()},
        {name: one.entropy for name, one in scores.items() if one.entropy is not None},
        measures(batch.table.measures, measured, batch.mask, chunk_tokens=chunk_tokens),
    )


def _loss_scale(mask: Tensor, num_sequences: float | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """d loss / d per_token, (B, T), from the one function that normalises."""
    with torch.enable_grad():
        per_token_BT = torch.zeros(mask.shape, dtype=dtype, device=device, requires_grad=True)
        (scale_BT,) = torch.autograd.grad(sequence_mean(per_token_BT, mask, num_sequences), per_token_BT)
    return scale_BT


def _loss(chunk_pass: ChunkPass, batch: _Batch) -> Tensor:
    return sequence_mean(chunk_pass.value_P.view(batch.mask.shape), batch.mask, batch.num_sequences)


def _in_dtype_of(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    if grad is None or like is None:
        return None
    # A loss scale arrives from above in the backward: without it, a float16 gradient would underflow here.
    return grad.view(like.shape) if like.dtype == torch.float16 else grad.view(like.shape).to(like.dtype)
