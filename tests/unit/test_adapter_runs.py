"""Folders of runs with adapters as student, teacher and for evaluation; quantised students."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapter_kit as kit
import pytest
import torch
import trainer_kit
from compatibility import tried
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dopd.adapters import layer_change, tuned_layers
from dopd.checkpoints import load, origin_of
from dopd.cli.main import main
from dopd.errors import ConfigError, ModelError
from dopd.quantized import compute_as_stored, is_quantized, whole_weight
from dopd.runs.build import load_model, load_processing_class
from dopd.runs.settings import load_settings
from dopd.runs.train import make_config, make_trainer, train
from dopd.trainer.adapting import check_added_rows
from dopd.trainer.anchor import AverageAnchor, FrozenAnchor
from dopd.trainer.guards import same_weights

RUN: dict[str, Any] = {
    "model_name_or_path": "tiny:dag/student",
    "teacher_model_name_or_path": "tiny:dag/teacher",
    "method": "vanilla",
    "task": "dag",
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_steps": 2,
    "max_completion_length": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": "none",
    "train_prompts": 8,
    "eval_prompts": 4,
    "learning_rate": 1e-2,
    "use_peft": True,
    "lora_r": 2,
    "lora_target_modules": ["q_proj", "down_proj"],
}


def run(folder: Path, **options: Any) -> Path:
    return train(load_settings(None, output_dir=str(folder), **(RUN | options)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "lora")


def by_hand(folder: Path) -> Any:
    """The adapter of a folder on the shipped model, as a user of PEFT would put them together."""
    return PeftModel.from_pretrained(load_model("tiny:dag/student"), folder).eval()


def test_a_run_with_an_adapter_and_its_checkpoints_open_as_models(finished: Path) -> None:
    base = kit.logits(load_model("tiny:dag/student"))
    for folder in (finished, finished / "checkpoint-1", finished / "checkpoint-2"):
        opened = kit.logits(load_model(str(folder)).eval())
        assert torch.equal(opened, kit.logits(by_hand(folder)))
        assert float((opened - base).abs().max()) > 1e-3
        merged = load_model(str(folder), merged=True).eval()
        assert type(merged).__name__ == "Qwen3ForCausalLM"
        torch.testing.assert_close(kit.logits(merged), opened, rtol=0, atol=1e-4)
        assert load_processing_class(str(folder)).get_vocab() == trainer_kit.TOKENIZER.get_vocab()
    tried("checkpoint", "folder of a run with an adapter, and its checkpoint-N", "base and adapter are loaded")


def test_evaluation_and_inspection_of_a_run_with_an_adapter(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--task", "dag", "--prompts", "2", "--max-new-tokens", "4", "--json"]
    assert main(["eval", str(finished), *options, "--teacher", str(finished / "checkpoint-1")]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["num_prompts"] == 2
    asked = [
        "--student",
        str(finished),
        "--teacher",
        "tiny:dag/teacher",
        "--prompt",
        "v1 = 3 .",
        "--max-new-tokens",
        "3",
    ]
    assert main(["inspect", *asked, "--privileged", "3"]) == 0


def test_an_adapter_goes_on_training(finished: Path, tmp_path: Path) -> None:
    """From its own weights; the base stays, and what is saved is the one adapter on the one base."""
    settings = load_settings(
        None, output_dir=str(tmp_path / "on"), **(RUN | {"model_name_or_path": str(finished)} | NEW)
    )
    made = make_trainer(settings, make_config(settings))
    assert torch.equal(kit.logits(made.model.eval()), kit.logits(by_hand(finished)))
    again = run(tmp_path / "on", model_name_or_path=str(finished), **NEW)
    config = json.loads((again / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == origin_of(str(finished))[0]
    assert config["r"] == 2
    assert torch.equal(kit.logits(load_model(str(again)).eval()), kit.logits(by_hand(again)))
    assert not torch.equal(kit.logits(by_hand(again)), kit.logits(by_hand(finished)))
    tried("checkpoint", "folder of a run with an adapter as the student", "the adapter goes on training")


NEW: dict[str, Any] = {"use_peft": False, "lora_target_modules": None}


def test_a_new_adapter_on_a_run_with_an_adapter(finished: Path, tmp_path: Path) -> None:
    """The old one becomes part of the weights; the folder says what it stands on, however deep."""
    second = run(tmp_path / "second", model_name_or_path=str(finished), lora_r=3)
    third = run(tmp_path / "third", model_name_or_path=str(second / "checkpoint-1"), lora_r=1)
    weights = by_hand(finished).merge_and_unload()
    weights = PeftModel.from_pretrained(weights, second / "checkpoint-1").merge_and_unload()
    expected = kit.logits(PeftModel.from_pretrained(weights, third).eval())
    torch.testing.assert_close(kit.logits(load_model(str(third)).eval()), expected, rtol=0, atol=1e-5)
    tried("checkpoint", "a new adapter on a run with an adapter", "merged below the new one")


def test_a_run_with_an_adapter_as_the_teacher(finished: Path, tmp_path: Path) -> None:
    settings = load_settings(
        None, output_dir=str(tmp_path), **(RUN | {"teacher_model_name_or_path": str(finished), "use_peft": False})
    )
    made = make_trainer(settings, make_config(settings))
    assert torch.equal(kit.logits(made.teacher_model), kit.logits(by_hand(finished)))
    assert not any(weight.requires_grad for weight in made.teacher_model.parameters())
    made.train()
    tried("checkpoint", "folder of a run with an adapter as the teacher", "base and adapter are loaded")


def test_the_trainer_takes_an_adapters_folder_by_name(finished: Path, tmp_path: Path) -> None:
    made = trainer_kit.trainer(
        tmp_path, "vanilla", model=str(finished), teacher_model=load_model("tiny:dag/teacher"), processing_class=None
    )
    assert torch.equal(kit.logits(made.model.eval()), kit.logits(by_hand(finished)))
    made.train()


def test_the_layers_that_a_run_kept_are_the_ones_that_its_adapter_stands_on(tmp_path: Path) -> None:
    folder = run(tmp_path / "cut", student_keep_layers=[1], max_steps=1)
    opened = load_model(str(folder))
    assert len(opened.base_model.model.model.layers) == 1
    base = load_model("tiny:dag/student")
    base.model.layers = nn.ModuleList([base.model.layers[1]])
    base.model.layers[0].self_attn.layer_idx = 0
    base.config.num_hidden_layers, base.config.layer_types = 1, base.config.layer_types[1:2]
    expected = PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(kit.logits(opened.eval()), kit.logits(expected))


def test_a_run_that_goes_on_with_an_adapter_keeps_what_the_first_made_of_its_base(tmp_path: Path) -> None:
    """At a rate of 0 the second is the first one: of the same layers, packed in the same way."""
    still = {"max_steps": 1, "learning_rate": 0.0}
    first = run(tmp_path / "first", student_keep_layers=[1], load_in_4bit=True, **still)
    second = run(tmp_path / "second", use_peft=False, model_name_or_path=str(first), **still)
    opened = load_model(str(second)).eval()
    assert any(map(is_quantized, opened.modules()))
    assert torch.equal(kit.logits(opened), kit.logits(load_model(str(first)).eval()))
    tried("checkpoint", "a run that goes on with an adapter whose base was cut or packed", "opens on that base")


def test_where_an_adapters_base_is_looked_for(finished: Path, tmp_path: Path) -> None:
    config = json.loads((finished / "adapter_config.json").read_text())
    alone, base = tmp_path / "alone", tmp_path / "base"
    load_model("tiny:dag/student").save_pretrained(base)
    alone.mkdir()
    (alone / "adapter_model.safetensors").write_bytes((finished / "adapter_model.safetensors").read_bytes())
    for named, found in (("../base", True), (str(base), True), ("tiny:dag/student", True), ("./gone", False)):
        (alone / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        if found:
            assert torch.equal(kit.logits(load_model(str(alone)).eval()), kit.logits(by_hand(finished)))
        else:
            with pytest.raises(ModelError, match=r"is an adapter, and its base model .*'./gone'.*is not here"):
                load_model(str(alone))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_embeddings_that_were_resized_under_an_adapter_open_again(tmp_path: Path) -> None:
    rows = {"trainable_token_indices": [64, 65]}
    cases: tuple[tuple[Any, list[str], dict[str, Any]], ...] = (
        (trainer_kit.student(), ["q_proj"], {}),
        (kit.tied(), ["q_proj"], {}),
        (kit.tied(), ["q_proj", "embed_tokens"], {}),
        (trainer_kit.student(), ["q_proj", "embed_tokens"], {"modules_to_save": ["lm_head"]}),
        (trainer_kit.student(), ["q_proj"], {"modules_to_save": ["lm_head", "embed_tokens"]}),
        (kit.tied(), ["q_proj"], {"modules_to_save": ["embed_tokens"]}),
        (trainer_kit.student(), ["q_proj"], rows),
        (kit.tied(), ["q_proj"], rows),
    )
    for number, (base, targets, more) in enumerate(cases):
        base.save_pretrained(tmp_path / f"base{number}")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / f"base{number}")
        base.resize_token_embeddings(70, mean_resizing=False)
        model = kit.moved(get_peft_model(base, LoraConfig(r=2, target_modules=targets, **more)), 1)
        check_added_rows(model)
        model.save_pretrained(tmp_path / f"adapter{number}")
        opened = load(str(tmp_path / f"adapter{number}")).eval()
        torch.testing.assert_close(kit.logits(opened), kit.logits(model.eval()), rtol=0, atol=1e-6)
    tried("checkpoint", "adapter with embeddings resized for added tokens", "opens as it was saved")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_rows_of_a_head_that_a_saved_adapter_would_lack_are_refused_and_the_advice_works(tmp_path: Path) -> None:
    trainer_kit.student().save_pretrained(tmp_path / "base")

    def made(base: Path, **options: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(base)
        if base.name == "base":
            model.resize_token_embeddings(70, mean_resizing=False)
        config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM", **options)
        teacher = trainer_kit.teacher()
        teacher.resize_token_embeddings(70, mean_resizing=False)
        return trainer_kit.trainer(tmp_path / "run", model=model, teacher_model=teacher, peft_config=config)

    with pytest.raises(ConfigError, match=r"embeddings of 70 rows.*63: .*rows of lm_head.*lm_head in modules_to_save"):
        made(tmp_path / "base")
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    resized.resize_token_embeddings(70, mean_resizing=False)
    resized.save_pretrained(tmp_path / "resized")
    made(tmp_path / "resized")
    made(tmp_path / "base", modules_to_save=["lm_head"])
    tried("checkpoint", "head resized beside an adapter on the input embeddings", "refused: both ways out work")


# --- Quantised students

pytest.importorskip("bitsandbytes", reason="4- and 8-bit weights need bitsandbytes: pip install 'dopd[quantized]'")
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
PACKED: dict[str, dict[str, Any]] = {
    "4 bit": FOUR,
    "4 bit, nested": FOUR | {"bnb_4bit_use_double_quant": True},
    "8 bit": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    trainer_kit.many_ends(trainer_kit.student()).save_pretrained(folder)
    return folder


def packed(folder: Path, bits: str) -> Any:
    options = BitsAndBytesConfig(**PACKED[bits])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.float32)
    compute_as_stored(model)
    return model


ADDED = ("LoRA", "rsLoRA", "LoRA with modules_to_save lm_head and norm", "LoRA with trainable_token_indices", "VeRA")


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("name", [*ADDED, "DoRA", "IA3", "OFT"])
def test_earlier_students_on_quantised_weights(name: str, bits: str, plain_folder: Path) -> None:
    """Against PEFT's own layers: an adapter of full rank on the same base that holds the average of the changes."""
    if bits == "8 bit" and name not in ADDED:
        model = get_peft_model(packed(plain_folder, bits), kit.ADAPTERS[name]())
        if name != "DoRA":  # bitsandbytes cannot run that one on a CPU at all
            with pytest.raises(ConfigError, match=r"privileged_student='ema' averages weights.*Use .*'frozen'"):
                AverageAnchor(model, 0.5)
            tried("adapter", f"{name}, {bits}", "ema refused by name; frozen, snapshot exact")
        return
    model = kit.moved(get_peft_model(packed(plain_folder, bits), kit.ADAPTERS[name]()).eval(), 3)
    initial, none, average, frozen = (
        kit.logits(model),
        AverageAnchor(model, 0.0),
        AverageAnchor(model, 0.6),
        FrozenAnchor(model),
    )
    plain = [merged_by_hand(model, name)]
    for step in range(2):
        kit.moved(model, step)
        plain.append(merged_by_hand(model, name))
        none.after_step(model)
        average.after_step(model)
    live = kit.logits(model)
    with none.scoring_model(model):
        torch.testing.assert_close(kit.logits(model), live, rtol=0, atol=1e-5)
    with frozen.scoring_model(model):
        assert torch.equal(kit.logits(model), initial)
    with average.scoring_model(model):
        found = kit.logits(model)
    expected = kit.logits(kit.average_of(plain, 0.6))
    # 8 bit rounds the inputs of every layer too, which plain weights do not.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.25 if bits == "8 bit" else 2e-5)
    assert float((found - live).abs().max()) > 0.005
    tried("adapter", f"{name}, {bits}", "ema, frozen and resume exact")


