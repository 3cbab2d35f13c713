"""`dopd inspect` and `dopd report` as a user meets them, with tiny untrained models."""

import io
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from compatibility import tried
from rich.console import Console

import tests.report_kit as report_kit
import tests.trainer_kit as kit
from dopd.cli.main import main
from dopd.cli.terminal import completion_text, print_records, strengths
from dopd.errors import ConfigError, DataError, ScoringError
from dopd.inspection.schema import problems
from dopd.runs.inspection import inspect_prompt, last_thresholds

pytestmark = pytest.mark.filterwarnings("default")
PROMPT, PRIVILEGED = "J b 1 C 8 4 D j j B 4 5 ? B", "plan J B"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("student", kit.student()), ("teacher", kit.teacher())):
        model.save_pretrained(folder / name)
        kit.TOKENIZER.save_pretrained(folder / name)
    return str(folder / "student"), str(folder / "teacher")


def inspect(models: tuple[str, str], **options: Any) -> list[dict[str, Any]]:
    options = {"max_new_tokens": 8, "privileged_template": "{prompt} {privileged_context}"} | options
    return inspect_prompt(*models, PROMPT, options.pop("privileged", PRIVILEGED), **options)


@pytest.mark.parametrize("method", ["dopd", "vanilla", "privileged_teacher", "privileged_student"])
def test_records_follow_the_schema(models: tuple[str, str], method: str) -> None:
    for record in inspect(models, method=method, rollouts=2):
        assert problems(record) == [] and record["kind"] == "inspect" and record["score"] is None


def test_the_same_seed_answers_the_same_and_rollouts_differ(models: tuple[str, str]) -> None:
    first, again = inspect(models, rollouts=3), inspect(models, rollouts=3)
    assert first == again and [record["rollout"] for record in first] == [0, 1, 2]
    ids = [[token["id"] for token in record["tokens"]] for record in first]
    assert ids[0] != ids[1]
    other = inspect(models, seed=1)
    assert [token["id"] for token in other[0]["tokens"]] != ids[0]


def test_a_greedy_answer_takes_the_likeliest_tokens(models: tuple[str, str]) -> None:
    (record,) = inspect(models, greedy=True, rollouts=4)
    for token in record["tokens"]:
        assert token["text"].strip() == token["top_student"][0][0].strip()


def test_answers_are_drawn_and_scored_at_one_temperature(models: tuple[str, str], tmp_path: Path) -> None:
    """That of the student's run, or the one that is asked for; against the model's own logits."""
    (likeliest,) = inspect(models, greedy=True)
    for record in inspect(models, temperature=1e-4, rollouts=4):
        assert [token["id"] for token in record["tokens"]] == [token["id"] for token in likeliest["tokens"]]
    shutil.copytree(models[0], tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("temperature: 0.25\n", encoding="utf-8")
    (record,) = inspect((str(tmp_path / "run"), models[1]))
    assert (record,) == tuple(inspect(models, temperature=0.25))
    model = kit.student().eval()
    ids = [token["id"] for token in record["tokens"]]
    prompt = kit.TOKENIZER.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt["input_ids"], *ids]])).logits[0, len(prompt["input_ids"]) - 1 :]
    own = (logits[:-1].double() / 0.25).softmax(-1).max(-1).values
    shown = torch.tensor([token["top_student"][0][1] for token in record["tokens"]]).double()
    torch.testing.assert_close(shown, own, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match=r"temperature \(=0\) must be above 0; greedy"):
        inspect(models, temperature=0)
    tried("checkpoint", "dopd inspect of a run with a temperature", "answers and scores at the run's temperature; told")


def test_an_answer_of_ones_own(models: tuple[str, str]) -> None:
    (record,) = inspect(models, completion="B 4 5 9")
    assert "".join(token["text"] for token in record["tokens"]) == "B 4 5 9"


def test_without_p_both_views_are_the_plain_one(models: tuple[str, str]) -> None:
    (record,) = inspect(models, privileged=None)
    assert record["privileged_context"] is None
    for token in record["tokens"]:
        assert token["logprob_student"] == pytest.approx(token["logprob_plain"], abs=1e-5)


