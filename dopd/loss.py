"""The routed loss on logits: the definition that every faster path must agree with.

Shapes: B sequences, T completion tokens, V vocabulary, M tokens of one rule.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dopd.assignment import Assignment, assign
from dopd.divergences import (
    divergence,
    divergence_function,
    entropy,
    is_clamped,
    log_probs,
    on_support,
    pick,
    sampled_terms,
    surrogate,
)
from dopd.errors import ConfigError
from dopd.routing import UNROUTED
from dopd.rules import Rule
from dopd.signals import SignalBatch, take_measure
from dopd.sources import LIVE, Factor, Target
from dopd.tables import RoutingTable


@dataclass(frozen=True)
class RoutedLoss:
    """What a routed loss returns.

    Attributes:
        loss (`Tensor` ()): mean over the scored tokens of a sequence, then over the sequences that have any (Eq. 11).
        per_token (`Tensor` (B, T)): weight times divergence of every token, nats; 0 where it is not scored.
        regimes (`LongTensor` (B, T)): the `Regime` of every token (0 in an unrouted table), -1 where it is not scored.
        sums (`dict[str, Tensor]`): what `stats` is computed from, as sums that add up over micro-batches and ranks.
    """

    loss: Tensor
    per_token: Tensor
    regimes: Tensor
    sums: dict[str, Tensor] = field(repr=False)

    @property
    def stats(self) -> dict[str, float]:
        """`num_tokens`, `num_sequences`, `entropy` (of the student, nats) and, for every rule of the table, `share/`,
        `weight/`, `loss/` (weighted, nats) and, in a routed table, `gap/` (nats), each followed by the rule's label."""
        return stats_of({name: float(value) for name, value in self.sums.items()})


def routed_loss(
    student_logits: Tensor,
    targets: Mapping[str, Tensor],
    completion_ids: Tensor,
    mask: Tensor,
    table: RoutingTable,
    *,
    assignment: Assignment | None = None,
    num_sequences: float | None = None,
    merged_ids: Sequence[int] = (),
) -> RoutedLoss:
    """Decide what every completion token receives, then sum weight * divergence(student, target) over its rules.

    Args:
        student_logits (`Tensor` (B, T, V)): the trained distribution S(. | x, y_<n), behind the prompt of `table.view`
            (WITHOUT privileged context, if it is `"plain"`), at the positions that predict the completion tokens.
            Gradients reach these alone.
        targets (`dict[str, Tensor]`): source name -> logits (B, T, V) at the same positions.
        completion_ids (`LongTensor` (B, T)): the tokens that the student sampled, or those of the reference texts
            (`table.text`).
        mask (`Tensor` (B, T)): non-zero where a token is scored.
        table (`RoutingTable`): the method. The loss of a table of several texts or views is the sum of those of its
            `parts`, each with logits, tokens and mask of its own.
        assignment (`Assignment`, *optional*): decisions about a larger batch, of which this is a part; computed here
            from this batch if left out.
        num_sequences (`float`, *optional*): the denominator of the mean over sequences, when this is a part of a larger
            batch; defaults to the sequences here that have a scored token.
        merged_ids (`list[int]`): tokens that count as one outcome where one of them was sampled (`table.merge_ends`).

    Returns:
        `RoutedLoss`.

    Raises:
        ConfigError: a source that the table needs is missing, the table has several parts, shapes differ, or ids or
            regimes are out of range.
        ScoringError: log-probs of sampled tokens that are not finite.
    """
    table.check_provided(targets, decided=assignment is not None)
    _check_shapes(student_logits, targets, completion_ids, mask)
    keep_BT = mask != 0
    safe_ids_BT = torch.where(keep_BT, completion_ids, 0)  # a padding id may lie outside the vocabulary
    if assignment is None:
        scored = {**targets, LIVE: student_logits.detach()}
        assignment = assign(table, _signals(table, scored, safe_ids_BT, mask, merged_ids))
    assignment.check(mask, table)

    per_rule: list[Tensor] = []
    clamped: dict[int, Tensor] = {}
    for index, rule in enumerate(table.rules):
        per_token_BT = torch.zeros(
            mask.shape, dtype=torch.promote_types(student_logits.dtype, torch.float32), device=mask.device
        )
        chosen_BT = assignment.chosen(index, rule)
        if rule.clamp is not None:
            chosen = {name: targets[name][chosen_BT] for name in rule.target_names}
            found_M = _clamped(rule, student_logits[chosen_BT], chosen, assignment.progress)
            clamped[index] = torch.zeros_like(chosen_BT).masked_scatter(chosen_BT, found_M)
        if rule.weight and bool(chosen_BT.any()):
            value_M = rule_divergence(
                rule,
                student_logits[chosen_BT],
                {name: targets[name][chosen_BT] for name in rule.target_names},
                safe_ids_BT[chosen_BT],
                advantages=assignment.advantages[index][chosen_BT] if index in assignment.advantages else None,
                progress=assignment.progress,
                merged_ids=merged_ids,
            ).to(per_token_BT.dtype)
            factor_M = assignment.factors[index][chosen_BT].to(value_M) if index in assignment.factors else 1.0
            per_token_BT = per_token_BT.masked_scatter(chosen_BT, rule.weight * factor_M * value_M)
        per_rule.append(per_token_BT)

    per_token_BT = torch.stack(per_rule).sum(0)
    loss = sequence_mean(per_token_BT, mask, num_sequences)
    entropy_BT = torch.where(keep_BT, entropy(log_probs(student_logits.detach())), 0.0)
    sums = routing_sums(table, assignment, per_rule, entropy_BT, clamped)
    return RoutedLoss(loss, per_token_BT, assignment.regimes, sums)


