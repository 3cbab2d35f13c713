"""`dopd train --accelerate_config`: what is started, read by accelerate's own parser."""

import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from dopd.cli.launch import config_names
from dopd.cli.main import main


class Replaced(BaseException):
    """Another program has taken the place of this one."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have taken the place of this process."""
    commands: list[list[str]] = []

    def execv(program: str, command: list[str]) -> None:
        commands.append([program, *command[1:]])
        raise Replaced

    monkeypatch.setattr("os.execv", execv)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return commands


def run(*arguments: str) -> None:
    with pytest.raises(Replaced):
        main(["train", *arguments])


def test_the_launcher_gets_its_flags_and_the_command_the_rest(started: list[list[str]], tmp_path: Path) -> None:
    keys = ["tiny-dag", "--max_steps", "3", "--output_dir", str(tmp_path / "run")]
    machines = ["--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    run(*keys[:2], "--accelerate_config", "fsdp2", "--num_processes", "4", *machines, *keys[2:])
    ((program, *command),) = started
    assert program == sys.executable and command[:2] == ["-m", "accelerate.commands.launch"]
    read = launch_command_parser().parse_args(command[2:])
    assert (read.num_processes, read.num_machines, read.machine_rank) == (4, 2, 1)
    assert read.main_process_ip == "10.0.0.1" and read.module
    assert (read.training_script, read.training_script_args) == ("dopd.cli.main", ["train", *keys])
    config: Any = load_config_from_file(read.config_file)
    assert str(config.distributed_type.value) == "FSDP" and str(config.fsdp_config["fsdp_version"]) == "2"


def test_a_file_or_no_configuration_at_all(started: list[list[str]], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("distributed_type: 'NO'\n")
    run("tiny-dag", "--accelerate_config", str(file))
    run("tiny-dag", "--num_processes", "2")
    first, second = (launch_command_parser().parse_args(command[3:]) for command in started)
    assert first.config_file == str(file)
    assert second.config_file is None and second.num_processes == 2


@pytest.mark.parametrize("text", ["", "- a\n", "distributed_type: FOO\n", "method: dopd\n", "{"])
def test_a_file_that_accelerate_cannot_read_is_one_line(
    started: list[list[str]], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert main(["train", "tiny-dag", "--accelerate_config", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"accelerate_config (='{file}') is no configuration of accelerate: " in said
    assert said.count("\n") == 1 and started == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--accelerate_config", "fspd2"], "must be one of fsdp1, fsdp2, multi_gpu"),
        (["--accelerate_config", "fsdp2", "--learning_rate", "-1"], "learning_rate"),
        (["--accelerate_config", "fsdp2", "--max_stepz", "1"], "max_stepz"),
    ],
)
def test_what_cannot_work_is_said_once_before_anything_starts(
    started: list[list[str]], flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "tiny-dag", *flags]) == 2
    assert words in capsys.readouterr().err and started == []


def test_a_process_of_a_launcher_starts_no_other(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "tiny-dag", "--num_processes", "2"]) == 2
    assert "num_processes: this process was started by a launcher already" in capsys.readouterr().err and started == []


def test_the_host_brings_the_configurations_that_the_guide_names() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "several-gpus.md").read_text()
    assert {"multi_gpu", "zero1", "zero2", "zero3", "fsdp2"} <= set(config_names())
    assert all(f"`{name}`" in page for name in ("multi_gpu", "zero1", "zero2", "zero3", "fsdp2"))
