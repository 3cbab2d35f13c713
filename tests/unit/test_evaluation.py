"""The evaluation without privileged context: what it scores, its intervals and shards, and that it disturbs nothing."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import trainer_kit as kit
from datasets import Dataset

from dopd.evaluation.results import EvaluationResult
from dopd.evaluation.student import StudentEvaluator
from dopd.sampling import Ending
from dopd.scoring import evaluation_mode
from dopd.statistics import mean_interval, wilson_interval

EOS = kit.TOKENIZER.eos_token_id
TEMPLATE = "{prompt} {privileged_context}"


class Scripted:
    """Stands in for `generate`: greedy answers echo the hint (the prompt's last word), sampled ones do not end."""

    def __init__(self) -> None:
        self.configs: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, generation_config: Any, **kwargs: Any) -> torch.Tensor:
        self.configs.append(generation_config)
        if generation_config.do_sample:
            answers = [[5, 6, 7] for _ in input_ids]
        else:
            answers = [[int(ids[-2]), EOS, 9] for ids in input_ids]  # text after the end
        return torch.cat([input_ids, torch.tensor(answers)], dim=1)


def evaluator(rows: list[dict[str, Any]], **options: Any) -> StudentEvaluator:
    options = {"template": TEMPLATE, "batch_size": 3} | options
    return kit.evaluator(rows, lambda text, row: float(text == row["answer"]), 3, **options)


def rows(count: int = 5) -> list[dict[str, Any]]:
    """Questions whose answer is only in the hint, but for the first, which ends in its own answer."""
    return [
        {"prompt": [{"role": "user", "content": f"1 2 {3 if n else 7}"}], "privileged_context": "7", "answer": "7"}
        for n in range(count)
    ]


def test_greedy_and_sampled_answers_see_no_hint_and_the_privileged_ones_do() -> None:
    model: Any = kit.student()
    model.generate = script = Scripted()
    result = evaluator(rows()).evaluate(model, teacher=kit.teacher())
    assert result.greedy == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert result.privileged == [1.0] * 5
    assert result.sampled == [0.0] * 5 and result.ended == [0.0] * 5, "an answer that was cut is not finished"
    assert result.lengths == [3] * 5
    sampled = [config for config in script.configs if config.do_sample]
    assert {(config.temperature, config.top_k, config.top_p) for config in sampled} <= {(1.0, 0, 1.0), (1.0, 0, None)}
    metrics = result.metrics()
    assert metrics["accuracy_greedy"] == 0.2 and metrics["accuracy_privileged"] == 1.0
    assert 0 < metrics["entropy"] < math.log(len(kit.TOKENIZER)) and metrics["divergence_to_teacher"] > 0


def test_a_truncated_answer_is_wrong_whatever_its_text_says() -> None:
    model: Any = kit.student()
    model.generate = lambda input_ids, **kwargs: torch.cat([input_ids, torch.full((len(input_ids), 1), 9)], dim=1)
    result = kit.evaluator(rows(2), lambda text, row: 1.0, 1).evaluate(model)
    assert result.greedy == result.sampled == result.privileged == [0.0, 0.0]


def test_rows_without_a_hint_are_left_out_of_the_privileged_accuracy() -> None:
    model: Any = kit.student()
    model.generate = Scripted()
    some = rows(3)
    some[1]["privileged_context"] = None
    result = evaluator(some).evaluate(model)
    assert len(result.greedy) == 3 and len(result.privileged) == 2
    none = evaluator([{**row, "privileged_context": None} for row in some]).evaluate(model)
    assert "accuracy_privileged" not in none.metrics() and "divergence_to_teacher" not in none.metrics()


def test_entropy_and_divergence_are_those_of_full_logits() -> None:
    model: Any = kit.student()
    model.generate = Scripted()
    teacher = kit.teacher()
    result = evaluator(rows(2)).evaluate(model, teacher=teacher)
    for n, row in enumerate(rows(2)):
        prompt = kit.TOKENIZER(row["prompt"][0]["content"] + " :")["input_ids"]
        with torch.no_grad():
            s, t = (
                m(input_ids=torch.tensor([[*prompt, 5, 6, 7]]), use_cache=False)
                .logits[0, -4:-1]
                .double()
                .log_softmax(-1)
                for m in (model, teacher)
            )
        assert result.entropy[n] == pytest.approx(float(-(s.exp() * s).sum()), rel=1e-5)
        assert result.divergence[n] == pytest.approx(float((s.exp() * (s - t)).sum()), rel=1e-4)


def test_shards_and_batches_add_up_to_the_whole() -> None:
    model: Any = kit.student()
    model.generate = Scripted()
    whole = evaluator(rows()).evaluate(model, teacher=kit.teacher())
    for other in (
        evaluator(rows(), batch_size=1).evaluate(model, teacher=kit.teacher()),
        sum((evaluator(rows()).evaluate(model, teacher=kit.teacher(), shard=(n, 2)) for n in range(2)),
            start=EvaluationResult()),
    ):  # fmt: skip
        for name, value in whole.metrics().items():
            assert other.metrics()[name] == pytest.approx(value, rel=1e-5), name


def test_a_shard_without_prompts_is_empty_and_no_error() -> None:
    model: Any = kit.student()
    model.generate = Scripted()
    assert evaluator(rows(1)).evaluate(model, shard=(1, 2)) == EvaluationResult()