def rule_divergence(
    rule: Rule,
    student_logits: Tensor,
    targets: Mapping[str, Tensor],
    sampled_ids: Tensor,
    *,
    advantages: Tensor | None = None,
    progress: float = 0.0,
    merged_ids: Sequence[int] = (),
) -> Tensor:
    """The divergence of a rule at M tokens, before its weight: (M,), nats.

    Args:
        rule (`Rule`): the rule.
        student_logits (`Tensor` (M, V)): of the trained distribution; gradients reach these alone.
        targets (`dict[str, Tensor]`): logits (M, V) of `rule.target_names`.
        sampled_ids (`LongTensor` (M,)): the sampled tokens.
        advantages (`Tensor` (M,), *optional*): of a policy-gradient rule.
        progress (`float`): share of the training that is over, for exponents that move.
        merged_ids (`list[int]`): see `routed_loss`.
    """
    if advantages is not None:
        log_s_y = pick(log_probs(student_logits), sampled_ids, merged_ids)
        advantages = advantages.to(log_s_y) if rule.clip is None else advantages.to(log_s_y).clamp(*rule.clip)
        return surrogate(-advantages, advantages, log_s_y)
    everyone = {**targets, LIVE: student_logits}
    names = () if rule.target is None else sorted(rule.target.names)
    sources = {name: everyone[name].detach() for name in names}
    if rule.support == "sampled":
        # Powers of probabilities, not normalised: the normaliser is the same for every token that might be sampled.
        log_s_y = pick(log_probs(student_logits), sampled_ids, merged_ids)
        picked = {name: pick(log_probs(logits), sampled_ids, merged_ids) for name, logits in sources.items()}
        log_t_y = torch.zeros_like(log_s_y) if rule.target is None else log_product(rule.target, picked, progress)
        return surrogate(*sampled_terms(rule.divergence, log_s_y.detach(), log_t_y, rule.variant), log_s_y)
    if rule.target is None:
        target_logits = student_logits.detach()
    elif rule.outcomes_of is not None and rule.top_k < student_logits.shape[-1]:
        support_ids = sources[rule.outcomes_of].topk(rule.top_k, dim=-1).indices
        listed = {name: on_support(log_probs(logits), support_ids, rule.tail) for name, logits in sources.items()}
        log_t = log_product(rule.target, listed, progress).log_softmax(-1)
        log_s = on_support(log_probs(student_logits), support_ids, rule.tail)
        return divergence_function(rule.divergence, rule.variant, rule.tail)(log_s, log_t)
    else:
        target_logits = product_logits(rule.target, sources, progress)
    return divergence(
        student_logits,
        target_logits,
        kind=rule.divergence,
        support=rule.support,
        top_k=rule.top_k,
        tail=rule.tail,
        sampled_ids=sampled_ids,
        variant=rule.variant,
    )


