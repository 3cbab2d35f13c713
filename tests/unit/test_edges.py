"""Values at the edge of a condition, where one wrong sign, bound or default shows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dopd
from dopd.assignment import assign
from dopd.cli import doctor, show
from dopd.errors import ConfigError
from dopd.signals import SignalBatch
from dopd.trainer import lock


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.5])
def test_a_mixture_needs_both_distributions(beta: float) -> None:
    with pytest.raises(ConfigError, match="must be between 0 and 1, both excluded"):
        dopd.Rule(source="teacher", divergence="js", beta=beta)


@pytest.mark.parametrize(("bound", "expected"), [("top", 0.9), ("bottom", 0.1)])
def test_the_smallest_share_is_one_token(bound: str, expected: float) -> None:
    values_BT = torch.tensor([[0.5, 0.9, 0.3], [0.1, 0.7, 0.2]])
    rule = dopd.Rule(source="teacher", select={"signal": "student_entropy", bound: 0.01})
    logprobs = {name: -torch.ones(2, 3) for name in ("student", "teacher")}
    batch = SignalBatch(torch.ones(2, 3), logprobs, {"student": values_BT, "teacher": values_BT}, {})
    assignment = assign(dopd.RoutingTable(name="one", rules=(rule,)), batch)
    assert values_BT[assignment.factors[0] > 0].tolist() == pytest.approx([expected])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_doctor_advises_one_thread_where_there_are_several(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = [finding for finding in doctor.environment() if "torch uses" in finding.text]
    assert len(found) == (threads > 1)


def test_an_evaluation_is_printed_with_its_accuracies(capsys: pytest.CaptureFixture[str]) -> None:
    interval = {"mean": 0.25, "low": 0.125, "high": 0.5}
    record = {
        "intervals": {"accuracy_greedy": interval, "accuracy_privileged": interval},
        "metrics": {"mean_length": 12.5, "accuracy_greedy": 0.25, "num_prompts": 8},
    }
    result: Any = SimpleNamespace(to_json=lambda: record, greedy=[0] * 8)
    show.print_evaluation("mine", result, as_json=False)
    lines = [line.strip("\u2502 ").split("\u2502") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == 2]
    assert cells == [
        ["accuracy_greedy", "25.0% [12.5, 50.0]"],
        ["accuracy_greedy WITH p", "25.0% [12.5, 50.0]"],
        ["mean_length", "12.5"],
    ]


def test_without_locks_of_the_system_a_folder_nobody_has_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    assert lock._lock(-1, {}) is True
    assert lock._lock(-1, {"host": "another machine", "pid": 1}) is False
