"""Supervised pre-training of tiny models on gold solutions, with hints mixed in, for a fixed number of steps."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from dopd.tasks import AbstractTask, get_task
from dopd.tiny.shipped import fingerprint, save
from lab.tiny.kits import Kit, make_kit
from lab.tiny.muon import Muon
from lab.tiny.recipe import MixedRecipe, Recipe

_INNER = (".layers.", ".blocks.", ".merger.", "merger_list.")  # modules whose matrices Muon trains


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # More threads change the order of sums, hence the weights, and tiny matrices do not profit from them.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _optimizers(model: nn.Module, learning_rate: float) -> tuple[torch.optim.Optimizer, ...]:
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = any(part in name for part in _INNER)
        (matrices if parameter.ndim == 2 and inside else others).append(parameter)
    adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return Muon(matrices, lr=learning_rate), adamw


def _train(model: Any, kit: Kit, recipe: Recipe, seed: int, label: str) -> float:
    """Run `recipe.steps` updates in place; returns the mean loss of the last 20, in nats per token."""
    rng = random.Random(f"pretrain/{seed}")
    optimizers = _optimizers(model, recipe.learning_rate)
    losses: list[float] = []
    model.train()
    console = Console(stderr=True)
    for step in track(range(recipe.steps), label, console=console, transient=True, disable=not console.is_terminal):
        knobs, kind = recipe.draw(step, rng)
        options = {**knobs, "seed": seed}
        task = get_task(options.pop("name", recipe.task), **options)  # a mixed recipe draws the task too
        inputs, targets = kit.batch(task, kind, step * recipe.batch_size, recipe.batch_size)
        scale = min(1.0, (step + 1) / 50) * min(1.0, 1.6 * (1 - step / recipe.steps) + 0.05)
        chosen = targets != -100
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]), targets[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * recipe.learning_rate
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:])


@torch.no_grad()
def measure_accuracy(
    model: Any,
    kit: Kit,
    task: AbstractTask,
    privileged_kind: str = "none",
    *,
    split: str = "test",
    num_problems: int = 256,
    greedy: bool = False,
    blank: bool = False,
    seed: int = 0,
) -> float:
    """Share of problems `0 .. num_problems - 1` of `split` solved in one attempt, from 0 to 1.

    Args:
        privileged_kind: What the model reads after the prompt.
        greedy: Most likely tokens instead of samples at temperature 1.
        blank: Show grey images in place of the real ones.
        seed: Of the sampling; the global generator is left as it was.
    """
    rows = task.rows(split, num_problems, privileged_kind)
    inputs = kit.prompts(rows, blank=blank)
    was_training = model.training
    model.eval()
    sampling: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(
            **inputs, max_new_tokens=task.completion_words(split) + 1, **sampling, **kit.sampling(model)
        )
    model.train(was_training)
    completions = output[:, inputs["input_ids"].shape[1] :]
    solved = 0.0
    for row, ids in zip(rows, completions, strict=True):
        finished = kit.tokenizer.eos_token_id in ids
        solved += task.verify(str(kit.tokenizer.decode(ids)), row, finished=finished)
    return solved / num_problems


def _measure(model: Any, kit: Kit, task: AbstractTask, num_problems: int) -> dict[str, dict[str, float]]:
    def measured(kind: str, *, greedy: bool = False, blank: bool = False) -> float:
        return measure_accuracy(model, kit, task, kind, num_problems=num_problems, greedy=greedy, blank=blank)

    if not num_problems:
        return {"accuracy": {}}
    kinds = task.privileged_kinds
    accuracy = {kind: measured(kind) for kind in kinds}
    accuracy["none_greedy"] = measured("none", greedy=True)
    if not kit.reads_images:
        return {"accuracy": accuracy}
    accuracy[f"{task.default_kind}_greedy"] = measured(task.default_kind, greedy=True)
    return {"accuracy": accuracy, "accuracy_blank": {kind: measured(kind, blank=True) for kind in kinds}}


def pretrain(
    recipe: Recipe,
    seed: int = 0,
    output_dir: str | Path | None = None,
    *,
    num_problems: int = 256,
    label: str = "pretrain",
) -> tuple[Any, Any, dict[str, Any]]:
    """Train a tiny model and measure it on the held-out test split.

    The weights are a function of `recipe`, `seed` and the vocabulary (and of torch and the processor): one thread, a
    fixed number of steps, problems drawn by index. At the end they are rounded to half precision and kept in single.

    Args:
        output_dir (*optional*): Where to save model, tokenizer or processor, and the card `dopd_tiny.json`.
        num_problems: Problems per measured accuracy; 0 skips measuring.
        label: Name on the progress bar, which is shown on terminals only.

    Returns:
        The model in evaluation mode, its tokenizer or processor, and the card: `recipe`, `seed`, `parameters`, `loss`
        (nats per token), `train_s`, `train_cpu_s`, `measure_s` (seconds), `weights` (`fingerprint`), and `accuracy`
        with sampled (temperature 1) accuracy per privileged kind and `none_greedy`. The card of a vision-language model
        has `accuracy_blank` too: sampled accuracy per kind where every image is grey.
    """
    kit = make_kit(recipe)
    model = kit.build_model(recipe.spec, seed)
    task = get_task(recipe.task, **recipe.knobs)
    with _one_thread():
        started, started_cpu = time.perf_counter(), time.process_time()
        loss = _train(model, kit, recipe, seed, label)
        trained, trained_cpu = time.perf_counter(), time.process_time()
        round_to_half(model)
        model.eval()
        accuracies = _measure(model, kit, task, num_problems)
        if isinstance(recipe, MixedRecipe):
            for other in recipe.others:
                figures = _measure(model, kit, get_task(other.task, **other.knobs), num_problems)
                accuracies[f"accuracy_{other.task}"] = figures["accuracy"]
        measured = time.perf_counter()
    card = {
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": loss,
        **accuracies,
        "weights": fingerprint(model),
        "num_problems": num_problems,
        "train_s": round(trained - started, 1),
        "train_cpu_s": round(trained_cpu - started_cpu, 1),
        "measure_s": round(measured - trained, 1),
        "torch": torch.__version__,
    }
    if output_dir is not None:
        save(output_dir, model, kit.processing_class, card)
    return model, kit.processing_class, card


@torch.no_grad()
def round_to_half(model: nn.Module) -> None:
    """Round every weight to half precision, in place, so that a file of half the size holds the very same model."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
