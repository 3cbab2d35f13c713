"""Ends of completions: every end-of-sequence token counts and is scored, nothing after it is, a cut answer has none."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit

from dopd.tiny.tokenizer import build_tokenizer
from dopd.trainer import DOPDTrainer

A, B, C = 11, 12, 13  # words of the vocabulary
EOS = kit.TOKENIZER.eos_token_id
TURN_END = 14


def scripted(made: DOPDTrainer, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The scored batch when generation returns these tokens, padded as `generate` pads."""
    longest = max(map(len, answers))
    pad = made.tokenizer.pad_token_id
    output = torch.tensor([answer + [pad] * (longest - len(answer)) for answer in answers])

    def generate(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.cat([input_ids, output], dim=1)

    monkeypatch.setattr(type(made.model), "generate", generate)
    return kit.rollout(made, len(answers))


def masked(batch: dict[str, Any]) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]


def always_right(text: str, row: Any) -> float:
    return 1.0


def test_every_declared_end_of_sequence_token_ends_a_completion_and_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kit.student()
    model.generation_config.eos_token_id = [TURN_END]
    made = kit.trainer(tmp_path, model=model, verifier=always_right)
    assert set(made.eos_token_ids) == {EOS, TURN_END}
    assert set(made.generation_config.eos_token_id) == {EOS, TURN_END}
    batch = scripted(made, [[A, B, EOS], [A, TURN_END, B, EOS], [A, EOS, B, C], [A, B, C, B]], monkeypatch)
    assert masked(batch) == [[A, B, EOS], [A, TURN_END], [A, EOS], [A, B, C, B]]
    assert made._metrics["train"]["completions/eos_ratio"] == [0.75]
    assert made._metrics["train"]["completions/clipped_ratio"] == [0.25]
    ends = batch["completion_mask"].sum(1) - 1
    scores = batch["logprobs/privileged_teacher"].gather(1, ends.unsqueeze(1))
    assert bool((scores < 0).all()), "the last scored token, end of sequence or not, has a log-prob"
    assert not batch["logprobs/privileged_teacher"][batch["completion_mask"] == 0].any()
    assert bool((batch["regimes"][batch["completion_mask"] == 0] == -1).all())


def test_text_after_the_end_changes_neither_loss_nor_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for tail in ([], [C, B]):
        made = kit.trainer(tmp_path, teacher_model=kit.teacher())
        batch = scripted(made, [[A, EOS, *tail], [A, B, C, B]], monkeypatch)
        loss = kit.loss_of(made, batch)
        results.append((loss.item(), torch.autograd.grad(loss, made.model.lm_head.weight)[0]))
        monkeypatch.undo()  # the next trainer tries its models with answers of their own
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_a_pad_token_that_is_the_end_of_sequence_keeps_the_end_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masking by `ids != pad` would remove the only signal to stop."""
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    made = kit.trainer(tmp_path, "vanilla", processing_class=tokenizer)
    assert made.tokenizer.pad_token_id == EOS
    batch = scripted(made, [[A, EOS], [A, B, C, EOS], [A, B, C, B]], monkeypatch)
    assert masked(batch) == [[A, EOS], [A, B, C, EOS], [A, B, C, B]]
    assert made._metrics["train"]["completions/eos_ratio"] == [pytest.approx(2 / 3)]
    loss = kit.loss_of(made, batch)
    assert made._sums is not None and int(batch["completion_mask"].sum()) == 10
    assert loss.item() > 0


def test_a_truncated_completion_is_scored_to_its_last_token_and_counts_as_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = kit.trainer(tmp_path, verifier=always_right)
    batch = scripted(made, [[A, B, C, B], [A, B, C, EOS]], monkeypatch)
    assert batch["completion_mask"].sum(1).tolist() == [4, 4]
    assert bool((batch["logprobs/privileged_student"] < 0).all())
    assert made._metrics["train"]["rollout/accuracy"] == [0.5]


def test_a_padding_token_at_the_length_limit_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = kit.trainer(tmp_path, verifier=always_right)
    scripted(made, [[A, B, made.tokenizer.pad_token_id], [A, B, EOS]], monkeypatch)
    assert made._metrics["train"]["completions/clipped_ratio"] == [0.5]
    assert made._metrics["train"]["rollout/accuracy"] == [0.5]


def test_the_verifier_reads_the_text_before_the_end_and_the_whole_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def verifier(text: str, row: Any) -> float:
        seen.append((text, row["answer"]))
        return 0.0

    made = kit.trainer(tmp_path, verifier=verifier)
    seen.clear()  # it was tried
    scripted(made, [[A, B, EOS, C], [A, B, C, B]], monkeypatch)
    words = kit.TOKENIZER.convert_ids_to_tokens([A, B])
    assert seen == [(" ".join(words), made.train_dataset[0]["answer"])]
