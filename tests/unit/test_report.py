"""The report from run folders made by hand: tables, curves, warnings, bounds, and that text stays text."""

import base64
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tests.report_kit as kit
from dopd.errors import DataError
from dopd.inspection.schema import problems, read_trace
from dopd.report import palette, traces
from dopd.report.groups import differences, find_runs, find_summary
from dopd.report.headline import headline
from dopd.report.page import inspection_page, report_data, report_page, write_report
from dopd.report.series import charts, thin
from dopd.statistics import mean_interval, wilson_interval

SCRIPTS = sorted(Path(palette.__file__).parent.glob("*.js"))


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return kit.four_runs(tmp_path)


# --- Which runs


def test_a_folder_of_runs_is_grouped_by_method_and_seed(folder: Path) -> None:
    groups = kit.groups_of(folder)
    assert [(group.label, [run.config["seed"] for run in group.runs]) for group in groups] == [
        ("dopd", [0, 1]),
        ("vanilla", [0, 1]),
    ]
    assert len(kit.groups_of(folder, folder / "dopd-seed0")[0].runs) == 2


def test_runs_of_one_method_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    for rate in (1e-3, 1e-4):
        kit.run_folder(tmp_path / f"run{rate}", config={"learning_rate": rate})
    groups = kit.groups_of(tmp_path)
    assert [group.label for group in groups] == ["dopd (learning_rate=0.0001)", "dopd (learning_rate=0.001)"]
    assert differences(groups) == [("learning_rate", ["0.0001", "0.001"]), ("seed", ["0", "0"])]


def test_one_run_has_no_differences_to_show(tmp_path: Path) -> None:
    assert differences(kit.groups_of(kit.run_folder(tmp_path / "run"))) == []


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run folder"):
        find_runs([tmp_path])


# --- Headline


def test_the_headline_has_start_and_methods_with_their_intervals(folder: Path) -> None:
    rows = headline(kit.groups_of(folder), {})["rows"]
    assert [(row["label"], row["kind"]) for row in rows] == [
        ("start (student)", "start"),
        ("dopd", "method"),
        ("vanilla", "method"),
    ]
    start, dopd = rows[0]["cells"][0], rows[1]["cells"][0]
    wilson = wilson_interval(0.4 * 256, 256)
    assert (start["mean"], start["low"], start["high"]) == pytest.approx((wilson.mean, wilson.low, wilson.high))
    seeds = mean_interval([0.4, 0.5])
    assert dopd["mean"] == pytest.approx(0.45) and dopd["low"] == pytest.approx(max(seeds.low, 0.0))
    assert rows[1]["cells"][-1]["text"] == "2"


def test_quickstarts_evaluations_of_start_and_teacher_are_read(folder: Path) -> None:
    interval = {"mean": 0.9, "low": 0.85, "high": 0.95}
    intervals = {f"accuracy_{name}": interval for name in ("greedy", "sampled", "privileged")}
    result = {"metrics": {"accuracy_greedy": 0.9, "entropy": 0.1, "length": 20.0}, "intervals": intervals}
    summary = {"start": result, "teacher_result": result, "task": "dag", "methods": {"vanilla": [], "dopd": []}}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert find_summary([folder / "dopd-seed0"]) == summary
    page = data_of(report_page([folder]))
    assert [row["label"] for row in page["headline"]["rows"]] == ["start (student)", "teacher", "vanilla", "dopd"]
    assert page["headline"]["rows"][1]["cells"][0]["text"] == "90.0% [85.0, 95.0]"


# --- Curves


def test_every_curve_of_the_issue_is_there(folder: Path) -> None:
    titles = [chart["title"] for chart in charts(kit.groups_of(folder), {})]
    for words in (
        "Accuracy without p, greedy",
        "Accuracy WITH p",
        "Entropy",
        "Length",
        "KL to the plain teacher",
        "Share of tokens by regime: dopd",
        "Share of the loss by regime: dopd",
        "Share of the gradient by regime: dopd",
        "Gaps over time: dopd",
        "Seconds per step: vanilla",
    ):
        assert any(words in title for title in titles), words


def test_a_curve_is_the_mean_over_seeds_with_each_seed_behind_it(folder: Path) -> None:
    chart = charts(kit.groups_of(folder), {})[0]
    series = chart["series"][0]
    assert series["x"] == [0, 2, 4, 6] and series["y"][-1] == pytest.approx(0.45)
    assert [seed["y"][-1] for seed in series["seeds"]] == pytest.approx([0.4, 0.5])


def test_shares_of_a_stack_add_up(folder: Path) -> None:
    for chart in charts(kit.groups_of(folder), {}):
        if chart["kind"] in ("stack", "heat") and chart["unit"] == "share":
            sums = [sum(layer["y"][n] for layer in chart["layers"]) for n in range(len(chart["x"]))]
            assert sums == pytest.approx([1.0] * len(sums), abs=1e-3)


