"""The views of a batch of rollouts, and what signals know of it beside scores."""

from typing import Any

import torch

from dopd.data.contexts import rows_for_view
from dopd.data.images import COLUMNS, PRIVILEGED_COLUMN
from dopd.data.privileged import PrivilegedTemplate
from dopd.data.views import lacks_privileged, privileged_prompt
from dopd.scoring import View
from dopd.sources import CONTRAST, PLAIN, PRIVILEGED
from dopd.tables import RoutingTable
from dopd.trainer.context import check_fits
from dopd.trainer.rollouts import texts

# Which field of `SignalBatch` says whether a row has the context of a view.
PRESENCE = {PRIVILEGED: "has_privileged", CONTRAST: "has_contrast"}


def as_the_student_reads(
    rows: list[dict[str, Any]], table: RoutingTable, template: PrivilegedTemplate
) -> list[dict[str, Any]]:
    """The rows with the prompt that the student answers and is trained on."""
    if table.student_view == "plain":
        return rows
    # The prompt has the row's images in it then.
    without_images = dict.fromkeys((*COLUMNS, PRIVILEGED_COLUMN))
    return [row | without_images | {"prompt": privileged_prompt(row, template)} for row in rows]


def batch_views(
    trainer: Any, rows: list[dict[str, Any]], batch: dict[str, Any], scores: list[float] | None
) -> tuple[dict[str, View], dict[str, Any]]:
    """The views that the table reads, by name, and fields of `SignalBatch` that are not scores.

    Args:
        trainer: a `DOPDTrainer`.
        rows: the batch's rows, the rollouts of a prompt side by side.
        batch (`dict`): the host's batch of rollouts.
        scores (`list[float]`, *optional*): a verifier's scores of the rollouts.
    """
    table, device = trainer.table, trainer.accelerator.device
    known: dict[str, Any] = {
        "num_generations": trainer.args.num_generations if trainer.model.training else 1,
        "step": trainer.state.global_step,
        "progress": trainer.state.global_step / max(trainer.state.max_steps, 1),
        "rewards": None if scores is None else torch.tensor(scores, dtype=torch.float64, device=device),
    }
    views = {PLAIN: trainer.rollout_view(batch)}
    completions = texts(batch, trainer._tokenizer) if table.needs_rewards else []
    if completions:
        # An answer that wrote out a control token cannot be shown to a sibling: it would act as markup there.
        markup = trainer.markup
        completions = ["" if markup.first_in([text]) else text for text in completions]
    for name in sorted(table.views - {PLAIN}):
        told = rows_for_view(name, table, rows, completions, scores, known["num_generations"])
        views[name] = trainer._privileged_view(told)
        check_fits(trainer, name, views[name])
        if name in PRESENCE:
            known[PRESENCE[name]] = torch.tensor([not lacks_privileged(row) for row in told], device=device)
    return views, known
