"""What commands print, at any width and into any pipe."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from dopd.cli.main import main
from dopd.cli.output import CLOSED
from dopd.cli.terminal import print_records
from dopd.errors import cut, did_you_mean
from dopd.methods import METHODS
from dopd.report.summary import summary_rows
from dopd.report.terminal import print_paragraph, print_table
from dopd.runs.quiet import quiet_libraries
from dopd.shown import visible

WIDTHS = (30, 60, 80, 200)


def printed(width: int, header: list[str], rows: list[list[str | Text]], **options: Any) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115
    print_table(console, header, rows, **options)
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_keeps_every_word_whole_at_any_width(width: int) -> None:
    words = ["privileged_student", "[a]", "47.4 [42.2, 52.6]", "the only walk of n steps in a directed graph"]
    text = printed(width, ["", "x", "accuracy_greedy (%)", "what it is"], [words, ["a", "", "b", "c"]], title="Table")
    for word in " ".join(words).split():
        assert word in text
    assert "\u2026" not in text
    longest = max(len(word) for word in " ".join(words).split())
    if width > 3 * longest:
        assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [60, 80])
def test_the_table_of_the_quickstart_has_every_method_whole(width: int) -> None:
    interval = {"mean": 0.5, "low": 0.25, "high": 0.75}
    record = {
        "metrics": {f"accuracy_{kind}": 0.5 for kind in ("greedy", "sampled", "privileged")}
        | {"entropy": 0.123, "length": 21.5},
        "intervals": {f"accuracy_{kind}": interval for kind in ("greedy", "sampled", "privileged")},
    }
    methods = {name: [record] for name in METHODS}
    header, rows = summary_rows({"start": record, "teacher_result": record, "methods": methods})
    text = printed(width, header, rows)
    for name in METHODS:
        assert any(name in line.split() for line in text.splitlines()), name
    assert text.count("50.0 [25.0, 75.0]") == 3 * (2 + len(METHODS)) or text.count("50.0") == 3 * (2 + len(METHODS))


@pytest.mark.parametrize("command", [["tasks"], ["tasks", "dag"], ["methods"], ["methods", "dopd"], ["experiment"]])
@pytest.mark.parametrize("width", ["40", "60", "80"])
def test_listings_cut_nothing(
    command: list[str], width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "\u2026" not in out
    assert max(map(len, out.splitlines())) <= int(width)


PIPES = {
    "a reader that leaves": ("{{ {dopd} methods; echo $? >&3; }} | sleep 0", CLOSED),
    "help into a reader that leaves": ("{{ {dopd} train --help; echo $? >&3; }} | sleep 0", CLOSED),
    "a report": ("{{ {dopd} report run; echo $? >&3; }} | sleep 0", CLOSED),
    "closed output": ("{dopd} tasks >&-; echo $? >&3", 0),
}


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a Unix shell")
@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_that_closes_ends_a_command_without_a_word(name: str, tmp_path: Path) -> None:
    command, status = PIPES[name]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"task": "dag"}))
    script = f"( {command.format(dopd=f'{sys.executable} -m dopd.cli.main')} ) 3>status"
    for unbuffered in ("", "1"):
        given = {
            **os.environ,
            "COLUMNS": "80",
            "PYTHONUNBUFFERED": unbuffered,
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=given, cwd=tmp_path)
        assert done.stderr == "" and (tmp_path / "status").read_text() == f"{status}\n", done.stderr


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps({"task": "dag"}))
    for target in (str(run / "config.yaml" / "page.html"), str(run)):
        status = main(["report", str(run), "--output", target])
        error = capsys.readouterr().err
        assert status == 2 and error.startswith("error: ") and len(error.splitlines()) == 1, error


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "tiny:dag/student", "--prompts", "0"],
        ["eval", "tiny:dag/student", "--batch-size", "x"],
        ["eval", "tiny:dag/student", "--max-new-tokens", "-1"],
        ["inspect", "--student", "x", "--prompt", "q", "--rollouts", "0"],
        ["tiny", "dag", "--seed", "-1"],
        ["quickstart", "--jobs", "0"],
        ["quickstart", "--seeds", "1.5"],
        ["experiment", "figure3", "--jobs", "0"],
    ],
)
def test_a_number_that_cannot_be_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "must be a whole number of at least" in capsys.readouterr().err


CONTROLS = "\x1b[31mred\x1b]0;title\x07\r\x9b1A\u202eback\x00"


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert visible(CONTROLS) == "\\x1b[31mred\\x1b]0;title\\x07\\r\\x9b1A\\u202eback\\x00"
    assert visible("two\nlines\tand caf\u00e9 \U0001f600 \u0645") == "two\nlines\tand caf\u00e9 \U0001f600 \u0645"


@pytest.mark.parametrize(
    "command",
    [
        ["eval", f"/no/{CONTROLS}".replace("\x00", ""), "--task", "dag"],
        ["train", "tiny-dag", "--output_dir", "x", f"--method={CONTROLS}"],
        ["tasks", CONTROLS],
        ["report", f"/no/{CONTROLS}".replace("\x00", "")],
        ["inspect", "--student", "tiny:dag/student", "--prompt", f"B {CONTROLS} [bold]", "--max-new-tokens", "3"],
    ],
)
def test_what_a_command_quotes_is_shown_and_not_obeyed(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    main(command)
    shown = "".join(capfd.readouterr())
    assert not set(shown) & set("\x00\x07\x1b\r\x9b\u202e")


def test_texts_are_cut_and_names_that_are_close_are_suggested() -> None:
    assert cut("abc", 3) == "abc" and cut("abcd", 3) == "abc..."
    known = ["vanilla", "dopd", "dopd_ema"]
    assert did_you_mean("dodp", known) == " Did you mean 'dopd'?"
    assert did_you_mean("dopd_em", known, 2) == " Did you mean 'dopd' or 'dopd_ema'?"
    assert did_you_mean("something else", known, 2) == did_you_mean(7, []) == ""


def test_what_models_and_tables_hold_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(force_terminal=False, width=200)
    print_table(console, ["name"], [[CONTROLS], ["[bold]"]], title=CONTROLS)
    print_paragraph(console, CONTROLS, "[bold]")
    record = {
        "tokens": [
            {"text": text, "regime": None, "gap": 0.0, "loss": 1.0, "logprob_teacher": None, "logprob_student": None}
            | {"logprob_plain": None, "entropy": None, "top_target": [[CONTROLS, 0.5]]}
            for text in (CONTROLS, "[bold]")
        ],
        "rules": ["all"],
        "thresholds": None,
        "rollout": 0,
        "num_tokens": 2,
    }
    print_records(console, [record])
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x00\x07\x1b\r\x9b\u202e")
    assert shown.count("[bold]") >= 3


def test_warnings_reach_the_stream_that_stands_for_standard_error_when_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under pytest, in notebooks and under `redirect_stderr` the stream of the first command is gone by the second."""
    quiet_libraries()
    for _ in range(2):
        monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
        quiet_libraries()
        logging.getLogger("dopd.anything").warning("seen")
        assert stream.getvalue() == "WARNING: seen\n"


def test_another_number_is_no_slip_of_the_pen() -> None:
    assert did_you_mean("float64", ["float16", "float32", "bfloat16"]) == ""
    assert did_you_mean("flaot16", ["float16", "float32"]) == " Did you mean 'float16'?"
    assert did_you_mean("float", ["float16"]) == " Did you mean 'float16'?"
