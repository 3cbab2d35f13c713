"""Warnings of the report: what each one reads, how they are grouped, and that their advice can be followed."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import tests.report_kit as kit
from dopd.report import palette
from dopd.report.findings import findings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return kit.four_runs(tmp_path)


def titles(*folders: Path) -> set[str]:
    return {warning["title"] for method in findings(kit.groups_of(*folders), {}) for warning in method["warnings"]}


def only_warning(groups: Any, summary: Any = None) -> dict[str, Any]:
    ((warning,),) = [method["warnings"] for method in findings(groups, summary or {})]
    return warning


def test_a_healthy_run_has_no_warnings(folder: Path) -> None:
    assert findings(kit.groups_of(folder), {}) == []


def test_collapse(tmp_path: Path) -> None:
    fall: Any = {"entropy": lambda t: 1.0 - 0.95 * t, "greedy": lambda t: 0.5 - 0.3 * t}
    assert titles(kit.run_folder(tmp_path / "run", **fall)) == {"collapse"}
    fine: Any = {"entropy": lambda t: 1.0 - 0.95 * t, "greedy": lambda t: 0.5 + 0.3 * t}
    assert titles(kit.run_folder(tmp_path / "better", **fine)) == set()


def test_privilege_illusion(tmp_path: Path) -> None:
    series: Any = {"greedy": lambda t: 0.5 + t * (0.5 - t), "privileged": lambda t: 0.7 + 0.2 * t}
    assert titles(kit.run_folder(tmp_path / "run", **series)) == {"privilege illusion"}


def test_a_drifting_privileged_student(tmp_path: Path) -> None:
    series: Any = {"privileged": lambda t: 0.9 - 0.4 * t}
    assert titles(kit.run_folder(tmp_path / "run", **series)) == {"the privileged student drifts"}
    assert titles(kit.run_folder(tmp_path / "plain", "vanilla", **series)) == set()


def test_one_regime_takes_all(tmp_path: Path) -> None:
    series: Any = {"shares": lambda t: (0.995, 0.005, 0.0, 0.0)}
    found = only_warning(kit.groups_of(kit.run_folder(tmp_path / "run", **series)))
    assert found["title"] == "one regime (LH) takes all" and "6 of 6" in found["runs"][0]["text"]


def test_dead_teacher_and_identical_models(tmp_path: Path) -> None:
    dead = [kit.record(0, row) for row in range(4)]
    for line in dead:
        for token in line["tokens"]:
            token["logprob_teacher"] = -3.0
    assert titles(kit.run_folder(tmp_path / "dead", trace=dead)) == {"dead teacher"}
    same = [kit.record(0, row) for row in range(4)]
    for line in same:
        for token in line["tokens"]:
            token["gap"] = 0.0
    assert titles(kit.run_folder(tmp_path / "same", trace=same)) == {"teacher and student are the same"}


def test_a_leaking_hint(tmp_path: Path) -> None:
    hint = "first find B then add nine to it"
    leak = kit.record(3, 0, privileged_context=hint, texts=("I", " find", " B", " then", " add", " nine", "."))
    clean = kit.record(3, 1, privileged_context=hint)
    assert titles(kit.run_folder(tmp_path / "leak", trace=[leak, clean])) == {"the hint leaks into answers"}
    asked = kit.record(3, 0, privileged_context=hint, prompt=hint, texts=("I", " find", " B", " then", " add", " nine"))
    assert titles(kit.run_folder(tmp_path / "asked", trace=[asked])) == set()
    speaking = kit.record(3, 0, texts=("As", " the", " hint", " says"))
    assert titles(kit.run_folder(tmp_path / "speaking", trace=[speaking])) == {"answers speak of a hint"}


def test_words_that_the_untrained_student_shares_with_p_are_no_leak(tmp_path: Path) -> None:
    hint = "first find B then add nine to it"
    texts = ("I", " find", " B", " then", " add", " nine", ".")
    early = [kit.record(0, row, privileged_context=hint, texts=texts) for row in range(4)]
    late = [kit.record(5, row, privileged_context=hint, texts=texts) for row in range(4)]
    assert titles(kit.run_folder(tmp_path / "always", trace=early + late)) == set()
    clean = [kit.record(0, row, privileged_context=hint) for row in range(4)]
    run = kit.run_folder(tmp_path / "learned", trace=clean + late[:1] + [kit.record(5, 1, privileged_context=hint)])
    assert "1 of 2 traced completions (50%; 0% before training)" in only_warning(kit.groups_of(run))["runs"][0]["text"]


def test_a_leak_of_a_script_without_spaces(tmp_path: Path) -> None:
    hint = "\u5148\u6c42\u51fa\u4e09\u89d2\u5f62\u7684\u9762\u79ef\u518d\u4e58\u4ee5\u9ad8"
    leak = kit.record(3, 0, privileged_context=hint, texts=(hint[:4], hint[4:]))
    assert titles(kit.run_folder(tmp_path / "leak", trace=[leak])) == {"the hint leaks into answers"}
    few = kit.record(3, 0, privileged_context=hint, texts=(hint[:8], " B"))
    assert titles(kit.run_folder(tmp_path / "few", trace=[few])) == set()


@pytest.mark.parametrize(
    ("cut", "lengths", "title", "level"),
    [
        ([0.02] * 8, [20.0] * 8, None, None),
        ([0.1] * 8, [20.0] * 8, "clipped answers", "note"),
        ([0.5] * 8, [20.0] * 8, "clipped answers", "bad"),
        ([0.0, 0.1, 0.5, 0.9, 0.95, 1.0, 1.0, 1.0], [20.0] * 8, "endless answers", "bad"),
        ([0.0] * 8, [20.0, 20.0, 20.0, 26.0, 30.0, 32.0, 34.0, 36.0], "answers grow longer", "note"),
        ([0.0] * 8, [20.0, 20.0, 20.0, 14.0, 12.0, 8.0, 8.0, 8.0], "answers grow shorter", "note"),
    ],
)
def test_clipped_answers_and_lengths(tmp_path: Path, cut: Any, lengths: Any, title: Any, level: Any) -> None:
    run = kit.run_folder(tmp_path / "run", steps=8)
    records = kit.metrics(8)
    for record in records:
        if "loss" in record:
            place = record["step"] - 1
            record |= {"completions/clipped_ratio": cut[place], "completions/mean_length": lengths[place]}
    kit.write_lines(run / "metrics.jsonl", records)
    if title is None:
        assert titles(run) == set()
        return
    warning = only_warning(kit.groups_of(run))
    assert (warning["title"], warning["level"]) == (title, level)
    assert title != "answers grow longer" or "from 20 to 34 tokens" in warning["runs"][0]["text"]


def test_warnings_are_grouped_by_method_with_a_count(tmp_path: Path) -> None:
    fall: Any = {"entropy": lambda t: 1.0 - 0.95 * t, "greedy": lambda t: 0.5 - 0.3 * t}
    for seed in (0, 1, 2):
        kit.run_folder(tmp_path / f"dopd{seed}", seed=seed, **(fall if seed else {}))
        kit.run_folder(tmp_path / f"vanilla{seed}", "vanilla", seed)
    (method,) = findings(kit.groups_of(tmp_path), {})
    (warning,) = method["warnings"]
    assert (method["method"], warning["title"], warning["of"]) == ("dopd", "collapse", 3)
    assert [run["run"] for run in warning["runs"]] == ["seed 1", "seed 2"]


def test_advice_names_settings_that_exist() -> None:
    from dopd.runs.settings import RunSettings
    from dopd.trainer import DOPDConfig

    folder = Path(palette.__file__).parent
    texts = "".join(
        (folder / name).read_text(encoding="utf-8") for name in ("findings.py", "monitors.py", "verdict.py")
    )
    texts = re.sub(r'"""(?:.|\n)*?"""|#.*', "", texts)  # of messages alone
    named = {name.partition(":")[0] for name in re.findall(r"`(?!dopd )([a-z_]+(?:: [^`]*)?)`", texts)}
    known = {field.name for kind in (RunSettings, DOPDConfig) for field in dataclasses.fields(kind)}
    assert len(named) > 15 and named - known - {"privileged_context"} == set()


def test_a_teacher_that_is_no_better(folder: Path) -> None:
    summary = {"start": {"metrics": {"accuracy_greedy": 0.5}}, "teacher_result": {"metrics": {"accuracy_greedy": 0.4}}}
    found = only_warning(kit.groups_of(folder), summary)
    assert found["title"] == "the teacher is no better than the student"
