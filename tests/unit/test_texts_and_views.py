"""Rules on reference texts and on other views of the student, in the trainer: against plain passes of the models."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainer_kit as kit
from torch import Tensor

import dopd
from dopd.errors import ConfigError, DataError

END = kit.TOKENIZER.eos_token_id


def rows(count: int = 4) -> list[dict[str, Any]]:
    """Prompts, contexts and short reference texts of different lengths; the third row has no reference text."""
    words = sorted(kit.TASK.vocabulary())
    return [
        {
            "prompt": [{"role": "user", "content": " ".join(words[n : n + 3 + 2 * n])}],
            "privileged_context": " ".join(words[3 * n : 3 * n + 2 + n % 3]),
            "solution": None if n == 2 else " ".join(words[5 * n % 19 : 5 * n % 19 + 2 + n % 4]),
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


def js(target: Tensor, log_s: Tensor) -> Tensor:
    target = target.detach()
    middle = ((target.exp() + log_s.exp()) / 2).log()
    return ((target.exp() * (target - middle) + log_s.exp() * (log_s - middle)) / 2).sum(-1).mean()


def test_gkd_with_lambda_is_one_mean_over_rows_on_answers_and_rows_on_references(tmp_path: Path) -> None:
    problems = [row for row in rows(9) if row["solution"] is not None]
    options = {"train_dataset": kit.Dataset.from_list(problems), "per_device_train_batch_size": 8}
    options |= {"max_completion_length": 12, "method_options": {"lmbda": 0.5}}
    trainer = made(tmp_path, "gkd", **options)
    own, others = trainer.scored_batch(problems)
    lots = [part.assignment.factors[0].amax(1).tolist() for part in (own, others)]
    assert [a + b for a, b in zip(*lots, strict=True)] == [1.0] * 8 and 0 < sum(lots[0]) < 8
    answers = [
        [token for token, kept in zip(*pair, strict=True) if kept]
        for pair in zip(own.completion_ids.tolist(), own.mask.tolist(), strict=True)
    ]
    loss, _ = trainer.micro_batch_loss(trainer.model, [own, others], trainer.micro_batch_targets([own, others]))
    terms = []
    for row, answer, drawn in zip(problems, answers, lots[0], strict=True):
        s, text = Plain(trainer.model, row, answer), "answer" if drawn else "reference"
        terms.append(js(s(text, None, trainer.teacher_model), s(text, None)))
    assert float(loss.detach()) == pytest.approx(float(torch.stack(terms).mean().detach()), rel=1e-6)
    again, _ = trainer.scored_batch(problems)
    assert again.assignment.factors[0].amax(1).tolist() == lots[0]  # of the seed and the step
    trainer.state.global_step = 1
    later, _ = trainer.scored_batch(problems)
    assert later.assignment.factors[0].amax(1).tolist() != lots[0]


def test_reference_texts_that_cannot_be_trained_on_are_refused_or_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = " ".join(sorted(kit.TASK.vocabulary())[:8])  # as long as an answer, without its end
    for change, words in (
        ({"solution": 7}, r"row 0, column 'solution': expected text or None, got int"),
        ({"solution": long}, r"row 0, column 'solution': the reference text has 8 tokens, 7 are allowed \(max_complet"),
        ({"solution": "Zyx"}, r"row 0: column 'solution': the tokenizer does not know a word of it and reads '<unk>'"),
        ({"solution": f"1 {kit.TOKENIZER.eos_token} 2"}, r"row 0: column 'solution': the text holds '<eos>', which"),
    ):
        rows_of_one = kit.Dataset.from_list([row | change for row in rows(1)])
        with pytest.raises(DataError, match=words):
            made(tmp_path, "sft", train_dataset=rows_of_one, per_device_train_batch_size=1)
    with pytest.raises(DataError, match=r"column 'solution' is missing and method 'sft' trains on it .*solution: c"):
        made(tmp_path, "sft", train_dataset=kit.Dataset.from_list(rows()).rename_column("solution", "completion"))
    with caplog.at_level("WARNING", logger="dopd"):
        problems = [*rows(), rows()[0] | {"solution": long}]
        trainer = made(tmp_path, "sft", train_dataset=kit.Dataset.from_list(problems), overlong_prompts="drop")
    assert len(trainer.train_dataset) == 4
    assert "1 rows were dropped because their solution is longer than an answer may be" in caplog.text
    assert "1 of 4 rows have no solution: rules on reference texts teach nothing there" in caplog.text
    # Nobody reads the column of a method that trains on answers alone.
    made(tmp_path, "vanilla", train_dataset=kit.Dataset.from_list([row | {"solution": 7} for row in rows()]))


def test_importance_weights_of_another_prompt_are_refused(tmp_path: Path) -> None:
    engine = SimpleNamespace(generate=lambda request: [[END] for _ in request.prompts])
    with pytest.raises(ConfigError, match=r"rollout_importance .*method 'dapd' trains on them behind another one"):
        made(tmp_path, "dapd", rollout_engine=engine, rollout_importance="truncated", generation_kwargs=None)
