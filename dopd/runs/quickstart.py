"""The first thing a newcomer runs: tiny models, Vanilla OPD beside DOPD from the same start, one table, plots,
examples.
"""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from dopd.errors import ConfigError
from dopd.files import replace_file
from dopd.inspection.schema import METRICS_FILE
from dopd.methods import METHODS, table
from dopd.report.curves import CURVES_FILE, draw_comparison
from dopd.report.groups import SUMMARY_FILE
from dopd.report.page import REPORT_FILE, write_report
from dopd.report.records import RunRecord, read_run
from dopd.report.summary import examples_text, summary_rows, summary_table, verdicts
from dopd.report.terminal import print_table
from dopd.runs.build import resolve_model
from dopd.runs.jobs import Job, run_jobs
from dopd.runs.recipes import config_path
from dopd.runs.settings import RunSettings, load_settings
from dopd.runs.train import check_folder, make_config
from dopd.settings import settings_of_call
from dopd.shown import visible
from dopd.trainer.folder import RunFolder, claim, seal

_DEFAULT_CONFIG = "tiny-dag"
_NUM_EXAMPLES = 20
_TABLE_FILE, _EXAMPLES_FILE = "summary.md", "examples.md"


def quickstart(
    *, config: str | None, folder: str, methods: Sequence[str], seeds: int, jobs: int | None = None
) -> dict[str, Any]:
    """Obtain the tiny models, train every method with every seed, evaluate all without p, and write a report folder.

    Args:
        config (`str`, *optional*): a YAML file or a recipe by name; `tiny-dag` if left out.
        folder (`str`): report folder: `report.html`, `summary.md`, `summary.json`, `curves.png`, `examples.md`, and a
            run folder for each run.
        methods (`list[str]`): names of methods, as `DOPDConfig.method` takes them.
        seeds (`int`): runs of each method.
        jobs (`int`, *optional*): runs at a time; one for each core if left out.

    Returns:
        What `summary.json` holds.
    """
    started = time.perf_counter()
    console = Console()
    path = config_path(config or _DEFAULT_CONFIG)
    labels = [table(method).name for method in methods]
    doubled = sorted({label for label in labels if labels.count(label) > 1})
    if doubled:
        raise ConfigError(f"methods: {', '.join(doubled)} is named more than once: each method has a folder of its own")
    if seeds < 1:
        raise ConfigError(f"seeds (={seeds}) must be at least 1")
    settings = load_settings(path)
    _check_kind(settings, path)
    target = Path(folder)
    at_once = (os.cpu_count() or 1) if jobs is None else jobs
    if at_once < 1:
        raise ConfigError(f"jobs (={at_once}) must be at least 1")
    jobs_to_do = _jobs(settings, path, target, dict(zip(labels, methods, strict=True)), seeds)
    for label in labels:
        for seed in range(seeds):
            check_folder(RunFolder(_run_folder(target, label, seed)), settings, make_config(settings))
    logs = [job.log.relative_to(target).as_posix() for job in jobs_to_do]
    files = (SUMMARY_FILE, REPORT_FILE, CURVES_FILE, _TABLE_FILE, _EXAMPLES_FILE, *logs)
    claim(target, files)
    _say_plan(console, settings, methods, seeds, target)
    for name in (settings.model_name_or_path, settings.trainer["teacher_model_name_or_path"]):
        resolve_model(name)  # once, before several runs want it
    run_jobs(jobs_to_do, at_once=at_once, console=console)
    runs = {label: [read_run(_run_folder(target, label, seed)) for seed in range(seeds)] for label in labels}
    summary = _write_report(target, settings, runs)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    replace_file(target / SUMMARY_FILE, (json.dumps(summary, indent=1) + "\n").encode())
    report = write_report([target])
    seal(target, files)
    header, rows = summary_rows(summary)
    print_table(console, header, rows, title=f"{summary['task']}, mean [95% interval]")
    for line in verdicts(summary):
        console.print(escape(visible(line)))
    console.print(f"{summary['seconds']:.0f} s. Open {report} in a browser; or look at {target / CURVES_FILE}.")
    return summary


def _check_kind(settings: RunSettings, path: Path) -> None:
    """Refuse a config that the summary cannot be made of, before anything is trained."""
    teacher = settings.trainer.get("teacher_model_name_or_path")
    for name, value in (("task", settings.task), ("teacher_model_name_or_path", teacher)):
        if value is None:
            raise ConfigError(f"config {str(path)!r} has no {name}: the quickstart needs one. Compare recipe tiny-dag")
    if settings.final_eval_prompts is None:
        raise ConfigError(
            f"config {str(path)!r} has no final_eval_prompts: the quickstart compares methods by that evaluation"
        )
    make_config(settings)


