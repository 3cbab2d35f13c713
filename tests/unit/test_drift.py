"""Engines that say how likely they took their tokens to be: held against the student, and weighed by."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import trainer_kit as kit
from torch import Tensor

from dopd.errors import ConfigError, ScoringError
from dopd.ranks import Alone
from dopd.step import Answers, Drift, Request
from dopd.trainer import DOPDTrainer

LENGTH = 5


class Own:
    """Draws one token after the other from a model's own unpadded logits, and says their log-probs."""

    def __init__(self, model: Any, said: Callable[[Tensor], Tensor] = lambda logprobs: logprobs) -> None:
        self.model, self.said = model, said
        self.logprobs: list[Tensor] = []

    def generate(self, request: Request) -> Answers:
        generator = torch.Generator().manual_seed(request.step)
        pairs = zip(request.view.prompt_ids, request.view.prompt_mask, strict=True)
        drawn = [self._answer(ids[kept != 0].tolist(), generator) for ids, kept in pairs]
        self.logprobs = [logprobs for _, logprobs in drawn]
        return Answers([ids for ids, _ in drawn], [self.said(logprobs).tolist() for logprobs in self.logprobs])

    @torch.no_grad()
    def _answer(self, prompt: list[int], generator: torch.Generator) -> tuple[list[int], Tensor]:
        ids, logprobs = list(prompt), []
        for _ in range(LENGTH):
            log_p = self.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            ids.append(int(torch.multinomial(log_p.exp(), 1, generator=generator)))
            logprobs.append(log_p[ids[-1]])
        return ids[len(prompt) :], torch.stack(logprobs)


def run(folder: Path, make: Callable[[Any], Own], **options: Any) -> tuple[DOPDTrainer, Own, list[dict[str, float]]]:
    model = kit.student()
    engine = make(model)
    given = {"max_completion_length": LENGTH, "max_steps": 2} | options
    made = kit.trainer(folder, model=model, rollout_engine=engine, **given)
    made.train()
    return made, engine, [entry for entry in made.state.log_history if "rollout/drift" in entry]


def test_an_engine_with_the_students_weights_does_not_drift(tmp_path: Path) -> None:
    _, _, logged = run(tmp_path, Own)
    assert len(logged) == 2
    assert all(entry["rollout/drift"] < 1e-5 and entry["rollout/drift_p99"] < 1e-4 for entry in logged)
    assert "rollout/importance" not in logged[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_drift_is_the_mean_and_the_99th_percentile_of_differences(
    tmp_path: Path, accumulation: int, caplog: pytest.LogCaptureFixture
) -> None:
    shifts = torch.linspace(-0.9, 0.3, LENGTH, dtype=torch.float64)
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    with caplog.at_level(logging.WARNING, "dopd"):
        _, engine, logged = run(tmp_path, lambda model: Own(model, lambda values: values + shifts), **options)
    # Said log-probs above 0 are none, and these are far below it.
    expected = numpy.tile(shifts.abs().numpy(), 8)
    assert len(engine.logprobs) == 8
    assert logged[0]["rollout/drift"] == pytest.approx(expected.mean(), abs=1e-5)
    assert logged[0]["rollout/drift_p99"] == pytest.approx(numpy.quantile(expected, 0.99, method="higher"), abs=1e-5)
    assert "above rollout_drift_limit (=0.1)" in caplog.text and "step 0" in caplog.text


def test_an_engine_with_older_weights_stops_the_run_in_front_of_the_next_step(tmp_path: Path) -> None:
    made = None
    kept: dict[str, Tensor] = {}

    class Old(Own):
        def generate(self, request: Request) -> Answers:
            if made is not None and made.state.global_step == 1:
                kept.update({name: value.clone() for name, value in made.model.state_dict().items()})
            return super().generate(request)

    model = kit.student()
    engine = Old(copy.deepcopy(model))
    made = kit.trainer(
        tmp_path, model=model, rollout_engine=engine, max_completion_length=LENGTH, max_steps=4, learning_rate=30.0
    )
    with pytest.raises(ScoringError, match="older weights than"):
        made.train()
    assert made.state.global_step == 1
    assert kept and all(torch.equal(value, kept[name]) for name, value in made.model.state_dict().items())


def test_what_a_drift_says() -> None:
    drift = Drift(0.1)
    assert drift.check({}) is None and drift.check({"rollout/drift": 0.02}) is None
    assert "above rollout_drift_limit" in str(drift.check({"rollout/drift": 0.15}))
    with pytest.raises(ScoringError, match=r"was 0\.02 at the first step.*older weights"):
        drift.check({"rollout/drift": 0.25})
    with pytest.raises(ScoringError, match="another model than"):
        Drift(0.1).check({"rollout/drift": 1.5})
    coarse = Drift(0.1)
    assert coarse.check({"rollout/drift": 0.3}) and coarse.check({"rollout/drift": 0.9}), "numerics from the start"
    assert Drift(0.1).taken(Alone()) == {}


@pytest.mark.parametrize("cap", [2.0, 1.1])
def test_importance_weights_are_those_of_the_tokens(tmp_path: Path, cap: float) -> None:
    shifts = torch.tensor([0.0, -0.3, 0.2, -0.05, -1.5], dtype=torch.float64)  # of the engine's log-probs
    weights = (-shifts).exp().clamp(max=cap)
    options = {"method": "vanilla", "max_steps": 1, "rollout_drift_limit": 0.9}
    options |= {"rollout_importance": "truncated", "rollout_importance_cap": cap}
    _, _, logged = run(tmp_path, lambda model: Own(model, lambda values: values + shifts), **options)
    assert logged[0]["rollout/importance"] == pytest.approx(weights.mean().item(), rel=1e-5)
    assert logged[0]["rollout/importance_capped"] == pytest.approx((weights >= cap).double().mean().item())
    assert logged[0]["weight/all"] == pytest.approx(weights.mean().item(), rel=1e-5)


def test_importance_needs_an_engine_that_says_log_probs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout_importance \(='truncated'\) is for engines with weights of their"):
        kit.trainer(tmp_path, rollout_importance="truncated")

    class Silent(Own):
        def generate(self, request: Request) -> Any:
            return super().generate(request).token_ids

    with pytest.raises(ScoringError, match="gave token ids alone"):
        run(tmp_path, Silent, rollout_importance="truncated")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (lambda values: values * float("nan"), "gave nan as the log-prob of a token of answer 0"),
        (lambda values: values - float("inf"), "gave -inf as the log-prob"),
        (lambda values: -values, "as the log-prob of a token of answer 0: a token that was drawn"),
        (lambda values: values[1:], "gave 4 log-probs for the 5 tokens of answer 0"),
    ],
)
def test_log_probs_that_are_none_are_named(tmp_path: Path, said: Any, words: str) -> None:
    with pytest.raises(ScoringError, match=words):
        run(tmp_path, lambda model: Own(model, said))
