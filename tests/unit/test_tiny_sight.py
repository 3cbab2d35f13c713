"""Tiny vision-language models: pretraining reads what the processor makes, models see, and a saved one opens again."""

import dataclasses
import json
import random

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen3VLForConditionalGeneration

from dopd.errors import ConfigError
from dopd.tasks import ScenesTask, get_task
from dopd.tiny import SightSpec, build_sight_model
from dopd.tiny.sight import IMAGE_PAD, IMAGE_TOKENS
from dopd.vision import load_processor
from lab.tiny import (
    SightKit,
    SightRecipe,
    measure_accuracy,
    pretrain,
    prompt_with_privilege,
    render_prompt,
    tiny_model_path,
)

SMALL = SightSpec(num_layers=2, hidden_size=24, num_heads=2, vision_layers=1, vision_size=16)
RECIPE = SightRecipe(
    task="scenes",
    kinds={"none": 1.0, "box_label": 1.0},
    grounding={"questions": ("scan",)},
    grounding_steps=2,
    spec=SMALL,
    steps=4,
    batch_size=4,
)
TASK = get_task("scenes")


@pytest.fixture(scope="module")
def kit():
    return SightKit(TASK.vocabulary())


@pytest.fixture(scope="module")
def model(kit):
    return build_sight_model(SMALL, kit.processing_class, seed=3)


def test_model_is_a_stock_qwen3_vl(kit, model):
    assert type(model) is Qwen3VLForConditionalGeneration
    assert model.config.text_config.vocab_size == len(kit.tokenizer)
    assert model.generation_config.eos_token_id == kit.tokenizer.eos_token_id
    same, other = (build_sight_model(SMALL, kit.processing_class, seed=seed) for seed in (3, 4))
    assert torch.equal(model.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    projection = model.model.visual.merger.linear_fc1.weight
    assert projection.std().item() == pytest.approx(projection.shape[1] ** -0.5, rel=0.1)


@pytest.mark.parametrize("split", ["test", "ood"])
def test_tokenizer_loses_nothing(kit, split):
    for index in range(20):
        example = TASK.example(split, index)
        for text in (example.prompt, example.solution, *example.privileged.values()):
            ids = kit.tokenizer(text)["input_ids"]
            assert len(ids) == len(text.split())
            assert kit.tokenizer.unk_token_id not in ids
            assert kit.tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ScenesTask.privileged_kinds)
def test_training_inputs_are_what_the_processor_makes(kit, kind):
    inputs, targets = kit.batch(TASK, kind, start=0, size=3)
    rows = TASK.rows("train", 3, kind)
    for i, row in enumerate(rows):
        text = prompt_with_privilege(row["prompt"][0]["content"], row["privileged_context"])
        rendered = f"{render_prompt(kit.processing_class, text, 1)} {row['solution']} <eos>"
        whole = kit.processing_class(images=[row["images"]], text=[rendered], return_tensors="pt")
        ids = whole["input_ids"][0, :-1]
        assert inputs["input_ids"][i, : len(ids)].tolist() == ids.tolist()
        assert inputs["attention_mask"][i].tolist() == [1] * len(ids) + [0] * (targets.shape[1] - len(ids))
        types = inputs["mm_token_type_ids"][i]
        assert types[: len(ids)].tolist() == whole["mm_token_type_ids"][0, :-1].tolist()
        patches = len(inputs["pixel_values"]) // 3
        assert torch.equal(inputs["pixel_values"][i * patches : (i + 1) * patches], whole["pixel_values"])
        assert inputs["image_grid_thw"][i].tolist() == whole["image_grid_thw"][0].tolist()
        completion = targets[i][targets[i] != -100].tolist()
        assert completion == [*kit.tokenizer(row["solution"]).input_ids, kit.tokenizer.eos_token_id]
        assert whole["input_ids"][0, -len(completion) :].tolist() == completion


def test_prompts_are_the_rows_and_blank_ones_differ_in_the_image_alone(kit):
    rows = TASK.rows("test", 3, "box_label")
    seen, blank = kit.prompts(rows), kit.prompts(rows, blank=True)
    assert torch.equal(seen["input_ids"], blank["input_ids"])
    assert not torch.equal(seen["pixel_values"], blank["pixel_values"])
    assert blank["pixel_values"].unique().numel() == 1
    assert (seen["input_ids"] == kit.tokenizer.convert_tokens_to_ids(IMAGE_PAD)).sum(1).tolist() == [IMAGE_TOKENS] * 3


def test_the_model_sees(kit, model):
    inputs, _ = kit.batch(TASK, "none", start=0, size=2)
    with torch.no_grad():
        before = model.model(**inputs).last_hidden_state
        half = len(inputs["pixel_values"]) // 2
        swapped = {**inputs, "pixel_values": inputs["pixel_values"].roll(half, 0)}
        assert not torch.allclose(before, model.model(**swapped).last_hidden_state, atol=1e-2)