def _say_plan(console: Console, settings: RunSettings, methods: Sequence[str], seeds: int, folder: Path) -> None:
    steps = settings.trainer.get("max_steps")
    console.print(
        f"[bold]dopd quickstart[/bold]: task {settings.task}; student {settings.model_name_or_path}; teacher "
        f"{settings.trainer['teacher_model_name_or_path']}; p: {settings.privileged_kind}.\n"
        f"1. obtain tiny teacher and student (they come with dopd)\n"
        f"2. train {' and '.join(methods)} from the same student, {seeds} seed(s) each, {steps} steps\n"
        f"3. evaluate all without p on {settings.final_eval_prompts} held-out problems; write {folder}"
    )


def _jobs(settings: RunSettings, config: Path, folder: Path, methods: Mapping[str, str], seeds: int) -> list[Job]:
    """Training and evaluation of every method, and the evaluation of what they start from."""
    jobs = []
    for seed in range(seeds):
        for label, method in methods.items():
            run_folder = _run_folder(folder, label, seed)
            arguments = ["train", str(config), "--method", method, "--seed", str(seed), "--output_dir", str(run_folder)]
            arguments += ["--method_options", json.dumps(_method_options(settings, method))]
            log = folder / "logs" / f"{run_folder.name}.log"
            steps = int(settings.trainer.get("max_steps", 1))
            jobs.append(
                Job(f"train {label}, seed {seed}", [*arguments, "--overwrite"], log, _progress(run_folder, steps))
            )
    for label, name in (
        ("start", settings.model_name_or_path),
        ("teacher", settings.trainer["teacher_model_name_or_path"]),
    ):
        jobs.append(Job(f"evaluate {label}", _eval_arguments(settings, name), folder / "logs" / f"{label}.json"))
    return jobs


def _method_options(settings: RunSettings, method: str) -> dict[str, Any]:
    """Of the config's options of its method, those that another method has too."""
    options = settings.trainer.get("method_options") or {}
    accepted = settings_of_call(METHODS.find(method))
    return {name: value for name, value in options.items() if name in accepted}


def _eval_arguments(settings: RunSettings, name: str) -> list[str]:
    arguments = ["eval", name, "--json", "--task", str(settings.task)]
    arguments += ["--privileged-kind", str(settings.privileged_kind)]
    arguments += ["--prompts", str(settings.final_eval_prompts), "--task-options", json.dumps(settings.task_options)]
    arguments += ["--max-new-tokens", str(settings.trainer["max_completion_length"])]
    if settings.trainer.get("privileged_template"):
        arguments += ["--privileged-template", settings.trainer["privileged_template"]]
    return arguments


def _run_folder(folder: Path, label: str, seed: int) -> Path:
    name = re.sub(r"[^\w.-]+", "_", label)
    return folder / f"{name}-seed{seed}"


def _progress(run_folder: Path, steps: int) -> Any:
    def fraction() -> float:
        path = run_folder / METRICS_FILE
        if not path.exists():
            return 0.0
        lines = path.read_text().splitlines()
        try:
            return json.loads(lines[-1])["step"] / steps
        except (IndexError, ValueError):  # nothing yet, or a line half-written
            return 0.0

    return fraction


def _write_report(folder: Path, settings: RunSettings, runs: dict[str, list[RunRecord]]) -> dict[str, Any]:
    logs = {label: json.loads(_last_line(folder / "logs" / f"{label}.json")) for label in ("start", "teacher")}
    summary = {
        "task": settings.task,
        "student": settings.model_name_or_path,
        "teacher": settings.trainer["teacher_model_name_or_path"],
        "start": logs["start"],
        "teacher_result": logs["teacher"],
        "methods": {name: [run.result for run in group] for name, group in runs.items()},
    }
    draw_comparison(runs, folder / CURVES_FILE)
    replace_file(folder / _TABLE_FILE, summary_table(summary).encode())
    routed = [run for group in runs.values() for run in group if any(r["tokens"][0]["regime"] for r in run.trace)]
    traces = routed[0].trace[-_NUM_EXAMPLES:] if routed else []
    replace_file(folder / _EXAMPLES_FILE, examples_text(traces).encode())
    return summary


def _last_line(path: Path) -> str:
    return path.read_text().strip().splitlines()[-1]
