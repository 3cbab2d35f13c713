"""Look at one prompt without training: the student answers it, and every token is scored and routed."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dopd.data.checks import check_row
from dopd.data.control import check_control_tokens, check_joined_texts
from dopd.data.encode import reads_images, tokenizer_of
from dopd.data.images import PRIVILEGED_COLUMN
from dopd.data.privileged import PrivilegedTemplate, is_blank
from dopd.data.unknown import Reader
from dopd.data.views import privileged_prompt
from dopd.errors import ConfigError, DataError
from dopd.evaluation.student import StudentEvaluator
from dopd.inspection.inspector import Inspector
from dopd.methods import table
from dopd.report.records import read_run
from dopd.runs.build import load_model, load_processing_class
from dopd.runs.checks import check_answering
from dopd.runs.circumstances import LOOKED_AT_FIELDS, Circumstances, circumstances
from dopd.sampling import Ending, declared_stop_strings, ends_of
from dopd.step import FixedModels, LocalScorer, PromptEncoder, Step
from dopd.step.verifier import unjudged
from dopd.tables import RoutingTable

logger = logging.getLogger(__name__)


def inspect_prompt(
    student_name: str,
    teacher_name: str | None,
    prompt: str,
    privileged_context: str | None,
    *,
    images: Sequence[str] = (),
    privileged_images: Sequence[str] = (),
    completion: str | None = None,
    method: str = "dopd",
    rollouts: int = 1,
    greedy: bool = False,
    max_new_tokens: int = 256,
    privileged_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    prompt_format: str | None = None,
    temperature: float | None = None,
    thresholds_from: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Records (`docs/reference/trace.md`) of answers to one prompt.

    Args:
        student_name, teacher_name (`str`): hub ids, folders or `tiny:TASK/ROLE`; a method that reads no teacher needs
            none.
        prompt (`str`): the question; a chat model reads it as a user's turn.
        privileged_context (`str`, *optional*): p.
        images, privileged_images (`list[str]`): files of pictures, for vision-language models: those of the question,
            and those that only teacher and privileged student see.
        completion (`str`, *optional*): an answer to look at; the student answers if left out.
        method (`str`): as `DOPDConfig.method`.
        rollouts (`int`): answers.
        privileged_template, chat_template_kwargs, prompt_format (*optional*): how prompts are written; as in the
            student's run or recipe where it has one.
        temperature (`float`, *optional*): of the distributions that answers are drawn from and scored by; as in the
            student's run, or 1.
        greedy (`bool`): the likeliest tokens in place of drawn ones.
        thresholds_from (`str`, *optional*): a run folder whose last batch averages route the tokens. The averages over
            these answers if left out.

    Raises:
        ConfigError, DataError, ModelError: what cannot work, and the fix.
    """
    routing = table(method)
    _check(prompt, routing, teacher_name, temperature, rollouts=rollouts, max_new_tokens=max_new_tokens)
    own = {"privileged_template": privileged_template, "temperature": temperature, "prompt_format": prompt_format}
    asked, _ = circumstances(student_name, only=LOOKED_AT_FIELDS, chat_template_kwargs=chat_template_kwargs, **own)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processing_class = load_processing_class(student_name)
    tokenizer = tokenizer_of(processing_class)
    student = load_model(student_name, dtype=dtype).to(device).eval()
    teacher = load_model(str(teacher_name), dtype=dtype).to(device).eval() if routing.needs_teacher else None
    prompts = _encoder(asked, processing_class, teacher_name if routing.needs_teacher else None)
    ending = Ending(ends_of(student, tokenizer), asked.stop_strings or declared_stop_strings(student), tokenizer)
    answering = StudentEvaluator([], unjudged, prompts, ending, max_new_tokens, seed=seed)
    if (images or privileged_images) and not reads_images(processing_class):
        raise ConfigError(f"{student_name!r} reads text only: leave the images out, or name a vision-language model")
    _warn_if_blank(privileged_context)
    row = prompts.asked_row({"prompt": prompt, "privileged_context": privileged_context})
    check_control_tokens(row, prompts.markup)
    check_joined_texts(privileged_prompt(row, prompts.template), prompts.markup)
    count = 1 if completion is not None or greedy else rollouts
    answers = None if completion is None else [_completion_ids(tokenizer, completion)]
    rows = [{**row, "images": list(images), PRIVILEGED_COLUMN: list(privileged_images)}] * count
    check_answering(answering, rows, student, teacher)
    models = FixedModels(student, teacher)
    step = Step(routing, prompts, LocalScorer(models, answering.batch_size, asked.temperature), ending)
    return Inspector(step, answering, models, asked.temperature).records(
        rows,
        answers=answers,
        greedy=greedy,
        thresholds=None if thresholds_from is None else last_thresholds(thresholds_from),
    )


def _warn_if_blank(privileged_context: str | None) -> None:
    if privileged_context is not None and is_blank(privileged_context):
        logger.warning(
            f"privileged context (={privileged_context!r}) is blank: the privileged views read the plain prompt"
        )


def _completion_ids(tokenizer: Any, completion: str) -> list[int]:
    reader = Reader("the tokenizer", tokenizer)
    word = reader.first_in(completion)
    if word is not None:
        instead = reader.instead_of(word)
        raise DataError(
            f"completion (={completion[:60]!r}): the tokenizer does not know {word!r} and reads {instead} for "
            "it, which is not what would be scored. Leave the word out"
        )
    return list(tokenizer(completion, add_special_tokens=False)["input_ids"])


def _check(
    prompt: str, routing: RoutingTable, teacher_name: str | None, temperature: float | None, **counts: int
) -> None:
    check_row({"prompt": prompt}, 0)
    if routing.needs_teacher and teacher_name is None:
        raise ConfigError(
            f"method {routing.name!r} reads a teacher: name one (--teacher), or another method (--method)"
        )
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature (={temperature!r}) must be above 0; greedy takes the likeliest tokens")
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} (={value}) must be at least 1")


def _encoder(asked: Circumstances, processing_class: Any, teacher_name: str | None) -> PromptEncoder:
    kwargs = asked.teacher_chat_template_kwargs
    own = (
        None
        if teacher_name is None
        else _teachers_own(processing_class, teacher_name, told_otherwise=kwargs is not None)
    )
    prompts = PromptEncoder(
        processing_class,
        PrivilegedTemplate(asked.privileged_template),
        asked.chat_template_kwargs,
        asked.prompt_format,
        own,
        kwargs,
    )
    for sentence in prompts.check_settings():
        logger.warning(sentence)
    return prompts


def _teachers_own(processing_class: Any, teacher_name: str, *, told_otherwise: bool) -> Any:
    if reads_images(processing_class):
        return load_processing_class(teacher_name)
    return processing_class if told_otherwise else None


def last_thresholds(folder: str | Path) -> dict[str, float]:
    """The averages that routed the last logged batch of a run.

    Raises:
        DataError: not a run folder, or a run that was not routed.
    """
    run = read_run(folder)
    gap, confidence = run.series("threshold/gap")[1], run.series("threshold/confidence")[1]
    if not gap:
        raise DataError(f"{str(folder)!r} has no thresholds: its method routes nothing")
    return {"gap": gap[-1], "confidence": confidence[-1]}
