"""Numbers that are not finite stop a run before the step that would spread them, and before anything is saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from transformers import TrainerCallback

from dopd.errors import ScoringError


class Spoil(TrainerCallback):
    """Puts a number into one gradient (before the step) or one weight (behind it) of a step."""

    def __init__(self, step: int, value: float, *, weight: bool = False) -> None:
        self._step, self._value, self._weight = step, value, weight

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self._step and not self._weight:
            dict(model.named_parameters())["model.norm.weight"].grad[3] = self._value

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self._step and self._weight:
            dict(model.named_parameters())["model.norm.weight"].data[3] = self._value


def saved(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*.safetensors")]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [0, 2])
def test_a_gradient_that_is_not_finite_is_no_step_not_even_the_last(tmp_path: Path, value: float, step: int) -> None:
    made = kit.trainer(tmp_path, max_steps=3, learning_rate=0.01, save_strategy="no")
    # The spoiler stands before the check, as a model's own backward pass does.
    made.callback_handler.callbacks.insert(0, Spoil(step, value))
    with pytest.raises(ScoringError, match=rf"gradient is not finite .* at step {step}, first in 'model.norm.weight'"):
        made.train()
    assert all(bool(torch.isfinite(p).all()) for p in made.model.parameters()), "no step was taken"
    assert made.state.global_step == step


@pytest.mark.parametrize("checkpoint", [False, True])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, checkpoint: bool) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2} if checkpoint else {}
    made = kit.trainer(
        tmp_path, max_steps=2, learning_rate=0.01, callbacks=[Spoil(2, float("nan"), weight=True)], **options
    )
    with pytest.raises(
        ScoringError, match=r"weights are not finite .* after step 2, first in 'model.norm.weight': nothing"
    ):
        made.train()
        made.save_model()
    assert saved(tmp_path) == []


def test_the_cause_that_is_named_is_the_likely_one(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, max_steps=3)
    made.args.learning_rate = 1e30  # no configuration may have it
    with pytest.raises(ScoringError) as caught:
        made.train()
    assert "learning_rate (=1e+30)" in str(caught.value) and "check the checkpoint" not in str(caught.value)


def test_large_numbers_that_are_finite_pass(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, max_steps=1, learning_rate=0.0)
    made.callback_handler.callbacks.insert(0, Spoil(0, 3e38))
    made.train()
    made.save_model()
    assert saved(tmp_path)


def saved_step(folder: Path, error: ScoringError, step: int) -> Any:
    file = folder / "non_finite.json"
    assert str(file) in str(error)
    record = json.loads(file.read_text())
    assert record["step"] == step
    return record


def test_a_step_whose_gradient_is_not_finite_is_saved_to_be_looked_at(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, max_steps=3, learning_rate=0.01)
    made.callback_handler.callbacks.insert(0, Spoil(1, float("nan")))
    seen = kit.scored(made)
    with pytest.raises(ScoringError, match="gradient is not finite") as caught:
        made.train()
    record = saved_step(tmp_path, caught.value, 1)
    assert record["source"] == "gradient of model.norm.weight"
    assert [answer["found_here"] for answer in record["answers"]] == [None] * 8
    kept = seen[1]["completion_mask"].bool()
    for number, answer in enumerate(record["answers"]):
        assert answer["completion_ids"] == seen[1]["completion_ids"][number][kept[number]].tolist()
        assert answer["row"]["prompt"] and answer["completion"]
        for source in made.table.sources:
            assert answer[f"logprobs/{source}"] == seen[1][f"logprobs/{source}"][number][kept[number]].tolist()


def test_rows_at_which_a_teacher_is_not_finite_are_named(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, max_steps=1)
    score, bad = made.models.hidden_states, {2, 5}

    def spoiled(model: Any, *args: Any, **options: Any) -> Any:
        hidden = score(model, *args, **options)
        if model is made.unwrapped_teacher:
            hidden = hidden.clone()
            hidden[sorted(bad)] = float("nan")
        return hidden

    made.models.hidden_states = spoiled
    with pytest.raises(ScoringError, match=r"distributions are not finite.*answers 2, 5 of the step") as caught:
        made.train()
    record = saved_step(tmp_path, caught.value, 0)
    assert {n for n, answer in enumerate(record["answers"]) if answer["found_here"]} == bad
    assert "teacher" in record["source"]


def test_the_answer_that_a_verifier_gives_no_number_for_is_named(tmp_path: Path) -> None:
    model = kit.many_ends(kit.student(), 40)
    made = kit.trainer(tmp_path, model=model, max_steps=1, verifier=lambda text, row: float("nan") if text else 1.0)
    with pytest.raises(ScoringError, match=r"the verifier gave nan.*found at answers \d of the step") as caught:
        made.train()
    record = saved_step(tmp_path, caught.value, 0)
    assert record["source"] == "verifier" and sum(answer["found_here"] for answer in record["answers"]) == 1
