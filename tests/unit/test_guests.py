"""Users' code leaves the process as it was: settings, random numbers, one copy of it, and the rows that it is given."""

import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import pytest
import torch

from dopd.guests import as_guest, begin_step
from dopd.step.rewards import judge_of
from dopd.step.verifier import judged


def _draws() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def _seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.mark.parametrize("code", [_seeds, _draws])
def test_the_numbers_of_a_run_are_those_without_users_code(code: Callable[[], object]) -> None:
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    expected = _draws()
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with as_guest("the verifier"):
        code()
    assert _draws() == expected


def _of_guests(count: int) -> list[tuple[float, float, float]]:
    drawn = []
    for _ in range(count):
        with as_guest("the verifier"):
            drawn.append(_draws())
    return drawn


def test_users_code_has_numbers_of_its_own_that_go_on_and_begin_anew_in_each_step() -> None:
    begin_step(3)
    of_step = _of_guests(3)
    assert len(set(of_step)) == 3
    begin_step(4)
    assert not set(_of_guests(3)) & set(of_step)
    _draws()  # the run's own numbers are not what they depend on
    begin_step(3)
    assert _of_guests(3) == of_step


_CHANGES: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "torch.set_grad_enabled": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "torch.set_default_dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "torch.set_default_device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "sys.setrecursionlimit": (lambda: sys.setrecursionlimit(sys.getrecursionlimit() - 100), sys.getrecursionlimit),
    "os.umask": (lambda: os.umask(0o777), lambda: os.umask(0o022)),
    "signal.signal": (
        lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        lambda: signal.getsignal(signal.SIGTERM),
    ),
    "sys.stdout": (lambda: setattr(sys, "stdout", None), lambda: sys.stdout),
    "warnings.simplefilter('error')": (
        lambda: warnings.simplefilter("error"),
        lambda: [one for one in warnings.filters if one[:3] == ("error", None, Warning)],
    ),
}


@pytest.mark.parametrize("name", _CHANGES)
def test_settings_that_the_process_shares_are_set_back_and_told_once(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, read = _CHANGES[name]
    os.umask(0o022)
    monkeypatch.setattr(warnings, "filters", [one for one in warnings.filters if one[0] != "error"])
    before = read()
    for _ in range(2):
        with as_guest(f"verifier of {name}"):
            change()
        assert read() == before
    assert [record.message.split(",")[0] for record in caplog.records] == [f"verifier of {name} changed {name}"]


def test_a_higher_limit_of_recursion_stays() -> None:
    limit = sys.getrecursionlimit()
    try:
        with as_guest("the verifier"):
            sys.setrecursionlimit(limit + 100)
        assert sys.getrecursionlimit() == limit + 100
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(("ends", "status"), [(lambda: None, 1), (lambda: sys.exit(0), 0), (lambda: 1 / 0, 1)])
def test_a_copy_of_the_process_does_not_go_on_as_a_second_run(ends: Callable[[], object], status: int) -> None:
    child = 0
    mine = os.getpid()
    try:
        with as_guest("the verifier"):
            child = os.fork()
            if not child:
                ends()
    finally:
        if os.getpid() != mine:
            os._exit(77)  # it came out
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def test_rows_that_users_code_changes_are_its_own() -> None:
    row = {"prompt": [{"role": "user", "content": "q"}], "answer": "1"}

    def spoils(completion: str, row: Mapping[str, Any]) -> float:
        row["prompt"][0]["content"] = "x"
        row.clear()  # type: ignore[attr-defined]
        return 1.0

    judged(spoils, "", row)
    assert row == {"prompt": [{"role": "user", "content": "q"}], "answer": "1"}


def test_batches_that_reward_functions_change_are_their_own() -> None:
    rows = [{"prompt": [{"role": "user", "content": "q"}], "answer": "1"} for _ in range(2)]
    ids = [[4, 5], [6]]
    seen = []

    def spoils(prompts: Any, completions: Any, completion_ids: Any, answer: Any) -> list[float]:
        for given in (*completion_ids, *prompts, *completions, answer, completion_ids, prompts):
            given.clear()
        return [0.0, 1.0]

    def counts(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.append((prompts, completion_ids, columns["answer"]))
        return [float(len(one)) for one in completion_ids]

    values = judge_of(None, [spoils, counts])._called(rows, ["a", "b"], ids, {})
    assert values == {"spoils": [0.0, 1.0], "counts": [2.0, 1.0]}
    assert ids == [[4, 5], [6]] and rows[0]["prompt"] == [{"role": "user", "content": "q"}]
    assert seen == [([row["prompt"] for row in rows], ids, ["1", "1"])]
