"""What each token receives: its regime, and the factor and advantage that each rule gives it; for a whole batch.

Shapes: B sequences, T completion tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dopd.errors import ConfigError, NotFiniteError, ScoringError
from dopd.ranks import Remembering
from dopd.routing import UNROUTED, Thresholds, classify, gap_thresholds, privilege_gap
from dopd.rules import Rule, Select
from dopd.signals import SignalBatch
from dopd.tables import RoutingTable


@dataclass(frozen=True)
class Assignment:
    """Decisions about every token of a batch, of which a loss may take a part.

    Attributes:
        regimes (`LongTensor` (B, T)): the `Regime` of every token (0 in an unrouted table), -1 where it is not scored.
        gap (`Tensor` (B, T), *optional*): privilege advantage gaps of a routed table, nats.
        factors (`dict[int, Tensor]`): index of a rule -> factor on its weight (B, T), 0 where the rule leaves the token
            out; of every rule with `select` or `scale`, and of all of them after `times`.
        advantages (`dict[int, Tensor]`): index of a policy-gradient rule -> advantages (B, T).
        progress (`float`): share of the training that is over, for exponents that move.
        thresholds (`Thresholds`, *optional*): the averages that decided the regimes.
        ranks (`Remembering`, *optional*): what signals and averages asked of the whole batch: with it other completions
            are decided about as these were.
    """

    regimes: Tensor
    gap: Tensor | None = None
    factors: Mapping[int, Tensor] = field(default_factory=dict)
    advantages: Mapping[int, Tensor] = field(default_factory=dict)
    progress: float = 0.0
    thresholds: Thresholds | None = None
    ranks: Remembering | None = None

    def chosen(self, index: int, rule: Rule) -> Tensor:
        """The tokens that a rule teaches, bool (B, T)."""
        chosen_BT = self.regimes != UNROUTED if rule.regime is None else self.regimes == int(rule.regime)
        return chosen_BT & (self.factors[index] != 0) if index in self.factors else chosen_BT

    def weights(self, table: RoutingTable) -> Tensor:
        """What the divergences of every token are multiplied with (B, T), summed over the rules that teach it."""
        total_BT = torch.zeros(self.regimes.shape, dtype=torch.float64, device=self.regimes.device)
        for index, rule in enumerate(table.rules):
            weight = rule.weight * self.factors[index] if index in self.factors else rule.weight
            total_BT += torch.where(self.chosen(index, rule), weight, 0.0)
        return total_BT

    def times(self, factor: Tensor, table: RoutingTable) -> "Assignment":
        """These decisions with one more factor (B, T) on what each token receives from every rule."""
        factors = {
            index: torch.where(self.chosen(index, rule), factor.double() * self.factors.get(index, 1.0), 0.0)
            for index, rule in enumerate(table.rules)
        }
        return replace(self, factors=factors)

    def at(self, sequences: Tensor) -> "Assignment":
        """The decisions about some sequences, in the order in which `sequences` (LongTensor) names them."""
        return replace(
            self,
            regimes=self.regimes[sequences],
            gap=None if self.gap is None else self.gap[sequences],
            factors={index: values[sequences] for index, values in self.factors.items()},
            advantages={index: values[sequences] for index, values in self.advantages.items()},
        )

    def check(self, mask: Tensor, table: RoutingTable) -> None:
        """Raise `ConfigError` unless these decisions are about the tokens of `mask` and the rules of `table`."""
        check_regimes(self.regimes, mask, table)
        for index, rule in enumerate(table.rules):
            has_factor = index in self.factors
            for what, decided, needed in (
                ("factors", self.factors, has_factor or rule.select is not None or rule.scale is not None),
                ("advantages", self.advantages, rule.advantage is not None),
            ):
                if (index in decided) != needed or (needed and decided[index].shape != mask.shape):
                    raise ConfigError(
                        f"{what} for rule {rule.label!r} of table {table.name!r} must "
                        f"{f'have the shape (B, T) {tuple(mask.shape)} of the mask' if needed else 'be left out'}: "
                        "take them from dopd.assignment.assign for this table"
                    )


def assign(table: RoutingTable, batch: SignalBatch, *, thresholds: Thresholds | None = None) -> Assignment:
    """Decide what every token receives, from the scores of a whole optimizer batch.

    Args:
        table (`RoutingTable`): the method.
        batch (`SignalBatch`): scores of `table.scored_sources` and values of `table.measures`.
        thresholds (`Thresholds`, *optional*): averages that route the tokens; those of this batch if left out.

    Raises:
        ConfigError: a score or reward that the table needs is missing.
        ScoringError: a score is not finite.
    """
    _check_scored(table, batch)
    ranks = Remembering(batch.ranks)
    batch = replace(batch, ranks=ranks)
    keep_BT = batch.keep
    gap_BT = None
    if table.routed:
        regimes_BT, gap_BT, thresholds = _routed(table, batch, thresholds)
    else:
        regimes_BT, thresholds = torch.where(keep_BT, 0, UNROUTED), None
    factors, advantages = {}, {}
    for index, rule in enumerate(table.rules):
        if rule.select is not None or rule.scale is not None:
            factor_BT = _finite(rule, rule.scale.compute(batch), keep_BT) if rule.scale else keep_BT.double()
            if rule.select is not None:
                factor_BT = torch.where(_selected(rule, rule.select, batch), factor_BT, 0.0)
            factors[index] = torch.where(keep_BT, factor_BT, 0.0)
        if rule.advantage is not None:
            advantages[index] = _finite(rule, rule.advantage.compute(batch), keep_BT)
    return Assignment(regimes_BT, gap_BT, factors, advantages, batch.progress, thresholds, ranks)


def _routed(
    table: RoutingTable, batch: SignalBatch, thresholds: Thresholds | None
) -> tuple[Tensor, Tensor, Thresholds]:
    teacher_BT, student_BT = (batch.logprobs[name] for name in ("privileged_teacher", "privileged_student"))
    if thresholds is None:
        # Over every scored token of every rank, so that routing does not depend on how a batch is cut.
        for name, logprobs_BT in (("privileged_teacher", teacher_BT), ("privileged_student", student_BT)):
            wrong_N = ~torch.isfinite(logprobs_BT[batch.keep])
            if bool(wrong_N.any()):
                raise ScoringError(
                    f"{name}: {int(wrong_N.sum())} of {wrong_N.numel()} scored log-probs are not finite. A "
                    "sampled token "
                    "must have a probability above zero in both privileged views: check both checkpoints, and "
                    "that both "
                    "suppress the same tokens"
                )
        teacher_1N, student_1N = (batch.everywhere(values).unsqueeze(0) for values in (teacher_BT, student_BT))
        thresholds = gap_thresholds(teacher_1N, student_1N, torch.ones_like(teacher_1N), trim=table.trim)
    regimes_BT = classify(teacher_BT, student_BT, batch.mask, thresholds)
    return regimes_BT, privilege_gap(teacher_BT, student_BT).masked_fill(~batch.keep, 0.0), thresholds


def _selected(rule: Rule, select: Select, batch: SignalBatch) -> Tensor:
    """Which tokens a selection picks, bool (B, T); shares are of the scored tokens of every rank."""
    values_BT = _finite(rule, select.use.compute(batch), batch.keep, infinite=True)
    if select.bound in ("above", "below"):
        inside_BT = values_BT > select.value if select.bound == "above" else values_BT < select.value
        return inside_BT & batch.keep
    values_N = batch.everywhere(values_BT)
    if not values_N.numel():
        return batch.keep
    count = max(1, round(select.value * values_N.numel()))
    if select.bound == "top":
        return (values_BT >= values_N.topk(count).values[-1]) & batch.keep
    return (values_BT <= values_N.topk(count, largest=False).values[-1]) & batch.keep


def _finite(rule: Rule, values_BT: Tensor, keep_BT: Tensor, *, infinite: bool = False) -> Tensor:
    """Values of a signal at scored tokens, 0 elsewhere; those that are only compared may be infinite."""
    wrong_BT = keep_BT & (torch.isnan(values_BT) if infinite else ~torch.isfinite(values_BT))
    bad_B = wrong_BT.any(1)
    if bool(bad_B.any()):
        raise NotFiniteError(
            f"rule {rule.label!r}: a signal is not finite at a scored token: check the checkpoints",
            source=f"signal of rule {rule.label!r}",
            rows=tuple(bad_B.nonzero().flatten().tolist()),
        )
    return torch.where(keep_BT, values_BT.double(), 0.0)


def _check_scored(table: RoutingTable, batch: SignalBatch) -> None:
    missing = sorted((table.scored_sources - set(batch.logprobs)) | (table.measures - set(batch.measures)))
    if missing:
        raise ConfigError(f"table {table.name!r} decides by {', '.join(missing)}, which the batch does not have")


def check_regimes(regimes: Tensor, mask: Tensor, table: RoutingTable) -> None:
    """Raise `ConfigError` unless every scored token has the number of a rule of the table, and every other token -1."""
    if regimes.shape != mask.shape:
        raise ConfigError(f"regimes {tuple(regimes.shape)} must have the shape (B, T) of mask {tuple(mask.shape)}")
    numbers = [int(rule.regime) for rule in table.rules if rule.regime is not None] or [0]
    known_BT = torch.isin(regimes, torch.tensor(numbers, device=regimes.device))
    wrong_BT = torch.where(mask != 0, ~known_BT, regimes != UNROUTED)
    if bool(wrong_BT.any()):
        raise ConfigError(
            f"regimes: {int(wrong_BT.sum())} of {regimes.numel()} do not fit the mask and table {table.name!r}: a "
            f"scored token takes one of {sorted(numbers)}, every other token {UNROUTED}. Cut regimes and mask "
            "from one batch"
        )
