"""Small trainers for tests: tiny untrained models, a few prompts, one optimizer step unless told otherwise."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from dopd.data.views import PrivilegedTemplate
from dopd.evaluation.results import EvaluationResult
from dopd.evaluation.student import StudentEvaluator
from dopd.sampling import Ending
from dopd.scoring import View
from dopd.signals import SignalBatch, register_signal
from dopd.sources import SOURCES
from dopd.step import PromptEncoder, ScoredBatch, SourceScores
from dopd.tasks import get_task
from dopd.tiny.models import TinySpec, build_model
from dopd.tiny.tokenizer import build_tokenizer
from dopd.trainer import DOPDConfig, DOPDTrainer
from dopd.trainer.callbacks import StudentEvaluation

TOKENIZER = build_tokenizer()
STUDENT = TinySpec(num_layers=2, hidden_size=32)
TEACHER = TinySpec(num_layers=2, hidden_size=48)
GREEDY = {"do_sample": False}
# Its name before transformers 5.20.
_CHECKPOINTING = min({"activation_checkpointing", "gradient_checkpointing"} & {one.name for one in fields(DOPDConfig)})
TASK = get_task("dag")


def task_rows(count: int = 8, kind: str = "hints_without_execution", split: str = "train") -> list[dict[str, Any]]:
    return TASK.rows(split, count, kind)


def uneven_rows(count: int = 8) -> list[dict[str, Any]]:
    """Prompts, privileged contexts and reference texts of very different lengths: every view of every row needs its own
    padding, and one row has no reference text.
    """
    words = sorted(TASK.vocabulary())
    return [
        {
            "prompt": [{"role": "user", "content": " ".join(words[n : n + 2 + 3 * n])}],
            "privileged_context": " ".join(words[2 * n : 2 * n + 1 + (5 * n) % 7]),
            "solution": None if n == 2 else " ".join(words[5 * n % 19 : 5 * n % 19 + 2 + n % 5]),
            "answer": "1",
        }
        for n in range(count)
    ]


def first_token(completion_ids: list[list[int]], log_metric: Any, **columns: Any) -> list[float | None]:
    """A reward function that applies to some answers; by what they are, so that those of each process get others."""
    log_metric("first_token", sum(ids[0] for ids in completion_ids) / len(completion_ids))
    return [None if n % 4 == 3 else float(ids[0]) for n, ids in enumerate(completion_ids)]


def rewarded() -> dict[str, Any]:
    """Options of a run whose advantage is the reward: over a group that answers greedily, GRPO's adds up to 0."""

    @register_signal("raw_reward", needs_rewards=True)
    def raw_reward(batch: SignalBatch) -> torch.Tensor:
        return batch.per_token(torch.nan_to_num(batch.rewards))

    rule = {"divergence": "policy_gradient", "support": "sampled", "advantage": "raw_reward"}
    return {"rules": [rule], "reward_funcs": first_token}


def student(seed: int = 0, spec: TinySpec = STUDENT) -> Any:
    return build_model(spec, TOKENIZER, seed)


def teacher(seed: int = 1, spec: TinySpec = TEACHER) -> Any:
    return build_model(spec, TOKENIZER, seed)


def many_ends(model: Any, count: int = 12) -> Any:
    """Declares many end-of-sequence tokens, so that an untrained model's answers differ in length."""
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(10, 10 + count)]
    return model


def config(folder: Path, method: str = "dopd", **options: Any) -> DOPDConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "method": method,
        "use_cpu": True,
        "bf16": False,
        _CHECKPOINTING: False,
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "max_completion_length": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "privileged_template": "{prompt} {privileged_context}",
    }
    if "generation_kwargs" in options:
        defaults["off_policy_rollouts"] = True
    return DOPDConfig(**(defaults | options))


