"""Hints that are written and checked: against a server with faults, by rules, and those of other problems."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_kit import chatting, killed_behind
from datasets import Dataset
from PIL import Image
from server_kit import Fail

from dopd.cli.main import main
from dopd.data.encode import image_sources
from dopd.data.images import open_image
from dopd.data.views import images_of
from dopd.errors import ConfigError, DataError, ServerError, ServerLostError
from dopd.hints import chat
from dopd.hints.journal import Journal, Reply, key_of
from dopd.hints.kinds import WRITTEN
from dopd.hints.others import of_other_problems
from dopd.hints.replies import hint_of_reply, verdict_of_reply
from dopd.hints.templates import filled, prompt_of
from dopd.runs.asking import AskerSettings
from dopd.runs.hint_checks import check_hints, gains_of
from dopd.runs.hint_writing import write_hints
from dopd.runs.hints import HintData
from dopd.runs.local_models import LocalModel
from dopd.servers import client
from dopd.tasks import get_source, rows_of_task

PLANTED = "sk-planted-0123456789"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and pauses between attempts that nobody waits for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.001)
    return tmp_path


def problems(count: int = 12, **columns: Any) -> HintData:
    rows = [
        {"prompt": f"What is {n} plus {n + 1}, asked as number {n}?", "answer": str(2 * n + 1), "id": n, **columns}
        for n in range(10, 10 + count)
    ]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return HintData("data.jsonl")


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def plan(text: str) -> str:
    """A hint that names its question."""
    number = text.split("asked as number ")[1].split("?")[0]
    return f"Add both numbers of question {number}-."


def writer(url: str, **options: Any) -> AskerSettings:
    return AskerSettings(url, **{"retries": 4, "timeout": 20.0, **options})


def test_every_row_gets_its_own_hint() -> None:
    data = problems()
    with chatting(plan) as server:
        written = write_hints(data, "steps", writer(server.url), "out.jsonl")
    assert [row["privileged_context"] for row in lines("out.jsonl")] == [
        f"Add both numbers of question {n}-." for n in range(10, 22)
    ]
    assert [row["id"] for row in lines("out.jsonl")] == list(range(10, 22))
    assert {row["hint_kind"] for row in lines("out.jsonl")} == {"steps"}
    assert (written.num_hints, written.bill.num_asked, written.bill.num_kept) == (12, 12, 0)
    assert not Path("out.jsonl.left_out.jsonl").exists()
    assert all(body["model"] == "writer" and body["temperature"] == 0.0 for body in server.asked)


def test_nothing_is_paid_twice() -> None:
    """A second call asks nothing; other settings, a changed row or another prompt ask what is new alone."""
    data = problems()
    with chatting(plan) as server:
        first = write_hints(data, "steps", writer(server.url), "out.jsonl")
        again = write_hints(data, "steps", writer(server.url), "out.jsonl")
        assert len(server.asked) == 12 and again.bill.num_kept == 12 and again.bill.num_asked == 0
        assert (again.bill.prompt_tokens, again.bill.completion_tokens) == (
            first.bill.prompt_tokens,
            first.bill.completion_tokens,
        )
        rows = lines("data.jsonl")
        rows[3]["answer"] = "0"
        Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        assert write_hints(data, "steps", writer(server.url), "out.jsonl").bill.num_asked == 1
        assert write_hints(data, "steps", writer(server.url, temperature=0.5), "out.jsonl").bill.num_asked == 12


def test_equal_rows_are_asked_once() -> None:
    row = json.dumps({"prompt": "What is 1 plus 2, asked as number 1?", "answer": "3"}) + "\n"
    Path("data.jsonl").write_text(row * 5, encoding="utf-8")
    with chatting(plan) as server:
        write_hints(HintData("data.jsonl"), "steps", writer(server.url), "out.jsonl")
        assert len(server.asked) == 1
    assert len({line["privileged_context"] for line in lines("out.jsonl")}) == 1


def cut_off(number: int) -> Any:
    return Fail(cut=40)


FAULTS = {
    "429 with Retry-After": lambda n: Fail(429, "slow down", {"Retry-After": "0"}),
    "500": lambda n: Fail(500),
    "503": lambda n: Fail(503),
    "cut-off body": cut_off,
    "no choices": lambda n: {"choices": []},
    "no message": lambda n: {"choices": [{}]},
    "time-out": lambda n: Fail(pause=0.6),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_asked_again_and_nothing_is_lost(fault: str) -> None:
    data = problems(6)
    with chatting(plan) as server:
        server.fault = lambda number, reply: FAULTS[fault](number) if number % 2 == 0 and number < 6 else reply
        patient = writer(server.url, timeout=0.3 if fault == "time-out" else 20.0, concurrency=3)
        written = write_hints(data, "steps", patient, "out.jsonl")
    asked = Counter(server.questions)
    assert written.num_hints == 6 and sum(asked.values()) == 9 and len(asked) == 6
    assert [row["privileged_context"] for row in lines("out.jsonl")] == [
        f"Add both numbers of question {n}-." for n in range(10, 16)
    ]


def test_broken_json_is_asked_again() -> None:
    data = problems(2)
    with chatting(plan) as server:
        server.fault = lambda number, reply: Fail(cut=len(json.dumps(reply)) - 3) if number == 0 else reply
        assert write_hints(data, "steps", writer(server.url), "out.jsonl").num_hints == 2


def test_a_server_that_goes_away_leaves_what_was_received() -> None:
    data = problems(10)
    with chatting(plan) as server:
        server.fault = lambda number, reply: reply if number < 6 else Fail(503)
        with pytest.raises(ServerLostError):
            write_hints(data, "steps", writer(server.url, retries=1, concurrency=1), "out.jsonl")
        kept = len(lines("out.jsonl.journal.jsonl"))
        assert kept == 6 and not Path("out.jsonl").exists()
        server.fault, server.asked = (lambda number, reply: reply), []
        written = write_hints(data, "steps", writer(server.url), "out.jsonl")
        assert (len(server.asked), written.bill.num_kept, written.num_hints) == (4, 6, 10)


def test_whoever_stops_waits_for_no_second_attempt() -> None:
    """One request is lost at once; the others would be asked again for minutes."""
    data = problems(8)
    with chatting(plan) as server:
        server.fault = lambda number, reply: Fail(401) if number == 3 else Fail(503, headers={"Retry-After": "30"})
        with pytest.raises(ServerError, match="401"):
            write_hints(data, "steps", writer(server.url, model="writer", concurrency=4), "out.jsonl")
    assert len(server.asked) == 4


def test_a_journal_that_was_cut_is_mended(place: Path) -> None:
    path = place / "journal.jsonl"
    with Journal(path) as journal:
        journal.add("a", Reply("one"))
        journal.add("b", Reply("two", "stop", 3, 4))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with Journal(path) as journal:
        assert list(journal.replies) == ["a"] and journal.num_torn == 1
        journal.add("b", Reply("three"))
    with Journal(path) as journal:
        assert journal.replies == {"a": Reply("one"), "b": Reply("three")} and journal.num_torn == 0


def test_two_processes_do_not_pay_for_one_output(place: Path) -> None:
    with Journal(place / "j.jsonl"), pytest.raises(OSError, match="another process"), Journal(place / "j.jsonl"):
        pass


def test_keys_are_those_of_content_and_settings() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})


@pytest.mark.slow
def test_a_killed_call_goes_on_without_paying_twice(place: Path) -> None:
    problems(24)
    with chatting(plan) as server:
        server.fault = lambda number, reply: Fail(pause=0.2)
        arguments = ["hints", "write", "data.jsonl", "--kind", "steps", "--writer", server.url, "--concurrency", "2"]
        arguments += ["--output", "out.jsonl"]
        paid = killed_behind(6, arguments, place / "out.jsonl.journal.jsonl")
        assert 6 <= paid < 24
        server.fault, server.asked = (lambda number, reply: reply), []
        assert main(arguments) == 0
        assert len(server.asked) == 24 - paid
    assert [row["privileged_context"] for row in lines("out.jsonl")] == [
        f"Add both numbers of question {n}-." for n in range(10, 34)
    ]


def test_rows_that_are_refused_are_told_and_the_others_written(capsys: pytest.CaptureFixture[str]) -> None:
    problems(6)

    def answer(text: str) -> Any:
        return Fail(400, "content filter") if "number 12?" in text else plan(text)

    with chatting(answer) as server:
        flags = ["--kind", "steps", "--writer", server.url, "--output", "out.jsonl", "--concurrency", "1"]
        assert main(["hints", "write", "data.jsonl", *flags]) == 0
    (left_out,) = lines("out.jsonl.left_out.jsonl")
    assert left_out["row"] == 2 and "content filter" in left_out["reason"]
    assert lines("out.jsonl")[2]["privileged_context"] is None
    assert "5 of 6 rows have a hint" in capsys.readouterr().out


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_server_that_refuses_everything_is_not_asked_on(status: int) -> None:
    data = problems(12)
    with chatting(lambda text: Fail(status, "no")) as server, pytest.raises(ServerError):
        write_hints(data, "steps", writer(server.url, model="writer", concurrency=2), "out.jsonl")
    assert len(server.asked) <= 5
    assert not Path("out.jsonl.journal.jsonl").exists() or lines("out.jsonl.journal.jsonl") == []


def test_replies_that_are_no_hint_are_told_with_their_reason() -> None:
    data = problems(3)
    cut = {"choices": [{"message": {"content": "Add the"}, "finish_reason": "length"}]}
    texts = {"10": "", "11": "<think>hm</think>\n```\nAdd them.\n```", "12": cut}
    with chatting(lambda text: texts[text.split("asked as number ")[1][:2]]) as server:
        written = write_hints(data, "steps", writer(server.url), "out.jsonl")
    assert [row["privileged_context"] for row in lines("out.jsonl")] == [None, "Add them.", None]
    assert written.reasons == {0: "the reply is empty", 2: "the reply was cut at --max-new-tokens"}


def test_the_budget_is_not_gone_beyond_and_a_larger_one_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    problems(12)
    with chatting(plan) as server:
        flags = ["hints", "write", "data.jsonl", "--kind", "steps", "--writer", server.url, "--output", "out.jsonl"]
        flags += ["--price-in", "1000", "--price-out", "1000", "--max-new-tokens", "10"]
        assert main([*flags, "--budget", "1.5"]) == 1
        spent = sum(r["prompt_tokens"] + r["completion_tokens"] for r in lines("out.jsonl.journal.jsonl")) / 1000
        assert 0 < len(server.asked) < 12 and spent <= 1.5
        assert f"cost {spent:.4f}" in capsys.readouterr().out
        assert lines("out.jsonl")[-1]["privileged_context"] is None
        assert main([*flags, "--budget", "100"]) == 0
        assert len(server.asked) == 12 and all(row["privileged_context"] for row in lines("out.jsonl"))


def test_replies_without_token_counts_count_as_many_as_they_may_have() -> None:
    data = problems(1)
    uncounted = {"choices": [{"message": {"content": "Add."}, "finish_reason": "stop"}]}
    with chatting(lambda text: uncounted) as server:
        bill = write_hints(data, "steps", writer(server.url, max_new_tokens=50), "out.jsonl").bill
    assert bill.num_uncounted == 1 and bill.completion_tokens == 50 and bill.prompt_tokens >= 100


def test_the_key_is_sent_and_written_nowhere(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems(2)
    monkeypatch.setenv("MY_API_KEY", PLANTED)
    with chatting(lambda text: f"{plan(text)} {PLANTED}") as server:
        flags = ["--kind", "steps", "--writer", server.url, "--output", "out.jsonl", "--key-variable", "MY_API_KEY"]
        assert main(["hints", "write", "data.jsonl", *flags]) == 0
        assert all(body["headers"]["Authorization"] == f"Bearer {PLANTED}" for body in server.asked)
        server.answer = lambda text: Fail(401, f"wrong key {PLANTED}")
        assert main(["hints", "write", "data.jsonl", *flags, "--temperature", "1"]) == 2
    captured = capsys.readouterr()
    assert PLANTED not in captured.out + captured.err and "MY_API_KEY" in captured.err
    assert [path for path in place.rglob("*") if path.is_file() and PLANTED.encode() in path.read_bytes()] == []


def test_variables_and_addresses_that_would_show_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    problems(1)
    flags = ["hints", "write", "data.jsonl", "--kind", "steps", "--output", "out.jsonl", "--writer"]
    assert main([*flags, "http://localhost:1", "--key-variable", "WORDS"]) == 2
    assert main([*flags, f"http://me:{PLANTED}@localhost:1"]) == 2
    assert PLANTED not in capsys.readouterr().err


def test_settings_of_requests() -> None:
    data = problems(1)
    with chatting(plan) as server:
        extra = {"temperature": None, "max_tokens": None, "max_completion_tokens": 9}
        write_hints(data, "steps", writer(server.url, request=extra), "out.jsonl")
    body = server.asked[0]
    assert "temperature" not in body and "max_tokens" not in body and body["max_completion_tokens"] == 9


def test_prompts_of_the_package_and_of_a_user(place: Path) -> None:
    row = {"prompt": "Is {reference} odd?", "solution": "7 = 2*3+1", "answer": "yes"}
    for kind in WRITTEN:
        text = filled(prompt_of(kind), row, kind=kind, sizes=[(4, 3)])
        assert "Is {reference} odd?" in text and ("image 0: 4 x 3" in text) == (kind == "boxes")
    assert "result of a step" in filled(prompt_of("judge"), row, hint="h", kind="steps")
    own = place / "own.txt"
    own.write_text("Only: {question}", encoding="utf-8")
    assert filled(prompt_of("steps", str(own)), row) == "Only: Is {reference} odd?"
    own.write_text("nothing", encoding="utf-8")
    with pytest.raises(ConfigError, match="must contain"):
        prompt_of("steps", str(own))


def test_boxes_come_back_as_boxes_inside_the_image(place: Path) -> None:
    Image.new("RGB", (40, 30)).save(place / "a.png")
    turns = [{"role": "user", "content": "Where is the cat?"}]
    rows = [{"prompt": turns, "images": ["a.png"], "answer": "left", "id": n} for n in range(1)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reply = 'Here:\n```json\n[{"label": "cat", "box": [1, 2, 30, 20], "image": 0}]\n```'
    with chatting(lambda text: reply) as server:
        write_hints(HintData("data.jsonl"), "boxes", writer(server.url), "out.jsonl")
    image, text = server.asked[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,") and "40 x 30" in text["text"]
    (row,) = lines("out.jsonl")
    assert row["boxes"] == [{"image": 0, "label": "cat", "xyxy": [1.0, 2.0, 30.0, 20.0]}]
    assert row["privileged_context"] == "cat [1, 2, 30, 20]"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("none", "no JSON list"),
        ("[]", "no JSON list"),
        ('[{"label": "cat", "box": [1, 2, 50, 20]}]', "outside the image"),
        ('[{"label": "cat", "box": [9, 2, 5, 20]}]', "not in order"),
        ('[{"label": "", "box": [1, 2, 5, 20]}]', "no label"),
        ('[{"label": "cat"}]', "no list of four numbers"),
        ('[{"label": "cat", "box": [1, 2, 5, 20], "image": 1}]', "none of the row's 1"),
        ("[" * 5000 + "]" * 5000, "no JSON list"),
    ],
)
def test_boxes_that_are_none(text: str, reason: str) -> None:
    found = hint_of_reply(Reply(text), "boxes", [(40, 30)])
    assert found.text is None and reason in found.reason


def test_hints_of_other_problems() -> None:
    questions = [f"q{n // 2}" for n in range(20)]
    hints: list[str | None] = [f"h{n % 7}" for n in range(20)]
    hints[4] = None
    for seed in range(20):
        found = of_other_problems(questions, hints, seed)
        assert sorted(filter(None, found)) == sorted(filter(None, hints)) and found[4] is None
        assert all(one != own for one, own in zip(found, hints, strict=True) if own is not None)
    assert of_other_problems(questions[::2], hints[::2], 1) != of_other_problems(questions[::2], hints[::2], 2)
    assert of_other_problems(["a", "a", "b", "b"], ["1", "2", "3", "4"], 0)[0] in ("3", "4")
    with pytest.raises(DataError, match="2 of 3 rows"):
        of_other_problems(["a", "b", "c"], ["x", "x", "y"])


def test_rules_for_tasks_solutions_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--rows", "6", "--output", "out.jsonl"]
    assert main(["hints", "write", "task:dag", "--kind", "steps", *flags]) == 0
    assert all(row["privileged_context"].startswith("plan ") for row in lines("out.jsonl"))
    assert main(["hints", "write", "task:dag", "--kind", "other-problem", *flags]) == 0
    problems(3, solution="10 + 11 = 21\n#### 21")
    assert main(["hints", "write", "data.jsonl", "--kind", "steps", *flags]) == 0
    assert all(
        "?" in row["privileged_context"] and "21" not in row["privileged_context"] for row in lines("out.jsonl")[:1]
    )
    assert main(["hints", "write", "data.jsonl", "--kind", "answer", *flags]) == 0
    assert lines("out.jsonl")[0]["privileged_context"] == "The final answer is 21."
    assert main(["hints", "write", "task:dag", "--kind", "boxes", *flags]) == 2
    assert "no hints of kind boxes" in capsys.readouterr().err


def test_parquet_and_names_of_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    from datasets import Dataset

    flags = ["hints", "write", "task:dag", "--kind", "steps", "--rows", "3", "--output"]
    assert main([*flags, "out.parquet"]) == 0
    assert len(Dataset.from_parquet("out.parquet")) == 3
    problems(1)
    assert main(["hints", "write", "data.jsonl", "--kind", "answer", "--output", "data.jsonl"]) == 2
    assert "is DATA itself" in capsys.readouterr().err
    assert main([*flags, "out.txt"]) == 2
    assert "must end in .jsonl or .parquet" in capsys.readouterr().err


def test_a_model_of_this_machine_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = HintData("task:dag", count=3)
    own = AskerSettings("tiny:dag/student", max_new_tokens=4, batch_size=2)
    written = write_hints(data, "steps", own, "out.jsonl")
    assert written.bill.num_asked == 3
    assert write_hints(data, "steps", own, "out.jsonl").bill.num_kept == 3


VERDICTS = {
    "10": '{"correct": true, "complete": true, "leaks": false, "reason": "fine"}',
    "11": 'Well: {"correct": false, "complete": true, "leaks": false, "reason": "wrong <sum>"}',
    "12": '{"correct": true, "complete": false, "leaks": true, "reason": "tells"}',
    "13": "I cannot say",
}


@pytest.mark.parametrize("keep_rows", [False, True])
def test_a_judge_drops_what_is_not_good(keep_rows: bool) -> None:
    data = problems(4, privileged_context="Add them.")
    with chatting(lambda text: VERDICTS[text.split("asked as number ")[1][:2]]) as server:
        judge = writer(server.url)
        found = check_hints(data, "good.jsonl", judge=judge, keep_rows=keep_rows)
        check_hints(data, "good.jsonl", judge=judge, keep_rows=keep_rows)
        assert len(server.asked) == 4
    assert found.dropped == {1: ["incorrect"], 2: ["incomplete", "leaks"], 3: ["unjudged"]}
    kept = [(row["id"], row["privileged_context"]) for row in lines("good.jsonl")]
    assert kept == ([(10, "Add them."), (11, None), (12, None), (13, None)] if keep_rows else [(10, "Add them.")])
    assert lines("good.jsonl.dropped.jsonl")[0]["reason"] == "wrong <sum>"


def test_verdicts_need_truth_values() -> None:
    assert verdict_of_reply(Reply('{"correct": "yes", "complete": true, "leaks": false}')).faults == ("unjudged",)
    assert verdict_of_reply(Reply('{"correct": true}', "length")).faults == ("unjudged",)


class Teacher:
    """Answers right where it sees p, and the prompt's last word otherwise."""

    def __init__(self) -> None:
        from types import SimpleNamespace

        from dopd.data.views import PrivilegedTemplate

        template = PrivilegedTemplate("{prompt} {privileged_context}")
        self.prompts = SimpleNamespace(asked=list, template=template)

    def answers(self, prompts: list[Any], label: str, *, sampled: bool) -> list[tuple[str, bool]]:
        return [(str(prompt).split()[-1], True) for prompt in prompts]


