"""The entry points of the fused loss: they check their arguments and choose a backend.

Shapes: B sequences, T completion tokens, H / Hs hidden sizes of the student / a source, V vocabulary.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dopd.assignment import Assignment
from dopd.errors import ConfigError, check_choice
from dopd.fused.chunked import chunked_routed_loss
from dopd.fused.scores import TokenScores, score
from dopd.fused.tiles import TileOperations
from dopd.heads import Head
from dopd.loss import RoutedLoss, check_ids, routed_loss
from dopd.tables import RoutingTable

Backend = Literal["reference", "chunked", "triton", "auto"]
AnyHead = Head | nn.Linear | Tensor


@torch.compiler.disable
def score_tokens(
    hidden: Tensor,
    head: AnyHead,
    completion_ids: Tensor,
    mask: Tensor,
    *,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
    merged_ids: Sequence[int] = (),
) -> TokenScores:
    """Log-probs, entropies and log-sum-exps at the scored positions, one chunk of tokens at a time; no gradient.

    Args:
        hidden (`Tensor` (B, T, H)): last hidden states at the positions that predict the completion tokens.
        head (`Head`, `nn.Linear` or `Tensor` (V, H)): output head of the same model.
        completion_ids (`LongTensor` (B, T)): sampled tokens.
        mask (`Tensor` (B, T)): non-zero where a token is scored.
        backend (`str`, *optional*, defaults to `"auto"`): see `fused_routed_loss`.
        chunk_tokens (`int`, *optional*): tokens whose logits exist at a time; as many as fit a fixed number of bytes
            if left out (`dopd.fused.products`).
        merged_ids (`list[int]`): see `dopd.routed_loss`.
    """
    backend = _resolve(backend, chunk_tokens, hidden)
    head = _beside(hidden, head)
    _check_batch({"hidden": (hidden, head)}, completion_ids, mask)
    return score(
        hidden,
        head,
        completion_ids,
        mask,
        operations=_tile_operations(backend),
        chunk_tokens=chunk_tokens,
        merged_ids=merged_ids,
    )


@torch.compiler.disable
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
    assignment: Assignment | None = None,
    num_sequences: float | None = None,
    scores: Mapping[str, TokenScores] | None = None,
    merged_ids: Sequence[int] = (),
) -> RoutedLoss:
    """`routed_loss` from hidden states and heads. Gradients reach the student's hidden states and its head.

    Without an `assignment`, what the table decides by is computed here: one dense projection for each source that it
    scores and is not in `scores`. A table costs one projection of the student for each of its rule groups, which add
    up.

    Args:
        student_hidden (`Tensor` (B, T, H)): last hidden states of the plain student at the positions that predict the
            completion tokens.
        student_head (`Head`, `nn.Linear` or `Tensor` (V, H)): the student's output head.
        targets (`dict[str, tuple[Tensor, head]]`): source name -> hidden states (B, T, Hs) and head.
        completion_ids, mask, table, assignment, num_sequences, merged_ids: see `routed_loss`.
        backend (`str`, *optional*, defaults to `"auto"`): `"reference"` makes the logits of the whole batch;
            `"chunked"` and `"triton"` agree with it to rounding. `"auto"` is `"triton"` on CUDA, else `"chunked"`.
        chunk_tokens (`int`, *optional*): tokens whose logits exist at a time; as many as fit a fixed number of bytes
            if left out (`dopd.fused.products`).
        scores (`dict[str, TokenScores]`, *optional*): source name -> what `score_tokens` returned for these hidden
            states and this head (not for older weights of it). A source may then be left out of `targets` if that is
            all that is read of it (`TokenScores.give`; not with `"reference"`).

    Returns:
        `RoutedLoss`; `per_token` carries a gradient with `backend="reference"` alone, `loss` always.

    Raises:
        ConfigError, ScoringError: as `routed_loss`.
    """
    backend = _resolve(backend, chunk_tokens, student_hidden)
    head = _beside(student_hidden, student_head)
    reused = {} if scores is None else scores
    provided = {*targets, *_sources_by_scores(table, reused, head.vocab_size, decide_alone=backend == "reference")}
    table.check_provided(provided, decided=assignment is not None)
    sources = {source: (hidden, _beside(hidden, source_head)) for source, (hidden, source_head) in targets.items()}
    _check_batch({"student_hidden": (student_hidden, head), **_named(sources)}, completion_ids, mask)
    _check_scores(reused, mask)
    if backend == "reference":
        return routed_loss(
            head.gathered(student_hidden.dtype).logits(student_hidden),
            {
                source: source_head.gathered(hidden.dtype).logits(hidden.detach())
                for source, (hidden, source_head) in sources.items()
            },
            completion_ids,
            mask,
            table,
            assignment=assignment,
            num_sequences=num_sequences,
            merged_ids=merged_ids,
        )
    with_grad = torch.is_grad_enabled()
    # The gradient by a list of outcomes is autograd's, which inference mode would refuse to record.
    with torch.inference_mode(False), torch.set_grad_enabled(with_grad):
        return chunked_routed_loss(
            student_hidden,
            head,
            sources,
            completion_ids,
            mask,
            table,
            operations=_tile_operations(backend),
            chunk_tokens=chunk_tokens,
            assignment=assignment,
            num_sequences=num_sequences,
            scores=reused,
            merged_ids=merged_ids,
        )


def _beside(hidden: Tensor, head: AnyHead) -> Head:
    return Head.of(head).on(hidden.device)


def _sources_by_scores(
    table: RoutingTable, scores: Mapping[str, TokenScores], vocab_size: int, *, decide_alone: bool
) -> set[str]:
    """Sources that need not come with hidden states: their scores are all that is read of them.

    Args:
        decide_alone (`bool`): whether scores are read for decisions alone, and every target as a whole distribution.
    """
    rules = [rule for rule in table.rules if rule.weight]
    found = set(scores) - table.measured_sources
    if decide_alone:
        return found - table.target_sources
    return {
        name
        for name in found
        if all(scores[name].give(rule, vocab_size) for rule in rules if name in rule.target_names)
    }


def _resolve(backend: Backend, chunk_tokens: int | None, hidden: Tensor) -> Backend:
    check_choice("backend", backend, Backend)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens (={chunk_tokens}) must be at least 1, or None for the default")
    has_triton = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return "triton" if has_triton and hidden.is_cuda else "chunked"
    if backend == "triton":
        if not has_triton:
            raise ConfigError("backend='triton' needs the triton package; use backend='chunked', or install triton")
        if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(
                f"backend='triton' needs CUDA tensors, got {hidden.device.type}; use backend='chunked' or 'auto' "
                "(TRITON_INTERPRET=1 runs the kernels on a CPU, for tests)"
            )
    return backend


def _tile_operations(backend: Backend) -> TileOperations:
    if backend != "triton":
        return TileOperations()
    from dopd.fused.triton import TritonTileOperations  # triton is an optional package

    return TritonTileOperations()


def _named(sources: Mapping[str, tuple[Tensor, Head]]) -> dict[str, tuple[Tensor, Head]]:
    return {f"targets[{source!r}]": pair for source, pair in sources.items()}


def _check_batch(pairs: Mapping[str, tuple[Tensor, Head]], completion_ids: Tensor, mask: Tensor) -> None:
    vocab_size = next(iter(pairs.values()))[1].vocab_size
    for name, (hidden, head) in pairs.items():
        if hidden.dim() != 3 or hidden.shape[:2] != mask.shape or hidden.shape[2] != head.weight.shape[1]:
            raise ConfigError(
                f"{name} {tuple(hidden.shape)} must have the shape (B, T, H), with (B, T) {tuple(mask.shape)} of the "
                f"mask and H {head.weight.shape[1]} of its head"
            )
        if head.vocab_size != vocab_size:
            raise ConfigError(
                f"{name}: its head has {head.vocab_size} tokens and the student's has {vocab_size}; both must have "
                "one vocabulary"
            )
    if completion_ids.shape != mask.shape:
        raise ConfigError(
            f"completion_ids {tuple(completion_ids.shape)} must have the shape (B, T) {tuple(mask.shape)} of the mask"
        )
    check_ids(completion_ids, mask, vocab_size)


def _check_scores(scores: Mapping[str, TokenScores], mask: Tensor) -> None:
    for source, scored in scores.items():
        if scored.logprobs.shape != mask.shape:
            raise ConfigError(
                f"scores[{source!r}] {tuple(scored.logprobs.shape)} must have the shape (B, T) {tuple(mask.shape)} of "
                "the mask: give the part of them that belongs to these tokens"
            )