def trainer(folder: Path, method: str = "dopd", **options: Any) -> DOPDTrainer:
    """A trainer of tiny models. Arguments of `DOPDTrainer` are taken by name, everything else goes to the config."""
    names = (
        "model",
        "teacher_model",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "verifier",
        "reward_funcs",
        "peft_config",
        "rollout_engine",
        "teacher_processing_class",
        "teacher_models",
    )
    given = {name: options.pop(name) for name in (*names, "callbacks") if name in options}
    given.setdefault("model", student())
    if "teacher_models" not in given and "teacher_models" not in options:
        given.setdefault("teacher_model", teacher())
    given.setdefault("processing_class", TOKENIZER)
    given.setdefault("train_dataset", Dataset.from_list(task_rows()))
    return DOPDTrainer(args=config(folder, method, **options), **given)


def with_accuracies(folder: Path, values: list[float], **options: Any) -> DOPDTrainer:
    """A trainer whose evaluations, at each step from the one before the first on, measure these accuracies."""
    defaults: dict[str, Any] = {
        "max_steps": len(values) - 1,
        "student_eval_steps": 1,
        "train_dataset": Dataset.from_list(task_rows(8)),
        "eval_dataset": Dataset.from_list(task_rows(2, split="test")),
        "verifier": lambda text, row: 0.0,
    }
    made = trainer(folder, **(defaults | options))
    (callback,) = [one for one in made.callback_handler.callbacks if isinstance(one, StudentEvaluation)]

    def measured(*args: Any, **kwargs: Any) -> EvaluationResult:
        value = values[made.state.global_step]
        return EvaluationResult(
            greedy=[value], draws=[[value]], lengths=[1], ended=[1.0], entropy=[value], divergence=[value]
        )

    object.__setattr__(callback._evaluator, "evaluate", measured)
    return made


def let_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every optimizer made with a learning rate that no configuration may have."""
    make = DOPDTrainer.create_optimizer

    def diverging(made: DOPDTrainer, *args: Any) -> Any:
        made.args.learning_rate = 1e30
        return make(made, *args)

    monkeypatch.setattr(DOPDTrainer, "create_optimizer", diverging)


def lora(rank: int = 2) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def lora_trainer(folder: Path, **options: Any) -> DOPDTrainer:
    return trainer(folder, peft_config=lora(), **({"learning_rate": 0.1} | options))


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: whole(value).detach().clone() for name, value in model.named_parameters()}


def whole(tensor: Any) -> torch.Tensor:
    """A sharded tensor, collected."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def update(before: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    return {name: value - before[name] for name, value in parameters(model).items()}


def records(made: DOPDTrainer, key: str) -> list[float]:
    """The values of one metric, in the order in which they were logged."""
    return [record[key] for record in made.state.log_history if key in record]


def train_records(made: DOPDTrainer) -> list[dict[str, Any]]:
    return [record for record in made.state.log_history if "loss" in record]


class Named(dict[str, Any]):
    """The tensors of a scored batch under names of their own; `batch` is the batch itself."""

    batch: ScoredBatch


def named(batch: ScoredBatch) -> Named:
    made = Named(
        prompt_ids=batch.view.prompt_ids,
        prompt_mask=batch.view.prompt_mask,
        completion_ids=batch.completion_ids,
        completion_mask=batch.mask,
        regimes=batch.assignment.regimes,
        num_sequences=torch.tensor(batch.num_sequences),
    )
    for source, scores in batch.sources.items():
        made |= of_source(source, scores)
    if batch.assignment.gap is not None:
        made["gap"] = batch.assignment.gap
    made |= {f"factor/{index}": value for index, value in batch.assignment.factors.items()}
    made |= {f"advantage/{index}": value for index, value in batch.assignment.advantages.items()}
    made.batch = batch
    return made


def of_source(source: str, scores: SourceScores) -> dict[str, torch.Tensor]:
    parts = {"hidden": scores.hidden, **vars(scores.tokens)}
    return {f"{name}/{source}": value for name, value in parts.items() if value is not None}