def test_what_a_teacher_gains() -> None:
    rows = [
        {"prompt": "a right", "privileged_context": "right"},
        {"prompt": "a wrong", "privileged_context": "right"},
        {"prompt": "a right", "privileged_context": "wrong"},
        {"prompt": "a wrong", "privileged_context": "wrong"},
        {"prompt": "no hint", "privileged_context": None},
    ]
    gains = gains_of(Teacher(), rows, [0, 1, 2, 3], lambda text, row: float(text == "right"), 3)  # type: ignore[arg-type]
    assert [round(one.mean, 6) for one in gains.of_rows()] == [0.0, 1.0, -1.0, 0.0]
    assert all(one.low <= one.mean <= one.high for one in gains.of_rows())
    without, with_p, gain = gains.mean()
    assert (without.mean, with_p.mean, gain.mean) == (0.5, 0.5, 0.0) and gain.low < 0 < gain.high


def test_a_teacher_gains_by_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["hints", "check", "task:dag", "--rows", "12", "--output", "good.jsonl", "--max-new-tokens", "64"]
    assert main([*flags, "--teacher", "tiny:dag/teacher_needs_p"]) == 0
    rows = lines("good.jsonl")
    assert len(rows) == 12 and all(row["hint_gain_low"] <= row["hint_gain"] <= row["hint_gain_high"] for row in rows)
    assert sum(row["hint_gain"] for row in rows) / 12 > 0.3
    assert "points [95% interval over rows]" in capsys.readouterr().out


