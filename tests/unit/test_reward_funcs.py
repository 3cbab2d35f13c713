"""Reward functions, as in TRL's GRPO: called with a batch, weighted, awaited, checked; a verifier is a special case."""

import asyncio
import functools
import inspect
import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import trainer_kit as kit
import yaml
from datasets import Dataset
from transformers import TrainerState
from trl import GRPOTrainer

import dopd
from dopd.cli.main import main
from dopd.errors import ConfigError, DataError, ScoringError
from dopd.inspection.inspector import Inspector
from dopd.inspection.pictures import row_key
from dopd.inspection.schema import problems, read_trace
from dopd.ranks import Alone
from dopd.registry import files_of
from dopd.sampling import Ending
from dopd.scoring import View
from dopd.signals import SignalBatch
from dopd.signals.rewards import group_advantage
from dopd.step import FixedModels, LocalScorer, Moment, Step
from dopd.step.batch import Rollouts
from dopd.step.metrics import rollout_metrics
from dopd.step.rewards import Judge, judge_of
from dopd.step.verifier import unjudged
from dopd.trainer.host import _add_columns
from dopd.trainer.setup import answering
from dopd.verifiers.named import load_reward_functions

ROWS = [{"prompt": "q", "answer": str(n)} for n in range(3)]
IDS = [[5], [5, 6], [5, 6, 7]]
NAN = math.nan
FUNCTIONS = "def short(completion_ids, **columns):\n    return [-len(ids) for ids in completion_ids]\n"


def lengths(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def even_only(answer: list[str], **columns: Any) -> list[float | None]:
    return [10.0 if int(text) % 2 == 0 else None for text in answer]


async def awaited(completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return [-float(len(text)) for text in completions]


def rollouts(ids: list[list[int]] = IDS) -> Rollouts:
    mask = torch.tensor([[1] * len(one) + [0] * (3 - len(one)) for one in ids])
    padded = torch.tensor([one + [0] * (3 - len(one)) for one in ids])
    prompts = torch.ones(len(ids), 1, dtype=torch.long)
    return Rollouts(ROWS[: len(ids)], View(prompts, torch.ones_like(prompts)), padded, mask)


def judged(judge: Judge, rows: list[dict[str, Any]] = ROWS, texts: tuple[str, ...] = ("a", "bb", "ccc")) -> Rollouts:
    return judge.judged(rollouts(), rows, texts, [True, False, True])


def test_rewards_are_weighted_sums_of_the_functions_that_apply() -> None:
    made = judged(judge_of(lambda text, row: 0.5, [lengths, even_only, awaited, None], [1.0, 2.0, 0.5, 4.0]))
    assert made.scores == [0.5, 0.0, 0.5]  # the second answer was cut
    assert made.rewards == [1 + 20 - 0.5 + 2, 2 - 1 + 0, 3 + 20 - 1.5 + 2]
    by_name = {name: values for name, values in made.rewards_by_function.items() if name != "even_only"}
    assert by_name == {"lengths": [1, 2, 3], "awaited": [-1, -2, -3], "verifier": made.scores}
    assert [*map(str, made.rewards_by_function["even_only"])] == ["10.0", "nan", "10.0"]
    alone = judged(judge_of(None, [even_only]))
    assert (
        alone.scores is None and alone.rewards is not None and [*map(math.isnan, alone.rewards)] == [False, True, False]
    )
    only_verified = judged(judge_of(lambda text, row: 1.0))
    assert only_verified.rewards == only_verified.scores == [1.0, 0.0, 1.0] and not only_verified.rewards_by_function


@pytest.mark.parametrize("conversation", [False, True])
def test_functions_are_called_as_trl_calls_them(conversation: bool) -> None:
    seen: dict[str, Any] = {}

    def keep(**given: Any) -> list[float]:
        seen.update(given)
        return [0.0] * len(given["prompts"])

    prompt: Any = [{"role": "user", "content": "q"}] if conversation else "q"
    judged(judge_of(None, [keep]), [{**row, "prompt": prompt} for row in ROWS])
    texts = ["a", "bb", "ccc"]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if conversation else texts
    of_rows = {"prompts": [prompt] * 3, "completions": completions, "completion_ids": IDS, "answer": ["0", "1", "2"]}
    assert {name: seen.pop(name) for name in of_rows} == of_rows
    code = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert "prompts=prompts, completions=completions, completion_ids=completion_ids_list, **reward_kwargs" in code
    of_trl = {*re.findall(r'(?<!row_)reward_kwargs\["(\w+)"\]', code)}
    assert {*seen} == of_trl - {"environments"}, "conversations with tools are not supported"
    assert isinstance(seen["trainer_state"], TrainerState)


def test_functions_get_the_run_and_log_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = []

    def logged(
        completion_ids: list[list[int]], trainer_state: TrainerState, log_metric: Any, **more: Any
    ) -> list[float]:
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        log_metric("first_token", sum(ids[0] for ids in completion_ids) / len(completion_ids))
        more["log_extra"]("length", [len(ids) for ids in completion_ids])
        return [float(ids[0]) for ids in completion_ids]

    def plain(prompts: list[Any], completions: list[Any], completion_ids: list[Any], answer: list[Any]) -> list[float]:
        return [0.0] * len(prompts)  # takes nothing of the run

    rows = [{name: row[name] for name in ("prompt", "answer")} for row in kit.task_rows()]
    options = {"max_steps": 2, "trace_steps": 1, "trace_probes": 2, "train_dataset": Dataset.from_list(rows)}
    options |= {"log_completions": True, "logging_steps": 1}
    made = kit.trainer(tmp_path, "grpo", reward_funcs=[logged, plain], **options)
    made.train()
    assert steps == [(0, 1), (0, 2), (0, 2), (1, 2), (1, 2)]  # tried; then each step, and its probes
    assert kit.records(made, "first_token") == kit.records(made, "reward") != []  # of the batch, and not of probes
    with pytest.raises(ScoringError, match=r"log_metric\('x', 'much'\): the value must be a number"):
        made.reward_logs()["log_metric"]("x", "much")
    traced = read_trace(tmp_path / "trace.jsonl")
    assert {record["kind"] for record in traced} == {"batch", "probe"}
    assert all(record["extra"] == {"length": record["num_tokens"]} and not problems(record) for record in traced)
    for path in sorted((tmp_path / "completions").iterdir()):
        table = pandas.read_parquet(path)
        lengths = [len(kit.TOKENIZER(text)["input_ids"]) for text in table["completion"]]
        # What ends an answer is a token of it, and no text.
        assert all(n - m in (0, 1) for n, m in zip(table["length"], lengths, strict=True)) and len(table) == 8


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("length", [1, 2], r"log_extra\('length', ...\) got 2 values for 3 completions"),
        ("prompt", [1, 2, 3], r"log_extra\('prompt', ...\): the table of completions has a 'prompt'"),
    ],
)
def test_columns_that_cannot_be_kept_are_refused(column: str, values: list[Any], words: str) -> None:
    def logs(completions: list[Any], log_extra: Any, **more: Any) -> list[float]:
        log_extra(column, values)
        return [0.0] * len(completions)

    with pytest.raises(ScoringError, match=words):
        judged(judge_of(None, [logs]))


