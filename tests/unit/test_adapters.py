"""Earlier students (frozen, snapshot, average) over every kind of adapter: what PEFT's own merged weights give."""

import ast
from pathlib import Path
from typing import Any

import adapter_kit as kit
import peft
import pytest
import torch
import trainer_kit
import vision_kit
from compatibility import tried
from peft import LoraConfig, get_peft_model

from dopd.adapters import effective_weights, layer_change, tuned_layers
from dopd.errors import ConfigError, ModelError
from dopd.trainer.anchor import AverageAnchor, FrozenAnchor, SnapshotAnchor
from dopd.trainer.guards import same_weights

# What PEFT says of adapters on tied embeddings and on layers that it does not list.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]


def check_anchors(model: Any, folder: Path) -> None:
    """Decay 0 is the student; decay 0.7 is the average of PEFT's merged weights; frozen and snapshot are what was."""
    initial, plain = kit.logits(model), [kit.merged(model)]
    none, average = AverageAnchor(model, 0.0), AverageAnchor(model, 0.7)
    frozen, snapshot = FrozenAnchor(model), SnapshotAnchor(model, steps=2)
    renewed = initial
    for step in range(3):
        kit.moved(model, step)
        plain.append(kit.merged(model))
        for anchor in (none, average, snapshot):
            anchor.after_step(model)
        renewed = kit.logits(model) if step == 1 else renewed
    live = kit.logits(model)
    close(kit.logits(plain[-1]), live)  # PEFT's merge is the student
    assert float((live - initial).abs().max()) > 0.01
    close(scored(none, model), live)
    expected = kit.logits(kit.average_of(plain, 0.7))
    close(scored(average, model), expected)
    assert float((expected - live).abs().max()) > 0.005
    assert torch.equal(scored(frozen, model), initial) and torch.equal(scored(snapshot, model), renewed)
    for number, (anchor, fresh) in enumerate(
        ((average, AverageAnchor(model, 0.7)), (frozen, FrozenAnchor(model)), (snapshot, SnapshotAnchor(model, 2)))
    ):
        place = folder / str(number)
        place.mkdir()
        anchor.save(place)
        fresh.load(place)
        assert torch.equal(scored(fresh, model), scored(anchor, model))
    assert torch.equal(kit.logits(model), live), "the student is as it was"


def scored(anchor: Any, model: Any) -> torch.Tensor:
    with anchor.scoring_model(model) as standing:
        return kit.logits(standing)


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", kit.ADAPTERS)
def test_earlier_students_over_adapters(name: str, tmp_path: Path) -> None:
    check_anchors(kit.adapted(kit.ADAPTERS[name]()), tmp_path)
    tried("adapter", name, "ema, frozen, snapshot and resume exact")


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@pytest.mark.parametrize("name", kit.NEWER)
def test_earlier_students_over_adapters_that_newer_releases_have(name: str, tmp_path: Path) -> None:
    try:
        config = kit.NEWER[name]()
    except (AttributeError, TypeError):
        pytest.skip(f"PEFT {peft.__version__} has no {name}")
    check_anchors(kit.adapted(config), tmp_path)
    tried("adapter", name, "ema, frozen, snapshot and resume exact")


@pytest.mark.parametrize("name", kit.ON_TIED)
def test_earlier_students_over_adapters_on_tied_embeddings(name: str, tmp_path: Path) -> None:
    check_anchors(kit.adapted(kit.ADAPTERS[name](), kit.tied()), tmp_path)
    tried("adapter", f"{name}, embeddings tied", "ema, frozen, snapshot and resume exact")


