"""Rows before anything is trained on them: columns, a mapping to ours, views, lengths, and what will not do."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, List, Value, get_dataset_split_names

from dopd.checkpoints import config_of, resolve_model
from dopd.data.beside import columns_of_paths
from dopd.data.checks import check_columns, check_row, unread_columns
from dopd.data.column_names import SYSTEM, Columns, guessed_columns, likeliest_column, paths_of
from dopd.data.encode import PromptLengths, image_sources
from dopd.data.images import COLUMNS, image_size
from dopd.data.overlap import count_overlap, prompt_key
from dopd.data.turns import asked_turns, has_marks
from dopd.data.views import (
    PrivilegedTemplate,
    Prompt,
    as_conversation,
    images_of,
    lacks_privileged,
    plain_prompt,
    privileged_prompt,
)
from dopd.errors import ConfigError, DataError, cut
from dopd.progress import tracked
from dopd.runs.build import load_processing_class
from dopd.runs.circumstances import Circumstances
from dopd.runs.columns import all_paths, value_at, with_columns
from dopd.runs.hints import HintData, rows_of
from dopd.runs.layouts import Layout
from dopd.runs.row_filters import Keep, kept_rows
from dopd.runs.rows import Origin, held_out_rows, read_rows, splits_here
from dopd.sources import CONTEXT_COLUMNS, PLAIN, PRIVILEGED
from dopd.step import PromptEncoder
from dopd.trainer.context import context_of
from dopd.trainer.images import undecoded
from dopd.trainer.preflight import checked_views

_EXAMPLES = 3
_BROKEN = "an image cannot be read"
_LOOKED_AT = 100  # rows, for guesses
_EXAMPLE = 80  # characters of a value


@dataclass(frozen=True)
class Reader:
    """Who reads prompts, by tokenizer and configuration; no weight is loaded.

    Attributes:
        name (`str`): of the model.
        prompts (`PromptEncoder`): how it writes and encodes them.
        room (`int`, *optional*): tokens of its context that an answer leaves; `None` without a limit.
    """

    name: str
    prompts: PromptEncoder
    room: int | None

    @classmethod
    def of(cls, name: str, asked: Circumstances) -> "Reader":
        """The reader of a model by hub id, folder or `tiny:TASK/ROLE`.

        Raises:
            ModelError: it cannot be read.
            ConfigError: answers leave no room for a prompt.
        """
        template = PrivilegedTemplate(asked.privileged_template)
        encoder = PromptEncoder(load_processing_class(name), template, asked.chat_template_kwargs, asked.prompt_format)
        context = context_of(config_of(resolve_model(name)))
        if context is not None and context <= asked.max_new_tokens:
            raise ConfigError(
                f"max_completion_length (={asked.max_new_tokens}) leaves no room for a prompt in the {context} tokens "
                f"that {name!r} reads: lower it"
            )
        return cls(name, encoder, None if context is None else context - asked.max_new_tokens)


@dataclass(frozen=True)
class Lengths:
    """Lengths of a view, in tokens of a model, or in words without one."""

    view: str
    reader: str | None
    median: int
    p95: int
    longest: int
    allowed: int | None = None
    num_too_long: int = 0


@dataclass
class DataLook:
    """What was found.

    Attributes:
        name (`str`): of the dataset.
        num_rows (`int`): as they were read; `num_kept` after filters.
        columns (`list[dict]`): name, type, an example, and rows without a value.
        mapping (`dict[str, str or list[str]]`): the dataset's names by ours; `guessed` are those that nobody gave.
        examples (`list[dict]`): texts of rows by view.
        lengths (`list[Lengths]`): by view and model.
        num_repeated (`int`): rows that ask what an earlier row asks; `num_contradictory` with another answer.
        num_without_privileged (`int`): rows without p.
        overlaps (`dict[str, int]`): rows of other splits that ask what a row asks.
        filtered (`dict[str, int]`): rows that filters leave out, by reason.
        unusable (`dict[str, list[int]]`): rows that a run refuses, or drops where it is told to, by reason.
        notes (`list[str]`): what is worth knowing beside.
    """

    name: str
    num_rows: int = 0
    num_kept: int = 0
    columns: list[dict[str, Any]] = field(default_factory=list)
    mapping: dict[str, str | Sequence[str]] = field(default_factory=dict)
    guessed: list[str] = field(default_factory=list)
    examples: list[dict[str, str]] = field(default_factory=list)
    lengths: list[Lengths] = field(default_factory=list)
    num_repeated: int = 0
    num_contradictory: int = 0
    num_without_privileged: int = 0
    overlaps: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    unusable: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def look_at(
    data: HintData,
    readers: Sequence[Reader] = (),
    *,
    layout: Layout | None = None,
    keep: Keep | None = None,
    held_out: str | None = None,
    max_prompt_length: int | None = None,
) -> tuple[DataLook, Dataset]:
    """Look at rows, under the names that are given and, for what is not, under those that they are likely to have.

    Args:
        data (`HintData`): where they are. Of several splits, `train` is looked at, or the first one.
        readers: models whose tokens count.
        layout (`Layout`, *optional*): what is known of the dataset; its mapping comes before guesses.
        keep (`Keep`, *optional*): in the place of the layout's filters.
        held_out (`str`, *optional*): another dataset, of which rows that ask the same are counted.
        max_prompt_length (`int`, *optional*): most tokens of a prompt.

    Returns:
        What was found, and the rows that are kept, under a run's names.

    Raises:
        ConfigError, DataError: rows that cannot be read, or columns that are not there.
    """
    data, others = _one_split(data)
    raw = rows_of(data, needs=()) if data.task is not None else _read(data, {})
    found = DataLook(data.name, len(raw), len(raw), _summaries(raw))
    named = {**(layout.columns_of(raw.column_names, str(data.origin)) if layout else {}), **data.columns}
    guesses = {} if data.task is not None or layout else _guessed(raw, named)
    found.mapping, found.guessed = {**named, **guesses}, list(guesses)
    if data.task is None and found.mapping and columns_of_paths(raw, found.mapping):
        raw = _read(data, found.mapping)
    rows = with_columns(raw, found.mapping, str(data.origin))
    keep = keep or (layout.keep if layout else None)
    if keep is not None:
        rows, found.filtered = kept_rows(rows, keep, str(data.origin))
    found.num_kept = len(rows)
    _note_columns(found, rows)
    if "prompt" in rows.column_names:
        _look_at_rows(found, rows, readers, max_prompt_length)
        for origin in [*others, *([Origin("--held-out", "--held-out", held_out, None, None)] if held_out else [])]:
            there = held_out_rows(origin, {name: found.mapping[name] for name in ("prompt",) if name in found.mapping})
            name = str(origin.split or origin.name)
            found.overlaps[name] = count_overlap(undecoded(rows), undecoded(there))
    return found, rows


def _read(data: HintData, columns: Columns) -> Dataset:
    rows = undecoded(read_rows(data.origin, columns))
    return rows.select(range(min(data.count or len(rows), len(rows))))


def _one_split(data: HintData) -> tuple[HintData, list[Origin]]:
    """The split that is looked at, and the others."""
    if data.task is not None:
        return data, []
    names = splits_here(data.origin)
    if names is None:
        names = get_dataset_split_names(data.name, data.config) if data.split is None else [data.split]
    chosen = data.split or ("train" if "train" in names else names[0])
    data = replace(data, split=chosen)
    bases = {part.strip().partition("[")[0] for part in chosen.split("+")}
    return data, [replace(data.origin, split=name) for name in names if name not in bases and "all" not in bases]


def _summaries(rows: Dataset) -> list[dict[str, Any]]:
    columns = []
    for name, kind in rows.features.items():
        example = next((one for one in rows.select(range(min(100, len(rows))))[name] if one is not None), None)
        missing = rows.data.column(name).null_count if rows._indices is None else None
        columns.append({"name": name, "type": _type(kind), "example": _shown(example), "missing": missing})
    return columns


def _type(kind: Any) -> str:
    if isinstance(kind, Value):
        return kind.dtype
    if isinstance(kind, dict):
        return "{" + ", ".join(f"{name}: {_type(one)}" for name, one in kind.items()) + "}"
    return f"list of {_type(kind.feature)}" if isinstance(kind, List) else type(kind).__name__


def _shown(value: Any) -> str:
    return cut(" ".join((value if isinstance(value, str) else repr(value)).split()), _EXAMPLE)


def _guessed(rows: Dataset, named: Columns) -> dict[str, str | Sequence[str]]:
    """What is likely, where it is text, or pictures, that is there."""
    taken = {path for theirs in named.values() for path in paths_of(theirs)}
    paths = [path for path in all_paths(rows.features) if path not in taken]
    found = {name: theirs for name, theirs in guessed_columns(paths).items() if name not in named}
    first = [dict(row) for row in rows.select(range(min(_LOOKED_AT, len(rows))))]
    together = found.get("prompt", "")
    if not isinstance(together, str) and not all(_is_text(first, path) and _leads(first, path) for path in together):
        likeliest = likeliest_column(paths, "prompt")
        found |= {"prompt": likeliest} if likeliest else {}
    for name in ("privileged_context", "answer"):
        if isinstance(path := found.get(name), str) and (text := _text_in(first, path)) != path:
            found.pop(name)
            found |= {name: text} if text else {}
    if SYSTEM in found and not _is_text(first, str(found[SYSTEM])):
        del found[SYSTEM]
    asked = named.get("prompt", found.get("prompt", "prompt" if "prompt" in rows.column_names else ""))
    if isinstance(asked, str) and asked:
        found |= _guessed_of_conversations(first, asked, {**named, **found}, rows.column_names)
    return {name: theirs for name, theirs in found.items() if all(_leads(first, path) for path in paths_of(theirs))}


def _guessed_of_conversations(
    rows: Sequence[Mapping[str, Any]], asked: str, mapping: Columns, columns: Sequence[str]
) -> dict[str, str]:
    """The prompt under its own name, where it is not asked as it stands, and the answer that ends it."""
    found = {}
    conversation = value_at(rows[0], asked)
    pictures = {*COLUMNS} & {*mapping, *columns}
    marked = bool(pictures) and any(has_marks(asked_turns(value_at(row, asked))) for row in rows)
    if asked == "prompt" and "prompt" not in mapping and (marked or asked_turns(conversation) != conversation):
        found["prompt"] = "prompt"
    if isinstance(conversation, list) and conversation and isinstance(conversation[-1], Mapping):
        answered = len(asked_turns(conversation)) < len(conversation)
        if answered and "answer" not in {*mapping, *columns} and (text := _text_of_turn(conversation[-1])):
            found["answer"] = f"{asked}.-1.{text}"
    return found


def _text_of_turn(turn: Mapping[str, Any]) -> str | None:
    """The path to the text of a turn."""
    content = turn.get("content")
    if isinstance(content, list):
        place = next((n for n, block in enumerate(content) if isinstance(block, Mapping) and block.get("text")), None)
        return None if place is None else f"content.{place}.text"
    return "content" if content is not None else "value"


def _text_in(rows: Sequence[Mapping[str, Any]], path: str) -> str | None:
    """The path itself where it leads to text; where there is a list of turns or of texts, or a mapping with texts, that
    to one of these; `None` for values of values otherwise.
    """
    value = next((value for row in rows if (value := value_at(row, path)) is not None), None)
    if isinstance(value, list) and value:
        last = value[-1]
        if isinstance(last, Mapping) and (text := _text_of_turn(last)) and value_at(last, text):
            return f"{path}.-1.{text}"
        return f"{path}.0" if isinstance(value[0], str) else None
    if isinstance(value, Mapping):
        return _text_in(rows, f"{path}.text") if value.get("text") else None
    return path


def _is_text(rows: Sequence[Mapping[str, Any]], path: str) -> bool:
    return all(value is None or isinstance(value, str) for value in (value_at(row, path) for row in rows))


def _leads(rows: Sequence[Mapping[str, Any]], path: str) -> bool:
    return any(value_at(row, path) is not None for row in rows)


def _note_columns(found: DataLook, rows: Dataset) -> None:
    for needs_privileged in (False, True):
        try:
            check_columns(rows.column_names, needs_privileged=needs_privileged, method="dopd")
        except DataError as error:
            found.notes.append(str(error))
            break
    read = {path for theirs in found.mapping.values() for path in paths_of(theirs)}
    unread = [name for name in unread_columns(rows.column_names) if name not in read]
    if unread:
        found.notes.append(f"column(s) {', '.join(map(repr, unread))} are read by nothing but the verifier")
    if str(found.mapping.get("privileged_context")).split(".")[-1] == "teacher_prompt":
        found.notes.append("teacher_prompt holds the question, too: the privileged view asks it twice")


def _look_at_rows(found: DataLook, rows: Dataset, readers: Sequence[Reader], max_prompt_length: int | None) -> None:
    lengths: dict[tuple[str, str | None], list[int]] = {}
    counts = {reader.name: PromptLengths(reader.prompts.processing_class, reader.prompts.chat_template_kwargs)
              for reader in readers}  # fmt: skip
    allowed = {reader.name: _allowed(reader, max_prompt_length) for reader in readers}
    markups = {reader.name: reader.prompts.markup for reader in readers}
    asked: dict[tuple[str, ...], str] = {}
    reasons: dict[str, list[int]] = {}
    every: Sequence[Reader | None] = readers or (None,)
    for index, row in enumerate(tracked("looking at rows", "row", undecoded(rows))):
        try:
            check_row(row, index)
            _count_repeats(found, asked, row)
            found.num_without_privileged += lacks_privileged(row)
            longest: dict[str | None, int] = {}
            for reader in every:
                name = reader.name if reader else None
                views = dict(_views(row, reader))
                _check_images(found, index, views.values())
                if reader:
                    checked_views(
                        reader.prompts, markups[reader.name], reader.prompts.asked_row(row), [*views.values()]
                    )
                for view, prompt in views.items():
                    size = counts[reader.name]([prompt])[0] if reader else len(_text(prompt).split())
                    lengths.setdefault((view, name), []).append(size)
                    longest[name] = max(size, longest.get(name, 0))
                if len(found.examples) < _EXAMPLES and reader in (None, *readers[:1]):
                    found.examples.append({view: _rendered(prompt, reader) for view, prompt in views.items()})
            for one in readers:
                if (most := allowed[one.name]) is not None and longest[one.name] > most:
                    reason = f"a view is longer than the {most} tokens that {one.name} has room for"
                    reasons.setdefault(reason, []).append(index)
        except DataError as error:
            reasons.setdefault(_reason(str(error)), []).append(index)
    found.unusable = reasons
    for (view, name), sizes in lengths.items():
        sizes.sort()
        most = allowed.get(name) if name else None
        too_long = sum(size > most for size in sizes) if most is not None else 0
        median, p95 = (sizes[int(share * (len(sizes) - 1))] for share in (0.5, 0.95))
        found.lengths.append(Lengths(view, name, median, p95, sizes[-1], most, too_long))


def _check_images(found: DataLook, index: int, views: Iterable[Prompt]) -> None:
    """Raise `DataError` where the header of a picture cannot be read; of the first one it is noted why."""
    for source in (source for prompt in views for source in image_sources(prompt)):
        try:
            image_size(source)
        except DataError as error:
            if not any(note.startswith(_BROKEN) for note in found.notes):
                found.notes.append(f"{_BROKEN}: the first is in row {index}: {error}")
            raise DataError(_BROKEN) from error


def _allowed(reader: Reader, max_prompt_length: int | None) -> int | None:
    limits = [limit for limit in (reader.room, max_prompt_length) if limit is not None]
    return min(limits, default=None)


def _count_repeats(found: DataLook, asked: dict[tuple[str, ...], str], row: Mapping[str, Any]) -> None:
    key, answer = prompt_key(row), repr(row.get("answer"))
    if key in asked:
        found.num_repeated += 1
        found.num_contradictory += asked[key] != answer
    asked.setdefault(key, answer)


def _views(row: Mapping[str, Any], reader: Reader | None) -> Iterator[tuple[str, Prompt]]:
    template = reader.prompts.template if reader else PrivilegedTemplate()
    own = reader.prompts.asked_row(row) if reader else as_conversation(dict(row))
    yield PLAIN, plain_prompt(own)
    for view, column in CONTEXT_COLUMNS.items():
        context = own.get(column)
        if context or (view == PRIVILEGED and images_of(own, ("privileged_images",))):
            yield view, privileged_prompt({**own, "privileged_context": context}, template)


def _rendered(prompt: Prompt, reader: Reader | None) -> str:
    """As a model reads it; without one, who says what."""
    if reader is None:
        return _text(prompt)
    return str(reader.prompts.tokenizer.decode(reader.prompts.encode([prompt])[0]))


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    lines = []
    for turn in prompt:
        content = turn.get("content")
        if isinstance(content, list):
            content = " ".join(str(one.get("text") or f"[{one.get('type')}]") for one in content)
        lines.append(f"{turn['role']}: {content}")
    return "\n".join(lines)


def _reason(message: str) -> str:
    """What is wrong with a row, without the row and its values."""
    message = re.sub(r"^row \d+(, |: )", "", message)
    return re.sub(r" \(='.*?'\)| \(=\".*?\"\)| \(=[^)]*\)", "", message)


def config_of_data(data: HintData, found: DataLook) -> dict[str, Any]:
    """The keys of a configuration that read these rows as they were looked at."""
    name = str(Path(data.name)) if Path(data.name).exists() else data.name
    keys = {"dataset_name": name, "dataset_config": data.config, "dataset_train_split": data.split}
    return {**{key: value for key, value in keys.items() if value is not None}, "columns": found.mapping}


def reasons_in_words(reasons: Mapping[str, int]) -> str:
    """`3 rows: answer is empty; 1 row: ...`"""
    ordered = Counter(dict(reasons)).most_common()
    return "; ".join(f"{count} row{'s' if count != 1 else ''}: {reason}" for reason, count in ordered)
