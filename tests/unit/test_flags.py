"""Flags of commands: how they may be written, what is said of ones that do not exist, and help at any width."""

import pytest

from dopd.cli.main import build_parser, main
from lab import command as lab_command

WIDTHS = (40, 60, 80, 120, 200)
COMMANDS = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]


def helps() -> dict[str, str]:
    own = {name: parser.format_help() for name, parser in COMMANDS.items() if name not in ("experiment", "tiny")}
    ours = {name: lab_command.build_parser(name).format_help() for name in ("experiment", "tiny")}
    return {"dopd": build_parser().format_help(), **own, **ours}


@pytest.mark.parametrize("width", WIDTHS)
def test_help_fits_the_terminal_and_its_examples_are_a_line_each(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    wide = helps()
    monkeypatch.setenv("COLUMNS", str(width))
    for name, text in helps().items():
        lines = text.splitlines()
        examples = [line for line in lines if line.startswith(("  dopd ", "  accelerate "))]
        assert examples and examples == [line for line in wide[name].splitlines() if line in examples]
        # Behind argparse's usage; a flag with its metavar is a word.
        prose = [line for line in lines[lines.index("") :] if line not in examples and not line.startswith("  -")]
        longest_word = max(len(word) for line in prose for word in line.split())
        assert max(map(len, prose)) <= max(min(width, 110), longest_word + 16), name


MEANT = {
    "trian tiny-dag": "'trian' must be one of train, eval, .* Did you mean 'train'?",
    "methds": "Did you mean 'methods'?",
    "eval x --promts 3": "unrecognized arguments: --promts 3. Did you mean '--prompts'?",
    "eval x --split tset": "Did you mean 'test'?",
    "train tiny-dag --dry_rnu": "Did you mean '--dry-run'?",
    "train tiny-dag --learning-rat 3": "unknown key 'learning_rat'. Did you mean 'learning_rate'?",
    "train tiny-dga": "Did you mean 'tiny-dag'?",
    "train tiny-dag --method vanila --output_dir x": "Did you mean 'vanilla' or 'vanilla_pg'?",
    "doctor --local_techer x": "Did you mean '--local-teacher'?",
    "tasks dga": "Did you mean 'dag'?",
    "methods dodp": "Did you mean 'dopd'",
    "config lerning_rate": "Did you mean 'learning_rate'?",
    "experiment --job 3 --scal x": "argument --scale: 'x' must be one of tiny, full",
    "experiment figure33": "Did you mean 'figure3'?",
    "tiny dagg": "Did you mean 'dag'?",
    "train tiny-dag --privileged_kind final_answr --output_dir x": "Did you mean 'final_answer'?",
}


@pytest.mark.parametrize("line", MEANT)
def test_what_is_misspelt_is_answered_with_what_is_close(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(line.split())
    except SystemExit as left:
        status = left.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert status == 2
    for part in MEANT[line].split(".*"):
        assert part in said


@pytest.mark.parametrize(
    ("written", "name", "value"),
    [
        ("eval x --max_new_tokens 7", "max_new_tokens", 7),
        ("eval x --max_new_tokens=7", "max_new_tokens", 7),
        ("eval x --task-options {a_b:_1}", "task_options", "{a_b:_1}"),
        ("train --token_ids --dry_run", "token_ids", True),
        ("train --num-processes 2", "num_processes", "2"),
        ("quickstart --output_dir a_b-c", "output_dir", "a_b-c"),
    ],
)
def test_a_flag_may_be_written_with_either_line(written: str, name: str, value: object) -> None:
    assert getattr(build_parser().parse_args(written.split()), name) == value


def test_words_that_are_no_flags_stay_as_they_are() -> None:
    line = "train tiny-dag --lora-r 3 --method ./a_b.py:c -- --dry_run"
    arguments, rest = build_parser().parse_known_args(line.split())
    assert rest[:5] == ["tiny-dag", "--lora-r", "3", "--method", "./a_b.py:c"] and not arguments.dry_run