OTHERS = {
    "LoRA on an embedding that scales, tied (Gemma 3)": (kit.gemma, kit.ADAPTERS["LoRA on embeddings"]),
    "LoRA with target_parameters of experts": (
        kit.experts,
        lambda: LoraConfig(
            r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        ),
    ),
    "LoRA with target_parameters of a router": (
        kit.experts,
        lambda: LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]),
    ),
    "LoRA with a bias of its own on GPT-2": (
        kit.gpt2,
        lambda: LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, lora_bias=True),
    ),
    "DoRA on GPT-2": (kit.gpt2, lambda: LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_earlier_students_over_adapters_of_other_families(name: str, tmp_path: Path) -> None:
    base, config = OTHERS[name]
    check_anchors(kit.adapted(config(), base()), tmp_path)
    tried("adapter", name, "ema, frozen, snapshot and resume exact")


def test_two_adapters_of_which_both_act(tmp_path: Path) -> None:
    model = kit.adapted(kit.ADAPTERS["LoRA"]())
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    check_anchors(kit.moved(model, 4), tmp_path)


def test_an_adapter_beside_one_that_does_not_act(tmp_path: Path) -> None:
    model = kit.adapted(kit.ADAPTERS["LoRA"]())
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    model.set_adapter("second")
    check_anchors(kit.moved(model, 4), tmp_path)


def test_embeddings_resized_for_added_tokens_with_an_adapter(tmp_path: Path) -> None:
    cases = (
        (kit.tied(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
        (trainer_kit.student(), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[63, 64])),
        (trainer_kit.student(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])),
    )
    for number, (base, config) in enumerate(cases):
        base.resize_token_embeddings(70, mean_resizing=False)
        place = tmp_path / f"case{number}"
        place.mkdir()
        check_anchors(kit.adapted(config, base), place)
    tried("adapter", "LoRA on embeddings resized for added tokens", "ema, frozen, snapshot and resume exact")


def test_a_model_in_half_precision_keeps_an_adapters_small_change_apart() -> None:
    """bf16 weights plus a change below their rounding would be the weights: the average would be the base."""
    model = get_peft_model(trainer_kit.student().to(torch.bfloat16), kit.ADAPTERS["LoRA"]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-4)
    anchor = AverageAnchor(model, 0.0)
    for layer in tuned_layers(model).values():
        change = layer_change(layer)["weight"]
        weight = layer.get_base_layer().weight
        assert float(((weight + change.to(weight.dtype)) != weight).float().mean()) < 0.9, "rounding loses some of it"
    with anchor.scoring_model(model) as standing:
        for name, layer in tuned_layers(model).items():
            del layer
            inner = standing.get_submodule(name)
            x = torch.randn(2, inner.base_layer.in_features, dtype=torch.bfloat16)
            added = inner(x) - inner.base_layer(x)
            assert bool(added.abs().max() > 0)


def test_what_starts_to_train_later_is_not_silently_shared() -> None:
    model = trainer_kit.student()
    model.lm_head.requires_grad_(False)
    anchor = FrozenAnchor(model)
    model.lm_head.requires_grad_(True)
    with pytest.raises(ModelError, match=r"lm_head.weight trains, and did not"), anchor.scoring_model(model):
        pass


def test_an_anchor_follows_a_student_that_is_moved_to_another_precision() -> None:
    model = kit.adapted(kit.ADAPTERS["LoRA with modules_to_save lm_head and norm"]())
    average, frozen = AverageAnchor(model, 0.5), FrozenAnchor(model)
    model.double()
    expected = kit.logits(model)
    torch.testing.assert_close(scored(frozen, model), expected, rtol=0, atol=1e-9)
    average.after_step(model)
    torch.testing.assert_close(scored(average, model), expected, rtol=0, atol=1e-5)


# --- The same weights


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "OFT", "IA3", "LoRA started as PiSSA", "TrainableTokens", "LNTuning"])
def test_a_fresh_adapter_is_nothing_and_a_trained_one_is_something(name: str) -> None:
    fresh = get_peft_model(trainer_kit.student(), kit.ADAPTERS[name]())
    assert same_weights(fresh, trainer_kit.student()) and same_weights(trainer_kit.student(), fresh)
    assert not same_weights(fresh, trainer_kit.student(seed=3))
    assert not same_weights(kit.moved(fresh, 1), trainer_kit.student())


def test_effective_weights_are_pefts_merged_ones() -> None:
    for name in ("LoRA with biases", "DoRA on embeddings", "LoRA with modules_to_save lm_head and norm", "OFT"):
        model = kit.adapted(kit.ADAPTERS[name]())
        expected = dict(kit.merged(model).named_parameters())
        found = effective_weights(model)
        assert found.keys() == expected.keys()
        for key, weight in found.items():
            torch.testing.assert_close(weight.make(), expected[key], rtol=1e-5, atol=1e-6)


