"""A model is judged as it was trained: by its run folder, or by the recipe of a tiny model; flags come first."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import text_kit
import torch
import yaml
from compatibility import tried
from transformers import AutoModelForCausalLM, AutoTokenizer

from dopd.cli.main import main
from dopd.errors import ConfigError
from dopd.runs import evaluate, inspection
from dopd.runs.circumstances import Circumstances, check_problems, circumstances
from dopd.runs.evaluate import evaluate_checkpoint
from dopd.tasks import get_task
from dopd.tiny import TinySpec, build_model, build_tokenizer, tiny_model_path
from lab.tiny import RECIPES

pytestmark = pytest.mark.filterwarnings("default")
RUN = {
    "task": "dag",
    "task_options": {"num_needed": 2, "num_variables": 3},
    "privileged_kind": "final_answer",
    "privileged_template": "{privileged_context} {prompt}",
    "chat_template_kwargs": {"enable_thinking": False},
    "prompt_format": "text",
    "generation_kwargs": {"stop_strings": ["a b"]},
    "max_completion_length": 6,
    "output_dir": "r",
}
# A template that shows whether it was given enable_thinking.
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %} :"
    "{% if enable_thinking is defined and not enable_thinking %} stop{% endif %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for place in (folder, folder / "checkpoint-7"):
        build_model(TinySpec(num_layers=1, hidden_size=16, num_heads=2), tokenizer, 0).save_pretrained(place)
        tokenizer.save_pretrained(place)
    (folder / "config.yaml").write_text(yaml.safe_dump(RUN))
    return folder


def test_a_run_folder_and_its_checkpoints_bring_what_the_run_was_trained_with(run: Path) -> None:
    expected = Circumstances(
        "dag",
        {"num_needed": 2, "num_variables": 3},
        "final_answer",
        privileged_template="{privileged_context} {prompt}",
        chat_template_kwargs={"enable_thinking": False},
        prompt_format="text",
        stop_strings=("a b",),
        max_new_tokens=6,
    )
    for folder in (run, run / "checkpoint-7"):
        found, said = circumstances(str(folder))
        assert found == expected
        assert str(run / "config.yaml") in said and "enable_thinking" in said and "final_answer" in said
    tried("checkpoint", "dopd eval of a run folder", "task, template and lengths of the run; told")


def test_what_is_given_comes_first_and_another_task_has_its_own_options(run: Path) -> None:
    found, said = circumstances(str(run), chat_template_kwargs={}, max_new_tokens=9, task_options={"num_needed": 1})
    assert (found.chat_template_kwargs, found.max_new_tokens, found.task_options) == ({}, 9, {"num_needed": 1})
    assert "enable_thinking" not in said and "task_options" not in said
    other, _ = circumstances(str(run), task="graph")
    assert (other.task, other.task_options, other.privileged_kind) == ("graph", {}, None)
    assert other.chat_template_kwargs == {"enable_thinking": False}


def test_a_run_without_held_out_rows_needs_a_task_by_name(run: Path, tmp_path: Path) -> None:
    config = {key: value for key, value in RUN.items() if not key.startswith(("task", "privileged_kind"))}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"dataset_name": "rows.jsonl"}))
    found, _ = circumstances(str(tmp_path))
    assert found.task is None and found.max_new_tokens == 6
    with pytest.raises(ConfigError, match="task is missing"):
        check_problems("x", found)
    (tmp_path / "config.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match="is not the configuration of a run"):
        circumstances(str(tmp_path))
    assert circumstances("someone/model") == (Circumstances(), "")


@pytest.mark.parametrize(("task", "role"), [("dag", "student"), ("graph", "teacher"), ("scenes", "student")])
def test_a_tiny_model_brings_the_options_of_its_task(task: str, role: str) -> None:
    for name in (f"tiny:{task}/{role}", str(tiny_model_path(task, role))):
        found, said = circumstances(name, task=task)
        assert found.task_options == dict(RECIPES[task][role].knobs)
        assert "task_options" in said
        assert circumstances(name)[0].task == task
        assert circumstances(name, task_options={"a": 1})[0].task_options == {"a": 1}
    tried("checkpoint", "dopd eval of a tiny model", "options of its recipe; told")


def test_a_tiny_model_of_several_tasks_brings_the_options_of_each() -> None:
    recipe = RECIPES["text"]["student"]
    expected = {one.task: dict(one.knobs) for one in (recipe, *recipe.others)}  # type: ignore[attr-defined]
    for task, knobs in expected.items():
        assert circumstances("tiny:text/student", task=task)[0].task_options == knobs


class Recorder:
    """What a `StudentEvaluator` was made with."""

    def __init__(self, rows: Any, verifier: Any, prompts: Any, ending: Any, max_new_tokens: int, **more: Any) -> None:
        texts = {"prompt_format": prompts.prompt_format, "chat_template_kwargs": prompts.chat_template_kwargs}
        raise Stop(
            {
                "rows": rows,
                "verifier": verifier,
                "max_new_tokens": max_new_tokens,
                "stop_strings": ending.strings,
                **texts,
            }
        )


class Stop(Exception):
    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


ROWS = [{"question": f"a {n} b", "answer": f"b {n}", "hint": f"plan {n}"} for n in range(5)]
OF_ROWS: dict[str, Any] = {
    "dataset_name": "rows.jsonl",
    "dataset_train_split": "train[2:]",
    "dataset_test_split": "train[:2]",
    "columns": {"prompt": "question", "privileged_context": "hint"},
    "verifier": "exact",
}


@pytest.fixture
def run_on_rows(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on rows in the working directory, two of which it held out."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "on_rows")
    settings = {key: value for key, value in RUN.items() if not key.startswith(("task", "privileged_kind"))}
    Path("on_rows", "config.yaml").write_text(yaml.safe_dump(settings | OF_ROWS))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[3:]))
    return Path("on_rows")


def judged_rows(run: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[dict[str, Any]]:
    monkeypatch.setattr(evaluate, "StudentEvaluator", Recorder)
    with pytest.raises(Stop) as caught:
        evaluate_checkpoint(str(run), **given)
    rows, verifier = caught.value.values["rows"], caught.value.values["verifier"]
    assert [verifier(row["answer"], row) for row in rows] == [1.0] * len(rows)
    assert [verifier("4 a", row) for row in rows] == [0.0] * len(rows)
    return rows


@pytest.mark.parametrize(
    ("of_run", "given", "numbers"),
    [
        ({}, {}, [0, 1]),
        ({}, {"prompts": 1}, [0]),
        ({"dataset_test_split": None, "dataset_eval_name": "others.jsonl"}, {}, [3, 4]),
        ({"dataset_test_split": "train[1:]", "dataset_eval_name": ["others.jsonl"]}, {}, [4]),
        ({"dataset_test_split": None}, {"dataset_name": "rows.jsonl", "dataset_test_split": "train[4:]"}, [4]),
        ({}, {"dataset_test_split": "train[2:4]"}, [2, 3]),
        ({}, {"dataset_name": "others.jsonl"}, [3, 4]),
    ],
)
def test_a_run_on_rows_is_judged_on_those_that_it_held_out(
    run_on_rows: Path, of_run: Any, given: Any, numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load((run_on_rows / "config.yaml").read_text()) | of_run
    (run_on_rows / "config.yaml").write_text(yaml.safe_dump(config))
    rows = judged_rows(run_on_rows, monkeypatch, **given)
    expected = [(ROWS[n]["question"], ROWS[n]["answer"], ROWS[n]["hint"]) for n in numbers]
    assert [(row["prompt"], row["answer"], row["privileged_context"]) for row in rows] == expected


def test_a_model_of_no_run_is_judged_on_rows_by_their_own_names(
    run_on_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_on_rows / "config.yaml").unlink()
    flags = ["--dataset-name", "rows.jsonl", "--columns", "{prompt: question}", "--verifier", "exact"]
    assert main(["eval", str(run_on_rows), *flags, "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["num_prompts"] == len(ROWS)


def test_what_a_run_is_judged_on_is_said(run_on_rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run_on_rows), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert found["metrics"]["num_prompts"] == 2 and len(found["scores"]["privileged"]) == 2
    told = "from on_rows/config.yaml: dataset_name 'rows.jsonl', dataset_test_split 'train[:2]', columns {"
    assert told in err and "verifier 'exact', privileged_template" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "dag", "--dataset-name", "rows.jsonl"], "both say what is asked"),
        (["--task", "dag", "--columns", "{prompt: question}"], "columns (={'prompt': 'question'}) is of rows"),
        (["--task-options", "{num_needed: 3}"], "task_options (={'num_needed': 3}) is of a task"),
        (["--split", "ood"], "split (='ood') is of tasks: rows of a dataset are chosen by dataset_test_split"),
        (["--columns", "{prompt: 3}"], "columns"),
        (["--columns", "{prompt: questoin}"], "prompt (='questoin') is not a column of dataset_name (='rows.jsonl')"),
        (["--verifier", "exakt"], "Did you mean 'exact'"),
        (["--dataset-name", "broken.jsonl"], "'broken.jsonl', line 2: row 1"),
    ],
)
def test_what_cannot_be_judged_is_one_line(
    run_on_rows: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.jsonl").write_text("".join(json.dumps(ROWS[0] | {"question": text}) + "\n" for text in ("a", " ")))
    assert main(["eval", str(run_on_rows), *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error


@pytest.mark.parametrize(
    ("of_run", "words"),
    [
        ({"verifier": "./judge.py:score"}, "verifier (='./judge.py:score') is what"),
        ({}, "dataset_name (='rows.jsonl') is what"),
        ({"dataset_name": ["./rows.jsonl"]}, "dataset_name (='./rows.jsonl') is what"),
    ],
)
def test_files_that_a_run_names_and_that_are_elsewhere_are_told(
    run_on_rows: Path,
    tmp_path_factory: pytest.TempPathFactory,
    of_run: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = yaml.safe_load((run_on_rows / "config.yaml").read_text()) | of_run
    (run_on_rows / "config.yaml").write_text(yaml.safe_dump(config))
    folder = run_on_rows.resolve()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert main(["eval", str(folder)]) == 2
    error = capsys.readouterr().err
    assert words in error and "from the folder in which that run was started" in error


@pytest.mark.parametrize(
    ("given", "is_told"),
    [
        ({"dataset_name": "rows.jsonl", "dataset_test_split": "train[2:]"}, True),
        ({"dataset_name": "./rows.jsonl", "dataset_test_split": "train[2:]"}, True),
        ({"dataset_name": "rows.jsonl", "dataset_test_split": "train[:2]"}, False),
        ({"dataset_name": "others.jsonl"}, False),
        ({}, False),
    ],
)
def test_rows_that_a_run_was_trained_on_are_told(run_on_rows: Path, given: dict[str, Any], is_told: bool) -> None:
    assert ("was trained on" in circumstances(str(run_on_rows), **given)[1]) == is_told


def test_objects_of_a_program_are_no_names(run_on_rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = dict.fromkeys(("dataset_name", "dataset_eval_name", "verifier"), "given in Python: Dataset, 3 rows")
    settings = {"dataset_test_split": None, **given}
    (run_on_rows / "config.yaml").write_text(yaml.safe_dump(RUN | {"task": None, "task_options": {}} | settings))
    assert main(["eval", str(run_on_rows)]) == 2
    assert "with held-out rows that its config.yaml names" in capsys.readouterr().err
    assert main(["eval", str(run_on_rows), "--dataset-name", "rows.jsonl"]) == 2
    assert "verifier is missing" in capsys.readouterr().err


def test_evaluation_and_inspection_ask_as_the_run_did(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "StudentEvaluator", Recorder)
    monkeypatch.setattr(inspection, "StudentEvaluator", Recorder)
    with pytest.raises(Stop) as caught:
        evaluate_checkpoint(str(run), prompts=3)
    used = caught.value.values
    rows = get_task("dag", num_needed=2, num_variables=3).rows("test", 3, "final_answer")
    assert [row["prompt"] for row in used["rows"]] == [row["prompt"] for row in rows]
    assert [row["privileged_context"] for row in used["rows"]] == [row["privileged_context"] for row in rows]
    assert used["chat_template_kwargs"] == {"enable_thinking": False} and used["max_new_tokens"] == 6
    assert used["prompt_format"] == "text" and used["stop_strings"] == ("a b",)
    with pytest.raises(Stop) as caught:
        inspection.inspect_prompt(str(run), None, "q", None, method="opsd")
    assert caught.value.values["chat_template_kwargs"] == {"enable_thinking": False}
    assert caught.value.values["prompt_format"] == "text" and caught.value.values["stop_strings"] == ("a b",)
    with pytest.raises(Stop) as caught:
        inspection.inspect_prompt(str(run), None, "q", None, method="opsd", chat_template_kwargs={})
    assert caught.value.values["chat_template_kwargs"] == {}


@pytest.mark.parametrize(("given", "asked"), [(None, "a b"), ("auto", "a b :")])
def test_a_run_on_texts_is_inspected_on_texts(run: Path, given: str | None, asked: str) -> None:
    """Base models' tokenizers have chat templates too; what the run gave as it stands is given so again."""
    options: dict[str, Any] = {"completion": "b a", "chat_template_kwargs": {}, "prompt_format": given}
    (record,) = inspection.inspect_prompt(str(run), None, "a b", None, method="opsd", **options)
    tokenizer, model = AutoTokenizer.from_pretrained(run), AutoModelForCausalLM.from_pretrained(run)
    prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, "b a"))
    expected = text_kit.own_logprobs(model, prompt, answer)
    given_logprobs = [token["logprob_plain"] for token in record["tokens"]]
    torch.testing.assert_close(torch.tensor(given_logprobs).double(), expected, atol=1e-5, rtol=0)


def test_the_command_says_what_it_took_from_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run)
    turn = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False, enable_thinking=False).endswith("stop")
    assert main(["eval", str(run), "--prompts", "2", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["metrics"]["num_prompts"] == 2
    assert f"from {run / 'config.yaml'}: task 'dag'" in said.err and "max_new_tokens 6" in said.err
    flags = ["--chat-template-kwargs", "{enable_thinking: true}", "--max-new-tokens", "3"]
    assert main(["eval", str(run), "--prompts", "2", *flags]) == 0
    assert "enable_thinking" not in capsys.readouterr().err
    for bad in (["--chat-template-kwargs", "[1]"], ["--task-options", "x"], ["--task", "dga"]):
        assert main(["eval", str(run), *bad]) == 2
        assert len(capsys.readouterr().err.splitlines()) <= 2
