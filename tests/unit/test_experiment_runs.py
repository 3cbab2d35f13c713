"""Runs of experiments with barely trained models: nothing leaks from one to the next, budgets end them, they resume."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trainer_kit as kit
from rich.console import Console

from dopd.errors import ConfigError
from dopd.tiny import TinySpec, shipped
from lab import run, worker
from lab.catalogue import get_experiment
from lab.families import FAMILIES
from lab.spec import Claim, Condition, Experiment, RunSpec
from lab.store import RunStore
from lab.tiny import Recipe, cache

SMALL = TinySpec(num_layers=1, hidden_size=16, num_heads=2, mlp_ratio=2)
RUN = RunSpec(method="dopd", options={"top_k": 8}, steps=3, problems=8)


@pytest.fixture(autouse=True)
def barely_trained_models(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "experiment-models"
    monkeypatch.setenv("DOPD_CACHE", str(folder))
    recipes = {
        family: {
            role: Recipe(task=family, knobs=dict(given.options), spec=SMALL, steps=steps, batch_size=4)
            for role, steps in (("student", 2), ("teacher", 3))
        }
        for family, given in FAMILIES.items()
    }
    monkeypatch.setattr(shipped, "FOLDER", folder)
    monkeypatch.setattr(cache, "RECIPES", recipes)
    monkeypatch.setattr(worker, "COMPLETIONS", 8)
    monkeypatch.setattr(worker, "PROMPTS", 2)


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.endswith("seconds")}


def test_a_run_is_the_same_whatever_ran_before_it_in_the_process() -> None:
    first = worker.execute(RUN)
    worker.execute(dataclasses.replace(RUN, method="privileged_teacher", options={}, run_seed=1, learning_rate=1e-2))
    assert numbers(worker.execute(RUN)) == numbers(first)
    assert numbers(worker.execute(dataclasses.replace(RUN, run_seed=2)))["metrics"] != first["metrics"]


def test_a_run_ends_when_its_tokens_are_spent_or_its_steps() -> None:
    record = worker.execute(dataclasses.replace(RUN, steps=10))
    budget = 10 * 8 * FAMILIES["dag"].gold_tokens
    per_step = record["tokens"] / record["steps"]
    assert record["status"] == "finished"
    assert record["steps"] == 15 or budget <= record["tokens"] < budget + 1.5 * per_step


def test_what_a_record_holds() -> None:
    record = worker.execute(dataclasses.replace(RUN, others=("graph:test", "dag:ood"), evaluate_every=2))
    assert record["run"] == dataclasses.replace(RUN, others=("graph:test", "dag:ood"), evaluate_every=2).to_json()
    for name in ("greedy", "sampled", "privileged", "entropy", "length", "graph:test/greedy", "dag:ood/greedy"):
        assert name in record["metrics"], name
    assert record["curves"]["eval/step"][:2] == [0, 2]
    assert {"torch", "trl", "dopd"} <= set(record["versions"])
    assert str(Path.home()) not in str(record)


def test_rollouts_that_read_p_are_judged_by_the_problem_and_not_by_what_they_read() -> None:
    record = worker.execute(dataclasses.replace(RUN, method="privileged_both", options={}))
    assert record["status"] == "finished" and "rollout/accuracy" in record["curves"]


@pytest.mark.parametrize("method", ["start", "teacher"])
def test_untrained_conditions_only_evaluate(method: str) -> None:
    record = worker.execute(dataclasses.replace(RUN, method=method, options={}))
    assert record["steps"] == record["tokens"] == 0 and 0.0 <= record["metrics"]["greedy"] <= 1.0


def test_stages_go_on_from_one_another_and_judge_every_family_after_each() -> None:
    stages = RunSpec(method="sft", families=("graph", "dag"), steps=2, problems=8)
    record = worker.execute(stages)
    for name in ("stage1/greedy", "stage1/dag:test/greedy", "stage2/greedy", "graph:test/greedy"):
        assert name in record["metrics"], name
    assert record["tokens"] >= 2 * 8 * (FAMILIES["graph"].gold_tokens + FAMILIES["dag"].gold_tokens)
    alone = worker.execute(dataclasses.replace(stages, families=("dag",), student="graph/student"))
    assert alone["metrics"]["entropy"] != record["metrics"]["entropy"]


def test_supervised_tuning_learns_the_gold_solutions() -> None:
    longer = RunSpec(method="sft", families=("graph",), steps=60, problems=8, learning_rate=1e-2)
    before = worker.execute(dataclasses.replace(longer, method="start"))
    assert worker.execute(longer)["metrics"]["entropy"] < before["metrics"]["entropy"]


def test_a_run_that_diverges_counts_as_nothing_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    kit.let_diverge(monkeypatch)
    record = worker.execute(dataclasses.replace(RUN, settings={"warmup_steps": 0}))
    assert record["status"] == "diverged" and record["error"]
    assert record["metrics"] == {"greedy": 0.0, "sampled": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table4", "table7", "robustness"])
def test_every_kind_of_p_row_and_noise_runs(name: str) -> None:
    for condition in get_experiment(name).conditions:
        record = worker.execute(dataclasses.replace(condition.run, steps=2, problems=8))
        assert record["status"] == "finished", condition.label


@pytest.mark.slow
@pytest.mark.parametrize(
    "condition",
    [*get_experiment("table1_dag").conditions, *get_experiment("further").conditions[5:]],
    ids=lambda condition: condition.label,
)
def test_every_method_of_table_1_runs(condition: Condition) -> None:
    record = worker.execute(dataclasses.replace(condition.run, steps=3, problems=8))
    assert record["status"] == "finished" and 0.0 <= record["metrics"]["greedy"] <= 1.0


def made_up() -> Experiment:
    return Experiment(
        name="made_up",
        title="Made up",
        source="Table 0",
        claim="None.",
        protocol="None.",
        conditions=(
            Condition(label="start", run=dataclasses.replace(RUN, method="start", options={})),
            Condition(label="again", run=dataclasses.replace(RUN, method="start", options={})),
            Condition(label="teacher", run=dataclasses.replace(RUN, method="teacher", options={})),
        ),
        claims=(Claim(text="equal", first="start", second="again", kind="near", margin=0.5),),
    )


def test_an_interrupted_experiment_goes_on_and_makes_no_run_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []

    def some(todo: Any, keep: Callable[[dict[str, Any]], None], **_: Any) -> None:
        for key, spec in todo[:5]:
            made.append(key)
            keep({"key": key, **worker.execute(spec)})

    monkeypatch.setattr(run, "get_experiment", lambda name: made_up())
    monkeypatch.setattr(run, "execute_all", some)
    monkeypatch.setattr(run, "PRETRAINING_SEEDS", (0,))
    given: dict[str, Any] = {
        "folder": tmp_path,
        "store": RunStore(tmp_path / "runs.jsonl"),
        "console": Console(quiet=True),
    }
    assert run.run_experiment("made_up", **given)["verdict"] == "not finished"
    result = run.run_experiment("made_up", **given)
    # Two of the three conditions are one and the same run.
    assert len(made) == len(set(made)) == 6 and len(result["runs"]) == 9
    assert result["verdict"] == "replicated"
    run.run_experiment("made_up", **given, only_report=True)
    assert len(made) == 6
    run.run_experiment("made_up", **given, resume=False)
    assert len(made) == 11


@pytest.mark.parametrize("given", [{"seeds": 0}, {"jobs": 0}])
def test_counts_below_one_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        run.run_experiment("figure3", **given)
