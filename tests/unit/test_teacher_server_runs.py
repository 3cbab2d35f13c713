"""`dopd train` with a teacher on a server: what is refused before anything is loaded, and a server that is lost."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from run_kit import Train, models_of_one_layer, steps_of, train  # noqa: F401 - fixtures
from server_kit import Fail, ModelServer, serving
from trainer_kit import TOKENIZER, parameters, student, task_rows, teacher, trainer

from dopd.cli.main import main
from dopd.errors import ServerLostError

NO_TEACHER = ("--teacher_model_name_or_path", "null")


@pytest.fixture(scope="module")
def server_of_module() -> Iterator[ModelServer]:
    with serving(teacher(), TOKENIZER) as server:
        yield server


@pytest.fixture
def server(server_of_module: ModelServer, monkeypatch: pytest.MonkeyPatch) -> ModelServer:
    monkeypatch.setattr("dopd.servers.client._FIRST_PAUSE", 0.01)
    server_of_module.fault = lambda number, reply: reply
    server_of_module.asked.clear()
    return server_of_module


def lost_after(count: int) -> Callable[[int, dict[str, Any]], Any]:
    """The server answers so many requests; the first of them tries the vocabulary."""
    return lambda number, reply: reply if number < count else Fail(503, "shutting down")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "teacher_server and teacher_model_name_or_path (='{teacher}') both name the teacher"),
        ((*NO_TEACHER, "--temperature", "0.7"), "temperature (=0.7) must be 1 with teacher_server"),
        ((*NO_TEACHER, "--method", "dopd"), "rule 'LH' takes its target over the student's top 128"),
        ((*NO_TEACHER, "--teacher_server", "http://127.0.0.1:1"), "does not answer: "),
        ((*NO_TEACHER, "--teacher_server", "there"), "must be a URL with http:// or https://"),
        ((*NO_TEACHER, "--teacher_server_model", "other"), "is not served at"),
        ((*NO_TEACHER, "--loss_backend", "reference"), "loss_backend (='reference') makes whole distributions"),
    ],
    ids=["two sources", "temperature", "table", "nobody there", "no URL", "no such model", "reference loss"],
)
def test_one_error_before_anything_is_loaded(
    train: Train,  # noqa: F811
    models_of_one_layer: tuple[str, str],  # noqa: F811
    server: ModelServer,
    flags: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dopd.runs.train.load_model", load)
    given = ("--teacher_server", server.url) if "--teacher_server" not in flags else ()
    method = () if "--method" in flags else ("--method", "vanilla_pg")
    assert train(*method, *given, *flags) == 2
    said = capsys.readouterr().err
    assert words.format(teacher=models_of_one_layer[1]) in said and said.count("error:") == 1 and not server.asked


def test_a_lost_server_leaves_a_checkpoint_and_the_run_goes_on(
    train: Train,  # noqa: F811
    server: ModelServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = (*NO_TEACHER, "--teacher_server", server.url, "--method", "vanilla_pg", "--save_strategy", "no")
    server.fault = lost_after(1 + 4)
    assert train(*flags, "--teacher_server_retries", "1") == 75
    said = capsys.readouterr().err
    assert "no answer after 2 attempts" in said and "HTTP 503: shutting down" in said
    assert "Stopped after step 1 of 2" in said and "resume_from_checkpoint=true" in said
    assert steps_of(tmp_path / "run") == ["checkpoint-1"]
    server.fault = lambda number, reply: reply
    assert train(*flags, "--resume_from_checkpoint", "true") == 0


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_one_that_was_not_stopped(server: ModelServer, tmp_path: Path) -> None:
    """In the middle of an epoch, and in the first step of one: three rows, one a step."""
    options: dict[str, Any] = {
        "teacher_model": None,
        "teacher_server": server.url,
        "teacher_server_retries": 0,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 5,
        "learning_rate": 0.5,
        "train_dataset": Dataset.from_list(task_rows(3)),
    }
    whole = trainer(tmp_path / "whole", "vanilla_pg", model=student(), **options)
    whole.train()
    for lost_in in (3, 4):
        server.asked.clear()
        server.fault = lost_after(1 + 2 * (lost_in - 1) + 1)  # in the middle of a step
        folder = tmp_path / str(lost_in)
        with pytest.raises(ServerLostError, match=f"Stopped after step {lost_in - 1} of 5"):
            trainer(folder, "vanilla_pg", model=student(), **options).train()
        server.fault = lambda number, reply: reply
        again = trainer(folder, "vanilla_pg", model=student(), resume_from_checkpoint="true", **options)
        again.train()
        for name, value in parameters(whole.model).items():
            assert torch.equal(value, parameters(again.model)[name]), name


def test_the_doctor_asks_the_server(
    train: Train,  # noqa: F811
    server: ModelServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, seed in (("same", 1), ("other", 7)):
        teacher(seed).save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    flags = (*NO_TEACHER, "--teacher_server", server.url, "--teacher_server_support", "target_topk")
    command = ["doctor", str(tmp_path / "settings.yaml"), *flags, "--method", "vanilla"]

    def findings(*more: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        status = main([*command, *more])
        return status, capsys.readouterr().out.splitlines()

    def one(lines: list[str], words: str) -> str:
        (found,) = [line for line in lines if words in line]
        return found

    server.introductions = 0
    status, lines = findings("--local-teacher", str(tmp_path / "same"))
    assert status == 0 and server.introductions == 1, lines
    size = TOKENIZER.vocab_size
    assert f"teacher at {server.url}, a context of 512 tokens; lists its whole vocabulary of {size}" in one(
        lines, "teacher on a server"
    )
    assert float(one(lines, "nats apart").split("there are ")[1].split()[0]) < 1e-5
    assert one(lines, "from the server").startswith("note") and "in place of the whole vocabulary" in one(
        lines, "from the server"
    )
    server.max_logprobs = 23
    try:
        status, lines = findings("--local-teacher", str(tmp_path / "other"))
    finally:
        server.max_logprobs = -1
    assert status == 2 and "lists at most 23 tokens" in one(lines, "teacher on a server")
    assert "FAIL" in one(lines, "they are not one model")
    command[command.index(server.url)] = "http://127.0.0.1:1"
    status, lines = findings()
    assert status == 2 and one(lines, "does not answer").startswith("HERE")
    monkeypatch.setattr("dopd.runs.examination.unreachable", lambda name, kind: "it is not here")
    status, lines = findings("--model_name_or_path", "no/such-model")  # nothing is loaded then
    assert status == 2 and one(lines, "does not answer").startswith("HERE")
