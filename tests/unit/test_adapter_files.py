"""Files of adapters and of resumed checkpoints: where they are looked for, and that every tensor of them is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_kit as kit
import pytest
import torch
import trainer_kit
from compatibility import tried
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dopd.bases import marks_of_base, write_base
from dopd.errors import ConfigError, ModelError
from dopd.runs.build import load_model, load_processing_class
from dopd.weights import read_weights

# PEFT warns of what is then refused.
pytestmark = pytest.mark.filterwarnings("ignore:Found missing adapter keys while loading the checkpoint:UserWarning")

Tensors = dict[str, torch.Tensor]
FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
NORM, ROWS = "layers.0.self_attn.q_norm.weight", "trainable_tokens_delta"
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "every tensor renamed": (lambda w: {f"net.{name}": value for name, value in w.items()}, "missing"),
    "a factor missing": (lambda w: {n: v for n, v in w.items() if n != FACTOR}, rf"missing.*{FACTOR}"),
    "a whole module missing": (lambda w: {n: v for n, v in w.items() if NORM not in n}, rf"{NORM} is missing"),
    "trained rows missing": (lambda w: {n: v for n, v in w.items() if ROWS not in n}, rf"{ROWS} is missing"),
    "a factor cut": (lambda w: {**w, FACTOR: w[FACTOR][:-1].clone()}, r"size mismatch.*q_proj.lora_B"),
    "a factor too many": (
        lambda w: {**w, FACTOR.replace("layers.0", "layers.7"): w[FACTOR].clone()},
        r"not in the model .*layers.7",
    ),
}
STEPS: dict[str, Any] = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 0.05,
}


def config() -> LoraConfig:
    return LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["q_norm"],
        trainable_token_indices=[1, 2],
        task_type="CAUSAL_LM",
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    trainer_kit.student().save_pretrained(folder)
    trainer_kit.TOKENIZER.save_pretrained(folder)
    return folder


def fresh(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize("what", BROKEN)
def test_an_adapter_that_is_not_whole_is_refused_by_its_tensors(what: str, base: str, tmp_path: Path) -> None:
    change, words = BROKEN[what]
    model = kit.adapted(config(), fresh(base))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(kit.logits(load_model(str(tmp_path / "adapter")).eval()), kit.logits(model))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=words):
        load_model(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match=words):  # where a resumed run reads it
        read_weights(str(tmp_path / "adapter"), model)
    tried("checkpoint", f"adapter: {what}", "refused: names the tensors")


def test_a_checkpoint_that_is_not_whole_gives_a_resumed_run_no_weights(tmp_path: Path) -> None:
    """Also where its manifest says that every file is as it was written."""
    model = trainer_kit.student()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    missing = next(key for key in whole if "q_proj" in key)
    save_file({key: value for key, value in whole.items() if key != missing}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"1 tensors are missing from it, and would be random \({missing}"):
        read_weights(str(tmp_path), model)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read: "):
        read_weights(str(tmp_path), model)
    tried("checkpoint", "a resumed checkpoint with a tensor missing", "refused: names the tensors")


def test_experts_are_resumed_and_the_best_are_loaded(tmp_path: Path) -> None:
    """Files hold experts one by one, and models all of a layer in one tensor."""
    unbroken = trainer_kit.trainer(tmp_path, model=kit.experts(), **STEPS)
    unbroken.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert any(".experts.0." in name for name in saved) and not saved.keys() >= unbroken.model.state_dict().keys()
    resumed = trainer_kit.trainer(tmp_path, model=kit.experts(), **STEPS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = unbroken.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    resumed.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    resumed._load_best_model()
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(kit.logits(resumed.model.eval()), kit.logits(best))
    assert not torch.equal(kit.logits(best), kit.logits(unbroken.model.eval()))
    tried("checkpoint", "a run of a mixture of experts, resumed", "exact: every expert is the checkpoint's")


def test_an_adapter_of_another_name_opens_and_resumes(base: str, tmp_path: Path) -> None:
    def made() -> Any:
        model = get_peft_model(fresh(base), trainer_kit.lora(), adapter_name="hinted")
        return trainer_kit.trainer(tmp_path, model=model, **STEPS)

    unbroken, resumed = made(), made()
    unbroken.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = kit.logits(unbroken.model.eval())
    assert torch.equal(kit.logits(resumed.model.eval()), expected)
    assert torch.equal(kit.logits(load_model(str(tmp_path / "checkpoint-4")).eval()), expected)
    tried("checkpoint", "folder of a run whose adapter has a name of its own", "base and adapter are loaded")


def test_of_several_adapters_a_folder_could_not_say_which_act(base: str, tmp_path: Path) -> None:
    model = get_peft_model(fresh(base), trainer_kit.lora())
    model.add_adapter("second", trainer_kit.lora(3))
    model.set_adapter("second")
    with pytest.raises(ConfigError, match=r"has the adapters default, second.*delete_adapter"):
        trainer_kit.trainer(tmp_path / "run", model=model)
    model.delete_adapter("default")
    trainer_kit.trainer(tmp_path / "run", model=model)
    model.add_adapter("third", trainer_kit.lora())
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(ModelError, match=r"holds the adapters second, third"):
        load_model(str(tmp_path / "both"))
    tried("adapter", "several adapters at once", "refused: a saved folder would not say which act; the advice works")


# --- On a hub that cannot be reached, from this machine's cache


def cached(cache: Path, name: str, revision: str, model: Any, *, tokenizer: bool = True) -> None:
    """Files of a model as the hub's client keeps them."""
    root, commit = cache / f"models--{name.replace('/', '--')}", f"{revision:a<40}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    model.save_pretrained(root / "snapshots" / commit)
    if tokenizer:
        trainer_kit.TOKENIZER.save_pretrained(root / "snapshots" / commit)


