"""Supervised pre-training of tiny models on gold solutions, with hints mixed in, for a fixed number of steps."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from dopd.errors import ConfigError
from dopd.tasks import PRIVILEGED_KINDS, AbstractTask, get_task
from dopd.tasks.base import check_choice
from dopd.tiny.models import TinySpec, build_model
from dopd.tiny.tokenizer import SEPARATOR, build_tokenizer

CARD_NAME = "dopd_tiny.json"

_DEFAULT_KINDS = {"none": 4.0, "hints_without_execution": 3.0, "hints_with_execution": 1.0, "final_answer": 1.0}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one tiny model is made: everything that decides its weights, together with a seed.

    Args:
        task: Name of a registered task.
        knobs: Difficulty of the problems the model is measured on (fields of the task's class).
        levels: Knobs that replace those of `knobs`, one entry drawn per step with equal chance; the easy levels are
            what makes the hard one learnable in minutes. Repeat an entry to weigh it.
        kinds: Relative frequency of each privileged kind, drawn per step.
        spec: Size of the model.
        steps: Optimizer updates. A fixed count, not a time, so that equal seeds give equal weights.
        batch_size: Problems per update.
        learning_rate: Peak rate of Muon (layer matrices) and AdamW (everything else).
    """

    task: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    levels: tuple[Mapping[str, Any], ...] = ({},)
    kinds: Mapping[str, float] = field(default_factory=lambda: dict(_DEFAULT_KINDS))
    spec: TinySpec = field(default_factory=TinySpec)
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, allowed: more than 0. Pass a positive number.")
        for kind, weight in self.kinds.items():
            check_choice("kinds", kind, PRIVILEGED_KINDS)
            if weight < 0:
                raise ConfigError(f"kinds[{kind!r}]: got {weight}, allowed: 0 or more. Use 0 to leave a kind out.")
        if not self.levels or sum(self.kinds.values()) <= 0:
            raise ConfigError("levels, kinds: got nothing to draw from, allowed: at least one each. Name one.")


def prompt_with_privilege(prompt: str, privileged_context: str | None) -> str:
    """What a privileged model reads: the prompt, a space and the hint; the prompt alone where there is no hint."""
    return prompt if privileged_context is None else f"{prompt} {privileged_context}"


