"""One run, from its spec to its record. Nothing outlives a run but the process that made it."""

import dataclasses
import gc
import importlib.metadata
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dopd.data.views import PrivilegedTemplate
from dopd.errors import ScoringError
from dopd.evaluation.student import StudentEvaluator
from dopd.runs.build import load_model, load_tokenizer
from dopd.runs.quiet import quiet_libraries
from dopd.runs.settings import RunSettings, load_settings
from dopd.runs.train import make_config, make_trainer
from dopd.sampling import Ending, ends_of
from dopd.step import PromptEncoder
from dopd.tasks import get_task
from dopd.trainer import DOPDTrainer
from lab.families import get_family
from lab.problems import evaluation_rows
from lab.sft import train_supervised
from lab.spec import SFT, RunSpec

PROMPTS, ROLLOUTS = 16, 4  # of a step
COMPLETIONS = PROMPTS * ROLLOUTS
MAX_STEPS_RATIO = 1.5  # a student whose answers get short stops here, before its token budget is spent
BIN = 10  # steps that one point of a curve averages
TEMPLATE = "{prompt} {privileged_context}"
_FRESH_STREAM = 1000  # training problems come from streams that no tiny model was trained on
_CURVES = ("rollout/accuracy", "entropy", "completions/mean_length", "share/", "threshold/gap", "loss")
_PACKAGES = ("dopd", "torch", "transformers", "trl", "accelerate")


def execute(spec: RunSpec) -> dict[str, Any]:
    """Train and evaluate one run.

    Returns:
        `run` (the spec), `status` (`"finished"`, or `"diverged"` where weights or losses stopped being finite: such a
        student answers nothing and counts as 0), `metrics` (shares in [0, 1], nats, tokens), `curves` (means of `BIN`
        steps each, by metric), `tokens`, `steps`, `seconds`, `cpu_seconds` and `versions`.
    """
    torch.set_num_threads(1)
    quiet_libraries()
    for name in ("dopd.runs.build", "dopd.trainer"):
        logging.getLogger(name).setLevel(logging.ERROR)
    started, started_cpu = time.perf_counter(), time.process_time()
    record: dict[str, Any] = {"run": spec.to_json(), "status": "finished", "metrics": {}, "curves": {}}
    record |= {"tokens": 0, "steps": 0}
    try:
        with tempfile.TemporaryDirectory() as folder:
            _stages(spec, Path(folder), record)
    finally:
        gc.collect()
    record["seconds"] = round(time.perf_counter() - started, 2)
    record["cpu_seconds"] = round(time.process_time() - started_cpu, 2)
    record["versions"] = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return record


def _stages(spec: RunSpec, folder: Path, record: dict[str, Any]) -> None:
    if not spec.trained:
        model = spec.student_model if spec.method == "start" else spec.teacher_model(spec.families[-1])
        record["metrics"] = _evaluate(spec, spec.families[-1], load_model(model), model)
        return
    start = spec.student_model
    for number, family in enumerate(spec.families, 1):
        stage = folder / f"stage{number}"
        try:
            model = _train(spec, family, start, stage, record)
        except ScoringError as error:
            record |= {"status": "diverged", "error": str(error), "metrics": {"greedy": 0.0, "sampled": 0.0}}
            return
        metrics = _evaluate(spec, family, model, spec.student_model)
        if len(spec.families) > 1:
            record["metrics"] |= {f"stage{number}/{name}": value for name, value in metrics.items()}
            start = str(stage / "student")
            model.save_pretrained(start)
            load_tokenizer(spec.student_model).save_pretrained(start)
        record["metrics"] |= metrics


def _train(spec: RunSpec, family: str, start: str, folder: Path, record: dict[str, Any]) -> Any:
    """Train one stage; returns the student."""
    budget = spec.token_budget(family, COMPLETIONS)
    if spec.method == SFT:
        student, seen = train_supervised(spec, family, start, budget=budget, completions=COMPLETIONS)
        record["tokens"] += seen["tokens"]
        record["steps"] += seen["steps"]
        return student
    settings = run_settings(spec, family, start, folder)
    trainer = make_trainer(settings, make_config(settings))
    meter = _Budget(budget)
    trainer.add_callback(meter)
    if spec.evaluate_every:
        trainer.add_callback(_Curve(spec, trainer, record))
    trainer.train()
    _add_curves(record, trainer.state.log_history)
    record["tokens"] += meter.tokens
    record["steps"] += trainer.state.global_step
    return trainer.unwrapped_student


