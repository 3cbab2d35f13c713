"""Sums of a step on numbers made by hand."""

from typing import Any

import pytest
import torch
import trainer_kit as kit

from dopd.methods import table
from dopd.ranks import Alone
from dopd.routing import UNROUTED, Regime
from dopd.signals.batch import SignalBatch
from dopd.signals.tokens import _unit_interval
from dopd.trainer.step_metrics import StepSums


def test_shares_of_the_gradient_are_those_of_the_tokens_own_regimes() -> None:
    order = [Regime.LH, Regime.LL, Regime.HT, Regime.HS]
    regimes = torch.tensor([[int(order[0]), int(order[1]), UNROUTED], [int(order[2]), int(order[3]), int(order[2])]])
    norms = torch.tensor([[1.0, 2.0, 9.0], [3.0, 10.0, 4.0]])
    hidden = torch.zeros(2, 3, 2, requires_grad=True)
    read = hidden * 1.0
    sums = StepSums()
    sums.add({name: torch.tensor(1.0) for name in ("tokens", "sequences", "entropy")})
    sums.add_gradients(read, regimes, table("dopd"))
    # The gradient of every token is (3, 4) / 5 of its norm.
    (read * norms.unsqueeze(-1) * torch.tensor([0.6, 0.8])).sum().backward()
    shares = sums.reduce(Alone())
    expected = {"LH": 1.0, "LL": 2.0, "HT": 7.0, "HS": 10.0}
    assert {name: shares[f"gradient/{name}"] for name in expected} == pytest.approx(
        {name: norm / 20.0 for name, norm in expected.items()}
    )


def test_exponents_move_with_the_share_of_the_training_that_is_over(tmp_path: Any) -> None:
    moving = {"teacher": {"start": 1.0, "end": 0.0}, "privileged_teacher": {"start": 0.0, "end": 1.0}}
    made = kit.trainer(tmp_path, "mine", rules=[{"source": moving}], max_steps=4)
    batches = kit.scored(made)
    made.train()
    assert [batch.batch.assignment.progress for batch in batches] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("count", [2, 7, 21, 40])
def test_quantiles_of_signals_lie_between_the_values(count: int) -> None:
    values = torch.linspace(0.0, 1.0, count, dtype=torch.float64).pow(3)[torch.randperm(count)]
    batch = SignalBatch(torch.ones(1, count), {}, {})
    found = _unit_interval(batch, values.unsqueeze(0), 0.07, 0.93)
    low, high = torch.quantile(values, 0.07), torch.quantile(values, 0.93)
    torch.testing.assert_close(found[0], ((values - low) / (high - low)).clamp(0, 1))