def test_weights_that_zero3_has_split_are_compared_by_parts() -> None:
    """As DeepSpeed leaves them: the parameter is empty, this rank's part stands beside it."""

    def split(model: Any) -> Any:
        for parameter in model.parameters():
            parameter.ds_shape = parameter.shape
            parameter.ds_tensor = torch.cat([parameter.detach().flatten(), torch.zeros(3)])
            parameter.data = torch.empty(0)
        return model

    assert same_weights(split(trainer_kit.student()), split(trainer_kit.student()))
    assert same_weights(trainer_kit.student(), split(trainer_kit.student()))
    assert not same_weights(split(trainer_kit.student()), split(trainer_kit.student(seed=1)))
    assert not same_weights(trainer_kit.student(seed=1), split(trainer_kit.student()))
    tried("checkpoint", "weights split by ZeRO-3, teacher and student compared", "two different ones are not the same")


# --- Through the trainer


@pytest.mark.parametrize(
    "name",
    ["DoRA", "LoRA with modules_to_save lm_head and norm", "LoRA with trainable_token_indices", "IA3", "OFT", "VeRA"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_run_trains_the_adapter_and_averages_it(name: str, tied: bool, tmp_path: Path) -> None:
    model = kit.tied() if tied else trainer_kit.student()
    made = trainer_kit.trainer(
        tmp_path, model=model, peft_config=kit.ADAPTERS[name](), privileged_student="ema", ema_decay=0.6, max_steps=3
    )
    steps = [kit.merged(made.model)]
    made.add_callback(trainer_kit.AfterEveryStep(lambda: steps.append(kit.merged(made.model))))
    before = trainer_kit.parameters(made.model)
    made.train()
    moved = {key for key, delta in trainer_kit.update(before, made.model).items() if bool(delta.any())}
    assert moved and all(made.model.get_parameter(key).requires_grad for key in moved)
    close(kit.logits(kit.average_of(steps, 0.6)), scored(made.anchor, made.model.eval()))


@pytest.mark.parametrize("kind", ["ema", "frozen", "snapshot", "reference"])
def test_a_resumed_run_has_the_earlier_student_that_it_left(kind: str, tmp_path: Path) -> None:
    """Also of an adapter that was drawn with another seed than the resumed trainer draws."""
    options: dict[str, Any] = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    if kind == "reference":
        options["rules"] = [{"source": "reference", "divergence": "reverse_kl"}]
    else:
        options["privileged_student"] = kind
        options["snapshot_steps"] = 3

    def run(seed: int) -> Any:
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=kit.LINEAR, init_lora_weights=False, task_type="CAUSAL_LM")
        return trainer_kit.trainer(tmp_path, model=get_peft_model(trainer_kit.student(), config), **options)

    unbroken = run(1)
    unbroken.train()
    resumed = run(2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name in ("anchor", "initial"):
        if name == "initial" and kind != "reference":
            continue
        first, second = (scored(getattr(made, name), made.model.eval()) for made in (unbroken, resumed))
        assert torch.equal(first, second)


def test_dropout_that_an_adapter_asks_for_acts_in_the_trained_view_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoraConfig(r=2, target_modules=kit.LINEAR, lora_dropout=0.5, task_type="CAUSAL_LM")
    with caplog.at_level("WARNING", logger="dopd"):
        made = trainer_kit.trainer(tmp_path, model=trainer_kit.student(), peft_config=config)
    told = [
        record.message
        for record in caplog.records
        if "lora_dropout (=0.5) acts in the trained view alone" in record.message
    ]
    assert len(told) == 1
    kit.moved(made.model, 1)
    batch = trainer_kit.rollout(made)
    made.model.train()
    losses = {trainer_kit.loss_of(made, batch).item() for _ in range(3)}
    assert len(losses) == 3, "the trained view has dropout"
    views = {
        "privileged": trainer_kit.privileged_view(made, [made.train_dataset[n] for n in range(8)]),
        "plain": batch.batch.view,
    }
    again = trainer_kit.scored_again(made, views, batch)
    for source in made.table.sources:
        assert torch.equal(again[f"logprobs/{source}"], batch[f"logprobs/{source}"]), "no scored view has"
    tried("adapter", "lora_dropout", "acts in the trained view alone; said once")


def test_rollouts_are_drawn_without_an_adapters_dropout(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=kit.LINEAR, lora_dropout=0.9, task_type="CAUSAL_LM")
    made = trainer_kit.trainer(
        tmp_path,
        model=kit.moved(get_peft_model(trainer_kit.student(), config), 1),
        generation_kwargs=trainer_kit.GREEDY,
    )
    completions = [trainer_kit.rollout(made)["completion_ids"] for _ in range(2)]
    assert torch.equal(*completions)


# --- Refused by name, before anything is loaded


REFUSED = {
    "PromptTuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PrefixTuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "AdaLoRA": lambda: peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10),
    "AdaptionPrompt": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
    "LoRA on the output head": lambda: LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_cannot_be_trained_are_refused_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    config = REFUSED[name]()
    with pytest.raises(ConfigError, match=r"peft_config: .*(LoRA|modules_to_save)"):
        trainer_kit.trainer(tmp_path, model="no/such-model", peft_config=config)
    tried("adapter", name, "refused before anything is loaded")


def test_an_adapter_loaded_for_inference_is_refused(tmp_path: Path) -> None:
    get_peft_model(trainer_kit.student(), kit.ADAPTERS["LoRA"]()).save_pretrained(tmp_path / "adapter")
    frozen = peft.PeftModel.from_pretrained(trainer_kit.student(), tmp_path / "adapter")
    with pytest.raises(ConfigError, match="is_trainable=True"):
        trainer_kit.trainer(tmp_path, model=frozen)


def test_adapters_that_act_in_a_pass_of_the_whole_model_alone_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"peft_config: alora_invocation_tokens .*never act"):
        trainer_kit.trainer(tmp_path, model="no/such-model", peft_config=config)
    tried("adapter", "LoRA with alora_invocation_tokens", "refused before anything is loaded")


NAMELESS: dict[str, tuple[dict[str, Any], str]] = {
    "target_modules": ({"target_modules": ["q_prj", "v_proj"]}, r"target_modules names 'q_prj'.*'q_proj'"),
    "modules_to_save": ({"modules_to_save": ["lm_haed"]}, r"modules_to_save names 'lm_haed'.*'lm_head'"),
    "no module at all": ({"target_modules": ["q_prj"]}, r"peft_config: LORA cannot be put on Qwen3ForCausalLM .*q_prj"),
    "the head in a pattern": ({"target_modules": r".*(q_proj|lm_head)"}, r"peft_config: LORA cannot .*lm_head"),
}


@pytest.mark.parametrize("what", NAMELESS)
def test_names_of_an_adapter_that_nothing_has_are_refused(what: str, tmp_path: Path) -> None:
    given, words = NAMELESS[what]
    config = LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | given))
    with pytest.raises(ConfigError, match=words):
        trainer_kit.trainer(tmp_path, peft_config=config)
    tried("adapter", f"names that nothing has: {what}", "refused: names the field and the name")


