"""FSDP2 over two processes is the run of one process: the head is sharded, the loss and the update are whole."""

from pathlib import Path
from typing import Any

import launcher
import pytest
import torch
import trainer_kit as kit
from sharded_worker import ANCHORED, EVALUATED

pytestmark = pytest.mark.slow
SETTINGS = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launcher.run("sharded_worker.py", tmp_path_factory.mktemp("sharded"), SETTINGS)


@pytest.mark.parametrize("method", ["vanilla", "dopd"])
def test_sharding_the_student_changes_neither_loss_nor_update(
    sharded: dict[str, Any], method: str, tmp_path: Path
) -> None:
    result = sharded[method]
    assert result["sharded"]
    single, _, _ = kit.one_step(tmp_path, method, 8, 1, **EVALUATED)
    expected = kit.train_records(single)[0]
    name = "eval_divergence_to_teacher"
    for found, alone in zip(result["evaluated"], kit.records(single, name), strict=True):
        assert found[name] == pytest.approx(alone, rel=1e-5)
    for key in ("loss", "entropy", "grad_norm", *(key for key in expected if key.startswith(("share/", "gap/")))):
        assert result["record"][key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key
    for name, value in single.model.named_parameters():
        torch.testing.assert_close(result["weights"][name], value.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ANCHORED)
def test_privileged_students_of_an_earlier_time_are_split_like_the_student(
    sharded: dict[str, Any], method: str, tmp_path: Path
) -> None:
    result = sharded[method]
    single, _, _ = kit.one_step(tmp_path, method, 8, 1, **ANCHORED[method])
    for found, expected in zip(result["records"], kit.train_records(single), strict=True):
        for key in ("loss", "entropy", "grad_norm", *(key for key in expected if key.startswith(("share/", "gap/")))):
            assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key
    for name, value in single.model.named_parameters():
        torch.testing.assert_close(result["weights"][name], value.detach(), rtol=1e-5, atol=1e-6)


def test_ranks_with_sharded_weights_evaluate_every_prompt_together(sharded: dict[str, Any]) -> None:
    """Three prompts, one at a time, would be two passes on one rank and one on the other: a hang."""
    assert [record["eval_num_prompts"] for record in sharded["dopd"]["evaluated"]] == [3.0, 3.0]


@pytest.mark.parametrize("way", ["killed", "torn"])
def test_sharded_runs_go_on_to_the_bit_from_the_newest_whole_checkpoint(sharded: dict[str, Any], way: str) -> None:
    """A torn file of the last checkpoint is found, and the one before is taken."""
    whole, again = sharded["resumed"]["whole"], sharded["resumed"][way]
    assert whole["steps"] == again["steps"] == 4 and again["checkpoints"] == [2, 4]
    assert whole["weights"].keys() == again["weights"].keys()
    assert all(torch.equal(value, again["weights"][name]) for name, value in whole["weights"].items())
    assert again["records"] == whole["records"]
