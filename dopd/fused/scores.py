"""What a source says about the sampled tokens, one chunk of logits at a time.

Shapes: B sequences, T completion tokens, H hidden size, V vocabulary, N scored tokens, C tokens of a chunk.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dopd.fused.products import chunk_size, dense_logits, working_head
from dopd.fused.tiles import TileOperations, score_tile
from dopd.heads import Head, widened, working_dtype
from dopd.rules import Rule
from dopd.signals import MEASURES, take_measure


@dataclass(frozen=True)
class TopLogprobs:
    """The most probable tokens of a source at every position, K of them.

    Attributes:
        ids (`LongTensor` (B, T, K)): likeliest first.
        logprobs (`Tensor` (B, T, K)): of the whole distribution, nats, float32 or wider.
    """

    ids: Tensor
    logprobs: Tensor

    def at(self, numbers: Tensor) -> "TopLogprobs":
        """Some completions, in the order in which `numbers` (LongTensor) names them."""
        return TopLogprobs(self.ids[numbers], self.logprobs[numbers])

    @classmethod
    def put_together(cls, parts: "Sequence[tuple[Tensor, TopLogprobs]]") -> "TopLogprobs":
        """Parts of a batch, each with the numbers of its completions (LongTensor)."""
        return cls(*(_put_together([(n, getattr(one, name)) for n, one in parts]) for name in ("ids", "logprobs")))


@dataclass(frozen=True)
class TokenScores:
    """What one source says about the sampled tokens.

    Attributes:
        logprobs (`Tensor` (B, T)): log-prob of every completion token, nats, float32 or wider; 0 where not scored.
        entropy (`Tensor` (B, T), *optional*): entropy of the whole distribution at every position, nats; 0 where not
            scored. `None` from a scorer that does not see whole distributions.
        logsumexp (`Tensor` (B, T), *optional*): log of the sum of the exponentials of the logits, nats; with it, a loss
            over K tokens needs only K logits of this source.
        top (`TopLogprobs`, *optional*): its most probable tokens, from a scorer that has no hidden states to give.
    """

    logprobs: Tensor
    entropy: Tensor | None
    logsumexp: Tensor | None = None
    top: TopLogprobs | None = None

    def at(self, numbers: Tensor) -> "TokenScores":
        """Some completions, in the order in which `numbers` (LongTensor) names them."""
        return TokenScores(
            self.logprobs[numbers],
            None if self.entropy is None else self.entropy[numbers],
            None if self.logsumexp is None else self.logsumexp[numbers],
            None if self.top is None else self.top.at(numbers),
        )

    @classmethod
    def put_together(cls, parts: "Sequence[tuple[Tensor, TokenScores]]") -> "TokenScores":
        """The scores of a batch from parts of it, each with the numbers of its completions (LongTensor). What one part
        does not have, the whole has not.
        """
        entropy = [(n, one.entropy) for n, one in parts if one.entropy is not None]
        sums = [(n, one.logsumexp) for n, one in parts if one.logsumexp is not None]
        top = [(n, one.top) for n, one in parts if one.top is not None]
        return cls(
            _put_together([(n, one.logprobs) for n, one in parts]),
            _put_together(entropy) if len(entropy) == len(parts) else None,
            _put_together(sums) if len(sums) == len(parts) else None,
            TopLogprobs.put_together(top) if len(top) == len(parts) else None,
        )

    def give(self, rule: Rule, vocab_size: int) -> bool:
        """Whether the target of a rule can be taken from these scores alone, without hidden states."""
        if rule.support == "sampled":
            return True
        listed = 0 if self.top is None else self.top.ids.shape[-1]
        is_single = rule.target is not None and rule.target.single is not None
        return rule.support == "target_topk" and is_single and rule.top_k <= listed and rule.top_k < vocab_size


def _put_together(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows of several tensors, in the order that their numbers say."""
    order = torch.cat([numbers for numbers, _ in parts]).argsort()
    return torch.cat([part for _, part in parts])[order]