def render_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """`text` as one user turn in the chat template, with the generation prompt."""
    conversation = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # More threads change the order of sums, hence the weights, and tiny matrices do not profit from them.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batch(
    task: AbstractTask, words: Mapping[str, int], kind: str, start: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` [B, T], right-padded, and `targets` [B, T] with -100 outside the completion."""
    prompts, completions = [], []
    for index in range(start, start + size):
        example = task.example("train", index)
        text = prompt_with_privilege(example.prompt, None if kind == "none" else example.privileged[kind])
        prompts.append([words[word] for word in text.split()] + [words[SEPARATOR]])
        completions.append([words[word] for word in example.solution.split()] + [words["<eos>"]])
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)) - 1
    input_ids = torch.full((size, length), words["<pad>"])
    targets = torch.full((size, length), -100)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        sequence = prompt + completion
        input_ids[i, : len(sequence) - 1] = torch.tensor(sequence[:-1])
        targets[i, len(prompt) - 1 : len(sequence) - 1] = torch.tensor(completion)
    return input_ids, targets


def _optimizers(model: Qwen3ForCausalLM, learning_rate: float) -> tuple[torch.optim.Optimizer, ...]:
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=4)
    return muon, torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)


def _train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, seed: int, label: str) -> float:
    """Run `recipe.steps` updates in place; returns the mean loss of the last 20, in nats per token."""
    rng = random.Random(f"pretrain/{seed}")
    words = tokenizer.get_vocab()
    tasks = [get_task(recipe.task, **{**recipe.knobs, **level, "seed": seed}) for level in recipe.levels]
    kinds, weights = list(recipe.kinds), list(recipe.kinds.values())
    optimizers = _optimizers(model, recipe.learning_rate)
    losses: list[float] = []
    model.train()
    console = Console(stderr=True)
    for step in track(range(recipe.steps), label, console=console, transient=True, disable=not console.is_terminal):
        level, kind = rng.randrange(len(tasks)), rng.choices(kinds, weights)[0]
        start = step * recipe.batch_size
        input_ids, targets = _batch(tasks[level], words, kind, start, recipe.batch_size)
        scale = min(1.0, (step + 1) / 50) * min(1.0, 1.6 * (1 - step / recipe.steps) + 0.05)
        chosen = targets != -100
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
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
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: AbstractTask,
    privileged_kind: str = "none",
    *,
    split: str = "test",
    num_problems: int = 256,
    greedy: bool = False,
    seed: int = 0,
) -> float:
    """Share of problems `0 .. num_problems - 1` of `split` solved in one attempt, from 0 to 1.

    Args:
        privileged_kind: What the model reads after the prompt.
        greedy: Most likely tokens instead of samples at temperature 1.
        seed: Of the sampling; the global generator is left as it was.
    """
    rows = task.rows(split, num_problems, privileged_kind)
    texts = [
        render_prompt(tokenizer, prompt_with_privilege(row["prompt"][0]["content"], row["privileged_context"]))
        for row in rows
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    was_training = model.training
    model.eval()
    sampling: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untyped: Any = model  # generate() is annotated for a protocol that mypy does not find in the model
        output = untyped.generate(**inputs, max_new_tokens=task.completion_words(split) + 1, **sampling)
    model.train(was_training)
    completions = output[:, inputs["input_ids"].shape[1] :]
    solved = 0.0
    for row, ids in zip(rows, completions, strict=True):
        finished = tokenizer.eos_token_id in ids
        solved += task.verify(str(tokenizer.decode(ids)), row, finished=finished)
    return solved / num_problems


def pretrain(
    recipe: Recipe,
    seed: int = 0,
    output_dir: str | Path | None = None,
    *,
    num_problems: int = 256,
    label: str = "pretrain",
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase, dict[str, Any]]:
    """Train a tiny model and measure it on the held-out test split.

    The weights are a function of `recipe`, `seed` and the vocabulary (and of torch and the processor): one thread, a
    fixed number of steps, problems drawn by index.

    Args:
        output_dir (*optional*): Where to save model, tokenizer and the card `dopd_tiny.json`.
        num_problems: Problems per measured accuracy; 0 skips measuring.
        label: Name on the progress bar, which is shown on terminals only.

    Returns:
        The model in evaluation mode, its tokenizer, and the card: `recipe`, `seed`, `parameters`, `loss` (nats per
        token), `train_s`, `train_cpu_s`, `measure_s` (seconds), and `accuracy` with sampled (temperature 1) accuracy
        per privileged kind and `none_greedy`.
    """
    tokenizer = build_tokenizer()
    model = build_model(recipe.spec, tokenizer, seed)
    task = get_task(recipe.task, **recipe.knobs)
    accuracy: dict[str, float] = {}
    with _one_thread():
        started, started_cpu = time.perf_counter(), time.process_time()
        loss = _train(model, tokenizer, recipe, seed, label)
        trained, trained_cpu = time.perf_counter(), time.process_time()
        model.eval()
        if num_problems:
            for kind in PRIVILEGED_KINDS:
                accuracy[kind] = measure_accuracy(model, tokenizer, task, kind, num_problems=num_problems)
            accuracy["none_greedy"] = measure_accuracy(model, tokenizer, task, num_problems=num_problems, greedy=True)
        measured = time.perf_counter()
    card = {
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": loss,
        "accuracy": accuracy,
        "num_problems": num_problems,
        "train_s": round(trained - started, 1),
        "train_cpu_s": round(trained_cpu - started_cpu, 1),
        "measure_s": round(measured - trained, 1),
        "torch": torch.__version__,
    }
    if output_dir is not None:
        save(output_dir, model, tokenizer, card)
    return model, tokenizer, card


def save(
    output_dir: str | Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, card: Mapping[str, Any]
) -> None:
    """Write model, tokenizer and card to `output_dir`, so that the `Auto` classes of transformers load it."""
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    Path(output_dir, CARD_NAME).write_text(json.dumps(card, indent=2) + "\n")
