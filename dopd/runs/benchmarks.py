"""Benchmarks of the field, graded by lm-evaluation-harness: ours is the glue, and the form of the results.

It was chosen since it installs beside this package's versions of torch and transformers (0.4.13: 34 packages, none of
ours replaced), takes a model that is loaded already, and has most of the benchmarks of text. lighteval 0.13 puts an
older latex2sympy2_extended under math-verify.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dopd.data.encode import tokenizer_of
from dopd.errors import ConfigError, DataError, DopdError, did_you_mean, first_line
from dopd.evaluation.kept import MODEL, ROWS, Evaluated, KeptAnswers
from dopd.evaluation.results import EvaluationResult, JudgedAnswer, PromptResult
from dopd.interrupts import Stopped
from dopd.runs.build import load_model, load_processing_class
from dopd.runs.evaluate import output_files
from dopd.runs.served_answers import served_name
from dopd.trainer.beginnings import weights_digest

_PACKAGES = ("dopd", "lm_eval", "transformers", "torch", "datasets")  # their versions stand beside answers


@dataclass(frozen=True)
class LibraryTask:
    """A task of the library, and which of its numbers is the score.

    Attributes:
        task (`str`): its name there, or the file of one.
        metric (`str`): of each document; the task's first one if empty.
        filter (`str`): how an answer is read; the task's first one if empty.
        about (`str`): what it asks.
    """

    task: str
    metric: str = ""
    filter: str = ""
    about: str = ""


BENCHMARKS = {
    "gsm8k": LibraryTask("gsm8k", "exact_match", "flexible-extract", "school mathematics, 5 examples"),
    "math500": LibraryTask("hendrycks_math500", "exact_match", "none", "competition mathematics, equal as text"),
    "aime24": LibraryTask("aime24", "exact_match", "none", "30 problems of 2024"),
    "aime25": LibraryTask("aime25", "exact_match", "none", "30 problems of 2025"),
    "ceval": LibraryTask("ceval-valid", "acc", "none", "Chinese exams, 52 subjects, by likelihood"),
    "mmlu_pro": LibraryTask("mmlu_pro", "exact_match", "custom-extract", "14 subjects, ten options, 5 examples"),
    "gpqa_diamond": LibraryTask("gpqa_diamond_cot_zeroshot", "exact_match", "flexible-extract", "science"),
    "bbh": LibraryTask("bbh_cot_fewshot", "exact_match", "get-answer", "27 tasks of reasoning, 3 examples"),
}
# What the paper or the field reports and the library has not, or not in a way that is run here.
_RUNS_CODE = "it runs programs of models without a sandbox: use its data set with --verifier code"
_NOT_THERE = "lm-evaluation-harness has no such task"
_PICTURES = "it asks about pictures, and dopd hands text to the library alone"
_REFUSED = {
    **dict.fromkeys(("humaneval", "mbpp"), _RUNS_CODE),
    "livecodebench": f"{_NOT_THERE}: use its data set with --verifier code",
    **dict.fromkeys(("livebench", "zebralogic", "autologi", "bfcl"), _NOT_THERE),
    **dict.fromkeys(("mmmu", "mmmu_pro", "mmstar", "realworldqa", "mathvision", "dynamath", "logicvista"), _PICTURES),
    "vsi_bench": "it asks about videos, and dopd hands text to the library alone",
}


def benchmarks_of(names: Sequence[str]) -> dict[str, LibraryTask]:
    """Benchmarks by name; or one's own task of the library, as the path of its `.yaml` file.

    Raises:
        ConfigError: a name that is none, with the reason; a name twice; the library is not installed.
    """
    found: dict[str, LibraryTask] = {}
    for name in (one.strip() for one in names):
        plain = name.lower().replace("-", "_")
        plain = plain if plain in {**BENCHMARKS, **_REFUSED} else plain.replace("_", "")
        if name.endswith(".yaml"):
            if not Path(name).is_file():
                raise ConfigError(
                    f"--benchmark (={name!r}) is no file: give the path of a task of lm-evaluation-harness"
                )
            plain, task = Path(name).stem, LibraryTask(name)
        elif plain in BENCHMARKS:
            task = BENCHMARKS[plain]
        else:
            reason = f"is not offered: {_REFUSED[plain]}" if plain in _REFUSED else "is no benchmark"
            raise ConfigError(
                f"--benchmark (={name!r}) {reason}. It must be of {', '.join(BENCHMARKS)}, or the .yaml file of a task "
                f"of lm-evaluation-harness.{did_you_mean(name, BENCHMARKS)}"
            )
        if plain in found:
            raise ConfigError(f"--benchmark names {plain} twice")
        found[plain] = task
    if not found:
        raise ConfigError(f"--benchmark is empty: name some of {', '.join(BENCHMARKS)}")
    if find_spec("lm_eval") is None:
        raise ConfigError("--benchmark needs lm-evaluation-harness: pip install 'dopd[benchmarks]'")
    return found


@dataclass(frozen=True)
class BenchmarkSettings:
    """How benchmarks are run.

    Attributes:
        limit (`int`, *optional*): documents of each task of the library, from the first on.
        max_new_tokens (`int`, *optional*): most tokens of an answer; as the task says if left out.
        batch_size (`int`): documents at a time.
        dtype (`str`): of the weights.
        seed (`int`): of the examples that tasks show.
        chat_template_kwargs (`dict`): of the chat template.
    """

    limit: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 64
    dtype: str = "float32"
    seed: int = 0
    chat_template_kwargs: Mapping[str, Any] | None = None


def run_benchmarks(
    model_names: Sequence[str],
    benchmarks: Mapping[str, LibraryTask],
    settings: BenchmarkSettings,
    *,
    output: str | None = None,
) -> dict[str, list[Evaluated]]:
    """Have models answer benchmarks: of each benchmark an evaluation of each model, in their order.

    Args:
        model_names (`list[str]`): hub ids, folders or `tiny:TASK/ROLE`.
        benchmarks (`dict[str, LibraryTask]`): of `benchmarks_of`.
        settings (`BenchmarkSettings`): how.
        output (`str`, *optional*): a folder that gets a file for each benchmark and model; those that are whole are
            read in the place of being run again.

    Raises:
        ConfigError: an output that is a file.
        DataError: a benchmark's data cannot be had.
        ModelError: a model that cannot be loaded.
    """
    if output is not None and Path(output).is_file():
        raise ConfigError(f"output (={output!r}) is a file: give a folder for the answers to benchmarks")
    for model_name in model_names:
        if served_name(model_name) is not None:
            raise ConfigError(f"model (={model_name!r}) is on a server: benchmarks are run on models of this machine")
    found: dict[str, list[Evaluated]] = {name: [] for name in benchmarks}
    files = {name: _files(output, name, model_names) for name in benchmarks}
    for number, model_name in enumerate(model_names):
        runner = _Runner(model_name, settings)
        for name, task in benchmarks.items():
            found[name].append(runner.run(name, task, files[name][number]))
    return found


def _files(output: str | None, name: str, model_names: Sequence[str]) -> list[Path | None]:
    """A file for a benchmark, or of several models a folder with one for each."""
    place = None if output is None else str(Path(output, name if len(model_names) > 1 else f"{name}.jsonl"))
    return output_files(place, model_names)


class _Runner:
    """One model in the library."""

    def __init__(self, model_name: str, settings: BenchmarkSettings) -> None:
        from lm_eval.models.huggingface import HFLM

        self.name, self.settings = model_name, settings
        model = load_model(model_name, dtype=settings.dtype).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        tokenizer = tokenizer_of(load_processing_class(model_name))
        self.chats = bool(getattr(tokenizer, "chat_template", None))
        self.digest = weights_digest(model.named_parameters())
        self.model = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=settings.batch_size,
            chat_template_args=dict(settings.chat_template_kwargs or {}),
        )

    def run(self, name: str, task: LibraryTask, path: Path | None) -> Evaluated:
        about = {
            MODEL: self.name,
            "model (its weights)": self.digest,
            "benchmark": name,
            "task of lm-evaluation-harness": task.task,
            ROWS: f"{name}, {'all' if self.settings.limit is None else f'the first {self.settings.limit}'}",
            "chat_template": self.chats,
            **{one: getattr(self.settings, one) for one in ("max_new_tokens", "dtype", "seed", "batch_size")},
            "chat_template_kwargs": dict(self.settings.chat_template_kwargs or {}),
        }
        versions = {package: version(package) for package in _PACKAGES}
        if path is None:
            return Evaluated(self.name, about, EvaluationResult.of(self._answers(name, task)), versions)
        path.parent.mkdir(parents=True, exist_ok=True)
        with KeptAnswers(path, about, versions) as kept:
            if not kept.results:
                kept.add(self._answers(name, task), ())
            kept.finish()
            return Evaluated(self.name, about, EvaluationResult.of(kept.results), versions)

    def _answers(self, name: str, task: LibraryTask) -> list[PromptResult]:
        """What the library makes of a benchmark, in the order of its tasks and documents."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        most = self.settings.max_new_tokens
        try:
            found = simple_evaluate(
                model=self.model,
                tasks=[task.task],
                limit=self.settings.limit,
                gen_kwargs=None if most is None else {"max_gen_toks": most},
                apply_chat_template=self.chats,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=self.settings.seed,
                numpy_random_seed=self.settings.seed,
                torch_random_seed=self.settings.seed,
                fewshot_random_seed=self.settings.seed,
                task_manager=TaskManager(),
            )
        except (DopdError, Stopped):
            raise
        except Exception as error:
            raise DataError(
                f"benchmark {name!r} (task {task.task!r} of lm-evaluation-harness) cannot be run: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        return answers_of(found["samples"], task)


def answers_of(samples: Mapping[str, Sequence[Mapping[str, Any]]], task: LibraryTask) -> list[PromptResult]:
    """The library's records of documents as answers with scores.

    Args:
        samples: of `simple_evaluate`, by task: a record for each document and filter.
        task (`LibraryTask`): which filter and metric are read.

    Raises:
        DataError: there is no such filter or metric.
    """
    found = []
    for records in samples.values():
        chosen = task.filter or str(records[0]["filter"] if records else "")
        for record in sorted((one for one in records if one["filter"] == chosen), key=lambda one: one["doc_id"]):
            metric = task.metric or str(record["metrics"][0])
            score = record.get(metric)
            if not isinstance(score, int | float) or not 0 <= score <= 1:
                raise DataError(f"{task.task!r} gives {metric} = {score!r} for a document, and no score from 0 to 1")
            found.append(PromptResult(JudgedAnswer(_text_of(record), float(score))))
        if records and not any(one["filter"] == chosen for one in records):
            raise DataError(f"{task.task!r} of this lm-evaluation-harness has no filter {chosen!r}")
    return found


def _text_of(record: Mapping[str, Any]) -> str:
    """The answer: text; of options that are compared by likelihood the number of the likeliest."""
    replies = record["resps"]
    if replies and isinstance(replies[0][0], str):
        return str(replies[0][0])
    likelihoods = [float(one[0][0]) for one in replies]
    return f"option {likelihoods.index(max(likelihoods))}" if likelihoods else ""
