"""Two gloo processes are one run: routing, loss, update, evaluation and the order of prompts."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import launcher
import pytest
import trainer_kit as kit

from dopd.inspection.schema import problems, read_json_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    return launcher.run("worker.py", folder)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("name", ["dopd", "dopd_cut", "vanilla", "tip_cut", "rewarded", "dapd_cut", "gkd"])
def test_rank_count_changes_neither_routing_nor_loss_nor_update(two: dict[str, Any], name: str, tmp_path: Path) -> None:
    method = name.removesuffix("_cut")
    options = kit.rewarded() if name == "rewarded" else {}
    options |= {"method_options": {"lmbda": 0.5, "seed": 3}} if name == "gkd" else {}
    single, batch, update = kit.one_step(tmp_path, method, 8, 1, **options)
    result = two[name]
    tokens = result["tokens_by_rank"]
    assert tokens[0] != tokens[1], "ranks with equally many tokens cannot show a wrong normalisation"
    assert sum(tokens) == int(batch["completion_mask"].sum())
    if method == "dopd":
        assert {**result["regimes"][0], **result["regimes"][1]} == kit.by_completion(batch, "regimes")
    assert kit.close(result["update"], update)
    same = ("share/", "gap/", "loss/", "entropy", "threshold/", "prob/", "num_sequences", "completions/eos", "reward")
    for key, value in kit.train_records(single)[0].items():
        if key == "loss" or key.startswith((*same, "first_token")):
            assert result["record"][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_the_main_process_alone_warns(two: dict[str, Any], folder: Path) -> None:
    outputs = [(folder / f"output{rank}.txt").read_text() for rank in range(2)]
    assert [output.count("what a process warns of") for output in outputs] == [1, 0]


def test_the_main_process_alone_says_what_a_command_came_to(two: dict[str, Any], folder: Path) -> None:
    outputs = [(folder / f"output{rank}.txt").read_text() for rank in range(2)]
    assert two["command"] == [[0, 0], [0, 0]]
    for line in ("run folder: ", "report: ", "next: ", "model_name_or_path: tiny:dag/student", "ok    student: "):
        assert [output.count(f"\n{line}") for output in outputs] == [1, 0], line


def test_every_prompt_of_an_epoch_is_met_once_and_a_resumed_second_epoch_goes_on_in_its_own_order(
    two: dict[str, Any],
) -> None:
    unbroken, resumed = two["orders"]["unbroken"], two["orders"]["resumed"]
    for rank in range(2):
        assert unbroken[rank][3:] == resumed[rank]
        assert unbroken[rank][:2] != unbroken[rank][2:], "the second epoch has the order of the first"
    for epoch in (slice(0, 2), slice(2, 4)):
        counts = Counter(
            tuple(token for token in row if token)
            for rank in range(2)
            for step in unbroken[rank][epoch]
            for row in step
        )
        assert len(counts) == 4 and set(counts.values()) == {2}


def test_evaluation_adds_up_over_ranks_and_is_written_once(two: dict[str, Any], folder: Path) -> None:
    log = two["run"]["log"]
    evaluated = [record for record in log if "eval_accuracy_greedy" in record]
    assert [record["eval_num_prompts"] for record in evaluated] == [7.0] * 3
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert Counter(line["step"] for line in lines if "loss" in line) == {1: 1, 2: 1}
    assert Counter(line["step"] for line in lines if "eval_accuracy_greedy" in line) == {0: 1, 1: 1, 2: 1}
    assert two["run"]["evaluated"]["eval_loss"] > 0
    assert (folder / "run" / "checkpoint-2" / "privileged_student.pt").exists()
    traced = read_json_lines(folder / "run" / "trace.jsonl")
    assert [(line["step"], line["kind"]) for line in traced] == [
        (s, k) for s in (0, 1) for k in [*["batch"] * 4, "probe"]
    ]
    assert [problems(line) for line in traced] == [[]] * 10


def test_ranks_hold_the_same_weights_after_training(two: dict[str, Any]) -> None:
    first, second = two["run"]["weights"]
    assert first == second


def test_a_stream_gives_each_rank_its_own_groups_of_rollouts(two: dict[str, Any]) -> None:
    first, second = ({tuple(t for t in row if t) for row in rows} for rows in two["stream"]["prompts"])
    assert len(first) == len(second) == 1 and first != second
