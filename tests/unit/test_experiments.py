"""Experiments as data: runs are valid configurations, hashes mean what they should, verdicts follow their rules."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import dopd
from dopd.errors import ConfigError
from dopd.methods import METHODS
from dopd.runs.settings import load_settings
from dopd.runs.train import make_config
from dopd.tasks import get_task
from lab.analysis import collect, judge, verdict
from lab.catalogue import EXPERIMENTS, get_experiment, models_without_recipe
from lab.catalogue import get_experiment as by_name
from lab.conditions import condition as made
from lab.index import write_index
from lab.launch import write_launch
from lab.problems import TEST_PROBLEMS, evaluation_rows
from lab.protocol import (
    DEFAULT_RATE,
    GRID,
    GRIDS,
    PRETRAINING_SEEDS,
    RUN_SEEDS,
    TUNED_RATES,
    best_rate,
    tuned_rate,
    untuned,
)
from lab.spec import MEASURED_TABLES, RESULTS_FILE, RUN_VERSION, SFT, Claim, Condition, Experiment, RunSpec
from lab.store import RunStore, missing, published
from lab.writing import README_FILE, write_experiment

SEEDS = [(pretraining, seed) for pretraining in PRETRAINING_SEEDS for seed in RUN_SEEDS]


def known(run: RunSpec) -> bool:
    return run.rules is not None or run.method in METHODS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_of_an_experiment_is_a_configuration_that_can_be_trained(name: str, tmp_path: Path) -> None:
    from lab.worker import run_settings

    checked: set[str] = set()
    for condition in get_experiment(name).conditions:
        run = condition.run
        if not run.trained or run.method == SFT or str(run) in checked:
            continue
        checked.add(str(run))
        assert known(run), f"{name}: {condition.label} names {run.method!r}, which `dopd methods` does not list"
        for family in run.families:
            settings = run_settings(run, family, run.student_model, tmp_path)
            table = make_config(settings, elsewhere=True).routing_table()
            assert table.name == run.method
            assert settings.trainer["max_steps"] >= run.steps


def test_protocol_asks_for_two_pretraining_and_three_run_seeds() -> None:
    assert len(PRETRAINING_SEEDS) >= 2 and len(RUN_SEEDS) >= 3
    figure3 = get_experiment("figure3")
    assert len(figure3.runs(PRETRAINING_SEEDS, RUN_SEEDS)) == 6 * len(figure3.conditions)


@pytest.mark.parametrize("name", ["tuning", "tuning_graph", "tuning_program"])
def test_tuning_keeps_clear_of_the_seeds_and_problems_of_the_tests(name: str) -> None:
    for _, run in get_experiment(name).runs(PRETRAINING_SEEDS, RUN_SEEDS):
        assert run.run_seed not in RUN_SEEDS and run.split == "validation"
        assert run.learning_rate in GRIDS.get(run.families[0], GRID)


@pytest.mark.parametrize(
    ("family", "name"), [("dag", "tuning"), ("graph", "tuning_graph"), ("program", "tuning_program")]
)
def test_rates_in_use_are_those_that_tuning_found(family: str, name: str) -> None:
    path = Path(__file__).parents[2] / "experiments" / name / RESULTS_FILE
    scores: dict[str, dict[float, float]] = {}
    for run in json.loads(path.read_text())["runs"]:
        method, _, rate = run["condition"].rpartition(", ")
        metrics = run["metrics"]
        scores.setdefault(method, {})[float(rate)] = (metrics["greedy"] + metrics["sampled"]) / 2
    assert TUNED_RATES[family] == {method: best_rate(by_rate) for method, by_rate in scores.items()}


def test_ties_go_to_the_lower_rate_and_ablations_take_dopds() -> None:
    assert best_rate({2e-4: 0.50, 5e-4: 0.595, 1e-3: 0.60}) == 5e-4
    assert best_rate({2e-4: 0.50, 5e-4: 0.58, 1e-3: 0.60}) == 1e-3
    assert tuned_rate("dopd_no_such_ablation") == tuned_rate("dopd") == TUNED_RATES["dag"]["dopd"]
    assert tuned_rate("vanilla", family="no such family") == tuned_rate("vanilla")


@pytest.mark.parametrize("family", ["dag", "graph", "program"])
def test_validation_problems_equal_none_of_the_test(family: str) -> None:
    from lab.families import get_family

    task: Any = get_task(family, **get_family(family).options)
    tested = {task.canonical(row) for row in evaluation_rows(family, "test", TEST_PROBLEMS, "none")}
    validation = [task.canonical(row) for row in evaluation_rows(family, "validation", 64, "none")]
    assert len(validation) == 64 and not tested & set(validation)


def test_gold_solutions_fit_the_token_counts_of_the_families() -> None:
    from lab.families import FAMILIES

    for name, family in FAMILIES.items():
        rows = get_task(family.task, **family.options).rows("test", 64)
        longest = max(len(row["solution"].split()) + 1 for row in rows)
        assert longest == family.gold_tokens < family.max_tokens, name


# --- hashes and the store


def test_a_key_is_stable_and_changes_with_every_field_and_model() -> None:
    run = RunSpec(method="dopd", options={"top_k": 8})
    models = dict.fromkeys(run.models, "weights")
    assert run.key(models) == RunSpec(method="dopd", options={"top_k": 8}).key(models)
    other = {
        "method": "vanilla",
        "options": {"top_k": 4},
        "rules": ({"source": "teacher"},),
        "families": ("dag", "graph"),
        "student": "dag/other",
        "teacher": "teacher_needs_p",
        "privileged_kind": "none",
        "privileged_noise": {"kind": "wrong"},
        "learning_rate": 1e-3,
        "steps": 81,
        "pretraining_seed": 1,
        "run_seed": 1,
        "split": "validation",
        "problems": 64,
        "others": ("dag:ood",),
        "evaluate_every": 10,
        "settings": {"warmup_steps": 1},
    }
    assert set(other) == {field.name for field in dataclasses.fields(RunSpec)}
    keys = {run.key(models)}
    for name, value in other.items():
        changed: Any = dataclasses.replace(run, **{name: value})
        keys.add(changed.key(dict.fromkeys(changed.models, "weights")))
    assert len(keys) == len(other) + 1
    assert run.key(dict.fromkeys(run.models, "other weights")) not in keys


def test_settings_that_experiments_share_are_run_once() -> None:
    def runs(name: str) -> list[RunSpec]:
        return [run for _, run in by_name(name).runs((0,), (0,))]

    def key(run: RunSpec) -> str:
        return run.key({model: model for model in run.models})

    wanted = [(key(run), run) for name in ("table6", "table7", "table8") for run in runs(name)]
    todo = missing(wanted, finished=())
    assert len(todo) == len({key for key, _ in wanted}) < len(wanted)
    assert missing(wanted, finished=[key for key, _ in todo]) == []
    assert missing(wanted, finished=[todo[0][0]]) == todo[1:]


def test_store_reads_what_was_added_and_says_what_is_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = RunStore(tmp_path / "runs.jsonl")
    assert store.read() == {}
    store.add({"key": "a", "metrics": {}})
    store.add({"key": "b", "metrics": {}})
    with store.path.open("a") as file:
        file.write('{"key": "c", "metr')
    with caplog.at_level("WARNING", logger="dopd"):
        assert set(store.read()) == {"a", "b"}
    assert "1 line(s)" in caplog.text


# --- verdicts on made-up numbers


def experiment(*claims: Claim) -> Experiment:
    return Experiment(
        name="made_up",
        title="Made up",
        source="Table 0",
        claim="A is better.",
        protocol="None.",
        conditions=tuple(
            Condition(label=label, run=RunSpec(method="dopd"), paper={"score": 1.0} if label == "a" else {})
            for label in ("a", "b", "c")
        ),
        claims=claims,
    )


def values(**by_label: list[float]) -> dict[str, Any]:
    return {
        label: {seed: {"greedy": value, "sampled": value / 2} for seed, value in zip(SEEDS, numbers, strict=True)}
        for label, numbers in by_label.items()
    }


HIGH = values(
    a=[0.80, 0.82, 0.81, 0.79, 0.80, 0.83],
    b=[0.60, 0.61, 0.63, 0.60, 0.58, 0.61],
    c=[0.805, 0.815, 0.812, 0.788, 0.804, 0.828],
)


@pytest.mark.parametrize(
    ("claim", "outcome"),
    [
        (Claim(text="", first="a", second="b"), "supported"),
        (Claim(text="", first="b", second="a"), "contradicted"),
        (Claim(text="", first="b", second="a", kind="below"), "supported"),
        (Claim(text="", first="a", second="c"), "undecided"),
        (Claim(text="", first="a"), "supported"),
        (Claim(text="", first="a", kind="below"), "contradicted"),
        (Claim(text="", first="a", second="c", kind="near", margin=0.03), "supported"),
        (Claim(text="", first="a", second="b", kind="near", margin=0.03), "contradicted"),
        (Claim(text="", first="a", second="c", kind="near", margin=0.001), "undecided"),
    ],
)
def test_outcome_of_a_claim(claim: Claim, outcome: str) -> None:
    (judgement,) = judge(experiment(claim), HIGH)
    assert judgement.outcome == outcome
    assert all(test.pairs == len(SEEDS) for test in judgement.tests)


def test_metrics_that_disagree_leave_a_claim_undecided() -> None:
    mixed = values(a=[0.8, 0.82, 0.81, 0.79, 0.8, 0.83], b=[0.6, 0.61, 0.63, 0.6, 0.58, 0.61], c=[0.0] * 6)
    for metrics in mixed["b"].values():
        metrics["sampled"] = 0.9
    assert judge(experiment(Claim(text="", first="a", second="b")), mixed)[0].outcome == "undecided"


def test_many_tests_are_corrected_together() -> None:
    weak = values(a=[0.61, 0.64, 0.60, 0.62, 0.65, 0.60], b=[0.60, 0.61, 0.59, 0.61, 0.62, 0.60], c=[0.0] * 6)
    alone = Claim(text="", first="a", second="b", metrics=("greedy",))
    assert judge(experiment(alone), weak)[0].outcome == "supported"
    others = [Claim(text=str(i), first="b", second="b", metrics=("greedy",)) for i in range(10)]
    assert judge(experiment(alone, *others), weak)[0].outcome == "undecided"


def test_verdict_of_an_experiment() -> None:
    yes, no = Claim(text="", first="a", second="b"), Claim(text="", first="b", second="a")
    unsure = Claim(text="", first="a", second="c")

    def of(*claims: Claim) -> str:
        return verdict(judge(experiment(*claims), HIGH))

    assert of(yes) == "replicated" and of(yes, no) == of(yes, unsure) == "partly"
    assert of(no) == of(no, unsure) == "refuted" and of(unsure) == "not" and of() == "nothing claimed"


def record(label: str, seeds: tuple[int, int], greedy: float, status: str = "finished") -> tuple[str, dict[str, Any]]:
    run = RunSpec(method="dopd", pretraining_seed=seeds[0], run_seed=seeds[1])
    curve = [0.2, 0.3, 0.5, 0.4, 0.1]
    return label, {
        "key": f"{label}{seeds}",
        "run": run.to_json(),
        "status": status,
        "metrics": {"greedy": greedy, "sampled": greedy / 2, "entropy": 0.1},
        "curves": {"rollout/accuracy": curve, "entropy": [0.2, 0.2, 0.1, 0.1, 0.05]},
        "tokens": 1000,
        "seconds": 1.0,
    }


def test_early_gain_and_late_change_are_read_from_the_curve() -> None:
    (metrics,) = collect([record("a", (0, 0), 0.5)])["a"].values()
    assert metrics["early_gain"] == pytest.approx(0.3) and metrics["late_change"] == pytest.approx(-0.4)
    assert metrics["entropy_ratio"] == pytest.approx(0.25) and metrics["tokens"] == 1000


def test_learning_and_forgetting_over_stages() -> None:
    _, given = record("a", (0, 0), 0.9)
    given["run"]["families"] = ["graph", "dag", "program"]
    given["metrics"] = {
        "stage1/greedy": 0.6,
        "stage2/greedy": 0.8,
        "stage3/greedy": 0.7,
        "graph:test/greedy": 0.3,
        "dag:test/greedy": 0.7,
    }
    (metrics,) = collect([("a", given)])["a"].values()
    assert metrics["learned"] == pytest.approx(0.7)
    assert metrics["kept"] == pytest.approx(((0.3 - 0.6) + (0.7 - 0.8)) / 2)


# --- the folder


def wanted(made_up: Experiment) -> list[tuple[str, RunSpec]]:
    return [(condition.label, run) for condition, run in made_up.runs(PRETRAINING_SEEDS, RUN_SEEDS)]


def test_folder_has_every_run_the_table_the_tests_and_the_notes(tmp_path: Path) -> None:
    made_up = experiment(Claim(text="A wins", first="a", second="b"))
    runs = [
        record(
            label, seeds, HIGH[label][seeds]["greedy"], "diverged" if (label, seeds) == ("b", (0, 0)) else "finished"
        )
        for label in "abc"
        for seeds in SEEDS
    ]
    (tmp_path / "notes.md").write_text("Because of the made-up numbers.")
    result = write_experiment(made_up, runs, wanted(made_up), tmp_path)
    assert result["verdict"] == "replicated"
    assert json.loads((tmp_path / RESULTS_FILE).read_text()) == json.loads(json.dumps(result))
    assert len(result["runs"]) == 18
    text = (tmp_path / README_FILE).read_text()
    for words in ("Verdict: replicated", "80.8 [", "paper: score", "A wins (a > b)", "< 0.001", "made-up numbers"):
        assert words in text, words
    assert "Diverged, counted as 0: b." in text
    assert 1000 < (tmp_path / "figure.png").stat().st_size < 200_000


def test_an_unfinished_experiment_has_no_verdict(tmp_path: Path) -> None:
    made_up = experiment(Claim(text="A wins", first="a", second="b"))
    runs = [record("a", seeds, 0.5) for seeds in SEEDS]
    result = write_experiment(made_up, runs, wanted(made_up), tmp_path)
    assert result["verdict"] == "not finished" and result["claims"] == []
    assert "6 of 18 runs" in (tmp_path / README_FILE).read_text()


def test_index_names_every_experiment_and_says_which_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = dataclasses.replace(experiment(Claim(text="A wins", first="a", second="b")), name="figure3")
    runs = [record(label, seeds, HIGH[label][seeds]["greedy"]) for label in "abc" for seeds in SEEDS]
    write_experiment(made_up, runs, wanted(made_up), tmp_path / "figure3")
    lines = write_index(tmp_path).read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) == len(EXPERIMENTS)
    (done,) = [row for row in rows if "[figure3]" in row]
    assert "18 of 18" in done and "1 of 1" in done and "replicated" in done
    assert sum("not run" in row for row in rows) == len(rows) - 1
    assert done.endswith("replicated (with settings that have changed since) |")  # figure3 has other conditions
    with monkeypatch.context() as patched:
        patched.setitem(EXPERIMENTS, "figure3", lambda: made_up)
        assert "| replicated |" in write_index(tmp_path).read_text()
    results = tmp_path / "figure3" / RESULTS_FILE
    results.write_text(results.read_text().replace(f'"run_version": {RUN_VERSION}', '"run_version": 0'))
    (stale,) = [row for row in write_index(tmp_path).read_text().splitlines() if "[figure3]" in row]
    assert "replicated (with tiny models that have been replaced since)" in stale


def test_committed_runs_are_read_and_not_made_again(tmp_path: Path) -> None:
    made_up = dataclasses.replace(experiment(Claim(text="A wins", first="a", second="b")), name="figure3")
    runs = [record(label, seeds, 0.5) for label in "abc" for seeds in SEEDS]
    write_experiment(made_up, runs, wanted(made_up), tmp_path / "figure3")
    assert published(tmp_path) == {run["key"]: run for _, run in runs}
    assert published(tmp_path / "nowhere") == {}


def test_committed_runs_are_found_by_the_experiments_that_made_them() -> None:
    store, folder = RunStore(), Path(__file__).parents[2] / "experiments"
    for path in sorted(folder.glob(f"*/{RESULTS_FILE}")):
        there = {run["key"] for run in json.loads(path.read_text(encoding="utf-8"))["runs"]}
        experiment = get_experiment(path.parent.name)
        seeds = RUN_SEEDS if experiment.run_seeds is None else experiment.run_seeds
        wanted = {store.key(spec) for _, spec in experiment.runs(PRETRAINING_SEEDS, seeds)}
        assert there <= wanted, path.parent.name


@pytest.mark.parametrize("method", MEASURED_TABLES)
def test_a_table_that_is_another_one_by_now_has_runs_of_its_own(method: str) -> None:
    measured = RunSpec(method=method, options=MEASURED_TABLES[method])
    models = dict.fromkeys(measured.models, "weights")
    assert measured.key(models) != RunSpec(method=method).key(models)
    assert dopd.table(method, **MEASURED_TABLES[method]) != dopd.table(method)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_the_models_that_it_needs(name: str) -> None:
    assert models_without_recipe(get_experiment(name)) == []


def test_conditions_of_a_method_that_was_not_tuned_are_named() -> None:
    assert not any(untuned(get_experiment(name)) for name in EXPERIMENTS)
    strange = made("a", "vanilla", rate_of="no_such_method")
    assert strange.run.learning_rate == DEFAULT_RATE
    assert untuned(dataclasses.replace(experiment(), conditions=(strange,))) == ["a"]


def test_an_experiment_whose_models_no_recipe_makes_is_refused_by_name() -> None:
    strange = dataclasses.replace(
        experiment(), conditions=(Condition(label="a", run=RunSpec(method="dopd", student="dag/giant")),)
    )
    assert models_without_recipe(strange) == ["dag/giant"]
    assert models_without_recipe(get_experiment("figure3")) == []


@pytest.mark.parametrize("kind", ["lines", "grid", "curves"])
def test_other_figures_are_drawn(tmp_path: Path, kind: Any) -> None:
    conditions = tuple(
        Condition(label=label, run=RunSpec(method="dopd"), x=float(place), group="line")
        for place, label in enumerate("ab")
    )
    made_up = dataclasses.replace(
        experiment(), conditions=conditions, figure=kind, curves=("rollout/accuracy", "entropy")
    )
    write_experiment(made_up, [record(label, s, 0.5) for label in "ab" for s in SEEDS], wanted(made_up), tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 1000


# --- errors and full scale


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'figure3'"):
        get_experiment("figur3")
    with pytest.raises(ConfigError, match="different labels"):
        dataclasses.replace(experiment(), conditions=experiment().conditions * 2)
    with pytest.raises(ConfigError, match="names 'z'"):
        experiment(Claim(text="", first="z"))
    with pytest.raises(ConfigError, match="margin"):
        Claim(text="", first="a", kind="near")
    with pytest.raises(ConfigError, match="family"):
        RunSpec(method="dopd", families=("poems",))
    with pytest.raises(ConfigError, match="steps"):
        RunSpec(method="dopd", steps=0)
    with pytest.raises(ConfigError, match="test or FAMILY:ood"):
        RunSpec(method="dopd", others=("dag:train",))
    with pytest.raises(ConfigError, match="at most 512"):
        evaluation_rows("dag", "test", 513, "none")


@pytest.mark.parametrize("name", ["table4", "table3", "table7", "robustness", "figure7a"])
def test_full_scale_writes_configs_that_are_read_back_and_a_script(name: str, tmp_path: Path) -> None:
    *configs, script = write_launch(name, tmp_path, seeds=2)
    assert len(set(configs)) == len(configs) > 0
    lines = script.read_text()
    for path in configs:
        settings = load_settings(path)
        values = yaml.safe_load(path.read_text())
        assert settings.model_name_or_path.startswith(("Qwen/", "runs/"))
        assert values.get("method_options", {}).get("top_k") != 8
        assert path.name in lines and "accelerate launch" in lines
        if name != "figure7a":
            make_config(settings, elsewhere=True)