def merged_by_hand(model: Any, name: str) -> Any:
    """PEFT's own merge of the same adapter on plain weights that hold the numbers of the packed ones."""
    base = trainer_kit.student()
    held = {key.replace(".base_layer", ""): module for key, module in model.base_model.model.named_modules() if key}
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            module = held[key.rpartition(".")[0]]
            module = getattr(module, "original_module", module)
            own = type(module.weight).__name__ in ("Params4bit", "Int8Params")
            parameter.copy_(whole_weight(module) if own else module.weight)
    twin = get_peft_model(base, kit.ADAPTERS[name]())
    set_peft_model_state_dict(twin, get_peft_model_state_dict(model))
    return kit.merged(twin)


def test_what_a_packed_weight_holds_is_what_its_layer_computes_with(plain_folder: Path) -> None:
    for bits in PACKED:
        layer = packed(plain_folder, bits).model.layers[0].mlp.up_proj
        read = layer(torch.eye(layer.in_features)).T
        torch.testing.assert_close(whole_weight(layer), read, rtol=0, atol=1e-3 if bits == "8 bit" else 1e-6)


@pytest.mark.parametrize("bits", PACKED)
def test_a_quantised_student_trains_is_averaged_evaluated_and_saved(
    bits: str, plain_folder: Path, tmp_path: Path
) -> None:
    def made(steps: int) -> Any:
        return trainer_kit.trainer(
            tmp_path,
            model=packed(plain_folder, bits),
            peft_config=kit.ADAPTERS["LoRA"](),
            privileged_student="ema",
            ema_decay=0.6,
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            optim="adamw_torch",
            learning_rate=1e-2,
            verifier=trainer_kit.TASK.verify,
            eval_dataset=trainer_kit.Dataset.from_list(trainer_kit.task_rows(2, split="test")),
            student_eval_steps=2,
        )

    unbroken = made(4)
    changes = [all_changes(unbroken.model)]
    unbroken.add_callback(trainer_kit.AfterEveryStep(lambda: changes.append(all_changes(unbroken.model))))
    unbroken.train()
    assert all(bool(changes[-1][name].any()) for name in changes[-1]), "every tuned layer has trained"
    average = changes[0]
    for current in changes[1:]:
        average = {name: 0.6 * average[name] + 0.4 * current[name] for name in average}
    for name, changed in unbroken.anchor._changes.items():
        torch.testing.assert_close(changed["weight"], average[name], rtol=1e-4, atol=1e-7)
    assert trainer_kit.records(unbroken, "eval_accuracy_greedy")
    resumed = made(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with unbroken.anchor.scoring_model(unbroken.model), resumed.anchor.scoring_model(resumed.model):
        assert torch.equal(kit.logits(unbroken.model.eval()), kit.logits(resumed.model.eval()))
    opened = PeftModel.from_pretrained(packed(plain_folder, bits), tmp_path / "checkpoint-4").eval()
    for name, parameter in opened.named_parameters():
        if "lora_" in name:  # as the host has them on quantised weights
            parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(kit.logits(opened), kit.logits(unbroken.model.eval()))
    tried("setting", f"a student in {bits} with LoRA and ema", "trains, evaluates, saves, resumes to the same average")


@torch.no_grad()
def all_changes(model: Any) -> dict[str, torch.Tensor]:
    """What each layer's adapter adds: alpha / r times B A (arXiv 2106.09685)."""
    return {
        name: layer.scaling["default"] * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        for name, layer in tuned_layers(model).items()
    }


def test_gradients_of_a_4_bit_student_are_those_of_plain_weights_with_its_numbers(
    plain_folder: Path, tmp_path: Path
) -> None:
    """Also after passes without gradient, which on some CPUs pack 4-bit weights for a kernel that has none."""
    adapter = kit.ADAPTERS["LoRA"]
    model = kit.moved(get_peft_model(packed(plain_folder, "4 bit"), adapter()), 2)
    with torch.no_grad():
        model.eval()(input_ids=kit.IDS)
    # TRL rounds adapters on quantised weights to bf16; the comparison is of the passes behind them.
    options = {"generation_kwargs": trainer_kit.GREEDY, "privileged_student": "frozen"}
    made = trainer_kit.trainer(tmp_path / "packed", model=model, **options)
    made.model.float()
    batch = trainer_kit.rollout(made)
    base = load_model(str(plain_folder))
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            module = model.base_model.model.get_submodule(key.rpartition(".")[0])
            module = getattr(module, "base_layer", module)
            parameter.copy_(whole_weight(module) if type(module.weight).__name__ == "Params4bit" else module.weight)
    twin = get_peft_model(base, adapter())
    set_peft_model_state_dict(twin, get_peft_model_state_dict(made.model))
    plain = trainer_kit.trainer(tmp_path / "plain", model=twin, **options)
    gradients = []
    for trainer in (made, plain):
        trainer.model.train()
        trainer_kit.loss_of(trainer, batch).backward()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[1].items():
        assert bool(gradient.any())
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("width", [48, 64])  # bitsandbytes' own kernel for CPUs takes multiples of 32 alone
def test_a_4_bit_model_is_evaluated_inspected_and_asked_as_a_teacher_by_the_weights_it_holds(
    width: int, tmp_path: Path
) -> None:
    """Against a model with those weights; some CPUs have a kernel for passes without gradient that rounds."""
    model = trainer_kit.teacher(spec=replace(trainer_kit.TEACHER, hidden_size=width))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    model.save_pretrained(tmp_path / "model")
    options = BitsAndBytesConfig(**FOUR)
    opened = load_model(str(tmp_path / "model"), quantization_config=options).eval()
    brought = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=options, dtype=torch.float32)
    made = trainer_kit.trainer(tmp_path / "run", teacher_model=brought)
    plain = load_model(str(tmp_path / "model")).eval()
    with torch.no_grad():
        for name, module in opened.named_modules():
            if type(module).__name__ == "Linear4bit":
                plain.get_submodule(name).weight.copy_(whole_weight(module))
        own = plain(input_ids=kit.IDS).logits
        for packed_model in (opened, made.unwrapped_teacher):
            torch.testing.assert_close(packed_model(input_ids=kit.IDS).logits, own, rtol=1e-4, atol=1e-4)
    tried("setting", f"a 4-bit model {width} wide: dopd eval, dopd inspect, teacher", "exact: by the weights it holds")