def test_the_loss_share_weighs_losses_by_tokens(folder: Path) -> None:
    (chart,) = [c for c in charts(kit.groups_of(folder), {}) if c["title"] == "Share of the loss by regime: dopd"]
    assert {layer["label"]: layer["y"][0] for layer in chart["layers"]} == pytest.approx(
        {"HT": 0.3, "HS": 0.2, "LH": 0.4, "LL": 0.1}
    )


def test_long_series_are_thinned_and_keep_both_ends() -> None:
    points = thin({step: float(step) for step in range(5000)})
    assert len(points) <= 160 and min(points) == 0 and max(points) == 4999
    assert thin({1: 2.0}) == {1: 2.0}


# --- The page


def test_the_page_is_a_pure_function_of_the_folders(folder: Path, tmp_path: Path) -> None:
    first = write_report([folder]).read_bytes()
    assert write_report([folder], tmp_path / "again" / "page.html").read_bytes() == first
    assert (folder / "report.html").read_bytes() == first


def test_several_folders_write_into_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_report([folder / "dopd-seed0", folder / "vanilla-seed0"])
    assert path == Path("report.html") and len(data_of(path.read_text())["runs"]) == 2


def test_nothing_in_the_page_is_fetched(folder: Path) -> None:
    page = report_page([folder])
    code = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.S).replace(
        "http://www.w3.org/2000/svg", ""
    )
    assert "http" not in code.replace("http-equiv", "") and "src=" not in code and "@import" not in code
    assert "default-src 'none'" in page


def test_text_of_a_model_cannot_leave_its_place(folder: Path) -> None:
    page = report_page([folder])
    assert "onerror" in page  # it is there, as JSON
    assert kit.EVIL not in page and "<img" not in page and page.count("</script>") == len(SCRIPTS) + 1
    assert kit.EVIL in data_of(page)["traces"]["strings"]


def test_packed_traces_hold_what_the_trace_says(folder: Path) -> None:
    packed = data_of(report_page([folder]))["traces"]
    records = read_trace(folder / "dopd-seed0" / "trace.jsonl")
    items = [item for item in packed["items"] if item["run"] == 0]
    assert packed["left_out"] == 0 and len(items) == len(records) == 12
    for item, line in zip(items, records, strict=True):
        assert problems(line) == []
        assert (item["step"], item["key"], item["rollout"]) == (line["step"], line["prompt_key"], line["rollout"])
        for n, token in enumerate(line["tokens"]):
            assert packed["strings"][item["text"][n]] == token["text"]
            assert item["labels"][item["regime"][n]] == token["regime"]
            assert [item[name][n] for name in ("gap", "loss", "entropy")] == [
                token[k] for k in ("gap", "loss", "entropy")
            ]
            pairs = item["target_top"][n]
            assert [packed["strings"][k] for k in pairs[::2]] == [text for text, _ in token["top_target"]]


def test_a_large_trace_is_thinned_from_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = [kit.record(step, row) for step in range(21) for row in range(2)]
    run = kit.run_folder(tmp_path / "run", trace=trace)
    monkeypatch.setattr(traces, "MAX_BYTES", 30_000)
    packed = data_of(report_page([run]))["traces"]
    steps = {item["step"] for item in packed["items"]}
    assert {0, 10, 20} <= steps and len(packed["items"]) + packed["left_out"] == 42 and packed["left_out"] > 0
    assert len(json.dumps(packed["items"])) < 40_000


def test_records_of_another_format_are_left_out(tmp_path: Path) -> None:
    old = {"step": 0, "row": 0, "method": "dopd", "prompt": "a", "privileged_context": None, "tokens": []}
    packed = data_of(report_page([kit.run_folder(tmp_path / "run", trace=[old, kit.record(1, 0)])]))["traces"]
    assert [item["step"] for item in packed["items"]] == [1] and packed["left_out"] == 1


def test_a_page_of_long_runs_stays_small(tmp_path: Path) -> None:
    trace = [kit.record(step, row, texts=kit.WORDS * 40) for step in range(12) for row in range(4)]
    run = kit.run_folder(tmp_path / "run", trace=trace, steps=3000)
    assert (run / "trace.jsonl").stat().st_size > 10e6
    assert write_report([run]).stat().st_size < 10e6


def test_a_run_without_a_trace_or_metrics_has_a_page(tmp_path: Path) -> None:
    run = kit.run_folder(tmp_path / "run", trace=[])
    (run / "metrics.jsonl").unlink()
    page = data_of(report_page([run]))
    assert page["charts"] == [] and page["headline"]["rows"] == [] and page["traces"]["items"] == []


def test_half_written_files_of_a_run_in_progress_are_read(tmp_path: Path) -> None:
    run = kit.run_folder(tmp_path / "run")
    for name in ("metrics.jsonl", "trace.jsonl"):
        path = run / name
        path.write_text(path.read_text()[:-40])
    assert len(data_of(report_page([run]))["traces"]["items"]) == 11


