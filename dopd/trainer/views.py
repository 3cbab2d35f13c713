"""The views of a batch of rollouts, and what signals know of it beside scores."""

from typing import Any

import torch
from torch import Tensor

from dopd.data.privileged import PrivilegedTemplate
from dopd.scoring import View
from dopd.sources import CONTEXT_COLUMNS, PLAIN, PRIVILEGED
from dopd.tables import RoutingTable
from dopd.trainer.contexts import PRESENCE, contexts_of
from dopd.trainer.rollouts import texts


def as_the_student_reads(
    rows: list[dict[str, Any]], table: RoutingTable, template: PrivilegedTemplate
) -> list[dict[str, Any]]:
    """The rows with the prompt that the student answers and is trained on."""
    if table.student_view == "plain":
        return rows
    column = CONTEXT_COLUMNS[PRIVILEGED]
    return [row | {"prompt": template.apply(row["prompt"], row.get(column))} for row in rows]


def batch_views(
    trainer: Any, rows: list[dict[str, Any]], batch: dict[str, Tensor], scores: list[float] | None
) -> tuple[dict[str, View], dict[str, Any]]:
    """The views that the table reads, by name, and fields of `SignalBatch` that are not scores.

    Args:
        trainer: a `DOPDTrainer`.
        rows: the batch's rows, the rollouts of a prompt side by side.
        batch (`dict[str, Tensor]`): the host's batch of rollouts.
        scores (`list[float]`, *optional*): a verifier's scores of the rollouts.
    """
    table, device = trainer.table, trainer.accelerator.device
    known: dict[str, Any] = {
        "num_generations": trainer.args.num_generations if trainer.model.training else 1,
        "step": trainer.state.global_step,
        "progress": trainer.state.global_step / max(trainer.state.max_steps, 1),
        "rewards": None if scores is None else torch.tensor(scores, dtype=torch.float64, device=device),
    }
    views = {PLAIN: View(batch["prompt_ids"], batch["prompt_mask"])}
    completions = texts(batch, trainer._tokenizer) if table.needs_rewards else []
    for name in sorted(table.views - {PLAIN}):
        contexts = contexts_of(name, table, rows, completions, scores, known["num_generations"])
        told = [row | {CONTEXT_COLUMNS[PRIVILEGED]: text} for row, text in zip(rows, contexts, strict=True)]
        views[name] = trainer._privileged_view(told)
        if name in PRESENCE:
            known[PRESENCE[name]] = torch.tensor([bool(text and str(text).strip()) for text in contexts], device=device)
    return views, known
