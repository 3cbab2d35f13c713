"""Rules on reference texts and on other views of the student, in the trainer: against plain passes of the models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from torch import Tensor

import dopd

END = kit.TOKENIZER.eos_token_id


def rows(count: int = 4) -> list[dict[str, Any]]:
    """Prompts, contexts and short reference texts of different lengths; the third row has no reference text."""
    words = sorted(kit.TASK.vocabulary())
    return [
        {
            "prompt": [{"role": "user", "content": " ".join(words[n : n + 3 + 2 * n])}],
            "privileged_context": " ".join(words[3 * n : 3 * n + 2 + n % 3]),
            "solution": None if n == 2 else " ".join(words[5 * n : 5 * n + 2 + n]),
            "answer": "1",
        }
        for n in range(count)
    ]


def made(folder: Path, method: str, **options: Any) -> dopd.DOPDTrainer:
    defaults = {
        "train_dataset": kit.Dataset.from_list(rows()),
        "model": kit.many_ends(kit.student()).double(),
        "teacher_model": kit.teacher().double(),
        "per_device_train_batch_size": 4,
        "num_generations": 1,
        "generation_kwargs": kit.GREEDY,
        "share_prompts": False,
    }
    return kit.trainer(folder, method, **(defaults | options))


class Plain:
    """Log-probs of plain transformers passes, a sequence at a time."""

    def __init__(self, model: Any, row: dict[str, Any], answer: list[int]) -> None:
        self.model, self.row, self.answer = model, row, answer
        text = row["solution"]
        self.reference = [] if text is None else [*kit.TOKENIZER(text, add_special_tokens=False)["input_ids"], END]

    def __call__(self, text: str, context: str | None, model: Any = None) -> Tensor:
        """log S(. | prompt with a context, text): (N, V)."""
        content = self.row["prompt"][0]["content"] + ("" if context is None else f" {context}")
        turns = [{"role": "user", "content": content}]
        prompt = kit.TOKENIZER.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        tokens = self.answer if text == "answer" else self.reference
        logits = (model or self.model)(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
        return logits[len(prompt) - 1 : len(prompt) - 1 + len(tokens)].log_softmax(-1)


def clamped(target: Tensor, log_s: Tensor, limit: float = 0.05) -> Tensor:
    return (target.detach().exp() * (target.detach() - log_s)).clamp(max=limit).sum(-1).mean()


def test_dapd_has_its_six_terms_in_value_and_gradient(tmp_path: Path) -> None:
    base = kit.student().double()
    trainer = made(tmp_path, "dapd", method_options={"snapshot_steps": 1}, max_steps=1)
    trainer.train()  # a step, behind which the snapshot is renewed: then the student is moved away from it
    snapshot = kit.student().double()
    snapshot.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.mul_(1.05)
    problems = rows()
    parts = trainer.scored_batch(problems)
    assert [(part.table.text, part.table.view) for part in parts] == [
        ("rollout", "plain"),
        ("rollout", "self"),
        ("reference", "privileged"),
        ("reference", "plain"),
    ]
    assert [part.num_sequences for part in parts] == [4.0, 4.0, 3.0, 3.0]
    trainer.model.zero_grad()
    loss, sums = trainer.micro_batch_loss(trainer.model, parts, trainer.micro_batch_targets(parts))
    loss.backward()
    ours = {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}

    answers = [
        [token for token, kept in zip(*pair, strict=True) if kept]
        for pair in zip(parts[0].completion_ids.tolist(), parts[0].mask.tolist(), strict=True)
    ]
    terms: dict[str, list[Tensor]] = {name: [] for name in ("y", "y*")}
    for row, answer in zip(problems, answers, strict=True):
        s = Plain(trainer.model, row, answer)
        p, y = row["privileged_context"], kit.TOKENIZER.decode(answer, skip_special_tokens=True)
        terms["y"].append(
            2 / 15 * clamped(s("answer", p, snapshot), s("answer", None))
            + 2 / 15 * clamped(s("answer", p, base), s("answer", y))
            + 2 / 5 * clamped(s("answer", None, base), s("answer", y))
        )
        if row["solution"] is not None:
            terms["y*"].append(
                2 / 15 * clamped(s("reference", None, base), s("reference", p))
                + 2 / 5 * clamped(s("reference", y, snapshot), s("reference", None))
                + 4 / 5 * clamped(s("reference", y, base), s("reference", p))
            )
    expected = torch.stack(terms["y"]).mean() + torch.stack(terms["y*"]).mean()
    trainer.model.zero_grad()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    for name, weight in trainer.model.named_parameters():
        # The model's norms compute in single precision.
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-6, atol=1e-8, msg=name)
    assert int(sums["sequences"]) == 14 and len([name for name in sums if name.startswith("loss/")]) == 6


def test_sft_is_the_mean_likelihood_of_the_texts_and_asks_for_no_answers(tmp_path: Path) -> None:
    trainer = made(tmp_path, "sft", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.engine = None  # type: ignore[assignment]
    before = kit.parameters(trainer.model)
    plain = made(tmp_path / "plain", "sft")
    losses = []
    for row in rows():
        if row["solution"] is not None:
            s = Plain(plain.model, row, [])
            losses.append(-s("reference", None).gather(1, torch.tensor(s.reference).unsqueeze(1)).mean())
    torch.stack(losses).mean().backward()
    trainer.train()
    (record,) = kit.train_records(trainer)
    assert record["loss"] == pytest.approx(sum(float(loss.detach()) for loss in losses) / 3, rel=1e-4)
    assert record["reference/missing_ratio"] == 0.25
    for name, weight in plain.model.named_parameters():
        torch.testing.assert_close(kit.update(before, trainer.model)[name], -0.1 * weight.grad, rtol=1e-6, atol=1e-8)