@pytest.mark.filterwarnings("ignore:Could not find a config file in someone/base:UserWarning")
def test_adapters_of_the_hub_are_read_from_the_cache_at_the_revision_that_is_meant(tmp_path: Path) -> None:
    cache, where = tmp_path / "cache", {"cache_dir": str(tmp_path / "cache")}
    cached(cache, "someone/base", "main", trainer_kit.student(1))
    cached(cache, "someone/base", "v1", trainer_kit.student(2))
    models = {}
    for revision, seed in (("main", 3), ("v2", 4)):
        models[revision] = kit.adapted(trainer_kit.lora(), load_model("someone/base", **where), seed)
        cached(cache, "someone/adapter", revision, models[revision], tokenizer=False)
    for revision, expected in models.items():
        opened = load_model("someone/adapter", revision=revision, **where).eval()
        assert torch.equal(kit.logits(opened), kit.logits(expected))
        assert len(load_processing_class("someone/adapter", revision=revision, **where)) == len(trainer_kit.TOKENIZER)
    # An adapter says which revision of its base it stands on.
    options = {"revision": "v1", **where}
    made = trainer_kit.trainer(
        tmp_path, model="someone/base", model_init_kwargs=options, peft_config=trainer_kit.lora(), max_steps=1
    )
    made.train()
    made.save_model(str(tmp_path / "saved"))
    assert torch.equal(kit.logits(load_model(str(tmp_path / "saved"), **where).eval()), kit.logits(made.model.eval()))
    with pytest.raises(ModelError, match=r"'someone/other' cannot be read: .*not in the cache"):
        load_model("someone/other", **where)
    tried("checkpoint", "adapter in the hub's cache, hub out of reach", "read, at the revision of adapter and of base")


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter, and no `config.yaml` beside it."""
    folder = tmp_path_factory.mktemp("trained")
    made = trainer_kit.lora_trainer(folder, model=AutoModelForCausalLM.from_pretrained(base), **STEPS)
    made.train()
    made.save_model()
    return folder


def with_base(adapter: Path, base: Path, folder: Path) -> Path:
    """A copy of an adapter's folder that names another base."""
    shutil.copytree(adapter, folder)
    named = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_knows_its_base_in_every_precision(
    dtype: str, stored: torch.dtype, trained: Path, base: str, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(base, dtype=stored).save_pretrained(tmp_path / "base")
    trainer_kit.TOKENIZER.save_pretrained(tmp_path / "base")
    load_model(str(with_base(trained, tmp_path / "base", tmp_path / "adapter")), dtype=dtype)


@pytest.mark.parametrize("of", ["", "checkpoint-2"])
@pytest.mark.parametrize("difference", ["another model", "one weight"])
def test_an_adapter_on_another_base_of_the_same_shape_is_refused(
    difference: str, of: str, trained: Path, base: str, tmp_path: Path
) -> None:
    other = trainer_kit.student(seed=7) if difference == "another model" else AutoModelForCausalLM.from_pretrained(base)
    if difference == "one weight":
        other.model.layers[1].mlp.up_proj.weight.data.mul_(1.1)
    other.save_pretrained(tmp_path / "base")
    adapter = with_base(trained / of, tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"was trained on another model than .*base'.*delete dopd_base\.json"):
        load_model(str(adapter))
    (adapter / "dopd_base.json").unlink()
    load_model(str(adapter))


def test_a_run_that_trains_an_adapter_goes_on_from_its_own_base_alone(trained: Path, tmp_path: Path) -> None:
    made = trainer_kit.lora_trainer(tmp_path / "run", model=trainer_kit.student(seed=7), **STEPS)
    with pytest.raises(ModelError, match="was trained on another model"):
        read_weights(str(trained / "checkpoint-2"), made.unwrapped_student)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1, "weights": [1]}', '{"format": 1, "weights": {"a": 1}}'])
def test_what_says_nothing_of_a_base_is_left_out(content: str, trained: Path, base: str, tmp_path: Path) -> None:
    adapter = with_base(trained, Path(base), tmp_path / "adapter")
    (adapter / "dopd_base.json").write_text(content)
    load_model(str(adapter))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT
@pytest.mark.parametrize("what", kit.ADAPTERS)
def test_every_kind_of_adapter_opens_on_its_base(what: str, base: str, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), kit.ADAPTERS[what]())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.01)
    model.save_pretrained(tmp_path)
    write_base(tmp_path, marks_of_base(model))
    load_model(str(tmp_path))
    assert (tmp_path / "dopd_base.json").is_file() == ("PiSSA" not in what)


def test_the_base_is_known_though_it_is_split_when_the_training_begins(base: str, tmp_path: Path) -> None:
    whole = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    made = trainer_kit.lora_trainer(tmp_path / "run", model=AutoModelForCausalLM.from_pretrained(base), **STEPS)
    made.unwrapped_student.save_pretrained(tmp_path)
    for weight in made.unwrapped_student.parameters():
        weight.data = weight.data.new_empty(0)  # no process has it whole any more
    write_base(tmp_path, made.base_marks)
    written = json.loads((tmp_path / "dopd_base.json").read_text())["weights"]
    assert set(written) == set(whole) - {name for name in whole if "lora" in name}
    for name, mark in written.items():
        flat = whole[name].detach().flatten().tolist()
        assert mark["values"][0] == flat[0] and mark["values"][-1] == flat[-1] and mark["shape"] == [*whole[name].shape]