def run_settings(spec: RunSpec, family: str, start: str, folder: Path) -> RunSettings:
    """The configuration of one stage, as `dopd train` would take it."""
    problems = get_family(family)
    max_steps = int(MAX_STEPS_RATIO * spec.steps)
    values: dict[str, Any] = {
        "model_name_or_path": start,
        "teacher_model_name_or_path": spec.teacher_model(family),
        "task": problems.task,
        "task_options": {**problems.options, "seed": _FRESH_STREAM + spec.run_seed},
        "privileged_kind": spec.privileged_kind,
        "privileged_template": TEMPLATE,
        "output_dir": str(folder),
        "method": spec.method,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "max_steps": max_steps,
        "num_generations": ROLLOUTS,
        "per_device_train_batch_size": COMPLETIONS,
        "max_completion_length": problems.max_tokens,
        "train_prompts": PROMPTS * max_steps,
        "eval_prompts": 1,
        "seed": spec.run_seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    if spec.rules is not None:
        values["rules"] = [dict(row) for row in spec.rules]
    if spec.options:
        values["method_options"] = dict(spec.options)
    if spec.privileged_noise:
        values["privileged_noise"] = {**spec.privileged_noise, "seed": spec.run_seed}
    return load_settings(None, **{**values, **spec.settings})


class _Budget(TrainerCallback):
    """Counts the completions' tokens and ends the training once the budget is spent."""

    def __init__(self, budget: int) -> None:
        self.tokens = 0
        self._budget = budget

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "completions/mean_length" in logs:
            self.tokens += round(logs["completions/mean_length"] * COMPLETIONS)
        if self.tokens >= self._budget:
            control.should_training_stop = True


class _Curve(TrainerCallback):
    """Evaluates every so many steps, into the record."""

    def __init__(self, spec: RunSpec, trainer: DOPDTrainer, record: dict[str, Any]) -> None:
        self._spec, self._trainer, self._record = spec, trainer, record

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._spec.evaluate_every == 0:
            self._evaluate(state.global_step)

    def _evaluate(self, step: int) -> None:
        spec = dataclasses.replace(self._spec, others=())
        metrics = _evaluate(spec, spec.families[-1], self._trainer.unwrapped_student, spec.student_model)
        for name, value in {"step": step, **metrics}.items():
            self._record["curves"].setdefault(f"eval/{name}", []).append(value)


def _add_curves(record: dict[str, Any], history: Sequence[dict[str, Any]]) -> None:
    """Means of `BIN` steps each; a last, shorter part counts where it has at least half of them."""
    steps = [entry for entry in history if "completions/mean_length" in entry]
    for name in sorted({name for entry in steps for name in entry if name.startswith(_CURVES)}):
        values = [entry.get(name) for entry in steps]
        parts = [values[start : start + BIN] for start in range(0, len(values), BIN)]
        kept = [[value for value in part if value is not None] for part in parts if len(part) >= BIN / 2]
        means = [round(sum(part) / len(part), 5) if part else None for part in kept]
        record["curves"].setdefault(name, []).extend(means)


def _evaluate(spec: RunSpec, own_family: str, model: Any, tokenizer_of: str) -> dict[str, float]:
    """Metrics on a stage's own problems; on the other stages' and `spec.others` under their names."""
    tokenizer = load_tokenizer(tokenizer_of)
    own = f"{own_family}:{spec.split}"
    others = [f"{family}:{spec.split}" for family in spec.families if family != own_family]
    metrics: dict[str, float] = {}
    for where in (own, *others, *spec.others):
        family, _, split = where.partition(":")
        problems = get_family(family)
        task = get_task(problems.task, **problems.options)
        extra = task.completion_words(split) - task.completion_words("test") if split == "ood" else 0
        evaluator = StudentEvaluator(
            rows=evaluation_rows(family, split, spec.problems, spec.privileged_kind),
            verifier=task.verify,
            prompts=PromptEncoder(tokenizer, PrivilegedTemplate(TEMPLATE)),
            ending=Ending(ends_of(model, tokenizer), tokenizer=tokenizer),
            max_new_tokens=problems.max_tokens + extra,
            batch_size=256,
            seed=spec.run_seed,
        )
        result = evaluator.evaluate(model).metrics()
        prefix = "" if where == own else f"{where}/"
        metrics |= {prefix + name.removeprefix("accuracy_"): round(value, 6) for name, value in result.items()}
    return metrics
