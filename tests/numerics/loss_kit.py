"""Random batches for the reference loss, tables to try them with, and a loss with its gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dopd
from dopd.divergences import log_probs, pick
from dopd.routing import privilege_gap

SOURCES = ["teacher", "privileged_teacher", "privileged_student"]
TABLES = {
    "dopd": dopd.table("dopd", top_k=4),
    "dopd renormalize": dopd.table("dopd", top_k=4, tail="renormalize"),
    "vanilla": dopd.table("vanilla"),
    "vanilla sampled": dopd.table("vanilla", support="sampled"),
    "vanilla js": dopd.table("vanilla", divergence="js", support="target_topk", top_k=3),
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def random_batch(seed: int, num_rows: int = 4, num_tokens: int = 6, vocab: int = 7) -> dict[str, Any]:
    """The arguments of `routed_loss` but the table, in float64."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(4, num_rows, num_tokens, vocab, generator=generator, dtype=torch.float64)
    teacher, privileged_teacher, student, privileged_student = 2.0 * views
    privileged_student = torch.where(  # part of the tokens agree, so that low regimes occur
        torch.rand(num_rows, num_tokens, 1, generator=generator) < 0.6,
        privileged_teacher + 0.1 * privileged_student,
        privileged_student,
    )
    mask = torch.rand(num_rows, num_tokens, generator=generator) < 0.75
    mask[:, 0] = True
    return {
        "student_logits": student,
        "targets": dict(zip(SOURCES, (teacher, privileged_teacher, privileged_student), strict=True)),
        "completion_ids": torch.randint(vocab, (num_rows, num_tokens), generator=generator),
        "mask": mask,
    }


def mapped(batch: dict[str, Any], function: Any) -> dict[str, Any]:
    """The batch with a function applied to every tensor."""
    return {
        key: {name: function(x) for name, x in value.items()} if isinstance(value, dict) else function(value)
        for key, value in batch.items()
    }


def run_loss(batch: dict[str, Any], table: dopd.RoutingTable, **options: Any) -> tuple[Any, Tensor]:
    """(result, gradient of the loss with respect to the student's logits)."""
    leaf = batch["student_logits"].detach().clone().requires_grad_()
    result = dopd.routed_loss(**{**batch, "student_logits": leaf}, table=table, **options)
    result.loss.backward()
    return replace(result, loss=result.loss.detach(), per_token=result.per_token.detach()), leaf.grad


def gap_of(batch: dict[str, Any]) -> Tensor:
    """The privilege gap of every token, 0 where nothing is scored."""
    teacher, student = (
        pick(log_probs(batch["targets"][name]), batch["completion_ids"])
        for name in ("privileged_teacher", "privileged_student")
    )
    return privilege_gap(teacher, student).masked_fill(~batch["mask"], 0.0)
