"""One pass over the scored tokens: divergences, entropies, and the gradient while a chunk's logits are there.

Tokens are grouped by row of the table, so that each has exactly one target. The student's logits are computed once for
every token; the target's logits only where a row reads the whole vocabulary, else K columns of them; and the gradient
goes through the dense head only where it is dense. `docs/performance.md` counts the products.

Shapes: P positions of the batch, H hidden size, V vocabulary, K tokens of a support, M tokens of a row,
C tokens of a chunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dopd.divergences import DIVERGENCES, pick
from dopd.fused import products
from dopd.fused.rows import TorchRows, score_rows
from dopd.fused.scores import TokenScores
from dopd.fused.supports import Outcomes, SupportGrad, mass_outside, support_grad, topk_ids
from dopd.heads import Head
from dopd.rules import RoutingTable, Rule

# A row's gradient outside its support is left out where its share is this fraction of the spacing of the working
# dtype: 1/2048 of the row's gradient in bfloat16, 7e-9 in float32.
TAIL_SHARE = 1 / 16
# Rounding of a log-sum-exp, in units of the spacing of numbers of its size; measured with hidden sizes to 2048.
LOGSUMEXP_ULPS = 4


@dataclass(frozen=True)
class Target:
    """One source: hidden states (P, H), a working head, and what scoring already knows of it."""

    hidden_PH: Tensor
    head: Head
    scores: TokenScores | None


@dataclass
class Sweep:
    """One pass over the scored tokens; it fills `value_P`, `entropy_P` and the gradients that are wanted."""

    hidden_PH: Tensor
    head: Head
    targets: Mapping[str, Target]
    ids_P: Tensor
    regimes_P: Tensor
    table: RoutingTable
    scale_P: Tensor  # d loss / d (weight * divergence)
    rows: TorchRows
    chunk_tokens: int | None
    wants: tuple[bool, bool, bool] = (False, False, False)  # gradients of hidden states, weight, bias
    value_P: Tensor = field(init=False)
    entropy_P: Tensor = field(init=False)
    grad_hidden_PH: Tensor | None = field(init=False, default=None)
    grad_weight_VH: Tensor | None = field(init=False, default=None)
    grad_bias_V: Tensor | None = field(init=False, default=None)
    tiles: dict[int, Tensor] = field(init=False, default_factory=dict)

    def run(self) -> None:
        self.value_P, self.entropy_P = (torch.zeros_like(self.scale_P) for _ in range(2))
        if self.wants[0]:
            self.grad_hidden_PH = self.scale_P.new_zeros(self.hidden_PH.shape)
        if self.wants[1]:
            self.grad_weight_VH = self.scale_P.new_zeros(self.head.weight.shape)
        if self.wants[2]:
            self.grad_bias_V = self.scale_P.new_zeros(self.head.vocab_size)
        for number, rule in self.table.labelled_rows():
            index_M = (self.regimes_P == number).nonzero().squeeze(1)
            for index_C in index_M.split(self._chunk_size(rule)) if index_M.numel() else ():
                self.entropy_P[index_C], value_C = self._chunk(rule, index_C)
                self.value_P[index_C] = rule.weight * value_C
        self.tiles.clear()

    def _chunk_size(self, rule: Rule) -> int:
        tiles = 1 if rule.weight == 0 or self._by_columns(rule) else 2
        return self.chunk_tokens or products.chunk_size(
            self.hidden_PH.device, self.head.vocab_size, self.scale_P.element_size(), tiles
        )

    def _by_columns(self, rule: Rule) -> bool:
        """Whether the target's logits are needed at the support alone."""
        scores = self.targets[rule.source].scores
        if rule.support == "sampled":
            return scores is not None
        known = rule.tail == "renormalize" or (scores is not None and scores.logsumexp is not None)
        return (
            rule.support == "student_topk"
            and known
            and products.sparse_is_cheaper(self.hidden_PH.device, rule.top_k, self.head.vocab_size)
        )

    def _tile(self, which: int, num_tokens: int) -> Tensor:
        """A (tokens, V) buffer that is kept from chunk to chunk."""
        numel = num_tokens * self.head.vocab_size
        if which not in self.tiles or self.tiles[which].numel() < numel:
            self.tiles.pop(which, None)
            self.tiles[which] = self.scale_P.new_empty(numel)
        return self.tiles[which][:numel].view(num_tokens, self.head.vocab_size)

    def _chunk(self, rule: Rule, index_C: Tensor) -> tuple[Tensor, Tensor]:
        """Entropies and unweighted divergences of one chunk (nats); adds its gradient."""
        hidden_CH = self.hidden_PH[index_C]
        z_CV = products.dense_logits(hidden_CH, self.head, self._tile(0, len(index_C)))
        if rule.weight == 0:
            entropy_C = -self.rows.stats(z_CV).neg_entropy_C
            return entropy_C, torch.zeros_like(entropy_C)
        if rule.support == "sampled":
            return self._sampled(rule, index_C, hidden_CH, z_CV)
        if rule.support != "full" and rule.top_k < self.head.vocab_size:
            return self._topk(rule, index_C, hidden_CH, z_CV)
        target_CV = self._target_logits(rule, index_C)
        scale_C = self.scale_P[index_C] * rule.weight
        value_C, entropy_C = self.rows.full_(rule.divergence, z_CV, target_CV, scale_C, self.head)
        self._add_dense(index_C, hidden_CH, z_CV)
        return entropy_C, value_C

    def _target_logits(self, rule: Rule, index_C: Tensor) -> Tensor:
        target = self.targets[rule.source]
        return products.dense_logits(target.hidden_PH[index_C], target.head, self._tile(1, len(index_C)))

    def _sampled(self, rule: Rule, index_C: Tensor, hidden_CH: Tensor, z_CV: Tensor) -> tuple[Tensor, Tensor]:
        ids_C, scores = self.ids_P[index_C], self.targets[rule.source].scores
        if scores is not None:
            log_t_C = scores.logprobs.flatten()[index_C].to(z_CV.dtype)
        else:
            log_t_C, _ = score_rows(self.rows, self._target_logits(rule, index_C), ids_C)
        picked_C = pick(z_CV, ids_C)
        slope_C = products.slope(self.head, picked_C)
        stats = self.rows.softmax_(z_CV, self.head)
        value_C = picked_C - stats.logsumexp_C - log_t_C
        # d/dz of value * log S(y) with the value held still: value * (onehot(y) - S).
        scale_C = self.scale_P[index_C] * rule.weight * value_C
        z_CV.mul_(-scale_C.unsqueeze(-1)).scatter_add_(1, ids_C.unsqueeze(-1), (scale_C * slope_C).unsqueeze(-1))
        self._add_dense(index_C, hidden_CH, z_CV)
        return -stats.neg_entropy_C, value_C

    def _topk(self, rule: Rule, index_C: Tensor, hidden_CH: Tensor, z_CV: Tensor) -> tuple[Tensor, Tensor]:
        target_CV = None if self._by_columns(rule) else self._target_logits(rule, index_C)
        if rule.support == "student_topk":
            ids_CK = topk_ids(z_CV, rule.top_k)
        else:
            assert target_CV is not None
            ids_CK = topk_ids(target_CV, rule.top_k)
        inside_CK = z_CV.gather(1, ids_CK)
        slope_CK = products.slope(self.head, inside_CK)
        # With the support taken out, the tile becomes the distribution of the rest.
        z_CV.scatter_(1, ids_CK, products.LOG_ZERO)
        rest = self.rows.softmax_(z_CV, self.head if rule.tail == "bucket" else None)
        student = Outcomes(inside_CK, rest.logsumexp_C if rule.tail == "bucket" else None)
        function = DIVERGENCES[rule.divergence]
        target = self._target_outcomes(rule, index_C, ids_CK, target_CV, student)
        result = support_grad(function, student, target)
        scale_C = (self.scale_P[index_C] * rule.weight).unsqueeze(-1)
        columns_CK = result.columns_CK * scale_C * slope_CK
        rest_C = None if result.rest_C is None else result.rest_C * scale_C.squeeze(-1)
        self._add_support(index_C, hidden_CH, z_CV, ids_CK, columns_CK, rest_C)
        return _entropy(inside_CK, rest.logsumexp_C, rest.neg_entropy_C), result.value_C

    def _target_outcomes(
        self, rule: Rule, index_C: Tensor, ids_CK: Tensor, target_CV: Tensor | None, student: Outcomes
    ) -> Outcomes:
        bucket = rule.tail == "bucket"
        if target_CV is not None:
            inside_CK = target_CV.gather(1, ids_CK)
            return Outcomes(inside_CK, self._rest(target_CV, ids_CK) if bucket else None)
        target = self.targets[rule.source]
        inside_CK = products.column_logits(target.hidden_PH[index_C], target.head, ids_CK)
        if not bucket:
            return Outcomes(inside_CK, None)
        assert target.scores is not None and target.scores.logsumexp is not None
        logsumexp_C = target.scores.logsumexp.flatten()[index_C].to(inside_CK.dtype)
        rest_C = mass_outside(inside_CK, logsumexp_C)
        guess = support_grad(DIVERGENCES[rule.divergence], student, Outcomes(inside_CK, rest_C))
        poor = _poorly_known(guess, rest_C, logsumexp_C).nonzero().squeeze(1)
        for part in poor.split(max(1, len(index_C) // 4)) if poor.numel() else ():
            rest_C[part] = self._rest(self._target_logits(rule, index_C[part]), ids_CK[part])
        return Outcomes(inside_CK, rest_C)

    def _rest(self, logits_CV: Tensor, ids_CK: Tensor) -> Tensor:
        """Log of the summed exponentials outside `ids`; the tile is used up."""
        return self.rows.stats(logits_CV.scatter_(1, ids_CK, products.LOG_ZERO)).logsumexp_C

    def _add_support(
        self,
        index_C: Tensor,
        hidden_CH: Tensor,
        rest_CV: Tensor,
        ids_CK: Tensor,
        columns_CK: Tensor,
        rest_C: Tensor | None,
    ) -> None:
        """Add the gradient rest_C * rest_CV + columns_CK at ids_CK, through the dense head only where it has to be."""
        if not any(self.wants):
            return
        dense_C = torch.ones_like(index_C, dtype=torch.bool)
        if products.sparse_is_cheaper(ids_CK.device, ids_CK.shape[1], self.head.vocab_size):
            dense_C = _tail_matters(columns_CK, rest_C, self.hidden_PH.dtype)
        sparse = (~dense_C).nonzero().squeeze(1)
        if sparse.numel():
            self._add_columns(index_C[sparse], hidden_CH[sparse], columns_CK[sparse], ids_CK[sparse])
        dense = dense_C.nonzero().squeeze(1)
        if not dense.numel():
            return
        if sparse.numel():
            for place, row in enumerate(dense.tolist()):  # moves rows forward inside the tile: no second one
                rest_CV[place].copy_(rest_CV[row])
        grad_CV = rest_CV[: dense.numel()]
        if rest_C is None:
            grad_CV.zero_()
        else:
            grad_CV.mul_(rest_C[dense].unsqueeze(-1))
        grad_CV.scatter_(1, ids_CK[dense], columns_CK[dense])
        self._add_dense(index_C[dense], hidden_CH[dense], grad_CV)

    def _add_dense(self, index_C: Tensor, hidden_CH: Tensor, grad_CV: Tensor) -> None:
        if self.grad_hidden_PH is not None:
            self.grad_hidden_PH[index_C] = products.dense_hidden_grad(grad_CV, self.head)
        if self.grad_weight_VH is not None:
            products.add_dense_weight_grad(self.grad_weight_VH, grad_CV, hidden_CH)
        if self.grad_bias_V is not None:
            self.grad_bias_V += grad_CV.sum(0)

    def _add_columns(self, index_C: Tensor, hidden_CH: Tensor, grad_CK: Tensor, ids_CK: Tensor) -> None:
        if self.grad_hidden_PH is not None:
            self.grad_hidden_PH[index_C] = products.column_hidden_grad(grad_CK, self.head, ids_CK)
        if self.grad_weight_VH is not None:
            products.add_column_weight_grad(self.grad_weight_VH, grad_CK, hidden_CH, ids_CK)
        if self.grad_bias_V is not None:
            self.grad_bias_V.index_add_(0, ids_CK.flatten(), grad_CK.flatten())


def _entropy(inside_CK: Tensor, rest_C: Tensor, rest_neg_entropy_C: Tensor) -> Tensor:
    """Entropy of the whole distribution from the logits of a support and what is known of the rest; nats."""
    logsumexp_C = torch.logaddexp(inside_CK.logsumexp(-1), rest_C)
    log_p_CK = inside_CK - logsumexp_C.unsqueeze(-1)
    log_rest_C = rest_C - logsumexp_C
    return -((log_p_CK.exp() * log_p_CK).sum(-1) + log_rest_C.exp() * (log_rest_C + rest_neg_entropy_C))


def _poorly_known(guess: SupportGrad, rest_C: Tensor, logsumexp_C: Tensor) -> Tensor:
    """Tokens whose divergence would feel the rounding of the target's remaining mass.

    1 - (mass of K columns) is known to the rounding of the log-sum-exp. That is harmless unless the divergence leans on
    the logarithm of a mass that small; those few rows get the sum over the other tokens.
    """
    assert guess.sensitivity_C is not None
    eps = torch.finfo(rest_C.dtype).eps
    mass_error_C = LOGSUMEXP_ULPS * eps * logsumexp_C.abs().clamp(min=1.0)
    error_C = guess.sensitivity_C * mass_error_C / (rest_C - logsumexp_C).exp()
    return ~(error_C <= 0.25 * eps**0.5)  # written so that a NaN counts as poor


def _tail_matters(columns_CK: Tensor, rest_C: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows whose gradient outside the support is not lost in the rounding of the gradient inside it."""
    if rest_C is None:
        return torch.zeros(len(columns_CK), dtype=torch.bool, device=columns_CK.device)
    return rest_C.abs() > TAIL_SHARE * torch.finfo(dtype).eps * columns_CK.abs().sum(-1)