def test_thresholds_of_a_run_route_the_tokens(models: tuple[str, str], tmp_path: Path) -> None:
    run = report_kit.run_folder(tmp_path / "run")
    assert last_thresholds(run) == {"gap": 0.5, "confidence": 0.9}
    (record,) = inspect(models, thresholds_from=str(run))
    assert record["thresholds"] == {"gap": 0.5, "confidence": 0.9}
    for token in record["tokens"]:
        assert (token["regime"] in ("HT", "HS")) == (token["gap"] >= 0.5)
    with pytest.raises(DataError, match="routes nothing"):
        last_thresholds(report_kit.run_folder(tmp_path / "plain", "vanilla"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollouts": 0}, "rollouts"),
        ({"completion": ""}, "without tokens"),
        ({"method": "dodp"}, "Did you mean 'dopd'"),
        ({"privileged_template": "{prompt}"}, "exactly once"),
    ],
)
def test_bad_input_is_refused(models: tuple[str, str], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        inspect(models, **options)


def test_a_teacher_is_asked_for_where_it_is_read(models: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="reads a teacher"):
        inspect_prompt(models[0], None, PROMPT, PRIVILEGED)
    assert inspect_prompt(models[0], None, PROMPT, PRIVILEGED, method="privileged_student", max_new_tokens=4)


CODE = """
def right(completion, row):
    return float(completion.strip() == row["solution"])

def long(completions, log_extra, **columns):
    log_extra("text", completions)
    return [float(len(text.split())) for text in completions]
"""
GIVEN = ["B 4 5 9", "B 4", "J"]


def _advantages(records: list[dict[str, Any]]) -> list[float]:
    """Of each answer, all of whose tokens have one: what is learned from is minus the advantage."""
    values = [{-token["loss"] for token in record["tokens"]} for record in records]
    assert all(len(of_answer) == 1 for of_answer in values)
    return [of_answer.pop() for of_answer in values]


def _expected(rewards: list[float]) -> Any:
    """GRPO's advantages of one group."""
    return pytest.approx([(r - statistics.mean(rewards)) / statistics.stdev(rewards) for r in rewards], abs=1e-3)


def test_rewards_are_those_of_a_verifier_or_of_functions(
    models: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    own = f"{tmp_path}/mine.py"
    options: dict[str, Any] = {"method": "grpo", "completion": GIVEN, "columns": {"solution": "B 4 5 9"}}
    records = inspect_prompt(models[0], None, PROMPT, None, verifier=f"{own}:right", **options)
    assert _advantages(records) == _expected([1.0, 0.0, 0.0]) and [r["score"] for r in records] == [1.0, 0.0, 0.0]
    records = inspect_prompt(models[0], None, PROMPT, None, reward_funcs=[f"{own}:long"], **options)
    assert _advantages(records) == _expected([4.0, 2.0, 1.0])
    assert [r["extra"] for r in records] == [{"text": text} for text in GIVEN] and not problems(records[0])
    # A run's own: the verifier's score and a function, weighted.
    shutil.copytree(models[0], tmp_path / "run")
    settings = f"verifier: {own}:right\nreward_funcs: [verifier, {own}:long]\nreward_weights: [3.0, 0.5]\n"
    (tmp_path / "run" / "config.yaml").write_text(settings, encoding="utf-8")
    records = inspect_prompt(str(tmp_path / "run"), None, PROMPT, None, **options)
    assert _advantages(records) == _expected([5.0, 1.0, 0.5])
    assert "nobody gives any" not in caplog.text and "there is one answer" not in caplog.text
    with pytest.raises(ScoringError, match=r"KeyError: 'solution'.*--row '\{answer: ...\}' gives the row further"):
        inspect_prompt(str(tmp_path / "run"), None, PROMPT, None, **options | {"columns": None})
    inspect_prompt(str(tmp_path / "run"), None, PROMPT, None, **options | {"completion": "J"})
    assert "compares the rewards of a prompt's answers, and there is one answer" in caplog.text


def test_the_command_takes_answers_and_a_verifier(models: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    answers = [part for text in ("4", "5") for part in ("--completion", text)]
    flags = ["--verifier", "exact", "--row", "{answer: 4}", "--method", "grpo", "--json"]
    assert main(["inspect", "--student", models[0], "--prompt", PROMPT, *answers, *flags]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["score"] for record in records] == [1.0, 0.0] and _advantages(records) == _expected([1.0, 0.0])


def test_where_nobody_gives_rewards_it_is_said(models: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    (record,) = inspect_prompt(models[0], None, PROMPT, None, method="grpo", max_new_tokens=4)
    assert {token["loss"] for token in record["tokens"]} == {0.0}
    assert "method 'grpo' learns from rewards or scores of its rollouts, and nobody gives any here" in caplog.text


# --- Commands


def command(models: tuple[str, str], *more: str) -> list[str]:
    given = ["inspect", "--student", models[0], "--teacher", models[1], "--prompt", PROMPT, "--privileged", PRIVILEGED]
    return [*given, "--max-new-tokens", "6", *more]


def test_inspect_prints_and_writes_a_page(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "look.html"
    assert main(command(models, "--html", str(page))) == 0
    out = capsys.readouterr().out
    assert "high gap, the teacher is surer" in out and "largest gaps" in out and "gap threshold" in out
    assert '"kind":"inspect"' in page.read_text()


def test_inspect_prints_json(models: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(models, "--json", "--rollouts", "2")) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [problems(record) for record in records] == [[], []]


def test_text_can_come_from_a_file(models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hint = tmp_path / "hint.txt"
    hint.write_text(PRIVILEGED)
    assert main([*command(models), "--privileged", f"@{hint}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["privileged_context"] == PRIVILEGED
    assert main([*command(models), "--privileged", "@absent.txt"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_report_writes_a_page_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = report_kit.run_folder(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out and (run / "report.html").stat().st_size > 10_000
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_report_of_several_runs_prints_how_they_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        for method, gain in (("vanilla", 0.1), ("dopd", 0.3)):
            made = {"greedy": lambda t, gain=gain, seed=seed: 0.4 + (gain + 0.01 * seed * gain) * t}
            report_kit.run_folder(tmp_path / f"{method}-{seed}", method, seed, **made)
    assert main(["report", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "verdict: dopd made the student better" in out and "it is better than vanilla, +20.2 points" in out
    assert "dopd against vanilla: greedy +20.2 [" in out and "Holm" in out and "next:" in out


def test_the_report_of_a_real_run(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, trace_steps=1, trace_probes=1, max_steps=2, verifier=kit.TASK.verify)
    made.train()
    (tmp_path / "config.yaml").write_text("method: dopd\nseed: 0\n")
    assert main(["report", str(tmp_path)]) == 0
    (text,) = re.findall(r'id="data">(.*?)</script>', (tmp_path / "report.html").read_text(), re.S)
    data = json.loads(text)
    assert {item["kind"] for item in data["traces"]["items"]} == {"batch", "probe"}
    assert {"Share of the gradient by regime: dopd", "Gaps over time: dopd"} <= {c["title"] for c in data["charts"]}


# --- The terminal


def test_colours_follow_regime_and_gap() -> None:
    record = report_kit.record(0, 0)
    text = completion_text(record, marked=False)
    assert text.plain == "".join(token["text"] for token in record["tokens"]).replace("\n", "\\n\n")
    assert len({str(span.style) for span in text.spans}) > 4
    shares = strengths(record)
    order = sorted(range(len(shares)), key=lambda n: record["tokens"][n]["gap"])
    assert sorted(shares) == [shares[n] for n in order] and min(shares) >= 0 and max(shares) < 1


def test_without_colours_every_token_names_its_regime() -> None:
    console = Console(record=True, color_system=None, width=100, file=io.StringIO())
    print_records(console, [report_kit.record(0, 0), report_kit.record(0, 0, method="vanilla")])
    out = console.export_text()
    assert len(re.findall(r"\[(?:LH|LL|HT|HS)\]", out)) == len(report_kit.WORDS) and "largest losses" in out


def test_markup_in_an_answer_is_text() -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    print_records(console, [report_kit.record(0, 0, texts=("[bold red]", "[/]", " x"))])
    out = console.export_text()
    assert "[bold red]" in out and "[/]" in out