def test_columns_are_plain_and_those_of_several_types_are_text(tmp_path: Path) -> None:
    values = [torch.tensor(2.5), None, Path("a")]

    def logs(completions: list[Any], log_extra: Any, **more: Any) -> list[float]:
        for value in values:  # one at a time
            log_extra("mixed", [value])
        return [0.0] * len(completions)

    assert judged(judge_of(None, [logs])).extra == {"mixed": [2.5, None, "a"]}
    pandas.DataFrame({"prompt": ["p"] * 3}).to_parquet(tmp_path / "table.parquet")
    _add_columns(tmp_path / "table.parquet", {"mixed": [2.5, None, "a"], "number": [1, None, 0.5]})
    table = pandas.read_parquet(tmp_path / "table.parquet")
    assert (
        table["mixed"].tolist()[::2] == ["2.5", "a"]
        and pandas.isna(table["mixed"][1])
        and table["number"].tolist()[::2] == [1.0, 0.5]
    )


def test_a_look_at_the_answers_of_a_batch_has_its_rewards(tmp_path: Path) -> None:
    """What each token adds, with all answers of a prompt as rollouts of one another, is what it added in training."""

    def logged(completion_ids: list[list[int]], log_extra: Any, **more: Any) -> list[float]:
        log_extra("length", [len(ids) for ids in completion_ids])
        return [float(ids[0]) for ids in completion_ids]

    rows = [{name: row[name] for name in ("prompt", "answer")} for row in kit.task_rows()]
    data = Dataset.from_list(rows)
    options = {"max_steps": 1, "trace_steps": 1, "trace_examples": 8, "train_dataset": data}
    run = kit.trainer(tmp_path, "grpo", reward_funcs=[logged], **options)
    run.train()
    traced: dict[str, list[Any]] = {}
    for record in read_trace(tmp_path / "trace.jsonl"):
        traced.setdefault(record["prompt_key"], []).append(record)
    models = FixedModels(kit.student().eval(), None)  # as it was before the step
    judge = judge_of(None, [logged])
    step = Step(run.table, run.prompts, LocalScorer(models, 8, run.temperature), run.ending, judge)
    inspector = Inspector(step, answering(run, [], unjudged), models)
    assert {len(group) for group in traced.values()} == {run.args.num_generations}
    for group in traced.values():
        (row,) = [row for row in rows if row_key(row) == group[0]["prompt_key"]]
        answers = [[token["id"] for token in record["tokens"]] for record in group]
        moment = Moment(num_generations=len(group))
        looked_at = inspector.records([row] * len(group), answers=answers, moment=moment, every=True)
        assert len({token["loss"] for record in group for token in record["tokens"]}) > 1
        for seen, record in zip(looked_at, group, strict=True):
            assert (seen["extra"], seen["score"], seen["rollout"]) == (record["extra"], None, record["rollout"])
            for name in ("loss", "weight", "logprob_plain"):
                expected = [token[name] for token in record["tokens"]]
                assert [token[name] for token in seen["tokens"]] == pytest.approx(expected, abs=2e-6)