@pytest.mark.parametrize("bits", PACKED)
def test_quantised_models_are_the_same_or_not(bits: str, plain_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    trainer_kit.student(seed=4).save_pretrained(other)
    fresh = get_peft_model(packed(plain_folder, bits), kit.ADAPTERS["LoRA"]())
    assert same_weights(fresh, packed(plain_folder, bits)) and same_weights(fresh, load_model(str(plain_folder)))
    assert not same_weights(fresh, packed(other, bits)) and not same_weights(fresh, load_model(str(other)))
    assert not same_weights(packed(plain_folder, bits), packed(other, bits))
    assert not same_weights(kit.moved(fresh, 1), packed(plain_folder, bits))
    near = load_model(str(plain_folder))
    with torch.no_grad():  # a slightly different checkpoint of one family
        weight = near.model.layers[1].mlp.up_proj.weight
        weight += 0.01 * weight.abs().mean() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert not same_weights(fresh, near)
    with pytest.raises(ConfigError, match="hold the same weights"):
        trainer_kit.trainer(
            tmp_path / "run",
            model=packed(plain_folder, bits),
            teacher_model=load_model(str(plain_folder)),
            peft_config=kit.ADAPTERS["LoRA"](),
        )
    tried("checkpoint", f"a fresh adapter on the teacher's checkpoint in {bits}", "refused where views are compared")


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_run_from_its_config(bits: str, tmp_path: Path) -> None:
    """And its folder opens on weights that are packed as they were."""
    folder = run(tmp_path / "run", method="dopd_ema", **{bits: True})
    opened = load_model(str(folder)).eval()
    layer = next(iter(tuned_layers(opened).values()))
    assert type(layer.get_base_layer()).__name__ == ("Linear4bit" if bits == "load_in_4bit" else "Linear8bitLt")
    assert layer_change(layer)["weight"].abs().max() > 0
    with pytest.raises(ConfigError, match="cannot be merged exactly"):
        run(tmp_path / "second", model_name_or_path=str(folder), **{bits: True})
    tried("setting", bits, "used, with use_peft; the folder opens as it was packed")


def test_quantised_weights_that_nothing_would_train_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set use_peft=true"):
        run(tmp_path, model_name_or_path="no/such-model", use_peft=False, load_in_4bit=True)
    with pytest.raises(ConfigError, match="cannot both be"):
        run(tmp_path, model_name_or_path="no/such-model", load_in_8bit=True, load_in_4bit=True)


def test_an_adapter_that_cannot_run_on_quantised_weights_is_named(plain_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"PEFT cannot run LOHA on quantised weights.*use plain LoRA"):
        trainer_kit.trainer(tmp_path, model=packed(plain_folder, "4 bit"), peft_config=kit.ADAPTERS["LoHa"]())
    tried("adapter", "LoHa, 4 bit", "refused: PEFT cannot run it")


# --- What a config says of the student's checkpoint


def test_model_init_kwargs_reach_the_student(tmp_path: Path) -> None:
    settings = load_settings(
        None,
        output_dir=str(tmp_path),
        **(RUN | {"model_init_kwargs": {"attn_implementation": "eager", "dtype": "bfloat16"}, "use_peft": False}),
    )
    made = make_trainer(settings, make_config(settings))
    assert made.model.config._attn_implementation == "eager" and made.model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(str(tmp_path / "none"), revision="no_such_revision")
    tried("setting", "model_init_kwargs in a config", "used for the student")


def test_code_of_a_checkpoint_runs_if_it_is_trusted(tmp_path: Path) -> None:
    model = load_model("tiny:dag/student")
    model.save_pretrained(tmp_path / "own")
    load_processing_class("tiny:dag/student").save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "own_code.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n\n\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own-qwen'\n\n\n"
        "class OwnForCausalLM(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config |= {
        "model_type": "own-qwen",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"},
    }
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    options = RUN | {"model_name_or_path": str(tmp_path / "own"), "use_peft": False, "trust_remote_code": True}
    settings = load_settings(None, output_dir=str(tmp_path / "run"), **options)
    made = make_trainer(settings, make_config(settings))
    assert type(made.model).__name__ == "OwnForCausalLM"
    assert torch.equal(kit.logits(made.model.eval()), kit.logits(model.eval()))
    tried("setting", "trust_remote_code in a config", "used for student and tokenizer")


@pytest.mark.parametrize(
    ("given", "found"), [(["q_proj"], {"q_proj"}), ([r".*layers\.1.*q_proj"], r".*layers\.1.*q_proj")]
)
def test_one_name_of_a_module_is_a_name(given: list[str], found: Any, tmp_path: Path) -> None:
    """TRL makes one name a pattern, which matches no whole path."""
    settings = load_settings(None, output_dir=str(tmp_path / "run"), **(RUN | {"lora_target_modules": given}))
    made = make_trainer(settings, make_config(settings))
    assert made.model.peft_config["default"].target_modules == found
    assert len(tuned_layers(made.model)) == (1 if isinstance(found, str) else made.model.config.num_hidden_layers)
    tried("setting", "lora_target_modules: one name, or one pattern", "used as what it is")
