"""Whether the scores of a source can come from a model that works.

Shapes: B sequences, T completion tokens, N scored tokens, H hidden size.
"""

import torch
from torch import Tensor

from dopd.errors import NotFiniteError, ScoringError

_EQUAL, _CERTAIN = 1e-6, 1e-3  # nats
_DIVERGED = (
    "the student has probably diverged. Lower learning_rate, set max_grad_norm, or go on from an earlier checkpoint"
)


def check_alive(
    source: str,
    logprobs: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    vocab_size: int,
    *,
    ids: Tensor | None = None,
    hidden: Tensor | None = None,
    trained: bool = False,
) -> None:
    """Raise `ScoringError` if a source's scores cannot come from a working model.

    A uniform distribution (weights lost on the way, an untrained head) or one distribution at every position teaches
    nothing, and looks like a loss all the same. A model that is certain of every token has equal scores too, and is
    well: it is dead only if its states are all one.

    Args:
        source (`str`): its name, for the message.
        logprobs, entropy (`Tensor` (B, T)): scores of the sampled tokens, nats; a scorer that does not see whole
            distributions gives no entropy.
        mask (`Tensor` (B, T)): non-zero where a token is scored.
        vocab_size (`int`): size of the vocabulary.
        ids (`LongTensor` (B, T), *optional*): the sampled tokens.
        hidden (`Tensor` (B, T, H), *optional*): the states that predict them.
        trained (`bool`): whether steps of this run may have moved the source since it was loaded.
    """
    cause = _DIVERGED if trained else "check the checkpoint path, its precision and any offloading"
    scores = logprobs if entropy is None else entropy
    values = logprobs[mask != 0].double()
    entropies = None if entropy is None else entropy[mask != 0].double()
    if values.numel() < 8:
        return
    if not bool(torch.isfinite(values if entropies is None else entropies).all()):
        bad = ((mask != 0) & ~torch.isfinite(scores)).any(1)
        raise NotFiniteError(
            f"{source}: its distributions are not finite (NaN or infinite logits): {cause}",
            source=source,
            rows=tuple(bad.nonzero().flatten().tolist()),
        )
    uniform = torch.log(torch.tensor(float(vocab_size))).item()
    if entropies is not None and float(entropies.min()) > uniform - 1e-3:
        raise ScoringError(
            f"{source} is dead: its distribution is uniform over {vocab_size} tokens at all {values.numel()} scored "
            f"positions. Its weights are not those of a trained model: {cause}"
        )
    # Answers of one token to one prompt are scored at one position: there, equal scores say nothing.
    several_positions = int((mask != 0).sum(1).max()) > 1
    if not several_positions or (entropies is not None and float(entropies.std()) >= _EQUAL):
        return
    certain = float(values.min()) > -_CERTAIN
    equal = float(values.std()) < _EQUAL or (ids is not None and _follow_from_tokens(values, ids, mask))
    one_state = hidden is not None and _all_one(hidden[mask != 0])
    if one_state or (equal and not certain):
        of_entropy = "" if entropies is None else f" (entropy {float(entropies[0]):.4f} nats)"
        raise ScoringError(
            f"{source} is dead: one distribution{of_entropy} at all {values.numel()} scored tokens. Its output "
            f"does not depend on its input: {cause}"
        )


def _follow_from_tokens(values: Tensor, ids: Tensor, mask: Tensor) -> bool:
    """Whether a token has one log-prob wherever it stands, and some token stands in several columns."""
    kept = mask != 0
    _, token_N = torch.unique(ids[kept], return_inverse=True)
    columns_N = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)[kept]
    count = int(token_N.max()) + 1

    def spread(numbers: Tensor) -> Tensor:
        lowest, highest = (
            numbers.new_zeros(count).scatter_reduce(0, token_N, numbers, how, include_self=False)
            for how in ("amin", "amax")
        )
        return highest - lowest

    return bool((spread(values) < 10 * _EQUAL).all()) and bool((spread(columns_N) > 0).any())


def _all_one(states_NH: Tensor) -> bool:
    return bool((states_NH - states_NH[:1]).abs().max() <= 1e-6 * states_NH.abs().max())
