"""Every method trains, draws its curves, and is reported and inspected; so does a table whose rows have names."""

import json
from pathlib import Path
from typing import Any

import pytest
import trainer_kit as kit
from datasets import Dataset
from rich.console import Console

from dopd.cli.terminal import print_records
from dopd.methods import METHODS
from dopd.report.curves import draw_run
from dopd.report.page import inspection_page, write_report
from dopd.report.records import CONFIG_FILE

NAMED = [
    {"regime": "LH", "name": "only p", "source": "privileged_teacher", "support": "student_topk", "top_k": 8},
    {"regime": "LL", "name": "<b>noise</b>", "source": "privileged_student", "support": "student_topk", "top_k": 8},
    {"regime": "HT", "source": "privileged_teacher", "divergence": "js"},
    {"regime": "HS", "name": "its own", "source": "privileged_student", "support": "student_topk", "top_k": 8},
]


def finished(folder: Path, method: str, **options: Any) -> list[dict[str, Any]]:
    """A run of one step with its report; returns what was traced."""
    rows = [{**row, "contrast_context": "1 2", "partial_context": "1", "solution": "1 2"} for row in kit.task_rows(8)]
    made = kit.trainer(
        folder,
        method,
        model=kit.many_ends(kit.student(), 40),
        train_dataset=Dataset.from_list(rows),
        verifier=lambda text, row: float(len(text) % 2),
        trace_steps=1,
        **options,
    )
    made.train()
    (folder / CONFIG_FILE).write_text(f"method: {method}\noutput_dir: run\nmodel_name_or_path: student\n")
    draw_run(folder)
    assert write_report([folder]).stat().st_size > 10_000
    return [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]


def looked_at(records: list[dict[str, Any]]) -> str:
    page = inspection_page("one prompt", "a student", records)
    for colours in (None, "truecolor"):
        console = Console(color_system=colours, force_terminal=colours is not None, width=60, record=True)  # type: ignore[arg-type]
        with console.capture() as shown:
            print_records(console, records)
        assert records[0]["tokens"][0]["text"].strip() in shown.get()
    return page


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method_ends_with_its_report(method: str, tmp_path: Path) -> None:
    looked_at(finished(tmp_path, method))


def test_rows_with_names_are_shown_by_name_with_a_colour_each(tmp_path: Path) -> None:
    page = looked_at(finished(tmp_path, "dopd", rules=NAMED))
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    labels = [row.get("name", row["regime"]) for row in NAMED]
    assert set(labels) <= set(data["regimes"]) and len({data["regime_colours"][label] for label in labels}) == 4


@pytest.mark.parametrize("text", ["{}", "[1]", "not json", '{"methods": ["a"]}', '{"methods": {"dopd": 3}}'])
def test_a_summary_of_somebody_else_beside_a_run_is_not_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text)
    finished(tmp_path / "run", "vanilla")
