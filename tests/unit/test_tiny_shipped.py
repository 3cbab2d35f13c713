"""Tiny models that come with the package or the repository: lossless, checked, and taken before any is trained."""

import dataclasses
import json
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dopd.checkpoints import resolve_model
from dopd.errors import ConfigError, ModelError
from dopd.tiny import TinySpec, shipped
from dopd.tiny.shipped import fingerprint
from lab.tiny import RECIPES, Recipe, cache, model_fingerprint, packing, tiny_model_path

RECIPE = Recipe(task="dag", spec=TinySpec(num_layers=1, hidden_size=16, num_heads=2), steps=3, batch_size=4)


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A trained model, its file, and a package that ships it."""
    monkeypatch.setattr(packing, "FOLDER", tmp_path / "weights")
    trained = tiny_model_path("dag", "student", recipe=RECIPE, cache_dir=tmp_path / "first", num_problems=4)
    return trained, packing.pack(trained, RECIPE, tmp_path / "weights")


def test_a_shipped_model_is_the_trained_one_at_half_the_size(packed, tmp_path, monkeypatch):
    trained, file = packed

    def forbidden(*args, **kwargs):
        raise AssertionError("a shipped model must not be trained")

    monkeypatch.setattr(cache, "pretrain", forbidden)
    taken = tiny_model_path("dag", "student", recipe=RECIPE, cache_dir=tmp_path / "second")
    assert taken.name == trained.name == file.stem and taken != trained
    assert sorted(path.name for path in taken.iterdir()) == sorted(path.name for path in trained.iterdir())
    first, second = (AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (trained, taken))
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    assert model_fingerprint(taken) == model_fingerprint(trained) == fingerprint(first)
    assert (taken / "dopd_tiny.json").read_text() == (trained / "dopd_tiny.json").read_text()
    assert file.stat().st_size < 0.6 * (trained / "model.safetensors").stat().st_size


def test_it_is_trained_where_that_is_asked_for_or_the_recipe_is_another(packed, tmp_path, monkeypatch):
    trained, _ = packed
    calls = []

    def recorded(recipe, seed, output_dir, **kwargs):
        calls.append(recipe)
        (output_dir / "dopd_tiny.json").write_text("{}")

    monkeypatch.setattr(cache, "pretrain", recorded)
    tiny_model_path("dag", "student", recipe=RECIPE, cache_dir=tmp_path / "first", train=True)
    assert calls == [RECIPE] and (trained / "dopd_tiny.json").read_text() == "{}"
    other = dataclasses.replace(RECIPE, steps=4)
    tiny_model_path("dag", "student", recipe=other, cache_dir=tmp_path / "second")
    assert calls == [RECIPE, other]


def test_weights_that_are_not_those_of_the_card_are_refused(packed, tmp_path):
    _, file = packed
    weights = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, file, metadata=metadata)
    with pytest.raises(ModelError, match="not those of its card"):
        tiny_model_path("dag", "student", recipe=RECIPE, cache_dir=tmp_path / "second")
    assert not list((tmp_path / "second" / "tiny").iterdir())


def test_weights_that_half_precision_would_change_are_not_packed(packed, tmp_path):
    trained, _ = packed
    weights = load_file(trained / "model.safetensors")
    weights["lm_head.weight"][0, 0] = 1 + 2**-20
    save_file(weights, trained / "model.safetensors", metadata={"format": "pt"})
    card = json.loads((trained / "dopd_tiny.json").read_text())
    card["weights"] = fingerprint(AutoModelForCausalLM.from_pretrained(trained, dtype="float32"))
    (trained / "dopd_tiny.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="half precision would change"):
        packing.pack(trained, RECIPE, tmp_path)


SHIPPED = [
    ("dag", "student"),
    ("dag", "teacher"),
    ("dag", "teacher_needs_p"),
    ("scenes", "student"),
    ("scenes", "teacher"),
]


@pytest.mark.parametrize(("task", "role"), SHIPPED)
def test_the_wheel_has_the_models_of_the_quickstarts(task, role, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "lab_module", lambda name: None)
    monkeypatch.setenv("DOPD_CACHE", str(tmp_path))
    path = shipped.tiny_model_path(task, role)
    assert path == tmp_path / "tiny" / f"{task}-{role}-seed0-{cache.recipe_key(RECIPES[task][role], 0)}"
    tracked = subprocess.run(["git", "ls-files", shipped.FOLDER], capture_output=True, text=True, check=True).stdout
    assert f"{path.name}.safetensors" in tracked
    card = json.loads((path / "dopd_tiny.json").read_text())
    again = tiny_model_path(task, role, cache_dir=tmp_path / "lab")
    assert model_fingerprint(again) == model_fingerprint(path) == card["weights"]
    assert (again / "config.json").read_text() == (path / "config.json").read_text()


def test_a_model_that_is_not_shipped_is_refused_in_a_wheel_and_found_in_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("DOPD_CACHE", str(tmp_path))
    assert resolve_model("tiny:dag/student?seed=3") == str(tiny_model_path("dag", "student", 3))
    monkeypatch.setattr(shipped, "lab_module", lambda name: None)
    for name in ("dag/student?seed=3", "dag/boss?seed=0", "d*/student?seed=0", "chess/teacher?seed=0"):
        with pytest.raises(ConfigError) as caught:
            resolve_model(f"tiny:{name}")
        said = str(caught.value)
        assert said.startswith(f"model 'tiny:{name}': no ")
        assert "comes with dopd, which has tiny:dag/student?seed=0, " in said
    assert str(caught.value).count("tiny:") == 1 + len(SHIPPED)


def test_every_file_of_package_and_repository_belongs_to_a_recipe_as_it_is_now():
    names = {
        f"{task}-{role}-seed{seed}-{cache.recipe_key(recipe, seed)}"
        for task, roles in RECIPES.items()
        for role, recipe in roles.items()
        for seed in range(8)
    }
    files = [file for place in (shipped.FOLDER, packing.REPOSITORY_FOLDER) for file in place.glob("*.safetensors")]
    assert len({file.name for file in files}) == len(files) > 20
    assert [file.name for file in files if file.stem not in names] == []
    assert all(file.stat().st_size < 5_000_000 for file in files)