@torch.no_grad()
def _clamped(rule: Rule, student_logits: Tensor, targets: Mapping[str, Tensor], progress: float) -> Tensor:
    """Where a rule's clamp bounds some outcome, (M,) bool."""
    assert rule.target is not None
    sources = {**targets, LIVE: student_logits}
    log_s = log_probs(student_logits)
    log_t = log_probs(product_logits(rule.target, sources, progress))
    if rule.support != "full" and rule.top_k < log_s.shape[-1]:
        ranked = log_s if rule.support == "student_topk" else log_t
        ids = (ranked if rule.outcomes_of is None else sources[rule.outcomes_of]).topk(rule.top_k, dim=-1).indices
        log_s, log_t = on_support(log_s, ids, rule.tail), on_support(log_t, ids, rule.tail)
        if rule.outcomes_of is not None:
            listed = {name: on_support(log_probs(sources[name]), ids, rule.tail) for name in sorted(rule.target.names)}
            log_t = log_product(rule.target, listed, progress).log_softmax(-1)
    return is_clamped(rule.divergence, log_s, log_t, rule.variant, rule.tail)


def product_logits(target: Target, logits: Mapping[str, Tensor], progress: float = 0.0) -> Tensor:
    """Logits (..., V) of a target from those of its sources; of a single source as they are."""
    if target.single is not None:
        return logits[target.single]
    # Log-probs, so that a large common offset of one model does not swallow the digits of another.
    return log_product(target, {name: log_probs(logits[name]) for name in sorted(target.names)}, progress)


def log_product(target: Target, log_p: Mapping[str, Tensor], progress: float = 0.0) -> Tensor:
    """log prod_i p_i^{w_i} up to its normaliser, with the bounds that factors have.

    An outcome that every factor with a positive exponent and without `over` rules out stays ruled out, whatever the
    others say of it.

    Args:
        target (`Target`): the product.
        log_p (`dict[str, Tensor]`): source -> log-probs (..., K) over the outcomes, or of one outcome each (...), where
            no factor is centred.
        progress (`float`): share of the training that is over, for exponents that move.
    """
    plain = [(factor.exponent.at(progress), factor) for factor in target.factors if factor.over is None]
    ruled_out = torch.stack([torch.isneginf(log_p[factor.name]) for power, factor in plain if power > 0]).any(0)
    kept = {name: values.masked_fill(ruled_out, 0.0) for name, values in log_p.items()}
    unbounded = [power * kept[factor.name] for power, factor in plain if power and factor.is_plain]
    total = sum(unbounded, torch.zeros_like(next(iter(kept.values()))))
    base = total.masked_fill(ruled_out, -math.inf)
    for factor in target.factors:
        power = factor.exponent.at(progress)
        if power and not factor.is_plain:
            total = total + power * _bounded(factor, kept, base)
    return total.masked_fill(ruled_out, -math.inf)