def test_a_teacher_on_a_server_gains(capsys: pytest.CaptureFixture[str]) -> None:
    """It is right where it sees p, and its answers are kept."""
    problems(4, privileged_context="Add them.")

    def answer(text: str) -> str:
        number = int(text.split("asked as number ")[1][:2])
        return f"The answer is {2 * number + 1 if 'Add them.' in text else 0}"

    flags = ["hints", "check", "data.jsonl", "--verifier", "math", "--samples", "2", "--output", "good.jsonl"]
    with chatting(answer) as server:
        for _ in range(2):
            assert main([*flags, "--teacher", server.url]) == 0
        assert len(server.asked) == 16 and {body["seed"] for body in server.asked} == {0, 1}
        assert all(body["temperature"] == 1.0 for body in server.asked)
        money = ["--price-in", "1", "--price-out", "1", "--budget", "0", "--seed", "5"]
        assert main([*flags, "--teacher", server.url, *money]) == 2 and len(server.asked) == 16
    assert [row["hint_gain"] for row in lines("good.jsonl")] == [1.0] * 4
    captured = capsys.readouterr()
    assert "without p: 0.0" in captured.out and "with p: 100.0" in captured.out


def test_a_check_needs_somebody_who_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hints", "check", "task:dag", "--rows", "2", "--output", "good.jsonl"]) == 2
    assert "name a --judge, or a --teacher" in capsys.readouterr().err