def test_a_recipe_shows_scenes_first_then_questions_then_privileged_text():
    recipe = dataclasses.replace(RECIPE, kinds={"box_label": 1.0}, steps=6, plain_steps=4)
    drawn = [recipe.draw(step, random.Random(0)) for step in range(6)]
    assert [knobs for knobs, _ in drawn] == [{"questions": ("scan",)}] * 2 + [{}] * 4
    assert [kind for _, kind in drawn] == ["none"] * 4 + ["box_label"] * 2


def test_equal_seeds_give_equal_weights():
    first, _, card = pretrain(RECIPE, seed=1, num_problems=0)
    torch.manual_seed(99)
    second, _, again = pretrain(RECIPE, seed=1, num_problems=0)
    third, _, _ = pretrain(RECIPE, seed=2, num_problems=0)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)
    assert card["loss"] == again["loss"]


def test_training_lowers_the_loss_and_reaches_every_weight(kit):
    untrained = kit.build_model(SMALL, 0)
    recipe = dataclasses.replace(RECIPE, batch_size=16)
    _, _, few = pretrain(recipe, num_problems=0)
    trained, _, more = pretrain(dataclasses.replace(recipe, steps=40), num_problems=0)
    assert more["loss"] < few["loss"] - 0.5
    weights = dict(trained.named_parameters())
    assert [name for name, weight in untrained.named_parameters() if torch.equal(weight, weights[name])] == []


class _Oracle(torch.nn.Module):
    """Writes the gold solutions of the test split where it gets the true images, and nothing where they are blank."""

    def __init__(self, kit, count):
        super().__init__()
        self.config = build_sight_model(SMALL, kit.processing_class).config
        texts = [f"{row['solution']} <eos>" for row in TASK.rows("test", count)]
        self.completions = kit.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").input_ids

    def generate(self, input_ids, pixel_values, suppress_tokens, max_new_tokens, **rest):
        assert {self.config.image_token_id, self.config.video_token_id} <= set(suppress_tokens)
        assert max_new_tokens >= TASK.completion_words() + 1
        shown = self.completions if pixel_values.unique().numel() > 1 else torch.zeros_like(self.completions)
        return torch.cat([input_ids, shown], dim=1)


def test_accuracy_is_measured_with_images_and_without(kit):
    oracle = _Oracle(kit, 8)
    for kind in TASK.privileged_kinds:
        assert measure_accuracy(oracle, kit, TASK, kind, num_problems=8) == 1.0
        assert measure_accuracy(oracle, kit, TASK, kind, num_problems=8, blank=True) == 0.0


def test_cached_model_opens_again_with_its_processor(tmp_path):
    path = tiny_model_path("scenes", "student", recipe=RECIPE, cache_dir=tmp_path, num_problems=4)
    card = json.loads((path / "dopd_tiny.json").read_text())
    kinds = set(ScenesTask.privileged_kinds)
    assert set(card["accuracy"]) == {*kinds, "none_greedy", "box_label_greedy"}
    assert set(card["accuracy_blank"]) == kinds
    model = AutoModelForImageTextToText.from_pretrained(path)
    processor = load_processor(str(path))
    row = TASK.row("test", 0)
    text = render_prompt(processor, row["prompt"][0]["content"], 1)
    again = processor(images=[row["images"]], text=[text], return_tensors="pt")
    ours = SightKit(TASK.vocabulary()).prompts([{**row, "privileged_context": None}])
    for name, value in ours.items():
        assert torch.equal(value, again[name]), name
    assert model.config.text_config.vocab_size == len(processor.tokenizer)


def test_template_keeps_the_prompt_as_prefix(kit):
    picture = {"type": "image", "image": Image.new("RGB", (64, 64))}
    turn = {"role": "user", "content": [picture, {"type": "text", "text": "how many red ?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "none answer 0"}]}
    whole = kit.processing_class.apply_chat_template([turn, answer], tokenize=False)
    prompt = kit.processing_class.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert whole == f"{prompt} none answer 0 <eos>"
    plain = kit.tokenizer.apply_chat_template(
        [{"role": "user", "content": "how many red ?"}, {"role": "assistant", "content": "none answer 0"}],
        tokenize=False,
    )
    assert plain == "how many red ? : none answer 0 <eos>"


def test_wrong_settings_are_explained():
    with pytest.raises(ConfigError, match="vision_size: got 20"):
        SightSpec(vision_size=20)
    with pytest.raises(ConfigError, match="vision_layers: got 0"):
        SightSpec(vision_layers=0)
    with pytest.raises(ConfigError, match="grounding_steps: got 4, allowed: 0 to steps - 1 = 3"):
        dataclasses.replace(RECIPE, grounding_steps=4)
    with pytest.raises(ConfigError, match="plain_steps: got -1"):
        dataclasses.replace(RECIPE, plain_steps=-1)
    with pytest.raises(ConfigError, match="kinds: got 'hints_without_execution', allowed: 'none', 'final_answer'"):
        dataclasses.replace(RECIPE, kinds={"hints_without_execution": 1.0})
