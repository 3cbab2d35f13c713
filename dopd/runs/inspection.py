"""Look at one prompt without training: the student answers it, and every token is scored and routed."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dopd.data.checks import check_row
from dopd.data.control import check_control_tokens, check_joined_texts
from dopd.data.encode import reads_images, tokenizer_of
from dopd.data.images import PRIVILEGED_COLUMN
from dopd.data.unknown import Reader
from dopd.data.views import PrivilegedTemplate, is_blank, privileged_prompt
from dopd.errors import ConfigError, DataError, ScoringError
from dopd.evaluation.results import Sampling
from dopd.evaluation.student import StudentEvaluator
from dopd.inspection.inspector import Inspector
from dopd.methods import table
from dopd.report.records import read_run
from dopd.runs.build import load_model, load_processing_class, load_teacher
from dopd.runs.checks import check_answering
from dopd.runs.circumstances import LOOKED_AT_FIELDS, REWARDED_FIELDS, Circumstances, circumstances
from dopd.sampling import Ending, declared_stop_strings, ends_of
from dopd.step import FixedModels, LocalScorer, Moment, PromptEncoder, Step
from dopd.step.rewards import Judge, judge_of
from dopd.step.verifier import unjudged
from dopd.tables import RoutingTable
from dopd.tasks import get_source
from dopd.trainer.config import BASE
from dopd.verifiers.named import load_reward_functions, load_verifier

logger = logging.getLogger(__name__)
_SECONDS = 60.0  # that a verifier or a reward function may take for an answer, as in training


def inspect_prompt(
    student_name: str,
    teacher_name: str | None,
    prompt: str,
    privileged_context: str | None,
    *,
    images: Sequence[str] = (),
    privileged_images: Sequence[str] = (),
    completion: str | Sequence[str] | None = None,
    method: str = "dopd",
    rollouts: int = 1,
    greedy: bool = False,
    max_new_tokens: int = 256,
    thresholds_from: str | None = None,
    columns: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    **own: Any,
) -> list[dict[str, Any]]:
    """Records (`docs/reference/trace.md`) of answers to one prompt.

    Args:
        student_name, teacher_name (`str`): hub ids, folders or `tiny:TASK/ROLE`; a method that reads no teacher needs
            none.
        prompt (`str`): the question; a chat model reads it as a user's turn.
        privileged_context (`str`, *optional*): p.
        images, privileged_images (`list[str]`): files of pictures, for vision-language models: those of the question,
            and those that only teacher and privileged student see.
        completion (`str` or `list[str]`, *optional*): answers to look at; the student answers if left out.
        method (`str`): as `DOPDConfig.method`.
        rollouts (`int`): answers.
        greedy (`bool`): the likeliest tokens in place of drawn ones.
        thresholds_from (`str`, *optional*): a run folder whose last batch averages route the tokens. The averages over
            these answers if left out.
        columns (`dict`, *optional*): what a verifier and reward functions read of a row beside the prompt.
        own: fields of `dopd.runs.circumstances.Circumstances`, as in the student's run or recipe if left out:
            `privileged_template`, `chat_template_kwargs`, `prompt_format`, `temperature` (of the distributions that
            answers are drawn from and scored by); and for methods that learn from scores or rewards, where the answers
            are one another's rollouts, `verifier`, `reward_funcs` and `reward_weights`.

    Raises:
        ConfigError, DataError, ModelError: what cannot work, and the fix.
        ScoringError: the verifier or a reward function gives no number.
    """
    routing = table(method)
    counts = {"rollouts": rollouts, "max_new_tokens": max_new_tokens}
    _check(prompt, routing, teacher_name, own.get("temperature"), **counts)
    asked, _ = circumstances(student_name, only=looked_at_fields(routing), **own)
    row = {"prompt": prompt, "privileged_context": privileged_context, **(columns or {})}
    judge = _judge(asked, row)
    processing_class = load_processing_class(student_name)
    tokenizer, student = tokenizer_of(processing_class), _placed(load_model(student_name, dtype=dtype))
    teacher, teachers_reader = None, None
    if routing.needs_teacher:
        teacher = _placed(load_teacher(str(teacher_name), student_name, dtype=dtype))
        teachers_reader = student_name if teacher_name == BASE else teacher_name
    prompts = _encoder(asked, processing_class, teachers_reader)
    ending = Ending(ends_of(student, tokenizer), asked.stop_strings or declared_stop_strings(student), tokenizer)
    drawn = Sampling(temperature=asked.temperature)
    answering = StudentEvaluator([], unjudged, prompts, ending, max_new_tokens, seed=seed, sampling=drawn)
    if (images or privileged_images) and not reads_images(processing_class):
        raise ConfigError(f"{student_name!r} reads text only: leave the images out, or name a vision-language model")
    _check_texts(row, prompts)
    completions = [completion] if isinstance(completion, str) else completion
    answers = None if completions is None else [_completion_ids(tokenizer, text) for text in completions]
    count = len(answers) if answers is not None else 1 if greedy else rollouts
    pictures = {"images": list(images), PRIVILEGED_COLUMN: list(privileged_images)}
    rows = [row | {name: sources for name, sources in pictures.items() if sources}] * count
    check_answering(answering, rows, student, teacher)
    models = FixedModels(student, teacher)
    scorer = LocalScorer(models, answering.batch_size, asked.temperature)
    return Inspector(Step(routing, prompts, scorer, ending, judge), answering, models).records(
        rows,
        answers=answers,
        greedy=greedy,
        thresholds=None if thresholds_from is None else last_thresholds(thresholds_from),
        moment=Moment(num_generations=_siblings(routing, judge, count)),
        every=True,
        whole=completions is not None,
    )


def looked_at_fields(routing: RoutingTable) -> tuple[str, ...]:
    """Fields of `Circumstances` that a look at answers with a method takes from the student's run."""
    return (*LOOKED_AT_FIELDS, *(REWARDED_FIELDS if routing.is_judged else ()))


def _judge(asked: Circumstances, row: Mapping[str, Any]) -> Judge:
    """What gives answers scores and rewards, tried on an empty answer to the row; nothing where nobody is asked to."""
    verifier = load_verifier(asked.verifier, _SECONDS, asked.verifier_options)
    if verifier is None and asked.task is not None:
        verifier = get_source(asked.task, **asked.task_options).verify
    functions = load_reward_functions(list(asked.reward_funcs), _SECONDS)
    try:
        return judge_of(verifier, functions, asked.reward_weights, _SECONDS).tried_on([[row]])
    except (DataError, ScoringError) as error:
        raise type(error)(f"{error}. --row '{{answer: ...}}' gives the row further columns") from error


def _siblings(routing: RoutingTable, judge: Judge, count: int) -> int:
    """How many of the answers count as rollouts of one prompt, beside which the others are seen."""
    if not (routing.is_judged and judge.gives_rewards):
        return 1
    if count == 1 and routing.needs_rewards:
        logger.warning(
            f"method {routing.name!r} compares the rewards of a prompt's answers, and there is one answer: draw more "
            "(--rollouts 4), or give several (--completion)"
        )
    return count


def _placed(model: Any) -> Any:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _check_texts(row: Mapping[str, Any], prompts: PromptEncoder) -> None:
    privileged_context = row["privileged_context"]
    if privileged_context is not None and is_blank(privileged_context):
        logger.warning(
            f"privileged context (={privileged_context!r}) is blank: the privileged views read the plain prompt"
        )
    asked = prompts.asked_row(row)
    check_control_tokens(asked, prompts.markup)
    check_joined_texts(privileged_prompt(asked, prompts.template), prompts.markup)


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