RULES_OF_MINE = """
def plan(row):
    row["prompt"] = "changed"
    return None if row["answer"] == "23" else "Add what is asked, twice."

def number(row):
    return 5

def fails(row):
    return row["nothing"]

def boxes(row):
    return '[{"label": "red", "xyxy": [0, 0, ' + row["answer"] + ', 4]}]'
"""


def test_a_rule_of_ones_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "rule.py").write_text(RULES_OF_MINE)
    written = write_hints(problems(3), "steps", AskerSettings("./rule.py:plan"), "out.jsonl")
    assert [row["privileged_context"] for row in lines("out.jsonl")] == [
        "Add what is asked, twice.", None, "Add what is asked, twice."
    ]  # fmt: skip
    assert [row["prompt"] for row in lines("out.jsonl")] == [row["prompt"] for row in lines(problems(3).name)]
    assert written.reasons == {1: "the rule gives none"} and written.bill.num_asked == 0
    flags = ["hints", "write", problems(3).name, "--kind", "steps", "--output", "out.jsonl", "--writer"]
    for rule, words in {
        "./rule.py:number": "gave int, row 0: expected text or None",
        "./rule.py:fails": "raised KeyError: 'nothing', for row 0",
        "./rule.py:plans": "did you mean 'plan'",
        "./none.py:plan": "there is no file './none.py'",
    }.items():
        assert main([*flags, rule]) == 2
        assert words in capsys.readouterr().err
    assert main([*flags, "./rule.py:plan", "--prompt-file", "rule.py"]) == 2
    assert "--prompt-file (='rule.py') is for models" in capsys.readouterr().err


