"""Several teachers, each of the rows that name it: against runs with one of them, and what rows may name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from run_kit import Train, models_of_one_layer, train  # noqa: F401 - fixtures
from server_kit import serving
from trainer_kit import (
    GREEDY,
    TEACHER,
    TOKENIZER,
    loss_of,
    many_ends,
    named,
    parameters,
    student,
    task_rows,
    teacher,
    trainer,
)

from dopd.cli.main import main
from dopd.errors import ConfigError, DataError, ModelError
from dopd.fused import fused_routed_loss
from dopd.heads import Head
from dopd.runs.build import load_model
from dopd.runs.sizes import ModelSize
from dopd.tiny.models import TinySpec, build_model
from dopd.trainer import DOPDTrainer

NAMES = ["math", "code", "code", "math"]
NARROW = TinySpec(num_layers=1, hidden_size=32)


def teachers() -> dict[str, Any]:
    """Of different widths and weights."""
    return {"math": teacher(1, TEACHER), "code": teacher(2, NARROW)}


def rows_of(*names: Any) -> list[dict[str, Any]]:
    return [row | {"teacher_id": name} for row, name in zip(task_rows(len(names)), names, strict=True)]


def a_trainer(folder: Path, method: str = "dopd", **options: Any) -> DOPDTrainer:
    defaults: dict[str, Any] = {
        "model": many_ends(student()),
        "train_dataset": Dataset.from_list(rows_of(*NAMES)),
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "generation_kwargs": GREEDY,
        "shuffle_dataset": False,
    }
    return trainer(folder, method, **(defaults | options))


@pytest.mark.parametrize("method", ["dopd", "vanilla_pg"])
def test_each_row_is_scored_and_taught_by_its_teacher(tmp_path: Path, method: str) -> None:
    """Mixed rows beside trainers of one teacher each: scores, and the loss by hand as the sum over the groups."""
    several = a_trainer(tmp_path / "several", method, teacher_models=teachers())
    rows = [row for row in several.train_dataset for _ in range(2)]
    several.model.train()
    (batch,) = several.scored_batch(rows)
    mixed = named(batch)
    assert batch.view.teachers == tuple(row["teacher_id"] for row in rows)
    loss = loss_of(several, batch)
    gradient = torch.autograd.grad(loss, [*several.model.parameters()])
    total, gradients = torch.zeros(()), [torch.zeros_like(one) for one in gradient]
    for name, model in teachers().items():
        alone = a_trainer(tmp_path / name, method, teacher_model=model)
        places = torch.tensor([number for number, row in enumerate(rows) if row["teacher_id"] == name])
        alone.model.train()
        (own,) = alone.scored_batch(rows)
        mine = named(own)
        for source in several.table.sources:
            for part in (f"logprobs/{source}", f"entropy/{source}"):
                assert torch.allclose(mixed[part][places], mine[part][places], atol=1e-6), part
        # The same decisions, and the teacher's own whole distributions.
        part = replace(
            own.at(places.tolist()), assignment=batch.assignment.at(places), num_sequences=batch.num_sequences
        )
        live = several.models.hidden_states(several.model, part.view, part.completion_ids, part.mask)
        routed = fused_routed_loss(
            live,
            Head.of_model(several.model),
            alone.step.targets(part),
            part.completion_ids,
            part.mask,
            several.table,
            backend="reference" if several.table.name != "vanilla_pg" else "auto",
            assignment=part.assignment,
            num_sequences=part.num_sequences,
            scores={source: scores.tokens for source, scores in part.sources.items()},
            merged_ids=several.step.merged_ids,
        )
        total = total + routed.loss.detach()
        for sum_, one in zip(gradients, torch.autograd.grad(routed.loss, [*several.model.parameters()]), strict=True):
            sum_ += one
    assert torch.allclose(loss.detach(), total, atol=1e-6)
    largest = max(float(one.abs().max()) for one in gradients)
    assert largest > 1e-4
    for one, other in zip(gradient, gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6 * max(1.0, largest))


def test_teachers_are_moved_once_for_a_batch_and_a_run_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = a_trainer(tmp_path, "dopd", teacher_models=teachers(), max_steps=2, trace_steps=1)
    moved: list[tuple[str, str]] = []
    parked = made.parked
    names = {id(model): name for name, model in parked.models.items()}
    monkeypatch.setattr(
        type(parked), "_move", lambda self, model, device: moved.append((names[id(model)], str(device)))
    )
    parked._device = torch.device("meta")  # another one than that of the CPU
    before = {name: parameters(model) for name, model in parked.models.items()}
    made.train()
    once = [("code", "meta"), ("code", "cpu"), ("math", "meta"), ("math", "cpu")]
    assert moved == once * 2
    for name, model in parked.models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in parameters(model).items())
    assert made.state.global_step == 2 and (tmp_path / "trace.jsonl").exists()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["math", None, "code", "math"], "row 1, column 'teacher_id': it names no teacher"),
        (["math", "code", "maths", "math"], "row 2, column 'teacher_id' (='maths'): there is no such teacher"),
    ],
)
def test_rows_name_a_teacher_that_is_there(tmp_path: Path, names: list[Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        a_trainer(tmp_path, teacher_models=teachers(), train_dataset=Dataset.from_list(rows_of(*names)))
    assert words in str(caught.value)


def test_what_cannot_be_is_refused_and_what_is_odd_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="column 'teacher_id' is missing"):
        a_trainer(tmp_path, teacher_models=teachers(), train_dataset=Dataset.from_list(task_rows(4)))
    with pytest.raises(ConfigError, match="teacher_models and teacher_model both bring the teacher"):
        a_trainer(tmp_path, teacher_models=teachers(), teacher_model=teacher())
    with pytest.raises(ConfigError, match="teacher_models and teacher_server"):
        a_trainer(tmp_path, "vanilla_pg", teacher_models={"math": "there"}, teacher_server="http://localhost:1")
    with pytest.raises(ConfigError, match=r"teacher_models\['math'\] \(='base'\)"):
        a_trainer(tmp_path, teacher_models={"math": "base"})
    with pytest.raises(ConfigError, match="must be a mapping"):
        a_trainer(tmp_path, teacher_models=["math"])
    with pytest.raises(ModelError, match=r"teacher_models\['math'\] \(='nowhere/there'\)"):
        a_trainer(tmp_path, teacher_models={"math": "nowhere/there"})
    with pytest.raises(ConfigError, match=r"teacher_models\['code'\]: teacher and student hold the same weights"):
        a_trainer(tmp_path, teacher_models={"math": teacher(), "code": student()})
    caplog.clear()
    a_trainer(tmp_path, teacher_models=teachers() | {"law": teacher(5)})
    assert "no row of train_dataset names the teacher(s) 'law'" in caplog.text
    assert "rows of train_dataset by teacher: math 2, code 2, law 0" in caplog.text


def test_a_method_that_reads_no_teacher_needs_no_names(tmp_path: Path) -> None:
    made = a_trainer(
        tmp_path, "privileged_student", teacher_models=teachers(), train_dataset=Dataset.from_list(task_rows(4))
    )
    assert not made.parked.models


def test_from_the_command_line(
    train: Train,  # noqa: F811
    models_of_one_layer: tuple[str, str],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is wrong is one error before anything is loaded; --dry-run, plan and the model card name all of them."""
    teacher_folder = models_of_one_layer[1]
    second = build_model(TinySpec(num_layers=2, hidden_size=48), TOKENIZER, 7)
    second.save_pretrained(tmp_path / "second")
    TOKENIZER.save_pretrained(tmp_path / "second")
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows_of(*["math", "code"] * 4)))
    models = {"math": teacher_folder, "code": str(tmp_path / "second")}
    flags: tuple[str, ...] = ("--task", "null", "--dataset_name", str(data))
    assert train(*flags, "--teacher_models", json.dumps(models)) == 2
    assert "teacher_models and teacher_model_name_or_path" in capsys.readouterr().err
    flags = (*flags, "--teacher_model_name_or_path", "null")
    assert train(*flags, "--teacher_models", json.dumps(models | {"law": str(tmp_path / "nothing")})) == 2
    assert "teacher_models['law']" in capsys.readouterr().err and not (tmp_path / "run").exists()
    no_names, flags = flags, (*flags, "--teacher_models", json.dumps(models))
    assert train(*flags, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "teacher_models['math']: Qwen3ForCausalLM" in shown and "by teacher: math 4, code 4" in shown
    assert main(["plan", str(tmp_path / "settings.yaml"), "--json", *flags]) == 0
    planned = json.loads(capsys.readouterr().out)
    sizes = [ModelSize.of(load_model(name, dtype="auto")) for name in models.values()]
    assert planned["waiting"] == sum(size.weights for size in sizes)
    assert planned["bytes"]["training"]["teacher"] == sum(4 * size.vocabulary * size.hidden for size in sizes)
    assert planned["bytes"]["scoring"]["teacher in its turn"] == max(size.weights for size in sizes)
    assert train(*flags) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| teacher of rows with teacher_id math | teacher |" in card
    assert "| teacher of rows with teacher_id code | second |" in card
    capsys.readouterr()
    other = ("--max_steps", "3", "--resume_from_checkpoint", "true")
    swapped = json.dumps({"math": models["code"], "code": models["math"]})
    assert train(*no_names, *other, "--teacher_models", swapped) == 2
    assert "teacher_model_name_or_path (its weights)" in capsys.readouterr().err


def test_teachers_on_servers_get_the_rows_that_name_them(
    tmp_path: Path,
    train: Train,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The weights after a step are those of the same teachers in this process; each row is asked for at its own."""
    models, after = teachers(), {}
    options: dict[str, Any] = {"teacher_model": None, "max_steps": 1, "gradient_accumulation_steps": 1}
    with serving(models["math"], TOKENIZER) as math, serving(models["code"], TOKENIZER) as code:
        urls = {"math": math.url, "code": [code.url]}
        for name, source in (("served", {"teacher_server": urls}), ("here", {"teacher_models": models})):
            made = a_trainer(tmp_path / name, "vanilla_pg", **(options | source), per_device_train_batch_size=8)
            before = parameters(made.model)
            made.train()
            after[name] = parameters(made.model)
        assert len(math.asked) == len(code.asked) == 4 + 1  # the first one tries the vocabulary
        data = tmp_path / "rows.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in rows_of(*["math", "code"] * 4)))
        flags = ("--task", "null", "--dataset_name", str(data), "--teacher_model_name_or_path", "null")
        flags = (*flags, "--method", "vanilla_pg", "--teacher_server", json.dumps(urls))
        assert train(*flags, "--dry-run") == 0
        shown = capsys.readouterr().out
        assert f"rows with teacher_id math: teacher on a server: teacher at {math.url}" in shown
        assert "rows of train_dataset by teacher: math 4, code 4" in shown
        assert train(*flags[:-1], json.dumps({"math": "there"})) == 2
        assert "teacher_server['math'] (='there') must be a URL" in capsys.readouterr().err
    assert any(not torch.equal(value, before[name]) for name, value in after["here"].items())
    for name, value in after["served"].items():
        torch.testing.assert_close(value, after["here"][name], rtol=1e-5, atol=1e-6)
