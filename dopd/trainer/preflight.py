"""The rows of a run, looked through before the first step; those of a stream as they pass."""

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from dopd.data.checks import (
    SKIP_ADVICE,
    DatasetReport,
    References,
    check_columns,
    check_contexts,
    check_kind,
    check_prompts,
    check_row,
    longest_view,
    overlong_message,
    unread_columns,
)
from dopd.data.contexts import rows_known_before
from dopd.data.control import Markup, check_control_tokens, check_joined_texts
from dopd.data.encode import check_placeholders, reads_images
from dopd.data.findings import Findings
from dopd.data.images import PRIVILEGED_COLUMN, BrokenImageError
from dopd.data.options import UnreadOptions, check_row_options, option_columns
from dopd.data.overlap import count_overlap
from dopd.data.unknown import ShownPrompt, UnknownWords
from dopd.data.views import Prompt, lacks_privileged, plain_prompt, privileged_prompt
from dopd.errors import DataError
from dopd.sources import CONTEXT_COLUMNS, PRIVILEGED, REFERENCE_COLUMN
from dopd.step import PromptEncoder
from dopd.trainer import images
from dopd.trainer.context import max_prompt_tokens
from dopd.trainer.host import HostTrainer
from dopd.trainer.setup import completions_per_step
from dopd.trainer.teachers import check_teacher_of, check_teachers_of, counted

logger = logging.getLogger(__name__)

HELD_OUT = "eval_dataset"
_CONTEXT = CONTEXT_COLUMNS[PRIVILEGED]


def prepare_datasets(host: HostTrainer) -> None:
    """Check the datasets row by row; report what is missing or dropped. Streams are checked as they are read."""
    for sentence in host.prompts.check_settings():
        logger.warning(sentence)
    if host.train_dataset is not None:
        host.train_dataset = _prepared(host, host.train_dataset)
        if host.teacher_names and isinstance(host.train_dataset, Dataset):
            for sentence in counted(check_teachers_of(host.train_dataset, host.teacher_names)):
                logger.warning(sentence)
        _check_enough_prompts(host)
    checked: dict[str, Any] = {}
    if host.eval_dataset is not None:
        held_out = host.eval_dataset
        parts = (
            {f"eval_dataset[{name!r}]": part for name, part in held_out.items()} if isinstance(held_out, dict) else {}
        )
        checked = {name: _prepared_held_out(host, part, name) for name, part in (parts or {HELD_OUT: held_out}).items()}
        for part in checked.values() if host.teacher_names and host.args.eval_strategy != "no" else ():
            if isinstance(part, Dataset):
                check_teachers_of(part, host.teacher_names)
        host.eval_dataset = dict(zip(held_out, checked.values(), strict=True)) if parts else checked[HELD_OUT]
        for name, part in checked.items():
            _warn_of_overlap(host.train_dataset, part, name)
    _warn_of_texts(host, {"train_dataset": host.train_dataset, **checked})


def _warn_of_texts(host: HostTrainer, datasets: Mapping[str, Any]) -> None:
    """Say of which datasets the prompts are texts that become turns; streams are not looked into."""
    texts = [name for name, one in datasets.items() if isinstance(one, Dataset) and isinstance(one[0]["prompt"], str)]
    if host.prompts.asks_text and texts:
        logger.warning(
            f"column 'prompt' of {' and '.join(texts)} is plain text and the tokenizer has a chat template: each text "
            "is asked as a user's turn. prompt_format='text' gives texts as they stand, for base models"
        )


def _warn_of_overlap(train: Any, held_out: Any, name: str) -> None:
    """Say how many held-out rows ask what is trained on; streams have no end to look at."""
    if not isinstance(train, Dataset) or not isinstance(held_out, Dataset):
        return
    count = count_overlap(train, held_out)
    if count:
        logger.warning(
            f"{count} of {len(held_out)} rows of {name} ask what a row of train_dataset asks (case and white space "
            "apart): accuracies on them are not of held-out prompts. Take them out of one of the two"
        )


def _prepared_held_out(host: HostTrainer, dataset: Any, name: str) -> Any:
    try:
        return _prepared(host, dataset, name)
    except DataError as error:
        raise type(error)(f"{name}: {error}") from error