def test_the_callers_random_state_and_every_modules_mode_are_left_as_they_were() -> None:
    model = kit.student().train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    evaluator(rows()).evaluate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_evaluation_mode_is_undone_after_an_error() -> None:
    model = kit.student().train()
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert all(module.training for module in model.modules())


def test_sampled_answers_repeat_for_a_seed_and_change_with_it() -> None:
    model = kit.student()
    prompts = [row["prompt"] for row in rows()]

    def answers(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return evaluator(rows()).answers(model, prompts, sampled=True)

    assert answers(1) == answers(1) != answers(2)


# --- Intervals


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775328), (5, 10, 0.2365931, 0.7634069), (81, 263, 0.2552902, 0.3662159), (10, 10, 0.7224672, 1.0)],
)
def test_wilsons_interval_has_its_published_values(successes: int, trials: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, trials)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=2e-5), pytest.approx(high, abs=2e-5))
    assert interval.mean == successes / trials


def test_students_interval_of_a_few_runs_is_wider_than_the_normal_one() -> None:
    interval = mean_interval([1.0, 2.0, 3.0])  # t(0.975, 2) = 4.303, s = 1
    assert interval.high - interval.mean == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert mean_interval([0.5]).low == -math.inf
    assert math.isnan(mean_interval([]).mean) and math.isnan(wilson_interval(0, 0).mean)
    many = mean_interval([0.0, 1.0] * 50)
    assert many.high - many.mean == pytest.approx(1.98 * 0.502519 / 10, rel=0.02)


# --- Inside a run


def run(folder: Path, **options: Any) -> Any:
    made = kit.trainer(
        folder,
        max_steps=3,
        verifier=kit.TASK.verify,
        eval_dataset=Dataset.from_list(kit.task_rows(6, split="test")),
        train_dataset=Dataset.from_list(kit.task_rows(16)),
        **options,
    )
    made.train()
    return made


def test_evaluating_changes_no_training_loss_and_swallows_no_training_log(tmp_path: Path) -> None:
    plain, evaluated = run(tmp_path / "a"), run(tmp_path / "b", student_eval_steps=2, student_eval_prompts=5)
    assert [record["step"] for record in kit.train_records(evaluated)] == [1, 2, 3]
    for key in ("loss", "entropy", "share/LH", "gap/HT", "completions/mean_length"):
        assert kit.records(plain, key)[:3] == kit.records(evaluated, key)[:3], key
    log = [record for record in evaluated.state.log_history if "eval_accuracy_greedy" in record]
    assert [record["step"] for record in log] == [0, 2, 3]
    assert all(record["eval_num_prompts"] == 5 and record["eval_divergence_to_teacher"] > 0 for record in log)
    weights = zip(kit.parameters(plain.model).values(), kit.parameters(evaluated.model).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_fall_of_the_accuracy_with_p_is_told_as_drift(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = kit.trainer(
        tmp_path,
        verifier=kit.TASK.verify,
        eval_dataset=Dataset.from_list(kit.task_rows(4, split="test")),
        student_eval_steps=1,
    )
    (callback,) = [c for c in made.callback_handler.callbacks if type(c).__name__ == "StudentEvaluation"]
    names = [type(c).__name__ for c in made.callback_handler.callbacks]
    assert names.index("RunProgress") < names.index("StudentEvaluation")  # which logs the start as training begins
    for value in (0.5, 0.9, 0.85):
        callback._warn_of_drift({"eval_accuracy_privileged": value})
    assert "drifting" not in caplog.text
    callback._warn_of_drift({"eval_accuracy_privileged": 0.7})
    assert "fell from 0.90 to 0.70" in caplog.text


def test_a_table_of_completions_is_written_where_there_are_any(tmp_path: Path) -> None:
    options = {"eval_dataset": kit.Dataset.from_list(kit.task_rows(4, split="test")), "verifier": kit.TASK.verify}
    kit.trainer(tmp_path, log_completions=True, student_eval_steps=1, **options).train()
    tables = [pandas.read_parquet(path) for path in sorted((tmp_path / "completions").iterdir())]
    assert tables and all(len(table) for table in tables) and sum(map(len, tables)) >= 8


def test_the_hosts_evaluation_loop_works_and_leaves_the_clock_of_training_alone(tmp_path: Path) -> None:
    made = run(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    evaluated = [record for record in made.state.log_history if "eval_loss" in record]
    assert len(evaluated) == 3
    for record in evaluated:
        assert record["eval_loss"] > 0 and 0 < record["eval_entropy"] < math.log(len(kit.TOKENIZER))
        assert sum(record[f"eval_share/{name}"] for name in ("LH", "LL", "HT", "HS")) == pytest.approx(1)
    assert all(value > 0 for value in kit.records(made, "seconds/training"))
    assert made.evaluate()["eval_loss"] > 0


def test_shards_draw_answers_of_their_own() -> None:
    said: list[list[str]] = []

    def heard(text: str, row: Any) -> float:
        said[-1].append(text)
        return 0.0

    # Many tokens end an answer: an untrained model's are judged only where they ended.
    ends = list(range(0, len(kit.TOKENIZER), 3))
    made = replace(
        evaluator(rows(9)[1:]), max_new_tokens=12, verifier=heard, ending=Ending(ends, tokenizer=kit.TOKENIZER)
    )
    for shard in ((0, 2), (1, 2), (0, 2)):
        said.append([])
        made.evaluate(kit.student(), shard=shard)
    assert said[0] == said[2] and said[0] != said[1]
