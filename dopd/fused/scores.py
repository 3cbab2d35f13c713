"""What a source says about the sampled tokens, one chunk of logits at a time.

Shapes: B sequences, T completion tokens, H hidden size, V vocabulary, N scored tokens, C tokens of a chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dopd.fused.products import chunk_size, dense_logits, wide, working_dtype, working_head
from dopd.fused.rows import TorchRows, score_rows
from dopd.heads import Head


@dataclass(frozen=True)
class TokenScores:
    """What one source says about the sampled tokens.

    Attributes:
        logprobs (`Tensor` (B, T)): log-prob of every completion token, nats, float32 or wider; 0 where not scored.
        entropy (`Tensor` (B, T)): entropy of the whole distribution at every position, nats; 0 where not scored.
        logsumexp (`Tensor` (B, T), *optional*): log of the sum of the exponentials of the logits, nats; with it, a loss
            over K tokens needs only K logits of this source.
    """

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor | None = None


@torch.no_grad()
def score(
    hidden: Tensor, head: Head, completion_ids: Tensor, mask: Tensor, *, rows: TorchRows, chunk_tokens: int | None
) -> TokenScores:
    """See `dopd.fused.score_tokens`; `rows` does the row operations."""
    keep_BT = mask != 0
    dtype = working_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        head = working_head(head, dtype)
        hidden_NH, ids_N = hidden.detach()[keep_BT].to(dtype), completion_ids[keep_BT]
        num_tokens = hidden_NH.shape[0]
        wide_dtype = wide(dtype)
        size = chunk_tokens or chunk_size(hidden.device, head.vocab_size, wide_dtype.itemsize, tiles=1)
        size = min(size, max(num_tokens, 1))
        tile_CV = torch.empty(size, head.vocab_size, dtype=wide_dtype, device=hidden.device)
        scored_3N = torch.empty(3, num_tokens, dtype=wide_dtype, device=hidden.device)
        for start in range(0, num_tokens, size):
            chunk = slice(start, min(start + size, num_tokens))
            z_CV = dense_logits(hidden_NH[chunk], head, tile_CV[: chunk.stop - start])
            logprobs_C, stats = score_rows(rows, z_CV, ids_N[chunk])
            scored_3N[:, chunk] = torch.stack([logprobs_C, -stats.neg_entropy_C, stats.logsumexp_C])
    spread_3BT = torch.zeros(3, *mask.shape, dtype=wide_dtype, device=hidden.device)
    spread_3BT[:, keep_BT] = scored_3N
    return TokenScores(*spread_3BT)