def answered(made: DOPDTrainer, rows: list[dict[str, Any]]) -> Named:
    """Rows answered and scored, as training or evaluation makes them."""
    (batch,) = made.scored_batch(rows)
    return named(batch)


def rollout(made: DOPDTrainer, count: int | None = None) -> Named:
    """The scored batch of the first rows of the training data, as training makes it."""
    rows = [made.train_dataset[n] for n in range(count or len(made.train_dataset))]
    made.model.train()
    return answered(made, rows)


def scored_again(made: DOPDTrainer, views: dict[str, View], batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The completions of a batch scored behind other prompts."""
    again: dict[str, torch.Tensor] = {}
    for source in made.table.sources:
        view = views[SOURCES[source].view]
        scores = made.step.scorer.score(source, view, batch["completion_ids"], batch["completion_mask"])
        again |= of_source(source, scores)
    return again


def privileged_view(made: DOPDTrainer, rows: list[dict[str, Any]]) -> View:
    return made.prompts.privileged_view(rows, made.accelerator.device)


def view_of(made: DOPDTrainer, prompts: list[Any]) -> View:
    return made.prompts.shared_view(prompts, made.accelerator.device)


def evaluator(
    rows: list[dict[str, Any]], verifier: Any, max_new_tokens: int, *, template: str | None = None, **options: Any
) -> StudentEvaluator:
    prompts = PromptEncoder(TOKENIZER, PrivilegedTemplate(template))
    ending = Ending([TOKENIZER.eos_token_id], tokenizer=TOKENIZER)
    return StudentEvaluator(rows, verifier, prompts, ending, max_new_tokens, **options)


def loss_of(made: DOPDTrainer, batch: Named | ScoredBatch) -> torch.Tensor:
    """The trainer's own loss of a scored batch, with its graph."""
    batch = batch.batch if isinstance(batch, Named) else batch
    return made.micro_batch_loss(made.model, [batch], made.micro_batch_targets([batch]))[0]


def scored(made: DOPDTrainer) -> list[Named]:
    """Keeps the batches that the trainer scores, as they are before they are cut into micro-batches."""
    seen: list[Named] = []
    original = made.scored_batch

    def keep(inputs: list[dict[str, Any]]) -> list[ScoredBatch]:
        parts = original(inputs)
        seen.extend(map(named, parts))
        return parts

    made.scored_batch = keep  # type: ignore[method-assign]
    return seen


def by_completion(batch: dict[str, Any], name: str) -> dict[tuple[int, ...], list[float]]:
    """Values of the scored tokens by (prompt, completion), without any padding."""
    rows = {}
    for n in range(batch["prompt_ids"].shape[0]):
        prompt = batch["prompt_ids"][n][batch["prompt_mask"][n].bool()].tolist()
        kept = batch["completion_mask"][n].bool()
        rows[tuple(prompt + batch["completion_ids"][n][kept].tolist())] = batch[name][n][kept].tolist()
    return rows


def close(update: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two updates are one but for rounding: of the sums behind them, and of the single-precision weights that
    they were read off as differences, a unit in the last place of a weight below 2 for each.
    """
    largest = max(float(value.abs().max()) for value in expected.values())
    residuals = torch.cat([(update[name] - expected[name]).flatten() for name in expected]).abs()
    return float(residuals.max()) < max(1e-5 * largest, 2e-7) and float(residuals.mean()) < 1e-6 * largest


def one_step(folder: Path, method: str, size: int, cuts: int, **options: Any) -> tuple[Any, ...]:
    made = trainer(
        folder,
        method,
        train_dataset=Dataset.from_list(uneven_rows(4)),
        num_generations=2,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=cuts,
        generation_kwargs=GREEDY,
        shuffle_dataset=False,
        **{"model": many_ends(student())} | options,
    )
    seen, before = scored(made), parameters(made.model)
    made.train()
    return made, seen[0], update(before, made.model)


class AfterEveryStep(TrainerCallback):
    def __init__(self, do: Any) -> None:
        self._do = do

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._do()