def _bounded(factor: Factor, log_p: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """The value of a factor with bounds, before its power; `base` is the product of those without, for the mean."""
    value = log_p[factor.name]
    if factor.over is not None:
        # Two impossible outcomes have the ratio 1: nothing is known of them.
        over = log_p[factor.over]
        value = torch.where(torch.isneginf(value) & torch.isneginf(over), 0.0, value - over)
    if factor.centre:
        # Infinite ratios are at their bound afterwards, whatever the mean: it is taken over the others.
        weights = base.softmax(-1).masked_fill(torch.isinf(value), 0.0)
        mean = (weights * torch.where(torch.isinf(value), 0.0, value)).sum(-1, keepdim=True)
        value = value - mean / weights.sum(-1, keepdim=True)
    if factor.clip is not None:
        value = value.clamp(*factor.clip)
    return value if factor.squash is None else factor.squash * torch.tanh(value / factor.squash)


def _signals(
    table: RoutingTable, logits: Mapping[str, Tensor], ids_BT: Tensor, mask: Tensor, merged_ids: Sequence[int]
) -> SignalBatch:
    """Scores that the table decides by, from logits, for a batch that is whole."""
    logprobs, entropies = {}, {}
    for name in table.scored_sources:
        log_p = log_probs(logits[name].detach())
        logprobs[name], entropies[name] = pick(log_p, ids_BT, merged_ids), entropy(log_p)
    measures = {name: take_measure(name, logits) for name in table.measures}
    return SignalBatch(mask, logprobs, entropies, measures)


def sequence_mean(per_token: Tensor, mask: Tensor, num_sequences: float | None = None) -> Tensor:
    """Mean over the scored tokens of each sequence, then over sequences (Eq. 11): the one place that normalises.

    A sequence without a scored token is left out, so padding a batch with empty sequences changes nothing.

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
    table: RoutingTable,
    assignment: Assignment,
    per_rule: Sequence[Tensor],
    entropy_BT: Tensor,
    clamped: Mapping[int, Tensor],
) -> dict[str, Tensor]:
    """Sums over scored tokens, overall and for every rule; they stay on the device, so that nothing waits for them.

    Args:
        table (`RoutingTable`): the method.
        assignment (`Assignment`): what each token receives.
        per_rule (`list[Tensor]`): weighted divergences (B, T) of every rule, nats, 0 where it is not for the token.
        entropy_BT (`Tensor` (B, T)): entropy of the plain student, nats.
        clamped (`dict[int, Tensor]`): index of a rule with a clamp -> where it bounds some outcome (B, T), bool.
    """
    scored_BT = assignment.regimes != UNROUTED
    sums = {
        "tokens": scored_BT.sum(),
        "sequences": scored_BT.any(1).sum(),
        "entropy": entropy_BT.masked_fill(~scored_BT, 0.0).sum(),
    }
    for (index, rule), values_BT in zip(enumerate(table.rules), per_rule, strict=True):
        row_BT = assignment.chosen(index, rule)
        factor = assignment.factors[index].sum() if index in assignment.factors else row_BT.sum()
        sums[f"tokens/{rule.label}"] = row_BT.sum()
        sums[f"weight/{rule.label}"] = factor * torch.tensor(rule.weight, dtype=torch.float64)
        sums[f"loss/{rule.label}"] = values_BT.detach().sum()
        if index in clamped:
            sums[f"clamped/{rule.label}"] = (clamped[index] & row_BT).sum()
        if assignment.gap is not None and rule.regime is not None:
            sums[f"gap/{rule.label}"] = assignment.gap.masked_fill(~row_BT, 0.0).sum()
    return sums


def stats_of(sums: Mapping[str, float]) -> dict[str, float]:
    """Shares and means from (added-up) `routing_sums`; a rule without tokens has share and means 0."""
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
    check_ids(completion_ids, mask, student_logits.shape[-1])


def check_ids(completion_ids: Tensor, mask: Tensor, num_tokens: int) -> None:
    """Raise `ConfigError` for a scored id outside the vocabulary."""
    outside_BT = (mask != 0) & ((completion_ids < 0) | (completion_ids >= num_tokens))
    if bool(outside_BT.any()):  # one wait for a device
        outside_N = completion_ids[outside_BT]
        raise ConfigError(
            f"completion_ids: {outside_N.numel()} scored ids are outside the vocabulary [0, {num_tokens}), first "
            f"{int(outside_N[0])}. Set mask to 0 where a token is padding or a label of -100"
        )
