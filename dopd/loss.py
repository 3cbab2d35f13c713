"""The routed loss on logits: the definition that every faster path must agree with.

Shapes: B sequences, T completion tokens, V vocabulary, M tokens of one row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dopd.divergences import divergence, entropy, log_probs, pick
from dopd.errors import ConfigError
from dopd.routing import UNROUTED, privilege_gap, route
from dopd.rules import RoutingTable


@dataclass(frozen=True)
class RoutedLoss:
    """What a routed loss returns.

    Attributes:
        loss (`Tensor` ()): mean over the scored tokens of a sequence, then over the sequences that have any (Eq. 11).
        per_token (`Tensor` (B, T)): weight times divergence of every token, nats; 0 where it is not scored.
        regimes (`LongTensor` (B, T)): the `Regime` of every token (0 in an unrouted table), -1 where it is not scored.
        sums (`dict[str, Tensor]`): what `stats` is made of, as sums that add up over micro-batches and ranks.
    """

    loss: Tensor
    per_token: Tensor
    regimes: Tensor
    sums: dict[str, Tensor] = field(repr=False)

    @property
    def stats(self) -> dict[str, float]:
        """`num_tokens`, `num_sequences`, `entropy` (of the student, nats) and, for every row of the table, `share/`,
        `weight/`, `loss/` (weighted, nats) and, in a routed table, `gap/` (nats), each followed by the row's label."""
        return stats_of({name: float(value) for name, value in self.sums.items()})


def routed_loss(
    student_logits: Tensor,
    targets: Mapping[str, Tensor],
    completion_ids: Tensor,
    mask: Tensor,
    table: RoutingTable,
    *,
    regimes: Tensor | None = None,
    num_sequences: float | None = None,
) -> RoutedLoss:
    """Route every completion token, then sum weight * divergence(student, target of its row).

    Args:
        student_logits (`Tensor` (B, T, V)): the trained distribution S(. | x, y_<n), WITHOUT privileged context, at the
            positions that predict the completion tokens. Gradients reach these alone.
        targets (`dict[str, Tensor]`): source name -> logits (B, T, V) at the same positions.
        completion_ids (`LongTensor` (B, T)): the tokens that the student sampled.
        mask (`Tensor` (B, T)): non-zero where a token is scored.
        table (`RoutingTable`): the method.
        regimes (`LongTensor` (B, T), *optional*): decisions made for a larger batch, of which this is a part; made here
            from this batch if left out.
        num_sequences (`float`, *optional*): the denominator of the mean over sequences, when this is a part of a larger
            batch; defaults to the sequences here that have a scored token.

    Returns:
        `RoutedLoss`.

    Raises:
        ConfigError: a source that the table needs is missing, shapes differ, or ids or regimes are out of range.
        ScoringError: log-probs of sampled tokens that are not finite.
    """
    table.check_provided(targets)
    _check_shapes(student_logits, targets, completion_ids, mask)
    keep_BT = mask != 0
    safe_ids_BT = torch.where(keep_BT, completion_ids, 0)  # a padding id may lie outside the vocabulary

    gap_BT = None
    if table.routed:
        log_t_BT, log_s_BT = (
            pick(log_probs(targets[source].detach()), safe_ids_BT)
            for source in ("privileged_teacher", "privileged_student")
        )
        gap_BT = privilege_gap(log_t_BT, log_s_BT)
        if regimes is None:
            regimes = route(log_t_BT, log_s_BT, mask, trim=table.trim)
    elif regimes is None:
        regimes = torch.where(keep_BT, 0, UNROUTED)
    check_regimes(regimes, mask, table)

    per_token_BT = torch.zeros(
        mask.shape, dtype=torch.promote_types(student_logits.dtype, torch.float32), device=mask.device
    )
    for number, rule in table.labelled_rows():
        row_BT = regimes == number
        if rule.weight == 0 or not bool(row_BT.any()):
            continue
        value_M = divergence(
            student_logits[row_BT],
            targets[rule.source][row_BT],
            kind=rule.divergence,
            support=rule.support,
            top_k=rule.top_k,
            tail=rule.tail,
            sampled_ids=safe_ids_BT[row_BT] if rule.support == "sampled" else None,
        )
        per_token_BT = per_token_BT.masked_scatter(row_BT, rule.weight * value_M.to(per_token_BT.dtype))

    loss = sequence_mean(per_token_BT, mask, num_sequences)
    entropy_BT = torch.where(keep_BT, entropy(log_probs(student_logits.detach())), 0.0)
    return RoutedLoss(loss, per_token_BT, regimes, routing_sums(table, regimes, per_token_BT, gap_BT, entropy_BT))


