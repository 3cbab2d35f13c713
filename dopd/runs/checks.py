"""What is tried of models before they answer or are shown outside of a training run."""

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dopd.data.checks import check_prompts
from dopd.data.encode import PromptLengths, image_sources, reads_images
from dopd.data.unknown import UnknownWords
from dopd.data.views import Prompt, lacks_privileged, plain_prompt, privileged_prompt
from dopd.evaluation.student import StudentEvaluator
from dopd.generation import check_generation
from dopd.step import PromptEncoder
from dopd.trainer.guards import check_one_vocabulary
from dopd.trainer.passes import check_passes, check_self_divergence
from dopd.trainer.preflight import checked_views
from dopd.vocabulary import vocab_size_of

logger = logging.getLogger(__name__)

_TRIAL_ROWS, _TRIAL_PROMPTS = 64, 3  # looked through for pictures, and tried


def check_rows(prompts: PromptEncoder, rows: Any, model: Any) -> None:
    """Look through rows that a model is to answer, as a run looks through its own.

    Args:
        prompts (`PromptEncoder`): what encodes them.
        rows (`datasets.Dataset`): the rows.
        model: the model.

    Raises:
        DataError: a row that cannot be used; the message begins with its number.
    """
    markup = prompts.markup

    def views(row: dict[str, Any]) -> list[Prompt]:
        row = prompts.asked_row(row)
        hinted = [] if lacks_privileged(row) else [privileged_prompt(row, prompts.template)]
        return checked_views(prompts, markup, row, [plain_prompt(row), *hinted])

    check_prompts(
        rows,
        needs_privileged=False,
        method="",
        views=views,
        num_tokens=PromptLengths(prompts.processing_class, prompts.chat_template_kwargs, vocab_size_of(model)),
        max_prompt_tokens=sys.maxsize,
        drop_overlong=False,
    )


def check_answering(
    evaluator: StudentEvaluator, rows: Sequence[Mapping[str, Any]], model: Any, teacher: Any = None
) -> None:
    """Try the passes of a student and a teacher, on prompts with images if the rows have any.

    Args:
        evaluator (`StudentEvaluator`): what encodes the prompts.
        rows (`list[dict]`): of which the first ones are tried; words that are unknown are looked for in all.
        model, teacher: transformers models; the teacher is optional.

    Raises:
        ConfigError: settings of prompts that would act as markup, or that nothing reads but something close.
        DataError: a row none of whose words is known.
        ModelError, ScoringError: naming the model and what is wrong with it.
    """
    for sentence in evaluator.prompts.check_settings():
        logger.warning(sentence)
    _warn_of_unknown_words(evaluator, rows)
    prompts = _with_pictures(evaluator, rows) if reads_images(evaluator.prompts.processing_class) else []
    if teacher is not None:
        for sentence in check_one_vocabulary(model, teacher, evaluator.prompts.processing_class):
            logger.warning(sentence)
    for name, tried in (("model", model), ("teacher", teacher)):
        if tried is None:
            continue
        view = evaluator.prompts.shared_view(prompts, tried.device) if prompts else None
        if view is not None and name == "teacher":
            view = view.for_teacher or view
        check_self_divergence(name, tried)
        check_passes(name, tried, view=view)
        if tried is model:
            check_generation(name, tried, view)


def _warn_of_unknown_words(evaluator: StudentEvaluator, rows: Sequence[Mapping[str, Any]]) -> None:
    prompts = evaluator.prompts
    mine, teachers = prompts.processing_class, prompts.teacher_processing_class
    unknown = UnknownWords(mine, None if teachers is mine else teachers, prompts.chat_template_kwargs, prompts.template)
    for index, row in enumerate(prompts.asked(rows) if unknown.may_be else []):
        views = [(None, plain_prompt(row)), (row.get("privileged_context"), privileged_prompt(row, prompts.template))]
        unknown.look(row, f"row {index}", views)
    for sentence in unknown.sentences(len(rows), "the prompts"):
        logger.warning(sentence)


def _with_pictures(evaluator: StudentEvaluator, rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """The first prompts with pictures; none where there are none among the first rows.

    Raises:
        DataError: the processor refuses a prompt without any.
    """
    prompts = [plain_prompt(row) for row in evaluator.prompts.asked(rows[:_TRIAL_ROWS])]
    found = [prompt for prompt in prompts if image_sources(prompt)][:_TRIAL_PROMPTS]
    if not found:
        evaluator.prompts.view(prompts[:1], "cpu")  # some processors read no prompt without a picture
    return found
