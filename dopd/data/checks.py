"""Checks of a dataset before anything is trained on it; what is missing or dropped is counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dopd.data.privileged import Prompt
from dopd.errors import DataError

CHECK_BATCH = 512  # rows tokenised at a time while lengths are checked


@dataclass(frozen=True)
class DatasetReport:
    """What was found. Rows and counts, none of them tokens.

    Attributes:
        num_rows (`int`): rows that will be used.
        num_without_privileged (`int`): rows among them without privileged context (p = "" in every view).
        num_dropped (`int`): rows left out because a view of the prompt was too long.
    """

    num_rows: int
    num_without_privileged: int
    num_dropped: int

    def sentences(self) -> list[str]:
        """The findings worth telling a user, one sentence each."""
        lines = []
        if self.num_without_privileged:
            lines.append(
                f"{self.num_without_privileged} of {self.num_rows} prompts have no privileged_context: for them both "
                "privileged views read the plain prompt"
            )
        if self.num_dropped:
            lines.append(f"{self.num_dropped} prompts were dropped because a view of them is longer than allowed")
        return lines


def check_columns(columns: Sequence[str], *, needs_privileged: bool, method: str) -> None:
    """Raise `DataError` if a column that the method reads is missing."""
    if "prompt" not in columns:
        raise DataError(f"column 'prompt' is missing; the dataset has {', '.join(columns) or 'no columns'}")
    if needs_privileged and "privileged_context" not in columns:
        raise DataError(
            f"column 'privileged_context' is missing and method {method!r} reads it; the dataset has "
            f"{', '.join(columns)}. Add the column (None in a row without privileged information), or choose "
            "method='vanilla'"
        )


def check_row(row: dict[str, Any], index: int) -> None:
    """Raise `DataError`, naming row and column, unless prompt and privileged context can be used."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"row {index}, column 'prompt': the text is empty")
    elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
        if not any(message["role"] == "user" for message in prompt):
            raise DataError(f"row {index}, column 'prompt': the conversation has no user turn")
    else:
        raise DataError(
            f"row {index}, column 'prompt' (={str(prompt)[:80]!r}): expected text, or a list of messages with "
            "'role' and 'content'"
        )
    context = row.get("privileged_context")
    if context is not None and not isinstance(context, str):
        raise DataError(
            f"row {index}, column 'privileged_context': expected text or None, got {type(context).__name__}"
        )


def check_kind(row: dict[str, Any], index: int, kinds: set[type]) -> None:
    """Raise `DataError` if this row's prompt is of another kind than those before it; `kinds` remembers them."""
    kinds.add(type(row["prompt"]))
    if len(kinds) > 1:
        raise DataError(f"row {index}, column 'prompt': text and conversations are mixed in one dataset")


def is_blank(privileged_context: str | None) -> bool:
    return privileged_context is None or not privileged_context.strip()


def check_prompts(
    dataset: Any,
    *,
    needs_privileged: bool,
    method: str,
    views: Callable[[dict[str, Any]], list[Prompt]],
    num_tokens: Callable[[list[Prompt]], list[int]],
    max_prompt_tokens: int,
    drop_overlong: bool,
) -> tuple[Any, DatasetReport]:
    """Check every row of a map-style dataset, and the length of every view of its prompt.

    Nothing is ever truncated: a prompt that does not fit is an error that names the row, or a counted drop.

    Args:
        dataset (`datasets.Dataset`): rows with the columns `prompt` and, where the method reads it,
            `privileged_context`.
        needs_privileged (`bool`): whether the method reads privileged context.
        method (`str`): the method's name, for messages.
        views (callable): row -> the prompts that models will read (plain, and privileged where it is needed).
        num_tokens (callable): prompts of one kind (all text, or all conversations) -> their lengths in tokens.
        max_prompt_tokens (`int`): the most tokens that any view may have.
        drop_overlong (`bool`): leave rows out, and count them, instead of raising.

    Returns:
        The dataset (without dropped rows) and the `DatasetReport`.

    Raises:
        DataError: no rows (at first, or after dropping), a missing column, a row that cannot be used or does not fit.
    """
    if len(dataset) == 0:
        raise DataError("the dataset is empty: it needs at least one row with a 'prompt'")
    check_columns(dataset.column_names, needs_privileged=needs_privileged, method=method)
    kept: list[int] = []
    num_blank = 0
    kinds: set[type] = set()
    for start in range(0, len(dataset), CHECK_BATCH):
        indices = range(start, min(start + CHECK_BATCH, len(dataset)))
        rows = [dataset[index] for index in indices]
        for index, row in zip(indices, rows, strict=True):
            check_row(row, index)
            check_kind(row, index, kinds)
        row_views = [views(row) for row in rows]
        lengths = num_tokens([view for prompts in row_views for view in prompts])
        position = 0
        for index, row, prompts in zip(indices, rows, row_views, strict=True):
            longest = max(lengths[position : position + len(prompts)])
            position += len(prompts)
            if longest > max_prompt_tokens:
                if not drop_overlong:
                    raise DataError(overlong_message(f"row {index}", longest, max_prompt_tokens))
                continue
            kept.append(index)
            num_blank += is_blank(row.get("privileged_context"))
    if not kept:
        raise DataError(
            f"all {len(dataset)} prompts are longer than {max_prompt_tokens} tokens: raise max_prompt_length"
        )
    num_dropped = len(dataset) - len(kept)
    report = DatasetReport(len(kept), num_blank if needs_privileged else 0, num_dropped)
    return (dataset.select(kept) if num_dropped else dataset), report


def overlong_message(where: str, length: int, allowed: int) -> str:
    return (
        f"{where}: a view of the prompt has {length} tokens, {allowed} are allowed (max_prompt_length, or the model's "
        "context less max_completion_length). Nothing is truncated: shorten it, raise the limit, or set "
        "overlong_prompts='drop' to leave such rows out and count them"
    )
