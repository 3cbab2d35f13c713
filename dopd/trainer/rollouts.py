"""What is said of a batch of rollouts before it is learned from: scores of the verifier, and metrics."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dopd.data.views import lacks_privileged
from dopd.errors import NotFiniteError, ScoringError
from dopd.evaluation.verifier import Verifier, judged
from dopd.lengths import crossing, shortest_switch
from dopd.sampling import Ending
from dopd.scoring import unpadded
from dopd.trainer.finite import likely_cause


@contextmanager
def finite_rollouts(step: int, learning_rate: float) -> Iterator[None]:
    """What diverged in the last update is first seen when a token is drawn; say so instead of torch's words."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise NotFiniteError(
            f"the student's distribution is not finite (NaN or infinite logits) at step {step}. "
            + likely_cause(step, learning_rate),
            source="student",
        ) from error


@contextmanager
def answers_of_at_most(limit: int | None, trainer: Any) -> Iterator[None]:
    """Let the trainer's rollouts end after `limit` tokens, if that is fewer than its own limit, whoever makes them."""
    engines = [(trainer.generation_config, "max_new_tokens")]
    if trainer.use_vllm:
        engines.append((trainer.vllm_generation, "max_completion_length"))
    whole = [getattr(engine, name) for engine, name in engines]
    for (engine, name), most in zip(engines, whole, strict=True):
        setattr(engine, name, most if limit is None else min(most, limit))
    try:
        yield
    finally:
        for (engine, name), most in zip(engines, whole, strict=True):
            setattr(engine, name, most)


def check_frequencies(model: Any, batch: Mapping[str, Tensor]) -> None:
    """Raise `ScoringError` for answers that crossed the length at which the student changes its rotation frequencies.

    Their first tokens were drawn with other frequencies than the sequence has as a whole, which is how it is scored.
    """
    starts = batch["prompt_mask"].sum(1)
    crossed = crossing(model.config, starts.tolist(), (starts + batch["completion_mask"].sum(1)).tolist())
    if crossed:
        raise ScoringError(
            f"{crossed} of {len(starts)} answers grew across {shortest_switch(model.config)} tokens, where "
            f"{type(model).__name__} changes its rotation frequencies (rope type longrope or dynamic): they were drawn "
            "from another distribution than is scored. Lower max_completion_length or max_prompt_length, or allow it "
            "with off_policy_rollouts=True"
        )


def verify(
    verifier: Verifier | None,
    rows: Sequence[Mapping[str, Any]],
    batch: Mapping[str, Tensor],
    tokenizer: Any,
    ending: Ending,
) -> list[float] | None:
    """The verifier's score of every completion; `None` without a verifier."""
    if verifier is None:
        return None
    scores = []
    for number, (row, text, ids) in enumerate(zip(rows, texts(batch, tokenizer), _tokens(batch), strict=True)):
        try:
            # A completion cut at the length limit is not a finished answer.
            scores.append(judged(verifier, text, row) if ending.ended(ids) else 0.0)
        except NotFiniteError as error:
            error.rows = (number,)
            raise
    return scores


def texts(batch: Mapping[str, Tensor], tokenizer: Any) -> list[str]:
    """Completions as text, without special tokens."""
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in _tokens(batch)]


def _tokens(batch: Mapping[str, Tensor]) -> list[list[int]]:
    return unpadded(batch["completion_ids"], batch["completion_mask"])


def rollout_metrics(
    rows: Sequence[Mapping[str, Any]],
    batch: Mapping[str, Tensor],
    scores: Sequence[float] | None,
    *,
    ending: Ending,
    needs_privileged: bool,
    accelerator: Any,
) -> dict[str, float]:
    """Shares over the completions of all ranks: of those that ended by themselves, that were right, that lacked p.

    Args:
        needs_privileged (`bool`): whether the method reads privileged context.
    """
    ended = torch.tensor([float(ending.ended(ids)) for ids in _tokens(batch)], device=accelerator.device)
    sums = {"completions/eos_ratio": ended.sum()}
    if needs_privileged:
        sums["privileged/missing_ratio"] = ended.new_tensor(float(sum(map(lacks_privileged, rows))))
    if scores is not None:
        sums["rollout/accuracy"] = ended.new_tensor(sum(scores))
    values = torch.stack([*sums.values(), ended.new_tensor(float(len(rows)))])
    *totals, count = accelerator.reduce(values, reduction="sum").tolist()
    metrics = {name: total / count for name, total in zip(sums, totals, strict=True)}
    return metrics | {"completions/clipped_ratio": 1.0 - metrics["completions/eos_ratio"]}


def grouped_by_length(batch: dict[str, Any], num_generations: int) -> dict[str, Any]:
    """The batch with its groups of rollouts in the order of their longest sequence.

    Args:
        batch (`dict`): tensors with a first dimension B, or none, and lists of B things.
        num_generations (`int`): rollouts of each prompt, which stand side by side. Where a rank holds parts of groups,
            every completion counts as a group of its own.
    """
    lengths_B = batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
    size = num_generations if len(lengths_B) % num_generations == 0 else 1
    order_G = lengths_B.view(-1, size).amax(1).argsort(stable=True)
    order_B = (order_G.unsqueeze(1) * size + torch.arange(size, device=order_G.device)).flatten()
    return {name: _reordered(value, order_B) for name, value in batch.items()}


def _reordered(value: Any, order: Tensor) -> Any:
    if isinstance(value, list):
        return [value[row] for row in order.tolist()]
    return value[order] if value.dim() else value
