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


@pytest.mark.slow
def test_every_command_from_raw_problems_to_a_report_runs(tmp_path: Path) -> None:
    write_named_files(tmp_path, HINTS)
    commands = [line for block in blocks(HINTS, "bash") for line in block.splitlines()]
    assert len(commands) == 10
    printed = {command: run(command, tmp_path) for command in commands}
    assert "512 of 512 hints leak" in printed[commands[1]]
    assert "0 of" in printed[commands[5]].splitlines()[0]
    hints = [json.loads(line) for line in (tmp_path / "hints.jsonl").read_text(encoding="utf-8").splitlines()]
    good = [json.loads(line) for line in (tmp_path / "good.jsonl").read_text(encoding="utf-8").splitlines()]
    control = [json.loads(line) for line in (tmp_path / "control.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(hints) == 512 and 256 < len(good) == len(control)
    pairs = list(zip(good, control, strict=True))
    assert all(one["privileged_context"] != other["privileged_context"] for one, other in pairs)
    assert (tmp_path / "both.html").is_file() and (tmp_path / "audit.html").is_file()


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
