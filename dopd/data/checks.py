"""Checks of a dataset before anything is trained on it; what is missing or dropped is counted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dopd.data.column_names import CONVERSATIONS, likeliest_column
from dopd.data.encode import image_sources
from dopd.data.images import COLUMNS, PRIVILEGED_COLUMN, BrokenImageError, in_short, open_image
from dopd.data.turns import written_turns
from dopd.data.views import Prompt, images_of, is_blank, lacks_privileged
from dopd.errors import DataError
from dopd.progress import tracked
from dopd.sources import CONTEXT_COLUMNS, REFERENCE_COLUMN

# Columns of text that go into a privileged view.
TEXT_COLUMNS = tuple(CONTEXT_COLUMNS.values())
# Columns that people bring, in the hope that somebody reads them.
_HOPEFUL = (
    "teacher_chat_template_kwargs",  # a setting of the run; the column of a row is for student and teacher
    "system",
    "system_prompt",
    "messages",
    "conversations",
    "documents",
    "functions",
    "hint",
    "hints",
    "privileged",
    "privileged_information",
    "teacher_prompt",
    "tool_choice",
)
_LIMITS = "(max_prompt_length, or max_context or the model's context, less max_completion_length)"
SKIP_ADVICE = "skip_broken_images=True leaves such rows out and counts them"


@dataclass(frozen=True)
class DatasetReport:
    """What was found. Rows and counts, none of them tokens.

    Attributes:
        num_rows (`int`): rows that will be used.
        num_without_privileged (`int`): rows among them without privileged context (p = "" in every view).
        num_dropped (`int`): rows left out because a view of the prompt was too long.
        num_broken (`int`): rows left out because an image of theirs cannot be read.
        first_broken (`str`): what was wrong with the first of these.
        num_without_reference (`int`): rows without a reference text, where the method trains on these.
        num_long_references (`int`): rows left out because their reference text is longer than an answer may be.
    """

    num_rows: int
    num_without_privileged: int
    num_dropped: int
    num_broken: int = 0
    first_broken: str = ""
    num_without_reference: int = 0
    num_long_references: int = 0

    def sentences(self) -> list[str]:
        """The findings worth telling a user, one sentence each."""
        lines = []
        if self.num_without_privileged:
            lines.append(
                f"{self.num_without_privileged} of {self.num_rows} prompts have no privileged_context: for them both "
                "privileged views read the plain prompt"
            )
        if self.num_without_reference:
            lines.append(
                f"{self.num_without_reference} of {self.num_rows} rows have no {REFERENCE_COLUMN}: rules on reference "
                "texts teach nothing there, and their means are over the rows that have one"
            )
        if self.num_dropped:
            lines.append(f"{self.num_dropped} prompts were dropped because a view of them is longer than allowed")
        if self.num_long_references:
            lines.append(
                f"{self.num_long_references} rows were dropped because their {REFERENCE_COLUMN} is longer than an "
                "answer may be"
            )
        if self.num_broken:
            lines.append(
                f"{self.num_broken} rows were dropped because an image of theirs cannot be read; the first: "
                f"{self.first_broken}"
            )
        return lines


@dataclass(frozen=True)
class References:
    """How long reference texts are, for a method that trains on them.

    Attributes:
        num_tokens (callable): row -> tokens of its reference text; 0 where it has none.
        most (`int`): tokens that an answer may have.
    """

    num_tokens: Callable[[Mapping[str, Any]], int]
    most: int

    def fits(self, row: Mapping[str, Any], index: int, *, drop: bool) -> bool:
        """Whether the reference text of a row is as short as an answer.

        Raises:
            DataError: it is no text, would act as markup, or (unless `drop`) is too long. It names the row.
        """
        text = row.get(REFERENCE_COLUMN)
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"row {index}, column {REFERENCE_COLUMN!r}: expected text or None, got {type(text).__name__}"
            )
        try:
            length = self.num_tokens(row)
        except DataError as error:
            raise type(error)(f"row {index}: {error}") from error
        if length > self.most and not drop:
            raise DataError(
                f"row {index}, column {REFERENCE_COLUMN!r}: the reference text has {length} tokens, {self.most} are "
                "allowed (max_completion_length, less one for the end). Nothing is truncated: raise "
                "max_completion_length, or set overlong_prompts='drop' to leave such rows out and count them"
            )
        return length <= self.most


def check_columns(
    columns: Sequence[str], *, needs_privileged: bool, method: str, needs_references: bool = False
) -> None:
    """Raise `DataError` if a column that the method reads is missing."""
    if "prompt" not in columns:
        raise DataError(
            f"column 'prompt' is missing; the dataset has {', '.join(columns) or 'no columns'}. {_prompt_from(columns)}"
        )
    if needs_privileged and not {"privileged_context", PRIVILEGED_COLUMN} & set(columns):
        raise DataError(
            f"column 'privileged_context' is missing and method {method!r} reads it; the dataset has "
            f"{', '.join(columns)}. {_privileged_from(columns)}Add the column (None in a row without privileged "
            "information), or choose method='vanilla'"
        )
    if needs_references and REFERENCE_COLUMN not in columns:
        theirs = likeliest_column(columns, REFERENCE_COLUMN) or "NAME"
        raise DataError(
            f"column {REFERENCE_COLUMN!r} is missing and method {method!r} trains on it (rules with text='reference'); "
            f"the dataset has {', '.join(columns)}. Write {renaming(REFERENCE_COLUMN, theirs)}"
        )


def check_contexts(columns: Sequence[str], needed: Sequence[str], method: str) -> None:
    """Raise `DataError` if the column of a context that a view of the method shows is missing: without it that view is
    the plain prompt, and the method another one.
    """
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DataError(
            f"column {missing[0]!r} is missing and method {method!r} reads it; the dataset has {', '.join(columns)}. "
            f"Write {renaming(missing[0], likeliest_column(columns, missing[0]) or 'NAME')}"
        )


def renaming(name: str, theirs: str) -> str:
    """What to write where a column has another name than the one that a run reads."""
    return f"columns: {{{name}: {theirs}}} in the config, or dataset.rename_column({theirs!r}, {name!r}) in Python"


def _prompt_from(columns: Sequence[str]) -> str:
    """How a dataset without the column gets it."""
    name = likeliest_column(columns, "prompt")
    if name is None:
        return f"Call the column that the student answers 'prompt': write {renaming('prompt', 'NAME')}"
    if name.lower() in CONVERSATIONS:
        return (
            f"If {name!r} are the conversations, write columns: {{prompt: {name}}} in the config: they are asked up to "
            "the last turn that is not the assistant's. In Python, make the column of these turns, each with 'role' "
            "and 'content'"
        )
    return f"If {name!r} is what the student answers, call it 'prompt': write {renaming('prompt', name)}"


def _privileged_from(columns: Sequence[str]) -> str:
    name = likeliest_column(columns, "privileged_context")
    if name is None:
        return ""
    return f"If {name!r} is what only the teacher may see, write {renaming('privileged_context', name)}. "


def unread_columns(columns: Sequence[str]) -> list[str]:
    """Columns that nothing reads although their names say that something should."""
    return [name for name in columns if name.lower() in _HOPEFUL]


def check_row(row: dict[str, Any], index: int) -> None:
    """Raise `DataError`, naming row and column, unless prompt and privileged context can be used."""
    prompt = row["prompt"]
    where = f"row {index}, column 'prompt'"
    if isinstance(prompt, str):
        if is_blank(prompt):
            raise DataError(f"{where}: the text is empty")
        if written_turns(prompt) is not None:
            raise DataError(
                f"{where} (={prompt[:60]!r}): a conversation written as text, which would be asked as it stands: "
                "columns: {prompt: prompt} in the config reads it; in Python, read it (json.loads) and give the list "
                "of messages"
            )
    elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
        for number, turn in enumerate(prompt):
            _check_turn(turn, f"{where}, turn {number}")
        if not any(message["role"] == "user" for message in prompt):
            raise DataError(f"{where}: the conversation has no user turn")
    else:
        raise DataError(
            f"{where} (={repr(prompt)[:80]}): expected text, or a list of messages with 'role' and 'content'"
        )
    for column in TEXT_COLUMNS:
        context = row.get(column)
        if context is not None and not isinstance(context, str):
            raise DataError(f"row {index}, column {column!r}: expected text or None, got {type(context).__name__}")


def _check_turn(turn: Mapping[str, Any], where: str) -> None:
    role, content = turn["role"], turn.get("content")
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"{where}: role (={role!r}) must be 'user', 'assistant', 'system' or 'tool'")
    if content is None:
        if role == "assistant" and turn.get("tool_calls"):
            return
        raise DataError(f"{where}: the {role}'s turn has no content")
    if isinstance(content, str):
        empty = is_blank(content)
    elif isinstance(content, list) and all(isinstance(block, dict) for block in content):
        if not all(isinstance(block.get("type"), str) for block in content):
            raise DataError(f"{where}: a block of the {role}'s turn has no 'type' ('text', 'image')")
        texts = [block.get("text") for block in content if block["type"] == "text"]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: a text block of the {role}'s turn has no 'text'")
        empty = not content or (len(texts) == len(content) and all(map(is_blank, texts)))
    else:
        raise DataError(
            f"{where}: content (={str(content)[:60]!r}) must be text or a list of blocks such as "
            f"{{'type': 'text', 'text': ...}}, got {type(content).__name__}"
        )
    if empty and role == "user":
        raise DataError(f"{where}: the user's turn is empty")


def check_kind(row: dict[str, Any], index: int, kinds: set[type]) -> None:
    """Raise `DataError` if this row's prompt is of another kind than those before it; `kinds` remembers them."""
    kinds.add(type(row["prompt"]))
    if len(kinds) > 1:
        raise DataError(f"row {index}, column 'prompt': text and conversations are mixed in one dataset")