def sequence_mean(per_token: Tensor, mask: Tensor, num_sequences: float | None = None) -> Tensor:
    """Mean over the scored tokens of each sequence, then over sequences (Eq. 11): the one place that normalises.

    A sequence without a scored token is left out, so padding a batch with empty rows changes nothing.

    Args:
        per_token (`Tensor` (B, T)): values, 0 where nothing is scored.
        mask (`Tensor` (B, T)): non-zero where a token is scored.
        num_sequences (`float`, *optional*): see `routed_loss`.
    """
    tokens_B = (mask != 0).sum(1)
    if num_sequences is None:
        num_sequences = max(int((tokens_B > 0).sum()), 1)
    means_B = (per_token * (mask != 0)).sum(1) / tokens_B.clamp(min=1)
    return means_B.sum() / num_sequences


def routing_sums(
    table: RoutingTable, regimes: Tensor, per_token: Tensor, gap: Tensor | None, entropy_BT: Tensor
) -> dict[str, Tensor]:
    """Sums over scored tokens, overall and for every row; they stay on the device, so that nothing waits for them.

    Args:
        table (`RoutingTable`): the method.
        regimes (`LongTensor` (B, T)): -1 where nothing is scored.
        per_token (`Tensor` (B, T)): weighted divergences, nats.
        gap (`Tensor` (B, T), *optional*): privilege advantage gaps, nats.
        entropy_BT (`Tensor` (B, T)): entropy of the plain student, nats.
    """
    scored_BT = regimes != UNROUTED
    sums = {
        "tokens": scored_BT.sum(),
        "sequences": scored_BT.any(1).sum(),
        "entropy": entropy_BT.masked_fill(~scored_BT, 0.0).sum(),
    }
    for number, rule in table.labelled_rows():
        row_BT = regimes == number
        sums[f"tokens/{rule.label}"] = row_BT.sum()
        sums[f"weight/{rule.label}"] = row_BT.sum() * torch.tensor(rule.weight, dtype=torch.float64)
        sums[f"loss/{rule.label}"] = per_token.detach().masked_fill(~row_BT, 0.0).sum()
        if gap is not None:
            sums[f"gap/{rule.label}"] = gap.masked_fill(~row_BT, 0.0).sum()
    return sums


def stats_of(sums: Mapping[str, float]) -> dict[str, float]:
    """Shares and means from (added-up) `routing_sums`; an empty row has share and means 0."""
    tokens = sums["tokens"]
    stats = {"num_tokens": tokens, "num_sequences": sums["sequences"], "entropy": sums["entropy"] / max(tokens, 1)}
    for name, value in sums.items():
        kind, _, label = name.partition("/")
        if not label:
            continue
        if kind == "tokens":
            stats[f"share/{label}"] = value / max(tokens, 1)
        else:
            stats[name] = value / max(sums[f"tokens/{label}"], 1)
    return stats


def check_regimes(regimes: Tensor, mask: Tensor, table: RoutingTable) -> None:
    """Raise `ConfigError` unless every scored token has the number of a row of the table, and every other token -1."""
    if regimes.shape != mask.shape:
        raise ConfigError(f"regimes {tuple(regimes.shape)} must have the shape (B, T) of mask {tuple(mask.shape)}")
    numbers = [number for number, _ in table.labelled_rows()]
    known_BT = torch.isin(regimes, torch.tensor(numbers, device=regimes.device))
    wrong_BT = torch.where(mask != 0, ~known_BT, regimes != UNROUTED)
    if bool(wrong_BT.any()):
        raise ConfigError(
            f"regimes: {int(wrong_BT.sum())} of {regimes.numel()} do not fit the mask and table {table.name!r}: a "
            f"scored token takes one of {numbers}, every other token {UNROUTED}. Cut regimes and mask from one batch"
        )


def _check_shapes(student_logits: Tensor, targets: Mapping[str, Tensor], completion_ids: Tensor, mask: Tensor) -> None:
    if student_logits.dim() != 3:
        raise ConfigError(f"student_logits {tuple(student_logits.shape)} must have the shape (B, T, V)")
    for name, logits in targets.items():
        if logits.shape != student_logits.shape:
            raise ConfigError(
                f"targets[{name!r}] {tuple(logits.shape)} must have the shape of student_logits "
                f"{tuple(student_logits.shape)}: same completion tokens, same vocabulary"
            )
    for name, tensor in (("completion_ids", completion_ids), ("mask", mask)):
        if tensor.shape != student_logits.shape[:2]:
            raise ConfigError(
                f"{name} {tuple(tensor.shape)} must have the shape (B, T) {tuple(student_logits.shape[:2])}"
            )
    scored_N, num_tokens = completion_ids[mask != 0], student_logits.shape[-1]
    outside_N = scored_N[(scored_N < 0) | (scored_N >= num_tokens)]
    if outside_N.numel():
        raise ConfigError(
            f"completion_ids: {outside_N.numel()} scored ids are outside the vocabulary [0, {num_tokens}), first "
            f"{int(outside_N[0])}. Set mask to 0 where a token is padding or a label of -100"
        )
