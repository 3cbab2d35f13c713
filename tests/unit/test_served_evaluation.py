"""Models on servers that are judged: against a server with faults, killed and gone on with, and compared."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_kit import chatting, killed_behind, text_of
from PIL import Image
from server_kit import Fail

from dopd.cli.main import main
from dopd.data.views import Conversation
from dopd.hints import chat
from dopd.runs.served_answers import served_name
from dopd.servers import client

PLANTED = "sk-planted-0123456789"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with rows, and pauses between attempts that nobody waits for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.001)
    rows = [
        {"prompt": f"What is {n} plus {n}?", "answer": str(2 * n), "privileged_context": "add"} for n in range(1, 13)
    ]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def command(url: str, *flags: str, output: str | None = "out.jsonl") -> list[str]:
    kept = [] if output is None else ["--output", output]
    rows = ["--dataset-name", "data.jsonl", "--verifier", "exact", "--measures", "greedy", "sampled"]
    return ["eval", f"writer={url}", *rows, "--samples", "2", "--json", *kept, *flags]


def number(text: str) -> int:
    return int(re.findall(r"What is (\d+)", text)[0])


def sums(text: str) -> str:
    """Right up to 8 + 8."""
    return str(2 * number(text)) if number(text) <= 8 else "0"


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_model_on_a_server_is_judged_and_asked_once(capsys: pytest.CaptureFixture[str]) -> None:
    with chatting(sums) as server:
        assert main(command(server.url, "--max-new-tokens", "9", "--temperature", "0.6", "--top-p", "0.9")) == 0
        found = printed(capsys)
        bodies = list(server.asked)
        assert len(bodies) == 12 * 3
        assert main(command(server.url, "--max-new-tokens", "9", "--temperature", "0.6", "--top-p", "0.9")) == 0
        again = printed(capsys)
        assert len(server.asked) == 12 * 3, "answers that are kept are not asked for again"
    metrics = found["metrics"]
    assert metrics["accuracy_greedy"] == metrics["accuracy_sampled"] == metrics["pass@2"] == pytest.approx(8 / 12)
    assert "accuracy_privileged" not in metrics and "entropy" not in metrics and metrics["eos_ratio"] == 1.0
    assert again["metrics"] == metrics and found["model"] == "writer"
    assert found["bill"]["num_asked"] == 36 and found["bill"]["completion_tokens"] == 36
    greedy = [body for body in bodies if body["temperature"] == 0]
    drawn = Counter(body["seed"] for body in bodies if body["temperature"] == 0.6 and body["top_p"] == 0.9)
    assert len(greedy) == 12 and drawn == {0: 12, 1: 12} and not any("seed" in body for body in greedy)
    assert {body["max_tokens"] for body in bodies} == {9}
    first, *rows, _, last = lines("out.jsonl")
    assert first["versions"]["server"] == server.url and first["evaluation"]["chat_template"]["sha256"] is None
    assert len(rows) == 12 and len(rows[3]["samples"]) == 2 and rows[2]["greedy"]["text"] == "6"
    assert last["metrics"] == metrics


FAULTS = {
    "429 with Retry-After": lambda n: Fail(429, "slow down", {"Retry-After": "0"}),
    "500": lambda n: Fail(500),
    "cut-off body": lambda n: Fail(cut=40),
    "broken JSON": lambda n: Fail(cut=100),
    "no choices": lambda n: {"choices": []},
    "time-out": lambda n: Fail(pause=1.2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_asked_again_and_nothing_is_lost(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    with chatting(sums) as server:
        server.fault = lambda n, reply: FAULTS[fault](n) if n % 2 == 0 and n < 8 else reply
        patience = ["--timeout", "0.6"] if fault == "time-out" else []
        assert main(command(server.url, "--concurrency", "4", *patience)) == 0
        assert len(server.asked) == 36 + 4
    assert printed(capsys)["metrics"]["accuracy_greedy"] == pytest.approx(8 / 12)
    assert len(lines("out.jsonl.journal.jsonl")) == 36


def test_refused_requests_are_counted_where_results_are_read_and_are_not_cut_answers(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with chatting(lambda text: Fail(400, "content filter") if "What is 3 " in text else sums(text)) as server:
        for _ in range(2):  # the second time from what is kept
            assert main(command(server.url)) == 0
            found = printed(capsys)["metrics"]
            assert found["refused_ratio"] == pytest.approx(3 / 36) and found["eos_ratio"] == 1.0
        assert main(["report", "out.jsonl", "--output", "page.html"]) == 0
    assert "3 of 36 requests refused" in (place / "page.html").read_text()


def test_a_row_without_a_prompt_is_named_with_its_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "What is 1 plus 1?", "answer": "2"}, {"prompt": None, "answer": "4"}]
    (place / "null.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with chatting(sums) as server:
        for arguments in (
            ["eval", f"m={server.url}", "--dataset-name", "null.jsonl", "--verifier", "exact"],
            ["hints", "write", "null.jsonl", "--kind", "answer", "--output", "hints.jsonl"],
        ):
            assert main(arguments) == 2
            error = capsys.readouterr().err
            assert "line 2" in error and "'prompt' (=None): expected text" in error
        assert server.asked == []
    assert main(["data", "null.jsonl", "--keep", "{distinct: true}", "--output", "kept.jsonl"]) == 0
    assert len(lines("kept.jsonl")) == 1 and "its prompt cannot be read" in "".join(capsys.readouterr())


def test_a_server_that_goes_away_leaves_what_was_received(capsys: pytest.CaptureFixture[str]) -> None:
    with chatting(sums) as server:
        server.fault = lambda n, reply: reply if n < 20 else Fail(503)
        flags = ["--retries", "1", "--concurrency", "1"]
        assert main(command(server.url, *flags)) == 75
        assert "no answer after 2 attempts" in capsys.readouterr().err
        assert len(lines("out.jsonl.journal.jsonl")) == 20
        server.fault, server.asked = (lambda n, reply: reply), []
        assert main(command(server.url, *flags)) == 0
        assert len(server.asked) == 16
    assert printed(capsys)["metrics"]["num_prompts"] == 12


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_without_paying_twice(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chatting(sums) as server:
        server.fault = lambda n, reply: Fail(pause=0.2)
        arguments = command(server.url, "--concurrency", "2")
        paid = killed_behind(6, arguments, place / "out.jsonl.journal.jsonl")
        assert 6 <= paid < 36
        server.fault, server.asked = (lambda n, reply: reply), []
        assert main(arguments) == 0
        assert len(server.asked) == 36 - paid
    assert printed(capsys)["metrics"]["accuracy_greedy"] == pytest.approx(8 / 12)


def test_draws_are_several_where_requests_say_no_seed(capsys: pytest.CaptureFixture[str]) -> None:
    """Equal requests are one answer otherwise, and pass@2 would be that of one draw."""
    counts: Counter[str] = Counter()

    def now_and_then(text: str) -> str:
        counts[text] += 1
        return sums(text) if counts[text] % 3 else "0"

    with chatting(now_and_then) as server:
        assert main(command(server.url, "--request", "{seed: null}", "--concurrency", "1")) == 0
        assert len(server.asked) == 36 and not any("seed" in body for body in server.asked)
    metrics = printed(capsys)["metrics"]
    assert metrics["accuracy_sampled"] == pytest.approx(4 / 12) and metrics["pass@2"] == pytest.approx(8 / 12)


def test_answers_that_are_cut_or_refused_are_wrong_and_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(text: str) -> Any:
        if number(text) == 2:
            return Fail(400, "content filter")
        if number(text) == 3:
            return {"choices": [{"message": {"content": "6"}, "finish_reason": "length"}]}
        return sums(text)

    with chatting(answer) as server:
        assert main(command(server.url, "--concurrency", "1")) == 0
    captured = capsys.readouterr()
    metrics = json.loads(captured.out)["metrics"]
    assert metrics["accuracy_greedy"] == pytest.approx(6 / 12) and metrics["eos_ratio"] == pytest.approx(10 / 11)
    assert "refused 1 of 12 requests" in captured.err and "content filter" in captured.err
    rows = [line for line in lines("out.jsonl") if "row" in line]
    assert rows[2]["greedy"]["text"] == "6" and rows[2]["greedy"]["score"] == 0.0


def test_the_budget_is_not_gone_beyond_and_a_larger_one_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    prices = ["--price-in", "1000", "--price-out", "1000", "--max-new-tokens", "10"]
    with chatting(sums) as server:
        assert main(command(server.url, *prices, "--budget", "0.15")) == 1
        error = capsys.readouterr().err
        spent = sum(r["prompt_tokens"] + r["completion_tokens"] for r in lines("out.jsonl.journal.jsonl")) / 1000
        asked = len(server.asked)
        assert "a larger --budget goes on" in error and 0 < asked < 36 and spent <= 0.15
        assert main(command(server.url, *prices, "--budget", "50")) == 0
        assert len(server.asked) == 36
    assert printed(capsys)["bill"]["cost"] == pytest.approx(36 * 6 / 1000)
    assert main(command("http://localhost:1", *prices, "--budget", "1", output=None)) == 2
    assert "--output FILE" in capsys.readouterr().err


def test_the_key_is_sent_and_written_nowhere(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOPD_EVAL_API_KEY", PLANTED)
    with chatting(lambda text: f"{sums(text)} {PLANTED}") as server:
        assert main(command(server.url)) == 0
        assert all(body["headers"]["Authorization"] == f"Bearer {PLANTED}" for body in server.asked)
        server.answer = lambda text: Fail(401, f"wrong key {PLANTED}")
        assert main(command(server.url, "--seed", "7", output="other.jsonl")) == 2
    captured = capsys.readouterr()
    assert PLANTED not in captured.out + captured.err and "DOPD_EVAL_API_KEY" in captured.err
    assert [path for path in place.rglob("*") if path.is_file() and PLANTED.encode() in path.read_bytes()] == []


def test_two_servers_are_compared_on_rows_that_need_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    with chatting(sums) as one, chatting(lambda text: str(2 * number(text)), name="better") as other:
        first, *rest = command(one.url, output="both")[1:]
        assert main(["eval", first, f"better={other.url}", *rest]) == 0
    found = printed(capsys)
    assert [model["model"] for model in found["models"]] == ["writer", "better"]
    difference = next(one for one in found["differences"] if one["measure"] == "greedy")
    assert difference["mean"] == pytest.approx(4 / 12) and difference["low"] > 0
    assert len(list(Path("both").glob("*.journal.jsonl"))) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher", "tiny:dag/teacher"], "gives texts and no distributions"),
        (["--prompt-format", "text"], "reads conversations"),
        (["--budget", "1"], "needs prices"),
        (["--key-variable", "WORDS"], "must be a name that says that it is secret"),
    ],
)
def test_what_a_server_cannot_be_asked_is_refused_before_it_is(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with chatting(sums) as server:
        assert main(command(server.url, *flags)) == 2
        assert server.asked == [] and server.introductions == 0
    assert words in capsys.readouterr().err


def test_names_of_models_on_servers() -> None:
    assert served_name("Qwen/Qwen3-8B=http://localhost:8000") == ("Qwen/Qwen3-8B", "http://localhost:8000")
    assert served_name("https://example.org/v1") == (None, "https://example.org/v1")
    assert served_name("https://example.org/?a=http://b") == (None, "https://example.org/?a=http://b")
    assert served_name("runs/lr=0.1") is None and served_name("tiny:dag/student") is None


def test_requests_carry_pictures_tools_and_what_a_row_tells_its_template(place: Path) -> None:
    Image.new("RGB", (4, 3)).save(place / "a.png")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    prompt = Conversation(turns, {"tools": tools, "enable_thinking": False})
    body = chat.conversation("m", prompt, {"temperature": None, "chat_template_kwargs": {"a": 1}})
    assert body["messages"][0] == turns[0] and "temperature" not in body
    picture, text = body["messages"][1]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,") and text["text"] == "What is it?"
    assert body["tools"] == tools and body["chat_template_kwargs"] == {"a": 1, "enable_thinking": False}
    assert text_of({"messages": body["messages"][1:]}) == "What is it?"
