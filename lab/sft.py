"""Supervised fine-tuning on gold solutions: the off-policy control of the continual-learning experiment."""

import itertools
from typing import Any

import torch
from transformers import get_constant_schedule_with_warmup, set_seed

from dopd.data.encode import encode_prompts
from dopd.runs.build import load_model, load_tokenizer
from dopd.tasks import get_task
from lab.families import get_family
from lab.spec import RunSpec

_FRESH_STREAM = 1000
_WARMUP = 10


def train_supervised(
    spec: RunSpec, family: str, start: str, *, budget: int, completions: int
) -> tuple[Any, dict[str, int]]:
    """Cross-entropy on gold solutions, `completions` a step, until `budget` of their tokens are seen.

    The optimizer is the trainer's (AdamW, gradient norm clipped at 1, ten steps of warm-up).

    Returns:
        The student, and how many `tokens` and `steps` it took.
    """
    set_seed(spec.run_seed)
    problems = get_family(family)
    task = get_task(problems.task, **{**problems.options, "seed": _FRESH_STREAM + spec.run_seed})
    tokenizer, student = load_tokenizer(start), load_model(start)
    optimizer = torch.optim.AdamW(student.parameters(), lr=spec.learning_rate, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, _WARMUP)
    tokens = 0
    student.train()
    for step in itertools.count():
        if tokens >= budget:
            return student.eval(), {"tokens": tokens, "steps": step}
        rows = task.rows("train", completions, "none", start=step * completions)
        prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], {})
        answers = [[*tokenizer(row["solution"])["input_ids"], tokenizer.eos_token_id] for row in rows]
        loss = _loss(student, prompts, answers, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += sum(map(len, answers))
    raise AssertionError("unreachable")


def _loss(student: Any, prompts: list[list[int]], answers: list[list[int]], pad: int) -> torch.Tensor:
    """Mean over the tokens of an answer, then over answers, as the distillation loss has it."""
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(prompts), length), pad)
    labels = torch.full((len(prompts), length), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = torch.tensor(answer)
    mask = (
        torch.arange(length) < torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)])[:, None]
    )
    logits = student(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    scored = labels[:, 1:] != -100
    return ((losses * scored).sum(1) / scored.sum(1)).mean()
