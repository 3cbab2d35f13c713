"""Weights are never invented: a tensor that is missing, cut or not the model's stops a run before training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
import vision_kit
from compatibility import tried
from safetensors.torch import load_file, save_file

from dopd.cli.main import main
from dopd.errors import ModelError
from dopd.weights import read_weights

Tensors = dict[str, torch.Tensor]
NAME = "model.layers.0.mlp.down_proj.weight"
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "every tensor renamed": (lambda w: {f"net.{name}": value for name, value in w.items()}, "are missing from it"),
    "one tensor missing": (lambda w: {name: value for name, value in w.items() if name != NAME}, f"missing.*{NAME}"),
    "one tensor cut": (lambda w: {**w, NAME: w[NAME][:-1].clone()}, f"another shape.*{NAME}"),
    "one tensor too many": (
        lambda w: {**w, "value_head.weight": w[NAME].clone()},
        "not in the model .value_head.weight",
    ),
    "a layer too many": (
        lambda w: {**w, **{n.replace("layers.1.", "layers.2."): v.clone() for n, v in w.items() if "layers.1." in n}},
        "not in the model .model.layers.2",
    ),
}


def saved(folder: Path, model: Any, change: Callable[[Tensors], Tensors] | None = None) -> str:
    model.save_pretrained(folder)
    kit.TOKENIZER.save_pretrained(folder)
    file = folder / "model.safetensors"
    if change is not None:
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_a_checkpoint_that_is_not_whole_trains_nothing(tmp_path: Path, role: str, what: str) -> None:
    change, words = BROKEN[what]
    names = {
        "model": saved(tmp_path / "student", kit.student()),
        "teacher_model": saved(tmp_path / "teacher", kit.teacher()),
    }
    make = kit.student if role == "model" else kit.teacher
    names[role] = saved(tmp_path / "broken", make(), change)
    with pytest.raises(ModelError, match=words):
        kit.trainer(tmp_path / "run", **names)
    tried("checkpoint", what, "refused: names the tensors")


def test_named_checkpoints_that_are_whole_hold_the_very_weights(tmp_path: Path) -> None:
    student, teacher = kit.student(3), kit.teacher(4)
    made = kit.trainer(
        tmp_path / "run",
        model=saved(tmp_path / "student", student),
        teacher_model=saved(tmp_path / "teacher", teacher),
        processing_class=None,
    )
    for mine, theirs in ((made.unwrapped_student, student), (made.unwrapped_teacher, teacher)):
        assert mine.dtype == theirs.dtype == torch.float32
        assert all(torch.equal(value, mine.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert made.processing_class.padding_side == "left" and made.args.model_init_kwargs is None


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    model = kit.student()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    kit.trainer(tmp_path / "run", model=saved(tmp_path / "student", model))


def test_evaluation_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "broken", kit.student(), BROKEN["one tensor missing"][0])
    assert main(["eval", path, "--task", "dag", "--prompts", "2"]) == 2
    assert NAME in capsys.readouterr().err


@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "gemma3", "paligemma", "internvl"])
def test_a_resumed_run_reads_image_families_that_name_tensors_otherwise_in_files(name: str, tmp_path: Path) -> None:
    processor = vision_kit.processor(name)
    model, other = (vision_kit.model(name, processor, seed=seed) for seed in (0, 1))
    model.save_pretrained(tmp_path)
    expected = model.state_dict()
    assert not expected.keys() <= load_file(tmp_path / "model.safetensors").keys()
    read_weights(str(tmp_path), other)
    assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())
    tried("checkpoint", f"a run of {name}, resumed", "exact: every weight is the checkpoint's")
