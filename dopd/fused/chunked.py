"""The routed loss a chunk of tokens at a time, with its gradient taken in the forward.

Shapes: B sequences, T completion tokens, P = B * T positions, H hidden size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dopd.fused.products import wide, working_dtype, working_head
from dopd.fused.rows import TorchRows
from dopd.fused.scores import TokenScores, score
from dopd.fused.sweep import Sweep, Target
from dopd.heads import Head
from dopd.loss import RoutedLoss, routing_sums, sequence_mean
from dopd.routing import UNROUTED, privilege_gap, route
from dopd.rules import RoutingTable


@dataclass(frozen=True)
class _Batch:
    """What the loss is asked about, besides the student: see `dopd.fused.fused_routed_loss`."""

    targets: Mapping[str, tuple[Tensor, Head]]
    completion_ids: Tensor
    mask: Tensor
    table: RoutingTable
    num_sequences: float | None


class _ChunkedLoss(torch.autograd.Function):
    """Runs a sweep; the backward hands out the gradients that it took, times what arrives from above."""

    @staticmethod
    def forward(
        ctx: Any, hidden_BTH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, sweep: Sweep, batch: _Batch
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        sweep.wants = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        sweep.run()
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in (hidden_BTH, weight_VH, bias_V)]
        # In the dtype of what they are gradients of: the wide sums are freed here, not kept until the backward.
        ctx.save_for_backward(
            _as(sweep.grad_hidden_PH, hidden_BTH), _as(sweep.grad_weight_VH, weight_VH), _as(sweep.grad_bias_V, bias_V)
        )
        sweep.grad_hidden_PH = sweep.grad_weight_VH = sweep.grad_bias_V = None
        return _loss(sweep, batch)

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
    rows: TorchRows,
    chunk_tokens: int | None,
    regimes: Tensor | None,
    num_sequences: float | None,
    scores: Mapping[str, TokenScores],
) -> RoutedLoss:
    """`dopd.fused.fused_routed_loss`, from arguments that have been checked; `rows` does the row operations."""
    batch = _Batch(targets, completion_ids, mask, table, num_sequences)
    weight, bias, heads = _working_heads(student_hidden, student_head, batch)
    known = _routing_scores(batch, heads, scores, rows, chunk_tokens)
    keep_BT = mask != 0
    gap_BT = None
    if table.routed:
        log_t_BT, log_s_BT = known["privileged_teacher"].logprobs, known["privileged_student"].logprobs
        gap_BT = privilege_gap(log_t_BT, log_s_BT)
        if regimes is None:
            regimes = route(log_t_BT, log_s_BT, mask, trim=table.trim)
    elif regimes is None:
        regimes = torch.where(keep_BT, 0, UNROUTED)

    with torch.autocast(student_hidden.device.type, enabled=False):
        dtype = heads["student"].weight.dtype
        sweep = Sweep(
            hidden_PH=student_hidden.detach().to(dtype).flatten(0, 1),
            head=heads["student"],
            targets={
                source: Target(
                    targets[source][0].detach().to(heads[source].weight.dtype).flatten(0, 1),
                    heads[source],
                    known.get(source),
                )
                for source in table.target_sources
            },
            ids_P=torch.where(keep_BT, completion_ids, 0).flatten(),  # a padding id may lie outside the vocabulary
            regimes_P=regimes.flatten(),
            table=table,
            scale_P=_loss_scale(mask, num_sequences, wide(dtype), student_hidden.device).flatten(),
            rows=rows,
            chunk_tokens=chunk_tokens,
        )
        if torch.is_grad_enabled():
            loss = _ChunkedLoss.apply(student_hidden, weight, bias, sweep, batch)
        else:
            sweep.run()
            loss = _loss(sweep, batch)
    per_token_BT, entropy_BT = sweep.value_P.view(mask.shape), sweep.entropy_P.view(mask.shape)
    return RoutedLoss(loss, per_token_BT, regimes, routing_sums(table, regimes, per_token_BT, gap_BT, entropy_BT))


def _working_heads(
    student_hidden: Tensor, student_head: Head, batch: _Batch
) -> tuple[Tensor, Tensor | None, dict[str, Head]]:
    """The student's whole weight and bias, for autograd, and working heads: each tensor is gathered and cast once."""
    whole = student_head.gathered()
    heads = {"student": working_head(whole, working_dtype(student_hidden))}
    made = {(id(student_head.weight), heads["student"].weight.dtype): heads["student"].weight}
    for source in sorted(batch.table.sources & set(batch.targets)):
        hidden, head = batch.targets[source]
        key = (id(head.weight), working_dtype(hidden))
        if key not in made:
            made[key] = head.gathered().weight.detach().to(key[1])
        heads[source] = working_head(replace(head, weight=made[key]), key[1])
    return whole.weight, whole.bias, heads


def _routing_scores(
    batch: _Batch,
    heads: Mapping[str, Head],
    scores: Mapping[str, TokenScores],
    rows: TorchRows,
    chunk_tokens: int | None,
) -> dict[str, TokenScores]:
    """The scores that were given, and those that routing needs besides."""
    known = dict(scores)
    for source in sorted(batch.table.routing_sources - set(known)):
        hidden = batch.targets[source][0]
        known[source] = score(
            hidden, heads[source], batch.completion_ids, batch.mask, rows=rows, chunk_tokens=chunk_tokens
        )
    return known


def _loss_scale(mask: Tensor, num_sequences: float | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """d loss / d per_token, (B, T), from the one function that normalises."""
    with torch.enable_grad():
        per_token_BT = torch.zeros(mask.shape, dtype=dtype, device=device, requires_grad=True)
        (scale_BT,) = torch.autograd.grad(sequence_mean(per_token_BT, mask, num_sequences), per_token_BT)
    return scale_BT


def _loss(sweep: Sweep, batch: _Batch) -> Tensor:
    return sequence_mean(sweep.value_P.view(batch.mask.shape), batch.mask, batch.num_sequences)


def _as(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    if grad is None or like is None:
        return None
    # A loss scale arrives from above in the backward: without it, a float16 gradient would underflow here.
    return grad.view(like.shape) if like.dtype == torch.float16 else grad.view(like.shape).to(like.dtype)
