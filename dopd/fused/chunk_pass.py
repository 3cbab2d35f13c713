"""One pass over the scored tokens: divergences, entropies, and the gradient while a chunk's logits are there.

Tokens are grouped by rule of the table, so that each has exactly one target. The student's logits are computed once for
every token; the target's logits only where a rule reads the whole vocabulary, else K columns of them; and the gradient
goes through the dense head only where it is dense. `docs/explanation/performance.md` counts the products.

Shapes: P positions of the batch, H hidden size, V vocabulary, K tokens of a support, M tokens of a rule,
C tokens of a chunk.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dopd.divergences import divergence_function, is_clamped, pick, sampled_terms
from dopd.fused import products
from dopd.fused.supports import Outcomes, SampledToken, corrected, mass_outside, support_grad, topk_ids
from dopd.fused.targets import Target, listed_outcomes, rounding_dominates
from dopd.fused.tiles import TileOperations, blocks, score_tile
from dopd.heads import Head
from dopd.loss import log_product, product_logits
from dopd.rules import Rule
from dopd.sources import LIVE
from dopd.sources import Target as RuleTarget

# A rule's gradient outside its support is left out where its share is this fraction of the spacing of the working
# dtype: 1/2048 of the rule's gradient in bfloat16, 7e-9 in float32.
TAIL_SHARE = 1 / 16
# A logit so far below the largest stands for -inf (`products.LOG_ZERO`).
RULED_OUT = products.LOG_ZERO / 10


@dataclass
class ChunkPass:
    """One pass over the scored tokens; it fills `value_P`, `entropy_P` and the gradients that are wanted."""

    hidden_PH: Tensor
    head: Head
    targets: Mapping[str, Target]
    ids_P: Tensor
    numbers_P: Tensor  # of the rule of each token; -1 where this pass leaves it out
    rules: Mapping[int, Rule]
    scale_P: Tensor  # d loss / d (weight * factor * divergence)
    factor_P: Tensor | None  # on the rule's weight
    advantage_P: Tensor | None  # of policy-gradient rules
    progress: float
    merged_ids: tuple[int, ...]
    operations: TileOperations
    chunk_tokens: int | None
    wants: tuple[bool, bool, bool] = (False, False, False)  # gradients of hidden states, weight, bias
    value_P: Tensor = field(init=False)
    entropy_P: Tensor = field(init=False)
    clamped_P: Tensor = field(init=False)
    grad_hidden_PH: Tensor | None = field(init=False, default=None)
    grad_weight_VH: Tensor | None = field(init=False, default=None)
    grad_bias_V: Tensor | None = field(init=False, default=None)
    tiles: dict[int, Tensor] = field(init=False, default_factory=dict)

    def run(self) -> None:
        self.value_P, self.entropy_P = (torch.zeros_like(self.scale_P) for _ in range(2))
        self.clamped_P = torch.zeros_like(self.scale_P, dtype=torch.bool)
        lift = self._lift()
        self.scale_P = self.scale_P * lift
        if self.wants[0]:
            self.grad_hidden_PH = self.scale_P.new_zeros(self.hidden_PH.shape)
        if self.wants[2]:
            self.grad_bias_V = self.scale_P.new_zeros(self.head.vocab_size)
        rules = list(self.rules.items())
        # Sorted, so that a chunk has tokens of one rule where it can, and the rules that need a second tile come first.
        rules.sort(key=lambda item: (self._tiles(item[1]) == 1, item[1].support != "full", item[0]))
        # The place of each token's rule in that order; a token that this pass leaves out comes last.
        ranks_P = torch.full_like(self.numbers_P, len(rules))
        for place, (number, _) in enumerate(rules):
            ranks_P = torch.where(self.numbers_P == number, place, ranks_P)
        counts = torch.bincount(ranks_P, minlength=len(rules) + 1).tolist()[:-1]  # the one wait for a device
        ends = list(itertools.accumulate(counts))
        order_N = ranks_P.argsort(stable=True)[: ends[-1]]
        num_two_tiles = sum(count for count, (_, rule) in zip(counts, rules, strict=True) if self._tiles(rule) == 2)
        start = 0
        while start < len(order_N):
            index_C = order_N[start : start + self._chunk_size(num_two_tiles - start)]
            parts, begin = [], 0
            for (_, rule), end in zip(rules, ends, strict=True):
                part = slice(max(begin - start, 0), min(end - start, len(index_C)))
                begin = end
                if part.start < part.stop:
                    parts.append((rule, part))
            self._chunk(index_C, parts)
            start += len(index_C)
        self.tiles.clear()
        if self.wants[1] and self.grad_weight_VH is None:
            self.grad_weight_VH = self._zero_weight_grad()
        for grad in (self.grad_hidden_PH, self.grad_weight_VH, self.grad_bias_V):
            if grad is not None and lift != 1.0:
                grad.div_(lift)

    def _lift(self) -> float:
        """A power of two that brings gradients of logits near 1 while they are in float16, where d loss / d token of a
        large batch would be 0: a loss scale reaches them in the backward only.
        """
        if self.hidden_PH.dtype != torch.float16 or not any(self.wants):
            return 1.0
        largest = float(self.scale_P.max())
        return 1.0 if largest <= 0 else 2.0 ** -math.floor(math.log2(largest))

    def _chunk_size(self, num_two_tiles: int) -> int:
        """Tokens of the next chunk, of which the first `num_two_tiles` need room for the target's logits too."""
        if self.chunk_tokens:
            return self.chunk_tokens
        device, itemsize = self.hidden_PH.device, self.scale_P.element_size()
        one, two = (products.chunk_size(device, self.head.vocab_size, itemsize, tiles) for tiles in (1, 2))
        return max(two, one - max(num_two_tiles, 0))

    def _tiles(self, rule: Rule) -> int:
        """Tiles of (tokens, V) that a rule needs: the student's, and the target's unless K columns of it are enough."""
        without = rule.weight == 0 or (rule.support == "sampled" and rule.target is None)
        return 1 if without or self._by_columns(rule) else 2

    def _by_columns(self, rule: Rule) -> bool:
        """Whether the target's logits are needed at the support alone."""
        if rule.support == "sampled":
            return all(self.targets[name].scores is not None for name in rule.target_names)
        if rule.target is None or rule.target.single is None:
            return False  # `outcomes_of` is of products alone
        target = self.targets[rule.target.single]
        if target.hidden_PH is None:
            return True  # the columns are listed
        scores = target.scores
        # Outcomes outside the support need the target's log-sum-exp, which scoring has left behind.
        has_normaliser = rule.tail == "renormalize" or (scores is not None and scores.logsumexp is not None)
        return (
            rule.support == "student_topk"
            and has_normaliser
            and products.sparse_is_cheaper(self.hidden_PH.device, rule.top_k, self.head.vocab_size)
        )

    def _tile(self, which: int, num_tokens: int) -> Tensor:
        """A (tokens, V) buffer that is kept from chunk to chunk."""
        numel = num_tokens * self.head.vocab_size
        if which not in self.tiles or self.tiles[which].numel() < numel:
            self.tiles.pop(which, None)
            self.tiles[which] = self.scale_P.new_empty(numel)
        return self.tiles[which][:numel].view(num_tokens, self.head.vocab_size)

    def _chunk(self, index_C: Tensor, parts: list[tuple[Rule, slice]]) -> None:
        """One projection of the student for every token, each rule's work on its part, one product a gradient."""
        hidden_CH = self.hidden_PH[index_C]
        z_CV = products.dense_logits(hidden_CH, self.head, self._tile(0, len(index_C)))
        are_dense: list[Tensor | bool] = []
        for rule, part in parts:
            entropy_M, value_M, is_dense = self._by_rule(rule, index_C[part], hidden_CH[part], z_CV[part])
            are_dense.append(is_dense)
            self.entropy_P[index_C[part]] = entropy_M
            value_M = products.with_infinities(value_M)
            self.value_P[index_C[part]] = self._weight(rule, index_C[part]) * value_M
        if not any(self.wants):
            return
        dense = _dense_places(are_dense, [part for _, part in parts], index_C)
        if dense.numel() == len(index_C):
            self._add_dense(index_C, hidden_CH, z_CV)
        elif dense.numel():
            grad_CV = z_CV[: dense.numel()]
            for block in blocks(grad_CV):  # moved forward inside the tile, some rows at a time: no second one
                grad_CV[block] = z_CV[dense[block]]
            self._add_dense(index_C[dense], hidden_CH[dense], grad_CV)

    def _by_rule(
        self, rule: Rule, index_C: Tensor, hidden_CH: Tensor, z_CV: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | bool]:
        """Entropies and unweighted divergences of a rule's tokens (nats), and where z_CV now holds a dense gradient."""
        if rule.weight == 0:
            entropy_C = -self.operations.stats(z_CV).neg_entropy_C
            return entropy_C, torch.zeros_like(entropy_C), False
        if rule.support == "sampled":
            return self._sampled(rule, index_C, z_CV)
        if rule.support != "full" and rule.top_k < self.head.vocab_size:
            return self._topk(rule, index_C, hidden_CH, z_CV)
        target_CV = self._target_logits(rule, index_C, z_CV)
        if rule.clamp is not None:
            for block in blocks(z_CV):
                log_s, log_t = (impossible(tile_CV[block].log_softmax(-1)) for tile_CV in (z_CV, target_CV))
                self.clamped_P[index_C[block]] = is_clamped(rule.divergence, log_s, log_t, rule.variant)
        function = divergence_function(rule.divergence, rule.variant)
        value_C, entropy_C = self.operations.full_(function, z_CV, target_CV, self._scale(rule, index_C), self.head)
        return entropy_C, value_C, True

    def _weight(self, rule: Rule, index_C: Tensor) -> Tensor | float:
        return rule.weight if self.factor_P is None else rule.weight * self.factor_P[index_C]

    def _scale(self, rule: Rule, index_C: Tensor) -> Tensor:
        """d loss / d divergence."""
        return self.scale_P[index_C] * self._weight(rule, index_C)

    def _target_logits(self, rule: Rule, index_C: Tensor, z_CV: Tensor) -> Tensor:
        """Logits of a rule's target, in a tile of their own; `z_CV` has the student's."""
        out_CV = self._tile(1, len(index_C))
        if rule.target is None:
            return out_CV.copy_(z_CV)
        if rule.target.single is not None:
            return self._source_logits(rule.target.single, index_C, out_CV)
        if not rule.target.is_plain:
            tiles = self._source_tiles(rule.target, index_C, z_CV)
            for block in blocks(out_CV):  # some rows at a time: log-probs of each source stand beside its logits
                logits = {name: impossible(tile_CV[block]) for name, tile_CV in tiles.items()}
                out_CV[block] = product_logits(rule.target, logits, self.progress).clamp_(min=products.LOG_ZERO)
            return out_CV
        total_CV = out_CV.zero_()
        ruled_out_CV = torch.zeros_like(out_CV, dtype=torch.bool)
        for factor in rule.target.factors:
            exponent = factor.exponent.at(self.progress)
            if not exponent:
                continue
            part_CV = self._tile(2, len(index_C))
            part_CV = part_CV.copy_(z_CV) if factor.name == LIVE else self._source_logits(factor.name, index_C, part_CV)
            part_CV.sub_(part_CV.amax(-1, keepdim=True))
            if exponent > 0:
                ruled_out_CV |= part_CV < RULED_OUT
            total_CV.add_(part_CV, alpha=exponent)
        return total_CV.masked_fill_(ruled_out_CV, products.LOG_ZERO)

    def _source_tiles(self, target: RuleTarget, index_C: Tensor, z_CV: Tensor) -> dict[str, Tensor]:
        """Logits of every source of a product, each in a tile of its own (the third and further ones)."""
        tiles = {}
        for which, name in enumerate(sorted(target.names), start=2):
            tile_CV = self._tile(which, len(index_C))
            tiles[name] = tile_CV.copy_(z_CV) if name == LIVE else self._source_logits(name, index_C, tile_CV)
        return tiles

    def _source_logits(self, name: str, index_C: Tensor, out_CV: Tensor) -> Tensor:
        return self.targets[name].logits(index_C, out_CV)

    def _source_logprobs(self, name: str, index_C: Tensor, live_C: Tensor) -> Tensor:
        """Log-probs of the sampled tokens; `live_C` has the student's."""
        if name == LIVE:
            return live_C
        scores = self.targets[name].scores
        if scores is not None:
            return scores.logprobs.flatten()[index_C].to(live_C.dtype)
        logits_CV = self._source_logits(name, index_C, self._tile(1, len(index_C)))
        return score_tile(self.operations, logits_CV, self.ids_P[index_C], self.merged_ids)[0]

    def _sampled(self, rule: Rule, index_C: Tensor, z_CV: Tensor) -> tuple[Tensor, Tensor, bool]:
        ids_C = self.ids_P[index_C]
        picked_C = pick(z_CV, ids_C, self.merged_ids)
        columns_CK, shares_CK = self._sampled_columns(z_CV, ids_C)
        stats = self.operations.softmax_(z_CV, self.head)
        live_C = picked_C - stats.logsumexp_C
        if rule.advantage is not None:
            assert self.advantage_P is not None
            advantage_C = self.advantage_P[index_C].to(live_C.dtype)
            advantage_C = advantage_C if rule.clip is None else advantage_C.clamp(*rule.clip)
            value_C = -advantage_C
        else:
            log_t_C = torch.zeros_like(live_C)
            if rule.target is not None:
                picked = {name: self._source_logprobs(name, index_C, live_C) for name in sorted(rule.target.names)}
                log_t_C = log_product(rule.target, picked, self.progress)
            value_C, advantage_C = sampled_terms(rule.divergence, live_C, log_t_C, rule.variant)
        # d/dz of -advantage * log S(y) with the advantage held still: -advantage * (onehot(y) - S).
        scale_C1 = (self._scale(rule, index_C) * -advantage_C).unsqueeze(-1)
        z_CV.mul_(-scale_C1).scatter_add_(1, columns_CK, scale_C1 * shares_CK)
        return -stats.neg_entropy_C, value_C, True

    def _sampled_columns(self, z_CV: Tensor, ids_C: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (C, K) whose logits the sampled tokens' log-probs rise with, and d of it by hidden @ weight.T there.

        K is 1, unless sampled tokens may stand for a group of merged ones.
        """
        columns_C1 = ids_C.unsqueeze(-1)
        shares_C1 = torch.ones_like(z_CV[:, :1]) * products.logit_gradient(self.head, z_CV.gather(1, columns_C1))
        if not self.merged_ids:
            return columns_C1, shares_C1
        merged_E = torch.tensor(self.merged_ids, device=ids_C.device)
        is_merged_C1 = torch.isin(ids_C, merged_E).unsqueeze(-1)
        inside_CE = z_CV[:, merged_E]
        shares_CE = inside_CE.softmax(-1) * products.logit_gradient(self.head, inside_CE)
        columns_CK = torch.cat([columns_C1, merged_E.expand(len(ids_C), -1)], dim=1)
        return columns_CK, torch.cat([shares_C1 * ~is_merged_C1, shares_CE * is_merged_C1], dim=1)

    def _topk(self, rule: Rule, index_C: Tensor, hidden_CH: Tensor, z_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bucket = rule.tail != "renormalize"
        listed, product, target_CV = self._listed(rule, index_C), None, None
        if listed is not None:
            ids_CK = listed[0]
        elif rule.outcomes_of is not None:
            ids_CK, product = self._outcome_product(rule, index_C, z_CV)
        else:
            target_CV = None if self._by_columns(rule) else self._target_logits(rule, index_C, z_CV)
            ranked_CV = z_CV if rule.support == "student_topk" else target_CV
            assert ranked_CV is not None
            ids_CK = topk_ids(ranked_CV, rule.top_k)
        token = self._sampled_token(rule, index_C, ids_CK, z_CV, target_CV) if rule.tail == "sampled" else None
        inside_CK = z_CV.gather(1, ids_CK)
        logit_gradient_CK = products.logit_gradient(self.head, inside_CK)
        # With the support taken out, the tile becomes the distribution of the rest: a gradient of the remaining mass is
        # spread over the other tokens in proportion to it.
        z_CV.scatter_(1, ids_CK, products.LOG_ZERO)
        rest = self.operations.softmax_(z_CV, self.head if bucket else None)
        student = Outcomes(inside_CK, rest.logsumexp_C if bucket else None)
        function = divergence_function(rule.divergence, rule.variant, rule.tail)
        if product is not None:
            target = product
        elif listed is not None:
            target = listed_outcomes(listed[1].to(inside_CK.dtype), bucket=bucket)
        else:
            target = self._target_outcomes(rule, index_C, ids_CK, target_CV, student)
        if rule.clamp is not None:
            log_s, log_t = (impossible(outcomes.log_probs) for outcomes in (student, target))
            self.clamped_P[index_C] = is_clamped(rule.divergence, log_s, log_t, rule.variant, rule.tail)
        result = support_grad(function, student, target)
        if token is not None:
            result = corrected(rule.divergence, rule.variant, result, (student, target), token)
        scale_C = self._scale(rule, index_C).unsqueeze(-1)
        columns_CK = result.columns_CK * scale_C * logit_gradient_CK
        rest_C = None if result.rest_C is None else result.rest_C * scale_C.squeeze(-1)
        dense_C = self._spread(index_C, hidden_CH, z_CV, ids_CK, columns_CK, rest_C, result.token_C)
        if token is not None and result.token_C is not None:
            at_token_C1 = result.token_C.unsqueeze(-1) * scale_C * token.logit_gradient_C1
            z_CV.scatter_add_(1, self.ids_P[index_C].unsqueeze(-1), at_token_C1)
        return _entropy(inside_CK, rest.logsumexp_C, rest.neg_entropy_C), result.value_C, dense_C

    def _outcome_product(self, rule: Rule, index_C: Tensor, z_CV: Tensor) -> tuple[Tensor, Outcomes]:
        """The tokens of a support that is one source's, and a product over these outcomes."""
        assert rule.target is not None and rule.outcomes_of is not None
        tiles = self._source_tiles(rule.target, index_C, z_CV)
        ids_CK = topk_ids(tiles[rule.outcomes_of], rule.top_k)
        log_p = {}
        for name, tile_CV in tiles.items():
            inside_CK = tile_CV.gather(1, ids_CK)
            rest_C = None if rule.tail == "renormalize" else self._rest(tile_CV, ids_CK)
            log_p[name] = impossible(Outcomes(inside_CK, rest_C).log_probs)
        log_t = log_product(rule.target, log_p, self.progress)
        if rule.tail == "renormalize":
            return ids_CK, Outcomes(log_t, None)
        return ids_CK, Outcomes(log_t[:, :-1], log_t[:, -1])

    def _sampled_token(
        self, rule: Rule, index_C: Tensor, ids_CK: Tensor, z_CV: Tensor, target_CV: Tensor | None
    ) -> SampledToken:
        """What is known of the sampled tokens, while the tiles have the logits."""
        ids_C1 = self.ids_P[index_C].unsqueeze(-1)
        logit_C1 = z_CV.gather(1, ids_C1)
        gradient_C1 = torch.ones_like(logit_C1) * products.logit_gradient(self.head, logit_C1)
        if target_CV is None:  # of a single source, by its scores
            assert rule.target is not None and rule.target.single is not None
            scores = self.targets[rule.target.single].scores
            assert scores is not None
            log_t_C = scores.logprobs.flatten()[index_C].to(z_CV.dtype)
        else:
            log_t_C = target_CV.gather(1, ids_C1).squeeze(1)
            for block in blocks(target_CV):
                log_t_C[block] -= target_CV[block].logsumexp(-1)
        return SampledToken(logit_C1.squeeze(1), log_t_C, (ids_CK != ids_C1).all(-1), gradient_C1)

    def _listed(self, rule: Rule, index_C: Tensor) -> tuple[Tensor, Tensor] | None:
        single = None if rule.target is None else rule.target.single
        return None if single is None else self.targets[single].listed(index_C, rule.top_k)

    def _target_outcomes(
        self, rule: Rule, index_C: Tensor, ids_CK: Tensor, target_CV: Tensor | None, student: Outcomes
    ) -> Outcomes:
        bucket = rule.tail != "renormalize"
        if target_CV is not None:
            inside_CK = target_CV.gather(1, ids_CK)
            return Outcomes(inside_CK, self._rest(target_CV, ids_CK) if bucket else None)
        assert rule.target is not None and rule.target.single is not None
        target = self.targets[rule.target.single]
        inside_CK = target.columns(index_C, ids_CK)
        if not bucket:
            return Outcomes(inside_CK, None)
        assert target.scores is not None and target.scores.logsumexp is not None
        logsumexp_C = target.scores.logsumexp.flatten()[index_C].to(inside_CK.dtype)
        rest_C = mass_outside(inside_CK, logsumexp_C)
        function = divergence_function(rule.divergence, rule.variant, rule.tail)
        # 1 - (mass inside) is cheap but cancels where the rest is tiny: it is kept where that error is harmless.
        guess = support_grad(function, student, Outcomes(inside_CK, rest_C))
        poor = rounding_dominates(guess, rest_C, logsumexp_C).nonzero().squeeze(1)
        for part in poor.split(max(1, len(index_C) // 4)) if poor.numel() else ():
            logits_CV = self._source_logits(rule.target.single, index_C[part], self._tile(1, len(part)))
            rest_C[part] = self._rest(logits_CV, ids_CK[part])
        return Outcomes(inside_CK, rest_C)

    def _rest(self, logits_CV: Tensor, ids_CK: Tensor) -> Tensor:
        """Log of the summed exponentials outside `ids`; the tile is used up."""
        return self.operations.stats(logits_CV.scatter_(1, ids_CK, products.LOG_ZERO)).logsumexp_C

    def _spread(
        self,
        index_C: Tensor,
        hidden_CH: Tensor,
        rest_CV: Tensor,
        ids_CK: Tensor,
        columns_CK: Tensor,
        rest_C: Tensor | None,
        token_C: Tensor | None = None,
    ) -> Tensor:
        """The gradient rest_C * rest_CV + columns_CK at ids_CK: added on columns alone where that is all there is, and
        not some of another token (`token_C`, which the caller adds).

        Returns which tokens' gradients have to go through the dense head; those stand in the tile.
        """
        dense_C = torch.ones_like(index_C, dtype=torch.bool)
        if products.sparse_is_cheaper(ids_CK.device, ids_CK.shape[1], self.head.vocab_size):
            dense_C = _tail_matters(columns_CK, rest_C, self.hidden_PH.dtype)
            dense_C = dense_C if token_C is None else dense_C | (token_C != 0)
        if not any(self.wants):
            return dense_C
        sparse = (~dense_C).nonzero().squeeze(1)
        if sparse.numel():
            self._add_columns(index_C[sparse], hidden_CH[sparse], columns_CK[sparse], ids_CK[sparse])
        if sparse.numel() < len(index_C):
            rest_CV.mul_(0.0 if rest_C is None else rest_C.unsqueeze(-1))
            rest_CV.scatter_(1, ids_CK, columns_CK)
        return dense_C

    def _add_dense(self, index_C: Tensor, hidden_CH: Tensor, grad_CV: Tensor) -> None:
        # By assignment, not added: a token is in one chunk of a pass; a token of the vocabulary is in all of them.
        if self.grad_hidden_PH is not None:
            self.grad_hidden_PH[index_C] = products.dense_hidden_grad(grad_CV, self.head)
        if self.wants[1]:
            if self.grad_weight_VH is None:
                self.grad_weight_VH = products.dense_weight_grad(grad_CV, hidden_CH)
            else:
                products.add_dense_weight_grad(self.grad_weight_VH, grad_CV, hidden_CH)
        if self.grad_bias_V is not None:
            self.grad_bias_V += grad_CV.sum(0)

    def _zero_weight_grad(self) -> Tensor:
        return self.scale_P.new_zeros(self.head.weight.shape)

    def _add_columns(self, index_C: Tensor, hidden_CH: Tensor, grad_CK: Tensor, ids_CK: Tensor) -> None:
        if self.grad_hidden_PH is not None:
            self.grad_hidden_PH[index_C] = products.column_hidden_grad(grad_CK, self.head, ids_CK)
        if self.wants[1]:
            if self.grad_weight_VH is None:
                self.grad_weight_VH = self._zero_weight_grad()
            products.add_column_weight_grad(self.grad_weight_VH, grad_CK, hidden_CH, ids_CK)
        if self.grad_bias_V is not None:
            self.grad_bias_V.index_add_(0, ids_CK.flatten(), grad_CK.flatten())


def impossible(values: Tensor) -> Tensor:
    """Logits or log-probs with -inf where `products.LOG_ZERO` stands for it."""
    return values.masked_fill(values < RULED_OUT, -math.inf)


def _entropy(inside_CK: Tensor, rest_C: Tensor, rest_neg_entropy_C: Tensor) -> Tensor:
    """Entropy of the whole distribution from the logits of a support and the mass and entropy of the rest; nats."""
    logsumexp_C = torch.logaddexp(inside_CK.logsumexp(-1), rest_C)
    log_p_CK = inside_CK - logsumexp_C.unsqueeze(-1)
    log_rest_C = rest_C - logsumexp_C
    return -((log_p_CK.exp() * log_p_CK).sum(-1) + log_rest_C.exp() * (log_rest_C + rest_neg_entropy_C))


def _tail_matters(columns_CK: Tensor, rest_C: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Tokens whose gradient outside the support is not lost in the rounding of the gradient inside it."""
    if rest_C is None:
        return torch.zeros(len(columns_CK), dtype=torch.bool, device=columns_CK.device)
    return rest_C.abs() > TAIL_SHARE * torch.finfo(dtype).eps * columns_CK.abs().sum(-1)


def _dense_places(are_dense: Sequence[Tensor | bool], parts: Sequence[slice], index_C: Tensor) -> Tensor:
    """The places in a chunk of the tokens whose gradient is dense; a device is asked where rules differ by token."""
    if all(isinstance(one, bool) for one in are_dense):
        whole = [part for one, part in zip(are_dense, parts, strict=True) if one]
        return torch.cat([index_C[:0], *(torch.arange(p.start, p.stop, device=index_C.device) for p in whole)])
    dense_C = torch.zeros_like(index_C, dtype=torch.bool)
    for one, part in zip(are_dense, parts, strict=True):
        dense_C[part] = one
    return dense_C.nonzero().squeeze(1)