def test_an_adapter_on_a_vision_tower_of_other_layers_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"peft_config: .*ClippableLinear.*take '.*' as target_modules") as caught:
        vision_kit.trainer("gemma4", tmp_path, peft_config=config)
    pattern = ast.literal_eval(str(caught.value).split(", take ")[1].split(" as target_modules")[0])
    made = vision_kit.trainer(
        "gemma4", tmp_path, peft_config=LoraConfig(r=2, target_modules=pattern, task_type="CAUSAL_LM")
    )
    assert {name.rpartition(".")[2] for name in tuned_layers(made.model)} == {"q_proj", "v_proj"}
    assert all("language_model" in name for name in tuned_layers(made.model))
    tried("adapter", "LoRA by names that a vision tower of other layers has", "refused: the pattern to use is named")


def test_what_training_leaves_in_a_layer_is_seen_before_training(tmp_path: Path) -> None:
    """MonteCLoRA keeps what its last pass sampled, with its graph, and cannot be copied from then on."""
    if not hasattr(peft, "MontecloraConfig"):
        pytest.skip("PEFT has no MonteCLoRA")
    config = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", monteclora_config=peft.MontecloraConfig()
    )
    with pytest.raises(ConfigError, match=r"privileged_student='ema' averages weights.*Use .*'frozen'"):
        trainer_kit.trainer(tmp_path, peft_config=config, privileged_student="ema")
    tried("adapter", "MonteCLoRA", "ema refused by name; frozen exact")