@torch.no_grad()
def score(
    hidden: Tensor,
    head: Head,
    completion_ids: Tensor,
    mask: Tensor,
    *,
    operations: TileOperations,
    chunk_tokens: int | None,
    merged_ids: Sequence[int] = (),
) -> TokenScores:
    """See `dopd.fused.score_tokens`; `operations` does what is done to a tile of logits."""
    places_N = (mask != 0).flatten().nonzero().squeeze(1)  # once: an index by a mask looks for them each time
    dtype = working_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        head = working_head(head, dtype)
        hidden_NH, ids_N = hidden.detach().flatten(0, 1)[places_N].to(dtype), completion_ids.flatten()[places_N]
        num_tokens = hidden_NH.shape[0]
        score_dtype = widened(dtype)
        size = chunk_tokens or chunk_size(hidden.device, head.vocab_size, score_dtype.itemsize, tiles=1)
        size = min(size, max(num_tokens, 1))
        tile_CV = torch.empty(size, head.vocab_size, dtype=score_dtype, device=hidden.device)
        scored_3N = torch.empty(3, num_tokens, dtype=score_dtype, device=hidden.device)
        for start in range(0, num_tokens, size):
            chunk = slice(start, min(start + size, num_tokens))
            z_CV = dense_logits(hidden_NH[chunk], head, tile_CV[: chunk.stop - start])
            logprobs_C, stats = score_tile(operations, z_CV, ids_N[chunk], merged_ids)
            scored_3N[:, chunk] = torch.stack([logprobs_C, -stats.neg_entropy_C, stats.logsumexp_C])
    spread_3BT = torch.zeros(3, *mask.shape, dtype=score_dtype, device=hidden.device)
    spread_3BT.flatten(1)[:, places_N] = scored_3N
    return TokenScores(*spread_3BT)


@torch.no_grad()
def measures(
    names: Iterable[str],
    sources: Mapping[str, tuple[Tensor, Head]],
    mask: Tensor,
    *,
    chunk_tokens: int | None = None,
) -> dict[str, Tensor]:
    """Measures of whole distributions (`dopd.signals.MEASURES`) at the scored positions, a chunk of tokens at a time.

    Args:
        names: which ones.
        sources (`dict[str, tuple[Tensor, Head]]`): source -> last hidden states (B, T, H) and head.
        mask (`Tensor` (B, T)): non-zero where a token is scored.
        chunk_tokens (`int`, *optional*): tokens whose logits exist at a time.

    Returns:
        Measure -> `Tensor` (B, T), float32 or wider; 0 where nothing is scored.
    """
    taken = {}
    for name in sorted(names):
        pairs = {source: sources[source] for source in MEASURES[name].sources}
        heads = {
            source: working_head(head.on(hidden.device), working_dtype(hidden))
            for source, (hidden, head) in pairs.items()
        }
        states = {
            source: hidden.detach()[mask != 0].to(heads[source].weight.dtype) for source, (hidden, _) in pairs.items()
        }
        first = next(iter(states.values()))
        dtype, vocab_size = widened(first.dtype), next(iter(heads.values())).vocab_size
        # Log-probs and what a measure makes of them stand beside the logits.
        size = chunk_tokens or chunk_size(first.device, vocab_size, dtype.itemsize, tiles=3 * len(pairs))
        values_N = torch.empty(len(first), dtype=dtype, device=first.device)
        with torch.autocast(first.device.type, enabled=False):
            for start in range(0, len(first), size):
                part = slice(start, start + size)
                logits = {
                    source: dense_logits(
                        states[source][part], heads[source], values_N.new_empty(len(states[source][part]), vocab_size)
                    )
                    for source in pairs
                }
                values_N[part] = take_measure(name, logits).to(dtype)
        taken[name] = torch.zeros(mask.shape, dtype=dtype, device=first.device).masked_scatter(mask != 0, values_N)
    return taken
