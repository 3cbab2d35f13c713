"""Where the contexts of the views come from, once a batch of rollouts is there and may have been judged."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from dopd.data.images import PRIVILEGED_COLUMN
from dopd.data.views import is_blank, lacks_privileged, without_question
from dopd.errors import ConfigError
from dopd.signals.answers import RIGHT_FROM
from dopd.sources import CONTEXT_COLUMNS, CONTEXT_ONLY, CONTRAST, CRITICISM, PLAIN, PRAISE, PRIVILEGED, SELF
from dopd.tables import RoutingTable

# What Cal-OPD (arXiv 2609.21619) tells the teacher of an answer that it is about to score.
JUDGEMENTS = {
    PRAISE: "The answer below was checked and is correct.",
    CRITICISM: "The answer below was checked and is wrong.",
}


def rows_for_view(
    view: str,
    table: RoutingTable,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str] = (),
    scores: Sequence[float] | None = None,
    num_generations: int = 1,
    *,
    ended: Sequence[bool] | None = None,
    number: int = 0,
) -> list[dict[str, Any]]:
    """The rows with a view's context in the place of `privileged_context` (and `privileged_images`).

    Args:
        view (`str`): one of the views of `dopd.sources`, not the plain one.
        table (`RoutingTable`): says where contexts come from.
        rows: the batch's rows, the rollouts of a prompt side by side.
        completions (`list[str]`): the rollouts as text, for contexts from siblings and for the student's own answer.
        scores (`list[float]`, *optional*): a verifier's scores of the rollouts, for the same.
        num_generations (`int`): rollouts of each prompt.
        ended (`list[bool]`, *optional*): which rollouts were not cut; all of them if left out.
        number (`int`): which of the contexts from siblings, where a view has several: the first is 0.

    Raises:
        ConfigError: contexts come from siblings, and there are no scores or parts of groups alone.
    """
    if view == CONTEXT_ONLY:
        privileged = rows_for_view(PRIVILEGED, table, rows, completions, scores, num_generations)
        return [row if lacks_privileged(row) else without_question(row) for row in privileged]
    origin = {PRIVILEGED: table.context, CONTRAST: table.contrast}.get(view, "column")
    if view == PRIVILEGED and origin == "column":
        return [dict(row) for row in rows]
    contexts: Sequence[Any]
    if view in JUDGEMENTS:
        contexts = [JUDGEMENTS[view]] * len(rows)
    elif view == SELF:
        contexts = completions
    elif origin == "none":
        contexts = [None] * len(rows)
    elif origin == "column":
        contexts = [row.get(CONTEXT_COLUMNS[view]) for row in rows]
    else:
        at_random = table.siblings == "random"
        right = view == PRIVILEGED
        if table.siblings_end and not right and ended is not None:
            completions = [text if ends else "" for text, ends in zip(completions, ended, strict=True)]
        options: dict[str, Any] = {"right": right, "at_random": at_random, "number": number}
        contexts = sibling_contexts(completions, scores, num_generations, **options)
    return [
        {**row, CONTEXT_COLUMNS[PRIVILEGED]: context, PRIVILEGED_COLUMN: None}
        for row, context in zip(rows, contexts, strict=True)
    ]


def rows_known_before(table: RoutingTable, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row with the context of each privileged view, for those whose contexts do not come from rollouts."""
    origins = {PRIVILEGED: table.context, CONTEXT_ONLY: table.context, CONTRAST: table.contrast}
    views = (table.views - {PLAIN, SELF}) | ({PRIVILEGED} if table.needs_privileged else set())
    return [rows_for_view(view, table, [row])[0] for view in sorted(views) if origins.get(view) != "sibling"]


def sibling_contexts(
    completions: Sequence[str],
    scores: Sequence[float] | None,
    num_generations: int,
    *,
    right: bool,
    at_random: bool = False,
    number: int = 0,
) -> list[str | None]:
    """For each rollout the first right (or wrong) rollout of the same prompt that is not itself, or a random one;
    `None` without one. With a `number`, the one after so many others.
    """
    if scores is None:
        raise ConfigError("contexts from siblings need a verifier: pass verifier=... (a task brings its own)")
    if len(completions) % num_generations:
        raise ConfigError(
            f"contexts from siblings: a rank holds {len(completions)} completions, which is not a multiple of "
            f"num_generations (={num_generations}). Set per_device_train_batch_size * gradient_accumulation_steps to "
            "one"
        )
    contexts: list[str | None] = []
    for place in range(len(completions)):
        start = place - place % num_generations
        siblings = (n for n in range(start, start + num_generations) if n != place)
        fitting = [
            completions[n] for n in siblings if (scores[n] >= RIGHT_FROM) is right and not is_blank(completions[n])
        ]
        # The texts are the seed: no state to save, and the answers of another step draw otherwise.
        seed = f"{place - start} {right} {completions[start : start + num_generations]}"
        if at_random and fitting:
            drawing = random.Random(seed)
            drawn = fitting.pop(drawing.randrange(len(fitting)))
            drawing.shuffle(fitting)
            fitting = [drawn, *fitting]
        contexts.append(fitting[number] if number < len(fitting) else None)
    return contexts
