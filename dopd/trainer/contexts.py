"""Where the contexts of the views come from, once a batch of rollouts is there and may have been judged."""

from collections.abc import Mapping, Sequence
from typing import Any

from dopd.errors import ConfigError
from dopd.sources import CONTEXT_COLUMNS, CONTRAST, CRITICISM, PRAISE, PRIVILEGED
from dopd.tables import RoutingTable

# Which field of `SignalBatch` says whether a row has the context of a view.
PRESENCE = {PRIVILEGED: "has_privileged", CONTRAST: "has_contrast"}
# What Cal-OPD (arXiv 2609.21619) tells the teacher of an answer that it is about to score.
JUDGEMENTS = {
    PRAISE: "The answer below was checked and is correct.",
    CRITICISM: "The answer below was checked and is wrong.",
}
RIGHT_FROM = 0.5  # the score from which a rollout counts as right


def contexts_of(
    view: str,
    table: RoutingTable,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    scores: Sequence[float] | None,
    num_generations: int,
) -> list[Any]:
    """The context that a view adds to each row's prompt; `None` where there is none.

    Args:
        view (`str`): one of the views of `dopd.sources`, not the plain one.
        table (`RoutingTable`): says where contexts come from.
        rows: the batch's rows, the rollouts of a prompt side by side.
        completions (`list[str]`): the rollouts as text.
        scores (`list[float]`, *optional*): a verifier's scores of the rollouts.
        num_generations (`int`): rollouts of each prompt.

    Raises:
        ConfigError: contexts come from siblings, and there are no scores or parts of groups alone.
    """
    if view in JUDGEMENTS:
        return [JUDGEMENTS[view]] * len(rows)
    origin = table.context if view == PRIVILEGED else table.contrast
    if origin == "none":
        return [None] * len(rows)
    if origin == "column":
        return [row.get(CONTEXT_COLUMNS[view]) for row in rows]
    return sibling_contexts(completions, scores, num_generations, right=view == PRIVILEGED)


def sibling_contexts(
    completions: Sequence[str], scores: Sequence[float] | None, num_generations: int, *, right: bool
) -> list[str | None]:
    """For each rollout the first right (or wrong) rollout of the same prompt that is not itself; `None` without one."""
    if scores is None:
        raise ConfigError("contexts from siblings need a verifier: pass verifier=... (a task brings its own)")
    if len(completions) % num_generations:
        raise ConfigError(
            f"contexts from siblings: a rank holds {len(completions)} completions, which is not a multiple of "
            f"num_generations (={num_generations}). Set per_device_train_batch_size * "
            "gradient_accumulation_steps to one"
        )
    contexts: list[str | None] = []
    for place in range(len(completions)):
        start = place - place % num_generations
        siblings = (n for n in range(start, start + num_generations) if n != place)
        fitting = (completions[n] for n in siblings if (scores[n] >= RIGHT_FROM) is right and completions[n].strip())
        contexts.append(next(fitting, None))
    return contexts
