"""What a model says at single tokens, and the record of a completion made of it.

Shapes: N tokens of one completion, H hidden size, V vocabulary, C tokens of a chunk, K most probable tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dopd.heads import Head
from dopd.inspection.pictures import pictures_of, row_key
from dopd.inspection.schema import (
    MAX_CHARACTERS,
    MAX_TOKENS,
    NUM_TOP,
    SCHEMA_VERSION,
    json_number,
    prompt_text,
    token_texts,
)
from dopd.sources import LIVE
from dopd.step import Rollouts, ScoredBatch, Step
from dopd.tables import RoutingTable

_CHUNK_LOGITS = 2**23  # logits that exist at a time: 32 MiB in float32


@dataclass(frozen=True)
class TokenDetails:
    """One model at the tokens of one completion.

    Attributes:
        logprobs (`Tensor` (N,)): of the tokens, nats.
        entropy (`Tensor` (N,)): of the whole distributions, nats.
        top_ids, top_probs (`Tensor` (N, K)): the most probable tokens, most probable first.
    """

    logprobs: Tensor
    entropy: Tensor
    top_ids: Tensor
    top_probs: Tensor


@dataclass(frozen=True)
class Completion:
    """What a record has of one completion beside its tokens.

    Attributes:
        row (`dict`): its dataset row.
        step (`int`): optimizer steps before it was sampled.
        number (`int`): its place among the completions of that step.
        rollout (`int`): its place among the completions of its prompt.
        kind (`str`): one of `dopd.inspection.schema.KINDS`.
        score (`float`, *optional*): the verifier's.
        extra (`dict`): what reward functions logged of it, by column.
    """

    row: Mapping[str, Any]
    step: int = 0
    number: int = 0
    rollout: int = 0
    kind: str = "inspect"
    score: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rollouts: Rollouts, place: int, row: Mapping[str, Any], **of_record: Any) -> "Completion":
        """One of judged rollouts.

        Args:
            rollouts (`Rollouts`), place (`int`): the answers, and which of them.
            row (`dict`): its row as the dataset brought it.
            of_record: `step`, `number`, `rollout` and `kind`.
        """
        score = None if rollouts.scores is None else rollouts.scores[place]
        extra = {column: values[place] for column, values in rollouts.extra.items()}
        return cls(row, score=score, extra=extra, **of_record)


@torch.no_grad()
def token_details(hidden_NH: Tensor, head: Head, ids_N: Tensor) -> TokenDetails:
    """Scores and most probable tokens from hidden states, a chunk of tokens at a time; `head` has whole tensors."""
    top = min(NUM_TOP, head.vocab_size)
    size = max(_CHUNK_LOGITS // head.vocab_size, 1)
    parts = []
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for start in range(0, max(hidden_NH.shape[0], 1), size):
            logp_CV = torch.log_softmax(head.logits(hidden_NH[start : start + size].detach()), dim=-1)
            probs_CV = logp_CV.exp()
            entropy_C = -(probs_CV * logp_CV.masked_fill(probs_CV == 0, 0.0)).sum(-1)
            top_CK = probs_CV.topk(top)
            logprobs_C = logp_CV.gather(1, ids_N[start : start + size].unsqueeze(1)).squeeze(1)
            parts.append((logprobs_C.cpu(), entropy_C.cpu(), top_CK.indices.cpu(), top_CK.values.cpu()))
    return TokenDetails(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))


def whole_models(
    student: tuple[Tensor, Head], targets: Mapping[str, tuple[Tensor, Head]]
) -> dict[str, tuple[Tensor, Head]]:
    """Hidden states and heads with whole tensors, of the plain student (`dopd.sources.LIVE`) and of the sources that
    rows pull towards. All processes call it together: a sharded head is collected by all.
    """
    states = {LIVE: student, **targets}
    return {name: (hidden, head.gathered(hidden.dtype)) for name, (hidden, head) in states.items()}


def completion_record(
    completion: Completion,
    step: Step,
    batch: ScoredBatch,
    place: int,
    models: Mapping[str, tuple[Tensor, Head]],
    per_token: Tensor,
    thresholds: Mapping[str, float] | None,
) -> dict[str, Any]:
    """The record of one completion of a scored batch.

    Args:
        completion (`Completion`): what a record has beside its tokens.
        step (`Step`): scored the batch.
        batch (`ScoredBatch`): the completions.
        place (`int`): which of them.
        models (`dict`): of `whole_models`.
        per_token (`Tensor` (B, T)): weighted divergences, nats.
        thresholds (`dict`, *optional*): batch averages that routed the tokens.
    """
    kept = batch.mask[place].bool()
    ids = batch.completion_ids[place][kept]
    details = {
        name: token_details(hidden[place][kept][:MAX_TOKENS], head, ids[:MAX_TOKENS])
        for name, (hidden, head) in models.items()
    }
    logprobs = {name: scores.tokens.logprobs for name, scores in batch.sources.items()}
    columns = {
        "gap": batch.assignment.gap,
        "logprob_teacher": logprobs.get("privileged_teacher", logprobs.get("teacher")),
        "logprob_student": logprobs.get("privileged_student"),
    }
    return trace_record(
        completion,
        batch.table,
        step.prompts.tokenizer,
        ids=ids.tolist(),
        student=details.pop(LIVE),
        targets=details,
        columns={name: None if c is None else c[place][kept].tolist() for name, c in columns.items()},
        regimes=batch.assignment.regimes[place][kept].tolist() if batch.table.routed else None,
        weights=batch.assignment.weights(batch.table)[place][kept].tolist(),
        losses=per_token[place][kept].detach().tolist(),
        thresholds=thresholds,
    )


def thresholds_of(batch: ScoredBatch) -> dict[str, float] | None:
    """The averages that routed a batch, as a record has them; `None` in an unrouted table."""
    averages = batch.assignment.thresholds
    return None if averages is None else {"gap": averages.gap, "confidence": averages.confidence}


def trace_record(
    completion: Completion,
    table: RoutingTable,
    tokenizer: Any,
    *,
    ids: list[int],
    student: TokenDetails,
    targets: Mapping[str, TokenDetails],
    columns: Mapping[str, list[float] | None],
    regimes: list[int] | None,
    weights: list[float],
    losses: list[float],
    thresholds: Mapping[str, float] | None,
) -> dict[str, Any]:
    """The record of one completion in the format of `docs/reference/trace.md`.

    Args:
        completion (`Completion`): what a record has beside its tokens.
        table (`RoutingTable`): the method.
        tokenizer: turns ids into text.
        ids (`list[int]`): the scored tokens (N).
        student (`TokenDetails`): the plain student.
        targets (`dict[str, TokenDetails]`): the distributions that rules of the table pull towards, by source.
        columns (`dict[str, list[float]]`): `gap`, `logprob_teacher`, `logprob_student`: values (N), or `None`.
        regimes (`list[int]`, *optional*): numbers of the regimes (N) of a routed table.
        weights (`list[float]`): what the divergences of a token are multiplied with (N).
        losses (`list[float]`): weight times divergence (N), nats.
        thresholds (`dict`, *optional*): batch averages that routed these tokens.
    """
    texts = token_texts(tokenizer, ids[:MAX_TOKENS])
    rules = {int(rule.regime): rule for rule in table.rules if rule.regime is not None}
    tokens = []
    for n, (token, text) in enumerate(zip(ids, texts, strict=False)):
        rule = table.rules[0] if regimes is None else rules[regimes[n]]
        target = targets.get(str(rule.target))
        tokens.append(
            {
                "id": token,
                "text": text,
                "regime": None if regimes is None else rule.label,
                **{name: None if values is None else json_number(values[n]) for name, values in columns.items()},
                "logprob_plain": json_number(float(student.logprobs[n])),
                "entropy": json_number(float(student.entropy[n])),
                "weight": json_number(weights[n]),
                "loss": json_number(losses[n]),
                "top_target": None if target is None else _top(target, n, tokenizer),
                "top_student": _top(student, n, tokenizer),
            }
        )
    prompt, privileged = prompt_text(completion.row["prompt"]), completion.row.get("privileged_context")
    return {
        "schema": SCHEMA_VERSION,
        "kind": completion.kind,
        "step": completion.step,
        "row": completion.number,
        "method": table.name,
        "prompt_key": row_key(completion.row),
        "rollout": completion.rollout,
        "prompt": prompt[:MAX_CHARACTERS],
        "privileged_context": None if privileged is None else str(privileged)[:MAX_CHARACTERS],
        "score": completion.score,
        "num_tokens": len(ids),
        "teacher_view": teacher_view(table),
        "thresholds": None if thresholds is None else {k: json_number(v) for k, v in thresholds.items()},
        "rules": {
            rule.label: {
                "source": str(rule.target or "none"),
                "divergence": rule.divergence,
                "support": f"{rule.support} {rule.top_k}" if rule.support.endswith("topk") else rule.support,
                "weight": rule.weight,
            }
            for rule in table.rules
        },
        "tokens": tokens,
        **({"extra": {n: _json_value(v) for n, v in completion.extra.items()}} if completion.extra else {}),
        **pictures_of(completion.row),
    }


def _json_value(value: Any) -> Any:
    if isinstance(value, str):
        return value[:MAX_CHARACTERS]
    return json_number(value) if isinstance(value, float) else value


def teacher_view(table: RoutingTable) -> str | None:
    """The prompt that the teacher of a method reads: `"privileged"`, `"plain"`, or `None` without a teacher."""
    if "privileged_teacher" in table.sources:
        return "privileged"
    return "plain" if "teacher" in table.sources else None


def _top(details: TokenDetails, n: int, tokenizer: Any) -> list[list[Any]]:
    pairs = zip(details.top_ids[n].tolist(), details.top_probs[n].tolist(), strict=True)
    return [[tokenizer.decode([token]), json_number(prob)] for token, prob in pairs]
