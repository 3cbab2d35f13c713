"""The last lines of a training: what it came to, where its report is, and what to do next."""

import re
import shlex
from pathlib import Path

from dopd.progress import say
from dopd.report.ending import ending_of
from dopd.report.outcome import WITHOUT_PRIVILEGED, changes
from dopd.report.page import REPORT_FILE
from dopd.report.records import GIVEN_IN_PYTHON, RunRecord, read_run
from dopd.shown import visible
from dopd.statistics import Interval

_MODEL_FILES = ("config.json", "adapter_config.json")


def say_outcome(folder: Path) -> None:
    """Print what the run in a folder came to, where its report is, and a command to go on with; on the main process of
    a run alone.
    """
    run = read_run(folder)
    found = changes(run, WITHOUT_PRIVILEGED)
    for change in found:
        start = "not measured" if change.start is None else in_percent(change.start)
        counts = "" if change.num_start in (0, change.num_end) else f"{change.num_start} and "
        say(f"{change.words}: {start} -> {in_percent(change.end)} ({counts}{change.num_end} prompts)")
    ending = ending_of(run)
    if ending is not None and ending.why:
        say(ending.why)
    if not found:
        say("accuracy was not measured: set student_eval_steps, with held-out rows and a verifier")
    say(visible(f"run folder: {folder}"))
    say(visible(f"report: {folder / REPORT_FILE}"))
    say(visible(f"next: {_next_command(run)}"))


def in_percent(interval: Interval) -> str:
    """`50.0% [25.0, 75.0]`, of shares."""
    return f"{100 * interval.mean:.1f}% [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _next_command(run: RunRecord) -> str:
    folder, model = shlex.quote(str(run.folder)), _model_of(run.folder)
    if run.config.get("task"):
        return f"dopd eval {folder} --split ood"
    teacher = run.config.get("teacher_model_name_or_path")
    # What `dopd inspect` has no flags for.
    of_program = str(teacher).startswith(GIVEN_IN_PYTHON)
    if model is None or of_program or run.config.get("rules") or run.config.get("teacher_server"):
        return f"dopd report {folder} OTHER_RUN --output both.html"
    named = {"student": str(model), "teacher": teacher, "method": run.config.get("method", "dopd")}
    flags = " ".join(f"--{flag} {shlex.quote(str(value))}" for flag, value in named.items() if value)
    return f"dopd inspect {flags} --prompt QUESTION --privileged HINT"


def _model_of(folder: Path) -> Path | None:
    """Where the trained model of a run is: its folder, or the last of its checkpoints."""
    numbered = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    last_first = sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True)
    places = [folder, *(path for _, path in last_first)]
    return next((path for path in places if any((path / name).is_file() for name in _MODEL_FILES)), None)