def _prepared(host: HostTrainer, dataset: Any, held_out: str = "") -> Any:
    """A dataset, checked; `held_out` is the name of one that is not trained on, which may do without p."""
    needs_privileged = host.table.needs_privileged
    if held_out and needs_privileged and not {_CONTEXT, PRIVILEGED_COLUMN} & set(dataset.column_names or [_CONTEXT]):
        logger.warning(
            f"{held_out} has no column {_CONTEXT!r}: its privileged views read the plain prompt, and accuracy with p "
            "is not measured"
        )
        needs_privileged = False
    allowed = max_prompt_tokens(host)
    drop = host.args.overlong_prompts == "drop"
    dataset = images.undecoded(dataset)
    if dataset.column_names and not held_out:
        check_contexts(dataset.column_names, host.table.context_columns, host.table.name)
    _warn_of_unread_columns(host, dataset.column_names or [], dataset)
    num_tokens = images.prompt_lengths(host, host.scored_vocab_size)
    markup = host.prompts.markup
    theirs = None if host.teacher_candidate is host.processing_class else host.teacher_candidate
    unknown = UnknownWords(host.processing_class, theirs, host.chat_template_kwargs, host.prompts.template)

    unread = UnreadOptions(host.prompts.processing_classes, host.chat_template_kwargs)

    def look(row: dict[str, Any], index: int) -> list[tuple[Findings, str]]:
        where = f"row {index}"
        words = unknown.look(row, where, _shown_prompts(host, row, held_out)) if unknown.may_be else []
        return [*((unknown, name) for name in words), *((unread, name) for name in unread.look(row, where))]

    def views(row: dict[str, Any]) -> list[Prompt]:
        row = host.prompts.asked_row(row)
        return checked_views(host.prompts, markup, row, [prompt for _, prompt in _shown_prompts(host, row, held_out)])

    here = dataset.column_names is None or REFERENCE_COLUMN in dataset.column_names
    references = _references(host, markup) if host.table.needs_references and (here or not held_out) else None

    if isinstance(dataset, IterableDataset):

        def warn(row: dict[str, Any], index: int) -> None:
            for found, name in look(row, index):
                count = found.counts[name]
                if count & (count - 1) == 0:  # 1, 2, 4, 8, ...: a stream has no end at which to warn
                    logger.warning(found.sentence(name, f"{count} rows of the stream so far"))

        return _checked_stream(
            host, dataset, views, num_tokens, warn, allowed, references, needs_privileged=needs_privileged
        )
    dataset, report = check_prompts(
        dataset,
        needs_privileged=needs_privileged,
        method=host.table.name,
        views=views,
        num_tokens=num_tokens,
        max_prompt_tokens=allowed,
        drop_overlong=drop,
        skip_broken_images=host.args.skip_broken_images,
        look=look,
        references=references,
    )
    _warn(report, needs_privileged)
    for found in (unknown, unread):
        for sentence in found.sentences(report.num_rows, held_out or "train_dataset"):
            logger.warning(sentence)
    return dataset


def _references(host: HostTrainer, markup: Markup) -> References:
    """How the reference texts of rows are looked at."""
    unknown = host.tokenizer.unk_token_id

    def num_tokens(row: Mapping[str, Any]) -> int:
        ids = host.prompts.reference(row)
        found = markup.first_in([row[REFERENCE_COLUMN]], of_assistant=True) if ids else None
        if found:
            raise DataError(
                f"column {REFERENCE_COLUMN!r}: the text holds {found!r}, which the tokenizer reads as the end of an "
                "answer. Remove it: an end is put behind every reference text"
            )
        if unknown is not None and unknown in ids and unknown not in host.eos_token_ids:
            raise DataError(
                f"column {REFERENCE_COLUMN!r}: the tokenizer does not know a word of it and reads "
                f"{host.tokenizer.unk_token!r}, which the student would learn to say. Write it in other words"
            )
        return len(ids)

    return References(num_tokens, int(host.max_completion_length or sys.maxsize) - 1)


def checked_views(prompts: PromptEncoder, markup: Markup, row: dict[str, Any], views: list[Prompt]) -> list[Prompt]:
    """The views of a row that is asked.

    Args:
        prompts (`PromptEncoder`): that encodes them.
        markup (`Markup`): its own, worked out once for all rows.

    Raises:
        DataError: images that nobody reads, an option that is none, or text that would act as markup.
    """
    images.check_readable(row, prompts.processing_class)
    if reads_images(prompts.processing_class):
        for prompt in views:
            check_placeholders(prompts.processing_class, prompt)
    check_row_options(row, prompts.processing_classes, prompts.chat_template_kwargs)
    check_control_tokens(row, markup)
    for prompt in views:
        check_joined_texts(prompt, markup)
    return views