def test_functions_of_trl_are_reward_functions() -> None:
    functions = load_reward_functions(["trl.rewards:think_format_reward"])
    rows = [{"prompt": [{"role": "user", "content": "q"}]}] * 3
    texts = ("<think>\nx\n</think>\ny", "y", "<think>\nx</think>")
    assert judged(judge_of(None, functions), rows, texts).rewards == [1.0, 0.0, 1.0]


class Called:
    def __call__(self, prompts: list[Any], **columns: Any) -> list[float]:
        return [0.0] * len(prompts)


def test_names_are_those_that_trl_logs_and_each_is_there_once() -> None:
    functions = [functools.partial(lengths, scale=1), Called(), lengths, functools.partial(lengths, scale=2), None]
    assert [*judge_of(lambda text, row: 1.0, functions).functions] == [
        "lengths", "Called", "lengths_2", "lengths_3", "verifier"
    ]  # fmt: skip


async def never(**given: Any) -> list[float]:
    await asyncio.sleep(30)
    return []


async def leaving(**given: Any) -> list[float]:
    raise SystemExit(0)


def raising(**given: Any) -> list[float]:
    raise KeyError("solution")


async def too_late(**given: Any) -> list[float]:
    raise TimeoutError("the server is silent")


def asleep(**given: Any) -> list[float]:
    time.sleep(30)
    return []


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "one number": (lambda **given: 1.0, "gave a float: it must give a list of 3"),
    "too few": (lambda **given: [1.0], "gave a list of 1: it must give a list of 3"),
    "text": (lambda **given: ["1"] * 3, "gave '1' for the answer 'a': a reward must be a finite number, or None"),
    "nan": (lambda **given: [0.0, NAN, 0.0], "gave nan for the answer 'bb'"),
    "infinity": (lambda **given: torch.tensor([0.0, 0.0, math.inf]), "gave inf for the answer 'ccc'"),
    "raises": (raising, r"'raising' raised KeyError: 'solution'.*prompts=, completions=, completion_ids=, answer="),
    "one argument": (lambda completions: [0.0] * 3, "raised TypeError: .*unexpected keyword"),
    "leaves, awaited": (leaving, "'leaving' raised SystemExit"),
    "is too slow": (asleep, r"'asleep' took more than verifier_timeout \(=0\.02\) seconds for each of 3 answers"),
    "is awaited too long": (never, r"'never' took more than verifier_timeout \(=0\.02\) seconds for each of 3 answers"),
    "has a time of its own": (too_late, "'too_late' raised TimeoutError: the server is silent"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_gives_no_rewards_is_refused_by_name(what: str) -> None:
    function, words = WRONG[what]
    with pytest.raises(ScoringError, match=words):
        judged(judge_of(None, [function], seconds=0.02 if "verifier_timeout" in words else None))
    assert judged(judge_of(None, [awaited])).rewards == [-1.0, -2.0, -3.0]  # the loop still runs


def test_awaited_functions_wait_together() -> None:
    both = threading.Barrier(2, timeout=20)

    async def meets(prompts: list[Any], **given: Any) -> list[float]:
        await asyncio.to_thread(both.wait)
        return [1.0] * len(prompts)

    assert judged(judge_of(None, [meets, meets])).rewards == [2.0] * 3


def test_rewards_are_given_where_a_loop_runs_already() -> None:
    async def in_a_notebook() -> Any:
        return judged(judge_of(None, [awaited])).rewards

    assert asyncio.run(in_a_notebook()) == [-1.0, -2.0, -3.0]


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward_weights \(=\[1\.0, 2\.0\]\) must have a number for each of the 1"):
        judge_of(None, [lengths], [1.0, 2.0])
    with pytest.raises(ConfigError, match="reward_funcs names 'verifier', and there is none"):
        judge_of(None, load_reward_functions("verifier"))
    with pytest.raises(ConfigError, match=r"reward_funcs \(='math'\) is a verifier: set verifier='math'"):
        load_reward_functions(["math"])
    with pytest.raises(ConfigError, match=r"reward_funcs \(='org/model'\) must be one of verifier, or your own"):
        load_reward_functions("org/model")
    with pytest.raises(ConfigError, match=r"reward_funcs \(=Linear\) is a model: pass a function that asks it"):
        load_reward_functions(torch.nn.Linear(1, 1))
    with pytest.raises(DataError, match="column 'completions' has the name of an argument of reward functions"):
        judged(judge_of(None, [lengths]), [{"prompt": "q", "completions": 1}] * 3)
    with pytest.raises(ConfigError, match="reward_weights"):
        kit.trainer(tmp_path, reward_weights=[1.0])
    with pytest.raises(ConfigError, match=r"reward_weights \(=\['x'\]\)"):
        kit.trainer(tmp_path, reward_weights=["x"], reward_funcs=[lengths])


def test_advantages_leave_out_what_no_function_applies_to() -> None:
    rewards = [3.0, NAN, -5.0, 7.0, NAN, NAN, 2.0, NAN]
    batch = SignalBatch(torch.ones(8, 1), {}, {}, rewards=torch.tensor(rewards), num_generations=4)
    known = torch.tensor([3.0, -5.0, 7.0], dtype=torch.float64)
    a, b, c = ((known - known.mean()) / known.std()).tolist()
    assert group_advantage(batch).flatten().tolist() == pytest.approx([a, 0, b, c, 0, 0, 0, 0])
    whole = torch.tensor([3.0, 1.0, -5.0, 7.0], dtype=torch.float64)
    batch = SignalBatch(torch.ones(4, 1), {}, {}, rewards=whole, num_generations=4)
    assert torch.equal(group_advantage(batch).flatten(), (whole - whole.mean()) / whole.std())


def test_rewards_are_logged_as_in_trl() -> None:
    made = judged(judge_of(lambda text, row: 1.0, [lengths, even_only]))
    found = rollout_metrics(made, Ending([7], (), kit.TOKENIZER), Alone(), needs_privileged=False)
    rewards = {name: value for name, value in found.items() if "reward" in name or "accuracy" in name}
    of_all = torch.tensor([11.0, 2.0, 13.0], dtype=torch.float64)
    assert rewards == pytest.approx(
        {
            "rollout/accuracy": 2 / 3,
            "rewards/lengths/mean": 2.0,
            "rewards/lengths/std": 1.0,
            "rewards/even_only/mean": 10.0,
            "rewards/even_only/std": 0.0,
            "reward": 26 / 3,
            "reward_std": float(of_all.std()),
            "reward/missing_ratio": 0.0,
        }
    )
    nothing = judged(judge_of(None, [lambda prompts, **given: [None] * 3]))
    found = rollout_metrics(nothing, Ending([7], (), kit.TOKENIZER), Alone(), needs_privileged=False)
    assert {name for name in found if "reward" in name} == {"reward/missing_ratio"} and found[
        "reward/missing_ratio"
    ] == 1


@pytest.mark.parametrize("scale", [1.0, -250.0])
def test_a_method_learns_from_rewards_of_any_scale(scale: float, tmp_path: Path) -> None:
    def scaled(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [scale * ids[0] for ids in completion_ids]

    made = kit.trainer(tmp_path, "grpo", reward_funcs=scaled, reward_weights=[0.5])
    batch = kit.rollout(made)
    first = batch["completion_ids"][:, 0].double().view(-1, 4) * (0.5 * scale)
    expected = ((first - first.mean(1, keepdim=True)) / first.std(1, keepdim=True)).flatten()
    assert torch.allclose(batch["advantage/0"][:, 0], torch.nan_to_num(expected), atol=1e-9)
    assert made.host_metrics["rewards/scaled/mean"] == pytest.approx([2 * float(first.mean())])


def test_which_answers_are_right_only_a_verifier_says(tmp_path: Path) -> None:
    for method in ("uni_opd", "rlcsd"):
        with pytest.raises(ConfigError, match=f"method '{method}' asks which answers are right: pass verifier="):
            kit.trainer(tmp_path, method, reward_funcs=[lengths], model="not/a/model")
    made = kit.trainer(tmp_path, "uni_opd", reward_funcs=[lengths], verifier=lambda text, row: 0.0)
    assert not kit.rollout(made)["advantage/1"].any()  # all are wrong, however they are rewarded


def test_functions_are_tried_before_a_model_is_loaded(tmp_path: Path) -> None:
    given = {"model": "not/a/model", "train_dataset": Dataset.from_list([{"prompt": "q", "answer": "x"}])}
    with pytest.raises(ScoringError, match="'even_only' raised ValueError"):
        kit.trainer(tmp_path, reward_funcs=[even_only], **given)
    with pytest.raises(ScoringError, match="gave a list of 1: it must give a list of 2"):
        kit.trainer(tmp_path, reward_funcs=[lambda prompts, **given: [0.0]], **given)


def test_verifiers_and_functions_are_named_in_python_as_in_a_config(tmp_path: Path) -> None:
    (tmp_path / "style.py").write_text(
        "def short(completion_ids, **columns): return [-len(i) for i in completion_ids]\n"
    )
    name = f"{tmp_path / 'style.py'}:short"
    made = kit.trainer(tmp_path / "run", verifier="exact", reward_funcs=["verifier", name])
    assert [*made.judge.functions] == ["verifier", "short"] and made.judge.verifier is not None
    assert made.judge.verifier(" 7 ", {"answer": 7}) == 1.0
    assert files_of(made.judge.code).startswith("style.py ")
    with pytest.raises(ConfigError, match=r"verifier \(='maths'\) must be one of math, exact, .*or your own.*'math'"):
        kit.trainer(tmp_path / "run", verifier="maths")


def test_a_config_names_reward_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style.py").write_text(FUNCTIONS)
    flags = ["--method", "grpo", "--method_options", "{}", "--output_dir", "run"]
    assert main(["train", "tiny-dag", "--dry-run", *flags, "--reward_funcs", "[verifier, ./style.py:short]"]) == 0
    assert yaml.safe_load(capsys.readouterr().out.split("\n\n")[0].rpartition("\n")[0])["reward_funcs"] == [
        "verifier", "./style.py:short"
    ]  # fmt: skip
    for wrong, words in (
        (["--reward_funcs", "stile"], "reward_funcs (='stile') must be one of verifier, or your own"),
        (["--reward_funcs", "./style.py:short", "--reward_weights", "[1, 2]"], "must have a number for each of the 1"),
        (["--reward_weights", "[1]"], "must have a number for each of the 0 reward_funcs (none)"),
        (["--reward_fn", "x"], "here it is reward_funcs"),
    ):
        assert main(["train", "tiny-dag", "--dry-run", *flags, *wrong]) == 2
        assert words in capsys.readouterr().err


def test_a_resumed_run_is_compared_in_what_judges_its_answers(tmp_path: Path) -> None:
    from dopd.trainer.identity import identity_of

    key = "reward_funcs (what answers are judged by)"
    weighted = kit.trainer(tmp_path, "grpo", reward_funcs=[lengths, even_only], reward_weights=[1.0, 0.5])
    said = identity_of(weighted)[key]
    assert said.startswith("1 x lengths, 0.5 x even_only (own code: test_reward_funcs.py ")
    assert identity_of(kit.trainer(tmp_path, reward_funcs=[lengths]))[key] == "none"  # only logged


def test_signals_say_whether_they_read_rewards_or_scores() -> None:
    assert dopd.table("grpo").needs_rewards and not dopd.table("grpo").needs_scores
    assert dopd.table("uni_opd").needs_scores and not dopd.table("uni_opd").needs_rewards
    assert dopd.table("rlcsd").needs_scores and dopd.table("rlcsd").needs_rewards
    assert not dopd.table("dopd").is_judged