def test_pictures_and_boxes_of_vision_records(tmp_path: Path) -> None:
    from PIL import Image

    boxes = [
        {"image": 0, "label": "cat", "xyxy": [0.1, 0.2, 0.5, 0.6]},
        {"image": 9, "xyxy": [0, 0, 1, 1]},
        {"xyxy": [2]},
    ]
    line = kit.record(0, 0, images=["seen.png", "absent.png"], boxes=boxes)
    run = kit.run_folder(tmp_path / "run", trace=[line])
    Image.new("RGB", (1200, 800), "red").save(run / "seen.png")
    assert problems(line) == []
    (item,) = data_of(report_page([run]))["traces"]["items"]
    assert item["images"][0].startswith("data:image/jpeg;base64,") and item["images"][1] is None
    assert item["boxes"] == boxes[:1]


def test_a_page_of_one_prompt() -> None:
    page = data_of(inspection_page("One prompt", "student a", [kit.record(0, 0)]))
    assert page["charts"] == [] and len(page["traces"]["items"]) == 1 and page["title"] == "One prompt"


# --- Colours


@pytest.mark.parametrize(("theme", "tint"), [(palette.LIGHT, palette.TINT_LIGHT), (palette.DARK, palette.TINT_DARK)])
def test_text_has_the_contrast_of_wcag_aa(theme: dict[str, str], tint: float) -> None:
    for behind in (theme["card"], theme["page"]):
        for name in ("ink", "soft", "link", "bad", "good"):
            assert palette.contrast(theme[name], behind) >= 4.5, (name, behind)
    for label, colour in palette.REGIME_COLOURS.items():
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            behind = palette.blend(colour, theme["card"], tint * share)
            assert palette.contrast(theme["ink"], behind) >= 4.5, (label, share)


@pytest.mark.parametrize(
    ("methods", "card"),
    [(palette.METHOD_COLOURS, palette.LIGHT["card"]), (palette.METHOD_COLOURS_DARK, palette.DARK["card"])],
)
def test_methods_and_regimes_never_have_one_colour(methods: tuple[str, ...], card: str) -> None:
    """20 in CIELAB is far: shades of one name are closer. Lines have the contrast that WCAG asks of graphics."""
    regimes = set(palette.label_colours([f"named{n}" for n in range(12)]).values())
    pairs = [*itertools.product(methods, regimes), *itertools.combinations(methods, 2)]
    assert min(distance(a, b) for a, b in pairs) >= 20
    assert min(distance(a, b) for a, b in itertools.product(palette.PHASE_COLOURS, regimes)) >= 10
    assert all(palette.contrast(colour, card) >= 3 for colour in methods)
    assert not set(methods) & set(palette.PHASE_COLOURS)


def distance(first: str, second: str) -> float:
    """CIE 1976 distance of two sRGB colours, by the formulas of the standard."""

    def lab(colour: str) -> tuple[float, ...]:
        channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        xyz = (
            (0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047,
            0.2126729 * r + 0.7151522 * g + 0.0721750 * b,
            (0.0193339 * r + 0.1191920 * g + 0.9503041 * b) / 1.08883,
        )
        x, y, z = (v ** (1 / 3) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116 for v in xyz)
        return 116 * y - 16, 500 * (x - y), 200 * (y - z)

    return math.dist(lab(first), lab(second))


def test_contrast_is_that_of_wcag() -> None:
    assert palette.contrast("#ffffff", "#000000") == pytest.approx(21)
    assert palette.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert palette.blend("#ff0000", "#ffffff", 0.5) == "#ff8080"


def test_the_report_needs_no_torch() -> None:
    code = "import dopd.report.page, sys; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_pages_own_scripts_may_run() -> None:
    page = inspection_page("</script><script>alert(1)</script>", "x", [])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    allowed = set(re.findall(r"'sha256-([^']+)'", policy[1].split("script-src")[1].split(";")[0]))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts}
    assert len(scripts) == len(SCRIPTS) and allowed == hashes
    assert "script-src 'unsafe" not in policy[1] and "default-src 'none'" in policy[1]


@pytest.mark.parametrize(
    ("config", "title"),
    [
        ({}, "dag: dopd"),
        ({"task": None, "dataset_name": "openai/gsm8k"}, "openai/gsm8k: dopd"),
        ({"task": None, "dataset_name": "/somewhere/else/train.jsonl"}, "train.jsonl: dopd"),
        ({"task": None, "dataset_name": ["a.jsonl", "b.jsonl"]}, "first: dopd"),
        ({"task": None, "dataset_name": "given in Python: Dataset, 64 rows, columns prompt"}, "first: dopd"),
    ],
)
def test_a_title_is_short(tmp_path: Path, config: dict[str, Any], title: str) -> None:
    run = kit.run_folder(tmp_path / "first", config=config | {"model_name_or_path": "given in Python: Net, 1 M"})
    data = report_data([run])
    assert data["title"] == title and data["subtitle"].startswith("student Net, 1 M, teacher tiny:dag/teacher, 1 run")


def test_seeds_of_rows_given_in_python_have_the_title_of_their_method(tmp_path: Path) -> None:
    for seed in (0, 1):
        config = {"task": None, "dataset_name": "given in Python: Dataset"}
        kit.run_folder(tmp_path / f"seed{seed}", seed=seed, config=config)
    assert report_data([tmp_path])["title"] == "dopd"
