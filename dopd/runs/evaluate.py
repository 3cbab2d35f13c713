"""Evaluate checkpoints on a task or on held-out rows without privileged context, outside of any training."""

import gc
import hashlib
import re
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from dopd.data.column_names import Columns
from dopd.data.encode import tokenizer_of
from dopd.data.rendering import template_of
from dopd.data.views import PrivilegedTemplate
from dopd.errors import ConfigError, check_choice
from dopd.evaluation.comparing import check_same_rows, named_apart
from dopd.evaluation.elsewhere import Answerer, evaluate_elsewhere
from dopd.evaluation.kept import MODEL, ROWS, Evaluated, KeptAnswers
from dopd.evaluation.results import MEASURES, EvaluationResult, Sampling
from dopd.evaluation.student import StudentEvaluator
from dopd.runs.asking import AskerSettings
from dopd.runs.build import load_model, load_processing_class, load_teacher
from dopd.runs.checks import check_answering
from dopd.runs.circumstances import Circumstances, check_problems, circumstances
from dopd.runs.hint_writing import journal_of
from dopd.runs.judging import JudgedProblems, problems_of
from dopd.runs.served_answers import ServedAnswers, served_name
from dopd.runs.vllm_answers import VLLMAnswers, check_vllm, weights_of
from dopd.sampling import Ending, declared_stop_strings, ends_of
from dopd.step import PromptEncoder
from dopd.trainer import DOPDConfig
from dopd.trainer.beginnings import teacher_weights, weights_digest
from dopd.trainer.identity import rows_digest

