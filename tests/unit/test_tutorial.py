"""The tutorial runs as written; configurations in the documentation can be read; metrics that are logged are named."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dopd.cli.main import main
from dopd.runs import example as example_module
from dopd.runs.example import Step
from dopd.runs.settings import all_settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TUTORIAL = DOCS / "tutorial" / "first-run.md"
HINTS = DOCS / "how-to" / "make-hints.md"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)


def write_named_files(folder: Path, page: Path = TUTORIAL) -> None:
    """Blocks that begin with `# NAME` are files of that name."""
    for block in blocks(page, "python") + blocks(page, "yaml"):
        name = re.match(r"# (\w+\.\w+)", block)
        assert name is not None, f"a block of the tutorial without a file's name: {block[:60]}"
        (folder / name[1]).write_text(block, encoding="utf-8")


def run(command: str, folder: Path) -> str:
    """A line of a shell, with `dopd` and `python` those of this environment."""
    tools = folder / ".tools"
    tools.mkdir(exist_ok=True)
    for name, arguments in {"dopd": " -m dopd.cli.main", "python": ""}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n', encoding="utf-8")
        (tools / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(tmp_path: Path) -> None:
    write_named_files(tmp_path)
    commands = [line for block in blocks(TUTORIAL, "bash") for line in block.splitlines()]
    assert len(commands) > 10
    said = {command: run(command, tmp_path) for command in commands}
    hinted = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    shipped = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    assert hinted == shipped  # the rule finds the plans of the task that made the problems
    for made in ("runs/first/report.html", "runs/first/trace.jsonl", "both.html", "merged/model.safetensors"):
        assert (tmp_path / made).is_file(), made
    trained = json.loads((tmp_path / "runs/first/result.json").read_text(encoding="utf-8"))
    assert trained["method"] == "dopd"
    assert any("greedy" in text for command, text in said.items() if command.startswith("dopd eval merged"))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_the_worked_example_is_the_one_that_the_command_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page shows the commands and the files; a folder of other origin is left alone, and edited files are kept."""
    folder = tmp_path / "example"
    assert main(["example", "--output-dir", str(folder), "--dry-run"]) == 0
    printed = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    (page,) = blocks(HINTS, "bash")
    assert printed == [line for line in page.splitlines() if not line.startswith("#")] and len(printed) == 13
    for block in blocks(HINTS, "python") + blocks(HINTS, "yaml"):
        name = block.splitlines()[0].removeprefix("# ")
        assert (folder / name).read_text(encoding="utf-8") == block
    raw = [json.loads(line) for line in (folder / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    assert raw[0].keys() == {"question", "solution", "answer"} and raw[-1]["answer"] is None
    assert not list(folder.glob("rows*")) and len({row["question"] for row in raw}) == len(raw) - 16
    (folder / "rule.py").write_text("# mine\n")
    assert main(["example", "--output-dir", str(folder), "--dry-run"]) == 0
    assert (folder / "rule.py").read_text() == "# mine\n"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "judge.py").write_text("")
    capsys.readouterr()
    assert main(["example", "--output-dir", str(tmp_path / "other")]) == 2
    assert "has something else in it: choose another folder" in capsys.readouterr().err


def test_a_command_of_the_example_runs_again_where_its_files_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two commands, the second of which reads what the first writes: a stand-in copies what each reads."""
    every = [Step("", "dopd hints write --writer ./rule.py:hint --output hints.jsonl"),
             Step("", "dopd hints audit hints.jsonl --json audit.json --html audit.html")]  # fmt: skip
    folder, ran = tmp_path / "example", []

    def run(step: Step, number: int, count: int, folder: Path, *, anew: bool) -> None:
        ran.append((number, anew))
        (folder / step.outputs[0]).write_text((folder / ("rule.py", "hints.jsonl")[number - 1]).read_text())

    monkeypatch.setattr(example_module, "steps", lambda: every)
    monkeypatch.setattr(example_module, "_run", run)

    def again() -> list[tuple[int, bool]]:
        ran.clear()
        assert main(["example", "--output-dir", str(folder)]) == 0
        return [*ran]

    whole = [(1, False), (2, True)]
    assert again() == whole and again() == []
    (folder / "rule.py").write_text("# mine\n")
    assert again() == whole and (folder / "audit.html").read_text() == "# mine\n" and again() == []
    (folder / "hints.jsonl").unlink()
    assert again() == whole
    (folder / "audit.html").unlink()
    assert again() == [(2, False)]  # as after an interruption: what it had written is there for it to go on with
    monkeypatch.undo()
    every[1:] = [Step("", "dopd hints adit hints.jsonl")]
    monkeypatch.setattr(example_module, "steps", lambda: every)
    capsys.readouterr()
    assert main(["example", "--output-dir", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "command 2 of 2 ended with status 2: dopd hints adit hints.jsonl" in error and "goes on with it" in error


@pytest.mark.example
def test_the_worked_example_ends_with_a_better_model(tmp_path: Path) -> None:
    printed = run(f"dopd example --output-dir {tmp_path / 'example'}", tmp_path)
    assert "640 of 640 hints leak" in printed and "0 of 638 hints leak" in printed
    assert "13 of 13 commands were run" in printed
    folder = tmp_path / "example"
    good, control = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("good.jsonl", "control.jsonl")
    )
    pairs = list(zip(good, control, strict=True))
    assert all(one["privileged_context"] != other["privileged_context"] for one, other in pairs)
    accuracies = {
        name: json.loads((folder / "runs" / name / "result.json").read_text(encoding="utf-8"))["final"][
            "greedy_accuracy"
        ]
        for name in ("hints", "control")
    }
    assert accuracies["hints"] > accuracies["control"]
    assert (folder / "report.html").is_file() and (folder / "audit.html").is_file()
    assert "0 of 13 commands were run" in run(f"dopd example --output-dir {folder}", tmp_path)


def configurations() -> Iterator[tuple[str, dict[str, object]]]:
    for path in PAGES:
        for number, block in enumerate(blocks(path, "yaml")):
            yield f"{path.relative_to(ROOT)}, {number}", yaml.safe_load(block)


@pytest.mark.parametrize("where", [name for name, _ in configurations()])
def test_configurations_in_the_documentation_can_be_read(where: str, tmp_path: Path) -> None:
    values = dict(configurations())[where]
    assert set(values) <= set(all_settings())
    whole = {
        "model_name_or_path": "tiny:dag/student",
        "output_dir": str(tmp_path / "run"),
        "dataset_name": "rows.jsonl",
    }
    load_settings(None, **{**whole, **values})


def test_the_table_of_memory_is_what_the_tool_computes() -> None:
    page = (DOCS / "how-to" / "one-gpu.md").read_text(encoding="utf-8")
    printed = subprocess.run(
        [sys.executable, str(DOCS / "tools" / "memory.py")], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() in page, "put the output of docs/tools/memory.py into docs/how-to/one-gpu.md"


def test_the_bytes_of_memory_are_those_of_models_of_these_sizes() -> None:
    """What the tool counts, beside parameters of models by transformers and of adapters by peft."""
    import importlib.util

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    spec = importlib.util.spec_from_file_location("memory", DOCS / "tools" / "memory.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules["memory"] = tool
    spec.loader.exec_module(tool)
    for model in tool.QWEN3.values():
        config = Qwen3Config(
            vocab_size=151_936,
            hidden_size=model.hidden,
            intermediate_size=model.intermediate,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_size,
            tie_word_embeddings=model.name != "Qwen3-8B",
        )
        with torch.device("meta"):
            made = Qwen3ForCausalLM(config)
            made.tie_weights()
            assert sum(p.numel() for p in made.parameters()) == pytest.approx(model.parameters * 1e9, rel=0.01)
            adapted = get_peft_model(made, LoraConfig(r=tool.RANK, target_modules="all-linear"))
            assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == model.adapter


@pytest.mark.slow
def test_every_metric_of_a_run_is_on_the_page_of_metrics(tmp_path: Path) -> None:
    write_named_files(tmp_path)
    for command in (
        "python problems.py",
        "python make_hints.py",
        "dopd train first.yaml --max_steps 2 --trace_steps 1",
    ):
        run(command, tmp_path)
    page = (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+)`", page))
    lines = (tmp_path / "runs" / "first" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = {key for line in lines for key in json.loads(line)} - {"step"}
    assert len(logged) > 40
    general = {re.sub(r"^(share|weight|loss|gap|gradient)/\w+$", r"\1/RULE", key) for key in logged}
    general = {re.sub(r"^gap_bin/.*$", "gap_bin/EDGE", key) for key in general}
    assert general - named == set()
