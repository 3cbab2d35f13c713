"""Evaluate a checkpoint on a task or on held-out rows without privileged context, outside of any training."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from dopd.data.encode import tokenizer_of
from dopd.data.views import PrivilegedTemplate
from dopd.errors import ConfigError
from dopd.evaluation.kept import KeptAnswers
from dopd.evaluation.results import EvaluationResult
from dopd.evaluation.student import StudentEvaluator
from dopd.runs.build import load_model, load_processing_class, load_teacher
from dopd.runs.checks import check_answering
from dopd.runs.circumstances import Circumstances, check_problems, circumstances
from dopd.runs.judging import JudgedProblems, problems_of
from dopd.sampling import Ending, declared_stop_strings, ends_of
from dopd.step import PromptEncoder
from dopd.trainer import DOPDConfig
from dopd.trainer.beginnings import teacher_weights, weights_digest
from dopd.trainer.identity import rows_digest

_PACKAGES = ("dopd", "transformers", "torch")  # their versions stand beside answers


def evaluate_checkpoint(
    model_name: str,
    task: str | None = None,
    *,
    task_options: dict[str, Any] | None = None,
    split: str | None = None,
    prompts: int = 512,
    privileged_kind: str | None = None,
    dataset_name: str | list[str] | None = None,
    dataset_config: str | None = None,
    dataset_test_split: str | None = None,
    columns: dict[str, str] | None = None,
    verifier: str | None = None,
    privileged_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    prompt_format: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    dtype: str = "float32",
    seed: int = 0,
    teacher_name: str | None = None,
    verifier_timeout: float | None = DOPDConfig.verifier_timeout,
    output: str | None = None,
) -> EvaluationResult:
    """Answer held-out problems of a task, or held-out rows, greedily and sampled, without p; and greedily with it.

    What is left out is as it was when the model was trained, where its folder is that of a run (or a checkpoint in
    one), or it is a tiny model: see `dopd.runs.circumstances`.

    Args:
        model_name (`str`): a hub id, a folder or `tiny:TASK/ROLE`.
        task (`str`, *optional*): a name that `dopd tasks` lists.
        task_options (`dict`, *optional*): difficulty knobs of the task.
        privileged_kind, privileged_template, chat_template_kwargs, prompt_format: as in training.
        dataset_name, dataset_config, dataset_test_split, columns, verifier (*optional*): as in training: rows in the
            place of a task's problems, and how an answer to one is scored.
        split (`str`, *optional*): of a task: `"test"`, which is the default, or `"ood"` (or `"train"`).
        prompts (`int`): problems, or rows from the first on, at most.
        max_new_tokens (`int`, *optional*): most tokens of an answer; 256 where the model brings none.
        teacher_name (`str`, *optional*): also measure the divergence to this (plain) teacher.
        verifier_timeout (`float`, *optional*): seconds that the task may take to judge an answer; `None` for any time.
        output (`str`, *optional*): a file of JSON lines that gets every answer as it comes; an evaluation that was
            interrupted goes on behind those that are there.

    Raises:
        ConfigError, DataError, ModelError: naming what cannot work and the fix.
        ScoringError: the verifier gives no score, or takes too long.
    """
    for name, value in (("prompts", prompts), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} (={value}) must be at least 1")
    asked, _ = circumstances(
        model_name,
        task=task,
        task_options=task_options,
        privileged_kind=privileged_kind,
        dataset_name=dataset_name,
        dataset_config=dataset_config,
        dataset_test_split=dataset_test_split,
        columns=columns,
        verifier=verifier,
        privileged_template=privileged_template,
        chat_template_kwargs=chat_template_kwargs,
        prompt_format=prompt_format,
        max_new_tokens=max_new_tokens,
    )
    check_problems(model_name, asked)
    problems = problems_of(asked, split, prompts, verifier_timeout)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(model_name, dtype=dtype).to(device)
    evaluator = _evaluator(model_name, model, asked, problems, batch_size=batch_size, seed=seed)
    teacher = None if teacher_name is None else load_teacher(teacher_name, model_name, dtype=dtype).to(device)
    check_answering(evaluator, evaluator.rows, model, teacher)
    if output is None:
        return evaluator.evaluate(model, teacher=teacher)
    decides = asdict(asked) | {"split": split, "batch_size": batch_size, "dtype": dtype, "seed": seed}
    decides |= _by_content(model_name, model, teacher_name, teacher, problems)
    with KeptAnswers(Path(output), decides, {name: version(name) for name in _PACKAGES}) as kept:
        return evaluator.evaluate(model, teacher=teacher, kept=kept)


def _by_content(
    model_name: str, model: Any, teacher_name: str | None, teacher: Any, problems: JudgedProblems
) -> dict[str, Any]:
    """Who is judged on what, by names and by what is in them."""
    rows = problems.rows if isinstance(problems.rows, Dataset) else Dataset.from_list(list(problems.rows))
    return {
        "model": model_name,
        "model (its weights)": weights_digest(model.named_parameters()),
        "teacher": teacher_name,
        "teacher (its weights)": teacher_weights(teacher),
        "rows": rows_digest(rows),
    }


def _evaluator(
    model_name: str, model: Any, asked: Circumstances, problems: JudgedProblems, *, batch_size: int, seed: int
) -> StudentEvaluator:
    processing_class = load_processing_class(model_name)
    tokenizer = tokenizer_of(processing_class)
    encoder = PromptEncoder(
        processing_class,
        PrivilegedTemplate(asked.privileged_template),
        asked.chat_template_kwargs,
        asked.prompt_format,
    )
    problems.check(encoder, model)
    return StudentEvaluator(
        rows=[*problems.rows],
        verifier=problems.verifier,
        prompts=encoder,
        ending=Ending(ends_of(model, tokenizer), asked.stop_strings or declared_stop_strings(model), tokenizer),
        max_new_tokens=asked.max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