def _shown_prompts(host: HostTrainer, row: dict[str, Any], held_out: str) -> list[ShownPrompt]:
    """The context and the prompt of every view of a row that exists before rollouts; the plain view first."""
    row = host.prompts.asked_row(row)
    rows = rows_known_before(host.table, row)
    if held_out and not lacks_privileged(row):
        rows.append(row)  # the student is also evaluated with p
    return [
        (None, plain_prompt(row)),
        *((one.get(_CONTEXT), privileged_prompt(one, host.prompts.template)) for one in rows),
    ]


def _warn_of_unread_columns(host: HostTrainer, columns: Sequence[str], dataset: Any) -> None:
    named = option_columns(columns, host.prompts.processing_classes, host.chat_template_kwargs)
    if named:
        example = f"{{{named[0]!r}: ...}}"
        logger.warning(
            f"column(s) {', '.join(map(repr, named))} have the name of an option of the chat template, which does not "
            f"read columns: give a row's options in its column 'chat_template_kwargs', as {example}"
        )
    unread = unread_columns(columns)
    if unread:
        logger.warning(
            f"column(s) {', '.join(map(repr, unread))} are read by nothing but the verifier: turns belong into "
            "'prompt', hints into 'privileged_context', schemas of functions into 'tools', what else a chat template "
            "reads (documents) into 'chat_template_kwargs'"
        )
    images.warn_of_unread_columns(columns, dataset)


def _checked_stream(
    host: HostTrainer,
    stream: Any,
    views: Any,
    num_tokens: Any,
    look: Any,
    allowed: int,
    references: References | None,
    *,
    needs_privileged: bool,
) -> Any:
    """The stream with every row checked as it passes; a row that cannot be used raises, or is left out with a
    warning.
    """
    dropped = broken = 0
    kinds: set[type] = set()
    args, table = host.args, host.table

    def fits(row: dict[str, Any], index: int) -> bool:
        nonlocal dropped, broken
        if not kinds and stream.column_names is None:  # of some streams the first row says what there is
            _warn_of_unread_columns(host, list(row), stream)
        needed = {"needs_privileged": needs_privileged, "needs_references": references is not None}
        check_columns(list(row), method=table.name, **needed)
        if host.teacher_names:
            check_teacher_of(row, index, host.teacher_names)
        check_row(row, index)
        check_kind(row, index, kinds)
        try:
            longest = longest_view(row, index, views, num_tokens)
        except BrokenImageError as error:
            if not args.skip_broken_images:
                raise BrokenImageError(f"{error}. {SKIP_ADVICE}") from error
            broken += 1
            logger.warning(f"row {index} of the stream dropped ({broken} with broken images so far): {error}")
            return False
        if references is not None and not references.fits(row, index, drop=args.overlong_prompts == "drop"):
            dropped += 1
            logger.warning(f"row {index} of the stream dropped ({dropped} so far): its {REFERENCE_COLUMN} is too long")
            return False
        if longest <= allowed:
            look(row, index)
            return True
        if args.overlong_prompts != "drop":
            raise DataError(overlong_message(f"row {index}", longest, allowed))
        dropped += 1
        logger.warning(f"row {index} of the stream dropped ({dropped} so far): a view has {longest} > {allowed} tokens")
        return False

    return stream.filter(fits, with_indices=True)


def _warn(report: DatasetReport, needs_privileged: bool) -> None:
    for sentence in report.sentences():
        logger.warning(sentence)
    if report.num_without_reference == report.num_rows:
        logger.warning(f"no row has a {REFERENCE_COLUMN}: rules on reference texts teach nothing")
    if needs_privileged and report.num_without_privileged == report.num_rows:
        logger.warning("no prompt has privileged context: rules that target the privileged student teach nothing")


def _check_enough_prompts(host: HostTrainer) -> None:
    if isinstance(host.train_dataset, IterableDataset):
        return
    needed = completions_per_step(host.args, host.accelerator.num_processes) // host.args.num_generations
    if len(host.train_dataset) < needed:
        raise DataError(
            f"train_dataset has {len(host.train_dataset)} prompts and one optimizer step takes {needed}: add "
            "prompts, or lower per_device_train_batch_size or gradient_accumulation_steps"
        )
