"""The entry points of the fused loss: they check what they are given and choose a backend.

Shapes: B sequences, T completion tokens, H / Hs hidden sizes of the student / a source, V vocabulary, N scored tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dopd.divergences import check_choice, entropy, log_probs, pick
from dopd.errors import ConfigError
from dopd.heads import Head
from dopd.loss import RoutedLoss, routed_loss
from dopd.rules import RoutingTable

Backend = Literal["reference", "chunked", "triton", "auto"]
AnyHead = Head | nn.Linear | Tensor
DEFAULT_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class TokenScores:
    """What one source says about the sampled tokens.

    Attributes:
        logprobs (`Tensor` (B, T)): log-prob of every completion token, nats, float32 or wider; 0 where not scored.
        entropy (`Tensor` (B, T)): entropy of the whole distribution at every position, nats; 0 where not scored.
    """

    logprobs: Tensor
    entropy: Tensor


@torch.no_grad()
def score_tokens(
    hidden: Tensor, head: AnyHead, completion_ids: Tensor, mask: Tensor, *, chunk_tokens: int | None = None
) -> TokenScores:
    """Log-probs and entropies at the scored positions, one chunk of tokens at a time; no gradient.

    Args:
        hidden (`Tensor` (B, T, H)): last hidden states at the positions that predict the completion tokens.
        head (`Head`, `nn.Linear` or `Tensor` (V, H)): output head of the same model.
        completion_ids (`LongTensor` (B, T)): sampled tokens.
        mask (`Tensor` (B, T)): non-zero where a token is scored.
        chunk_tokens (`int`, *optional*): tokens whose logits exist at a time; defaults to `DEFAULT_CHUNK_TOKENS`.
    """
    head = Head.of(head).gathered(hidden.dtype)
    keep_BT = mask != 0
    hidden_NH, ids_N = hidden[keep_BT], completion_ids[keep_BT]
    logprobs, entropies = [], []
    for hidden_CH, ids_C in zip(
        hidden_NH.split(chunk_tokens or DEFAULT_CHUNK_TOKENS),
        ids_N.split(chunk_tokens or DEFAULT_CHUNK_TOKENS),
        strict=True,
    ):
        log_p_CV = log_probs(head.logits(hidden_CH))
        logprobs.append(pick(log_p_CV, ids_C))
        entropies.append(entropy(log_p_CV))
    zeros_BT = torch.zeros(mask.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)

    def spread(pieces: list[Tensor]) -> Tensor:
        return zeros_BT.masked_scatter(keep_BT, torch.cat(pieces)) if pieces else zeros_BT

    return TokenScores(spread(logprobs), spread(entropies))


def fused_routed_loss(
    student_hidden: Tensor,
    student_head: AnyHead,
    targets: Mapping[str, tuple[Tensor, AnyHead]],
    completion_ids: Tensor,
    mask: Tensor,
    table: RoutingTable,
    *,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
    regimes: Tensor | None = None,
    num_sequences: float | None = None,
) -> RoutedLoss:
    """`routed_loss` from hidden states and heads. Gradients reach the student's hidden states and its head.

    Args:
        student_hidden (`Tensor` (B, T, H)): last hidden states of the plain student at the positions that predict the
            completion tokens.
        student_head (`Head`, `nn.Linear` or `Tensor` (V, H)): the student's output head.
        targets (`dict[str, tuple[Tensor, head]]`): source name -> hidden states (B, T, Hs) and head.
        completion_ids, mask, table, regimes, num_sequences: see `routed_loss`.
        backend (`str`, *optional*, defaults to `"auto"`): `"reference"` makes the logits of the whole batch; the others
            agree with it to rounding.
        chunk_tokens (`int`, *optional*): tokens whose logits exist at a time.

    Raises:
        ConfigError, ScoringError: as `routed_loss`.
    """
    check_choice("backend", backend, Backend)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens (={chunk_tokens}) must be at least 1, or None for the default")
    head = Head.of(student_head).gathered(student_hidden.dtype)
    target_logits = {
        source: Head.of(source_head).gathered(hidden.dtype).logits(hidden.detach())
        for source, (hidden, source_head) in targets.items()
    }
    return routed_loss(
        head.logits(student_hidden),
        target_logits,
        completion_ids,
        mask,
        table,
        regimes=regimes,
        num_sequences=num_sequences,
    )
