"""Mixtures of experts: routers' logits break nothing, and the load-balancing loss is the model's own."""

from pathlib import Path
from typing import Any

import pytest
import text_kit
import torch
import trainer_kit as kit
from compatibility import tried
from datasets import Dataset

from dopd.data.views import plain_prompt
from dopd.errors import ConfigError

ROWS = kit.uneven_rows(8)
FAMILIES = ["mixtral", "qwen3 moe"]


def trainer(folder: Path, student: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "train_dataset": Dataset.from_list(ROWS),
        "num_generations": 2,
        "max_completion_length": 6,
    }
    teacher = text_kit.build(options.pop("family"), seed=1, std=0.15)
    return kit.trainer(folder, "vanilla", model=student, teacher_model=teacher, **defaults | options)


def own_balance(model: Any, made: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The model's own `aux_loss` of whole sequences, padded on the right."""
    prompts = made.prompts.encode([plain_prompt(row) for row in ROWS])
    kept = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    whole = [prompt + ids for prompt, ids in zip(prompts, kept, strict=True)]
    longest = max(map(len, whole))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in whole])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in whole])
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_balance_is_added_with_its_own_coefficient(family: str, tmp_path: Path) -> None:
    student = text_kit.build(family, std=0.15)
    made = trainer(tmp_path, student, family=family)
    made.current_gradient_accumulation_steps = 1
    batch = kit.rollout(made)
    loss = kit.loss_of(made, batch)
    weight = next(value for name, value in student.named_parameters() if "gate.weight" in name or "router" in name)
    (gradient,) = torch.autograd.grad(loss, [weight])
    balance = own_balance(student, made, batch)
    (of_balance,) = torch.autograd.grad(balance, [weight])
    made.balance_coefficient = 0.0
    plain = kit.loss_of(made, batch)
    (of_plain,) = torch.autograd.grad(plain, [weight])
    torch.testing.assert_close(loss - plain, 0.5 * balance, atol=1e-5, rtol=1e-5)
    largest = float(of_balance.abs().max())
    torch.testing.assert_close(gradient - of_plain, 0.5 * of_balance, atol=1e-4 * largest, rtol=1e-3)
    made.balance_coefficient = 0.5
    made.train()
    assert kit.records(made, "aux_loss")[0] == pytest.approx(balance.item(), rel=0.2)
    tried("checkpoint", f"{family} with output_router_logits", "its load-balancing loss is added")


def test_a_coefficient_of_the_run_comes_first(tmp_path: Path) -> None:
    quiet = text_kit.build("mixtral", output_router_logits=False)
    assert trainer(tmp_path / "off", quiet, family="mixtral").balance_coefficient == 0.0
    assert trainer(tmp_path / "on", quiet, family="mixtral", router_aux_loss_coef=0.1).balance_coefficient == 0.1
    loud = text_kit.build("mixtral")
    assert trainer(tmp_path / "zero", loud, family="mixtral", router_aux_loss_coef=0.0).balance_coefficient == 0.0


@pytest.mark.parametrize("family", ["llama", "llama4 text"])
def test_a_model_without_such_a_loss_is_refused_a_coefficient(family: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef \(=0.1\): .* computes no load-balancing loss"):
        trainer(tmp_path, text_kit.build(family), family=family, router_aux_loss_coef=0.1)


def test_cutting_a_step_leaves_the_share_of_the_balance(tmp_path: Path) -> None:
    """Two micro-batches with one loss each count half, as in TRL."""
    student = text_kit.build("mixtral", std=0.15)
    made = trainer(tmp_path, student, family="mixtral", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    batch = kit.rollout(made)
    losses = []
    for passes in (1, 2):
        made.current_gradient_accumulation_steps = passes
        losses.append(kit.loss_of(made, batch))
    balance = own_balance(student, made, batch)
    torch.testing.assert_close(losses[0] - losses[1], 0.25 * balance, atol=1e-5, rtol=1e-5)
