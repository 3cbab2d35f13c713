"""Every example of every `--help` text runs as it is written; recipes are made small, so that it does so in seconds."""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_advice import helps

from dopd.cli.main import main
from dopd.runs.jobs import Job

pytestmark = pytest.mark.filterwarnings("default")
SMALL = {"max_steps": 1, "train_prompts": 64, "eval_prompts": 8, "student_eval_prompts": 4, "final_eval_prompts": 4}
NOT_HERE = {
    "accelerate": "starts processes of its own",
    "--train": "trains a tiny model for minutes",
    "--student Qwen": "answers with a model of the hub",
    "--writer http": "asks a server",
    "--writer Qwen": "answers with a model of the hub",
    "--judge http": "asks a server",
    "--teacher Qwen/Qwen3-8B --verifier math --samples": "answers with a model of the hub",
    "data dapo": "reads a dataset of the hub",
    "eval Qwen": "answers with a model of the hub",
    "plan qwen3": "reads configurations of the hub",
    "dopd example": "trains twice: tests/unit/test_tutorial.py",
    "experiment figure3": "makes hundreds of runs",
    "experiment all": "makes hundreds of runs",
    "experiment table4": "makes hundreds of runs",
}


def examples() -> list[str]:
    lines = (line for text in helps() for line in text.splitlines())
    found = (
        re.sub(r"(?<=\S)\s{2,}\(.*", "", line).strip() for line in lines if re.match(r"  (dopd|accelerate) ", line)
    )
    return [line for line in dict.fromkeys(found) if not any(words in line for words in NOT_HERE)]


def in_this_process(jobs: Sequence[Job], **_: Any) -> None:
    for job in jobs:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("w") as log, contextlib.redirect_stdout(log):
            assert main(job.arguments) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which somebody has trained, with what the examples name."""
    from dopd.runs import quickstart, settings

    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("examples")
        patch.chdir(path)
        read = settings.read_yaml_file
        patch.setattr(settings, "read_yaml_file", lambda file: read(file) | (SMALL if "tiny" in str(file) else {}))
        patch.setattr(quickstart, "run_jobs", in_this_process)
        for name in ("question.txt", "hint.txt"):
            (path / name).write_text("a 3 b a 4 ? b")
        (path / "problems.jsonl").write_text('{"question": "a 3 b a 4 ? b", "plan": "plan a b", "answer": "7"}\n')
        (path / "rule.py").write_text("def hint(row):\n    return 'plan a b'\n")
        for line in ("dopd quickstart --seeds 1 --methods dopd", "dopd train tiny-dag", *_runs()):
            with contextlib.redirect_stdout(io.StringIO()):
                assert main([*shlex.split(line)[1:]]) == 0, line
        yield path


def _runs() -> list[str]:
    """Runs that some examples report."""
    return [f"dopd train tiny-dag --method {name} --output_dir runs/{name}" for name in ("vanilla", "dopd")]


@pytest.mark.slow
@pytest.mark.parametrize("line", examples())
def test_an_example_runs_as_written(line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = shlex.split(line)[1:]
    if arguments[0] == "train" and not {"--dry-run", "--resume_from_checkpoint"} & set(arguments):
        arguments.append("--overwrite")  # the folder is another example's
    status = main(arguments)
    assert status == 0, capsys.readouterr().err


def test_there_are_examples_of_every_command_and_the_ones_left_out_exist() -> None:
    everything = "\n".join(helps())
    assert all(words in everything for words in NOT_HERE)
    commands = {line.split()[1] for line in examples()}
    assert {
        "train",
        "eval",
        "tasks",
        "methods",
        "config",
        "quickstart",
        "doctor",
        "report",
        "inspect",
        "hints",
        "tiny",
    } <= commands