def test_boxes_of_a_rule_are_checked_too(place: Path) -> None:
    (place / "rule.py").write_text(RULES_OF_MINE)
    Image.new("RGB", (10, 8)).save(place / "one.png")
    Path("pictures.jsonl").write_text(
        "".join(json.dumps({"prompt": "How?", "image": "one.png", "answer": n}) + "\n" for n in ("10", "11"))
    )
    written = write_hints(HintData("pictures.jsonl"), "boxes", AskerSettings("./rule.py:boxes"), "out.jsonl")
    assert [row["privileged_context"] for row in lines("out.jsonl")] == ["red [0, 0, 10, 4]", None]
    assert written.reasons[1].startswith("box 0: [0, 0, 11, 4] is outside the image of 10 x 8 pixels")


def test_a_vision_model_of_this_machine_sees_the_pictures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it is asked, what it answers, and that its boxes are checked as a server's are."""
    own = AskerSettings("tiny:scenes/student", max_new_tokens=6, batch_size=2)
    data = HintData("task:scenes", count=3)
    written = write_hints(data, "caption", own, "out.parquet")
    assert written.bill.num_asked == 3 and written.num_hints + len(written.reasons) == 3
    source = rows_of_task(get_source("scenes"), "train", 3, None)
    replies = iter(['[{"label": "red", "xyxy": [0, 0, 4, 4]}]', "no boxes", '[{"label": "r", "xyxy": [0, 0, 4, 999]}]'])
    seen: list[Any] = []

    def answers(self: Any, prompts: list[Any], label: str, *, sampled: bool = False) -> list[tuple[str, bool]]:
        seen.extend(prompts)
        return [(next(replies), True) for _ in prompts]

    monkeypatch.setattr(LocalModel, "answers", answers)
    written = write_hints(data, "boxes", own, "boxes.parquet")
    rows = Dataset.from_parquet("boxes.parquet")
    assert rows["privileged_context"][:] == ["red [0, 0, 4, 4]", None, None]
    assert written.reasons[1] == "the reply is no JSON list of boxes" and "outside the image" in written.reasons[2]
    for prompt, row in zip(seen, source, strict=True):
        (picture,) = image_sources(prompt)
        assert np.array_equal(np.asarray(open_image(picture)), np.asarray(open_image(images_of(row)[0])))
    flags = ["hints", "write", "task:scenes", "--rows", "2", "--kind", "caption", "--writer", "tiny:dag/student"]
    assert main([*flags, "--output", "none.parquet"]) == 2
    assert "--writer (='tiny:dag/student') reads text alone, and rows have pictures" in capsys.readouterr().err


def test_a_judge_sees_the_pictures(place: Path) -> None:
    Image.new("RGB", (10, 8), (200, 0, 0)).save(place / "one.png")
    row = {"prompt": "10 + 1 = ?", "image": "one.png", "answer": "11", "privileged_context": "Look left.", "n": "10"}
    Path("pictures.jsonl").write_text(json.dumps(row) + "\n")
    with chatting(lambda text: VERDICTS["10"]) as server:
        check_hints(HintData("pictures.jsonl"), "good.jsonl", judge=writer(server.url))
        (body,) = server.asked
    (uri,) = chat.pictures_in(body)
    assert open_image(uri).size == (10, 8) and open_image(uri).getpixel((0, 0)) == (200, 0, 0)


def test_a_picture_that_is_not_there_is_told_with_file_and_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pictures.jsonl").write_text(json.dumps({"prompt": "How?", "image": "none.png"}) + "\n")
    flags = ["hints", "write", "pictures.jsonl", "--kind", "caption", "--writer", "tiny:scenes/student"]
    assert main([*flags, "--output", "out.jsonl"]) == 2
    error = capsys.readouterr().err
    assert "'pictures.jsonl', line 1: row 0" in error and "none.png" in error