KEY_VARIABLE = "DOPD_EVAL_API_KEY"
_Engine = Literal["transformers", "vllm"]
_PACKAGES = ("dopd", "transformers", "torch")  # their versions stand beside answers
# Of the circumstances: what is asked and how it is judged. Several models share it; the rest is each one's own.
_OF_THE_PROBLEMS = (
    "task",
    "task_options",
    "privileged_kind",
    "dataset_name",
    "dataset_config",
    "dataset_test_split",
    "columns",
    "verifier",
    "verifier_options",
)
_OF_THE_MODEL = ("privileged_template", "chat_template_kwargs", "prompt_format", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What models are asked, and how.

    What is left out is as it was when the model was trained, where its folder is that of a run (or a checkpoint in
    one), or it is a tiny model: see `dopd.runs.circumstances`.

    Attributes:
        task (`str`, *optional*): a name that `dopd tasks` lists.
        task_options (`dict`, *optional*): difficulty knobs of the task.
        privileged_kind, privileged_template, chat_template_kwargs, prompt_format: as in training.
        dataset_name, dataset_config, dataset_test_split, columns, verifier, verifier_options (*optional*): as in
            training: rows in the place of a task's problems, and how an answer to one is scored.
        split (`str`, *optional*): of a task: `"test"`, which is the default, or `"ood"` (or `"train"`).
        prompts (`int`): problems, or rows from the first on, at most.
        measures (`list[str]`): which answers are asked for: `greedy`, `sampled`, `privileged` (greedy, with p) and
            `blank` (greedy, to grey images).
        sampling (`Sampling`): how many answers are drawn for each prompt, and from what.
        max_new_tokens (`int`, *optional*): most tokens of an answer; 256 where the model brings none.
        batch_size (`int`): prompts answered at a time.
        dtype (`str`): of the weights.
        seed (`int`): of sampled answers.
        teacher_name (`str`, *optional*): also measure the divergence to this (plain) teacher.
        verifier_timeout (`float`, *optional*): seconds that the task may take to judge an answer; `None` for any time.
        engine (`str`): what answers for models of this machine: `"transformers"`, or `"vllm"`, without entropies.
        engine_options (`dict`): arguments of `vllm.LLM`, such as `gpu_memory_utilization`.
        server (`AskerSettings`): how models on servers are asked; address, name and limits of answers are the models'.

    Raises:
        ConfigError: a value that is not allowed.
    """

    task: str | None = None
    task_options: dict[str, Any] | None = None
    privileged_kind: str | None = None
    dataset_name: str | list[str] | None = None
    dataset_config: str | None = None
    dataset_test_split: str | None = None
    columns: Columns | None = None
    verifier: str | None = None
    verifier_options: dict[str, Any] | None = None
    privileged_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt_format: str | None = None
    max_new_tokens: int | None = None
    split: str | None = None
    prompts: int = 512
    measures: Sequence[str] = MEASURES
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 64
    dtype: str = "float32"
    seed: int = 0
    teacher_name: str | None = None
    verifier_timeout: float | None = DOPDConfig.verifier_timeout
    engine: str = "transformers"
    engine_options: dict[str, Any] = field(default_factory=dict)
    server: AskerSettings = field(default_factory=lambda: AskerSettings("", key_variable=KEY_VARIABLE))

    def __post_init__(self) -> None:
        for name in ("prompts", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} (={value}) must be at least 1")
        for measure in self.measures:
            if measure not in MEASURES:
                raise ConfigError(f"measures (={measure!r}) must be of {', '.join(MEASURES)}")
        check_choice("engine", self.engine, _Engine)
        if self.engine_options and self.engine != "vllm":
            raise ConfigError(f"engine_options (={self.engine_options!r}) are of --engine vllm, which is not asked for")
        if self.engine == "vllm" and self.teacher_name is not None:
            raise ConfigError(
                f"teacher (={self.teacher_name!r}) is compared by engine='transformers' alone: leave one out"
            )
        if not self.measures:
            raise ConfigError(f"measures is empty: name some of {', '.join(MEASURES)}")

    def asked_of(self, model_name: str, problems: Circumstances | None = None) -> tuple[Circumstances, str]:
        """How a model is asked, and a note of what it brought.

        Args:
            model_name (`str`): the model.
            problems (`Circumstances`, *optional*): those whose problems it is to answer, whatever it brings.
        """
        own = {name: getattr(self, name) for name in (*_OF_THE_PROBLEMS, *_OF_THE_MODEL)}
        shared = {} if problems is None else {name: getattr(problems, name) for name in _OF_THE_PROBLEMS}
        if served_name(model_name) is None:
            return circumstances(model_name, **own | shared)
        return Circumstances(**{name: value for name, value in (own | shared).items() if value is not None}), ""


def evaluate_checkpoint(
    model_name: str, task: str | None = None, *, output: str | None = None, **options: Any
) -> EvaluationResult:
    """Answer held-out problems of a task, or held-out rows, greedily and sampled, without p; and greedily with it.

    Args:
        model_name (`str`): a hub id, a folder, `tiny:TASK/ROLE`, or a model on a server: `NAME=URL`.
        task (`str`, *optional*): a name that `dopd tasks` lists.
        output (`str`, *optional*): as of `evaluate_models`.
        options: fields of `EvaluationSettings`.

    Raises:
        ConfigError, DataError, ModelError: naming what cannot work and the fix.
        ScoringError: the verifier gives no score, or takes too long.
    """
    settings = EvaluationSettings(task=task, **options)
    return evaluate_models([model_name], settings, output=output)[0].result


def evaluate_models(
    model_names: Sequence[str], settings: EvaluationSettings, *, output: str | None = None
) -> list[Evaluated]:
    """Have models answer the same rows, one after the other, with the same seeds.

    Problems that are not given are those of the first model's run.

    Args:
        model_names (`list[str]`): hub ids, folders, `tiny:TASK/ROLE`, or models on servers that speak OpenAI's
            protocol: `NAME=URL`, or `URL` alone where it has one model.
        settings (`EvaluationSettings`): what is asked, and how.
        output (`str`, *optional*): a file of JSON lines that gets every answer as it comes; an evaluation that was
            interrupted goes on behind those that are there. Of several models a folder, with a file for each. Replies
            of a server are beside it (`OUTPUT.journal.jsonl`) as they come, and are not paid for again.

    Raises:
        ConfigError, DataError, ModelError: naming what cannot work and the fix; before anything is loaded where it can
            be seen in settings.
        ScoringError: the verifier gives no score, or takes too long.
        ServerError: a server refuses everything, or no longer answers.
        IncompleteError: the budget does not allow all answers.
    """
    if not model_names:
        raise ConfigError("no model is named: give a hub id, a folder or tiny:TASK/ROLE")
    first, _ = settings.asked_of(model_names[0])
    asked = [first, *(settings.asked_of(name, first)[0] for name in model_names[1:])]
    files = output_files(output, model_names)
    for name, one in zip(model_names, asked, strict=True):
        check_problems(name, one)
        _check_served(name, one, settings, output)
        if settings.engine == "vllm" and served_name(name) is None:
            check_vllm(name)
    evaluations: list[Evaluated] = []
    for number, (name, one) in enumerate(zip(model_names, asked, strict=True)):
        problems = problems_of(one, settings.split, settings.prompts, settings.verifier_timeout)
        here = _evaluated if settings.engine == "transformers" else _evaluated_by_vllm
        judge = here if served_name(name) is None else _evaluated_on_server
        evaluations.append(judge(name, one, problems, settings, files[number]))
        check_same_rows(evaluations)
        _free_memory()
    return named_apart(evaluations, [f"#{number}" for number in range(1, len(model_names) + 1)])


def output_files(output: str | None, model_names: Sequence[str]) -> list[Path | None]:
    """Where the answers of each model are kept: in the file, or in a file for each in the folder of several.

    Raises:
        ConfigError: a file where a folder is meant, or a folder where a file is.
    """
    if output is None:
        return [None] * len(model_names)
    if len(model_names) == 1:
        if Path(output).is_dir():
            raise ConfigError(f"output (={output!r}) is a folder: give a file for the answers of one model")
        return [Path(output)]
    if Path(output).exists() and not Path(output).is_dir():
        raise ConfigError(f"output (={output!r}) is a file: give a folder for the answers of several models")
    plain = [re.sub(r"[^\w.-]+", "-", name).strip("-.")[-80:] or "model" for name in model_names]
    names = [one if plain.count(one) == 1 else f"{one}-{number}" for number, one in enumerate(plain, 1)]
    return [Path(output) / f"{name}.jsonl" for name in names]


def _check_served(name: str, asked: Circumstances, settings: EvaluationSettings, output: str | None) -> None:
    """Raise `ConfigError` for what a server cannot be asked; nothing for a model of this machine."""
    served = served_name(name)
    if served is None:
        return
    replace(settings.server, where=served[1], model=served[0]).asker("model", "")  # its address, key and prices
    if settings.teacher_name is not None:
        raise ConfigError(
            f"teacher (={settings.teacher_name!r}): {name!r} is on a server, which gives texts and no distributions to "
            "compare: leave it out"
        )
    if asked.prompt_format == "text":
        raise ConfigError(f"prompt_format (='text'): {name!r} is on a server, which reads conversations: leave it out")
    if settings.server.budget is not None and output is None:
        raise ConfigError("budget needs a place for what is paid for: --output FILE")


def _evaluated_on_server(
    name: str, asked: Circumstances, problems: JudgedProblems, settings: EvaluationSettings, output: Path | None
) -> Evaluated:
    """The answers of a model on a server; the weights, and the template of prompts, are the server's."""
    served = served_name(name)
    assert served is not None
    for_template = {"chat_template_kwargs": asked.chat_template_kwargs} if asked.chat_template_kwargs else {}
    asking = replace(
        settings.server,
        where=served[1],
        model=served[0],
        max_new_tokens=asked.max_new_tokens,
        seed=settings.seed,
        request={**for_template, **settings.server.request},
    )
    with ExitStack() as stack:
        place = output or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "answers"
        answerer = ServedAnswers(asking, journal_of(place), PrivilegedTemplate(asked.privileged_template), "model")
        model = answerer.model()
        about = what_decides(model, asked, problems, settings) | {
            "chat_template": {"name": "that of the server", "sha256": None},
            "request": dict(settings.server.request),
            # Of models of this machine.
            "batch_size": None,
            "dtype": None,
        }
        versions = {"dopd": version("dopd"), "server": served[1]}
        result = _answered_elsewhere(answerer, problems, settings, output, (about, versions))
        return Evaluated(model, about, result, versions, asdict(answerer.bill))


def _evaluated_by_vllm(
    name: str, asked: Circumstances, problems: JudgedProblems, settings: EvaluationSettings, output: Path | None
) -> Evaluated:
    """One model's answers, by vLLM on this machine."""
    answerer = VLLMAnswers(name, asked, dtype=settings.dtype, seed=settings.seed, options=settings.engine_options)
    about = what_decides(name, asked, problems, settings) | {
        "chat_template": _template(answerer.encoder),
        "model (its weights)": weights_of(name),
        "engine": "vllm",
        "engine_options": dict(settings.engine_options),
        "batch_size": None,  # it makes its own
    }
    versions = {package: version(package) for package in (*_PACKAGES, "vllm")}
    return Evaluated(
        name, about, _answered_elsewhere(answerer, problems, settings, output, (about, versions)), versions
    )


def _answered_elsewhere(
    answerer: Answerer,
    problems: JudgedProblems,
    settings: EvaluationSettings,
    output: Path | None,
    head: tuple[dict[str, Any], dict[str, str]],
) -> EvaluationResult:
    """The result of answers that are not drawn by `generate` here; `head` begins the file in which they are kept."""
    with ExitStack() as stack:
        kept = None if output is None else stack.enter_context(KeptAnswers(output, *head))
        return evaluate_elsewhere(
            answerer,
            [*problems.rows],
            problems.verifier,
            measures=settings.measures,
            sampling=settings.sampling,
            kept=kept,
        )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _evaluated(
    name: str, asked: Circumstances, problems: JudgedProblems, settings: EvaluationSettings, output: Path | None
) -> Evaluated:
    """One model's answers, of this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(name, dtype=settings.dtype).to(device)
    evaluator = _evaluator(name, model, asked, problems, settings)
    teacher = None
    if settings.teacher_name is not None:
        teacher = load_teacher(settings.teacher_name, name, dtype=settings.dtype).to(device)
    check_answering(evaluator, evaluator.rows, model, teacher)
    about = what_decides(name, asked, problems, settings) | {
        "chat_template": _template(evaluator.prompts),
        "model (its weights)": weights_digest(model.named_parameters()),
        "teacher": settings.teacher_name,
        "teacher (its weights)": teacher_weights([teacher]),
    }
    versions = {package: version(package) for package in _PACKAGES}
    with ExitStack() as stack:
        kept = None if output is None else stack.enter_context(KeptAnswers(output, about, versions))
        return Evaluated(name, about, evaluator.evaluate(model, teacher=teacher, kept=kept), versions)


def what_decides(
    name: str, asked: Circumstances, problems: JudgedProblems, settings: EvaluationSettings
) -> dict[str, Any]:
    """What decides the answers and their scores, by the names of settings; of the rows a digest."""
    rows = problems.rows if isinstance(problems.rows, Dataset) else Dataset.from_list(list(problems.rows))
    own = {one: getattr(settings, one) for one in ("split", "batch_size", "dtype", "seed")}
    drawn = asdict(settings.sampling) | {"measures": [*settings.measures]}
    return {MODEL: name, ROWS: rows_digest(rows)} | asdict(asked) | own | drawn


def _template(prompts: PromptEncoder) -> dict[str, str] | None:
    """The chat template that prompts are rendered with: where it comes from, and its checksum; `None` without one."""
    template = template_of(prompts.processing_class, prompts.chat_template_kwargs)
    if template is None or not prompts.asks_text:
        return None
    name = "chat_template_kwargs" if "chat_template" in prompts.chat_template_kwargs else "that of the model"
    return {"name": name, "sha256": hashlib.sha256(str(template).encode()).hexdigest()}


def _evaluator(
    model_name: str, model: Any, asked: Circumstances, problems: JudgedProblems, settings: EvaluationSettings
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
        batch_size=settings.batch_size,
        seed=settings.seed,
        measures=settings.measures,
        sampling=settings.sampling,
    )