def check_images(row: Mapping[str, Any], index: int) -> None:
    """Read every image of a row.

    Raises:
        BrokenImageError: one cannot be read; the message names row, column and place.
    """
    sources = [(name, images_of(row, (name,))) for name in (*COLUMNS, PRIVILEGED_COLUMN)]
    written = [source for source in image_sources(row["prompt"]) if source is not None]
    for column, images in [*sources, ("prompt", written)]:
        for place, source in enumerate(images):
            try:
                open_image(source)
            except DataError as error:
                raise BrokenImageError(f"row {index}, column {column!r}, image {place}: {error}") from error


def check_prompts(
    dataset: Any,
    *,
    needs_privileged: bool,
    method: str,
    views: Callable[[dict[str, Any]], list[Prompt]],
    num_tokens: Callable[[list[Prompt]], list[int]],
    max_prompt_tokens: int,
    drop_overlong: bool,
    skip_broken_images: bool = False,
    look: Callable[[dict[str, Any], int], object] | None = None,
    references: References | None = None,
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
        skip_broken_images (`bool`): leave rows with an image that cannot be read out, and count them.
        look (callable, *optional*): is shown every row that is kept, and its index; it may refuse one.
        references (`References`, *optional*): of a method that trains on reference texts.

    Returns:
        The dataset (without dropped rows) and the `DatasetReport`.

    Raises:
        DataError: no rows (at first, or after dropping), a missing column, a row that cannot be used or does not fit.
    """
    if len(dataset) == 0:
        raise DataError("the dataset is empty: it needs at least one row with a 'prompt'")
    needed = {"needs_privileged": needs_privileged, "needs_references": references is not None}
    check_columns(dataset.column_names, method=method, **needed)
    kept: list[int] = []
    num_blank = num_untaught = num_long = 0
    broken: list[str] = []
    kinds: set[type] = set()
    # A bar that appears where this takes longer than one waits: images are read, one by one.
    for index in tracked("checking prompts", "row", range(len(dataset))):
        row = _row_of(dataset, index)
        check_row(row, index)
        check_kind(row, index, kinds)
        try:
            longest = longest_view(row, index, views, num_tokens)
        except BrokenImageError as error:
            if not skip_broken_images:
                raise BrokenImageError(f"{error}. {SKIP_ADVICE}") from error
            broken.append(str(error))
            continue
        if longest > max_prompt_tokens:
            if not drop_overlong:
                raise DataError(overlong_message(f"row {index}", longest, max_prompt_tokens))
            continue
        if references is not None and not references.fits(row, index, drop=drop_overlong):
            num_long += 1
            continue
        if look is not None:
            look(row, index)
        kept.append(index)
        num_blank += lacks_privileged(row)
        num_untaught += is_blank(row.get(REFERENCE_COLUMN)) if references is not None else 0
    num_dropped = len(dataset) - len(kept) - len(broken) - num_long
    if not kept:
        raise DataError(_nothing_left(num_dropped, max_prompt_tokens, broken))
    counts = (len(kept), num_blank if needs_privileged else 0, num_dropped, len(broken))
    report = DatasetReport(*counts, broken[0] if broken else "", num_untaught, num_long)
    return (dataset.select(kept) if len(kept) < len(dataset) else dataset), report


def _row_of(dataset: Any, index: int) -> dict[str, Any]:
    try:
        return dict(dataset[index])
    except Exception as error:  # columns of videos, sound and pictures are decoded here, also those that nobody reads
        raise DataError(
            f"row {index}: the dataset cannot decode it: {in_short(error)}. Take columns away that are not needed "
            "(dataset.remove_columns), or install what their decoding asks for"
        ) from error


def longest_view(
    row: dict[str, Any],
    index: int,
    views: Callable[[dict[str, Any]], list[Prompt]],
    num_tokens: Callable[[list[Prompt]], list[int]],
) -> int:
    """Tokens of the longest view of a row, every image of which was read.

    Raises:
        BrokenImageError: an image cannot be read, or the processor refuses what it sees: a shape, a number of images.
        DataError: a view cannot be made. Both name row and column.
    """
    check_images(row, index)
    try:
        return max(num_tokens(views(row)))
    except BrokenImageError as error:
        raise BrokenImageError(f"row {index}, {_columns_of_images(row)}: {error}") from error
    except DataError as error:
        raise type(error)(f"row {index}: {error}") from error


def _columns_of_images(row: Mapping[str, Any]) -> str:
    filled = [name for name in (*COLUMNS, PRIVILEGED_COLUMN) if images_of(row, (name,))]
    if any(source is not None for source in image_sources(row["prompt"])):
        filled.append("prompt")
    return f"column {' and '.join(map(repr, filled or COLUMNS[:1]))}"


def _nothing_left(num_dropped: int, allowed: int, broken: Sequence[str]) -> str:
    reasons = []
    if num_dropped:
        reasons.append(f"all {num_dropped} prompts are longer than {allowed} tokens {_LIMITS}: raise the limit")
    if broken:
        reasons.append(f"{len(broken)} have images that cannot be read, the first: {broken[0]}")
    return "no row is left: " + "; ".join(reasons)


def overlong_message(where: str, length: int, allowed: int) -> str:
    return (
        f"{where}: a view of the prompt has {length} tokens, {allowed} are allowed {_LIMITS}. Nothing is truncated: "
        "shorten it, raise the limit, or set overlong_prompts='drop' to leave such rows out and count them"
    )
