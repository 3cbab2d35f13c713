"""Tiny models: a lossless tokenizer, equal weights for equal seeds, a cache that is complete or absent."""

import dataclasses
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from dopd.checkpoints import resolve_model
from dopd.errors import ConfigError
from dopd.tasks import PRIVILEGED_KINDS, get_task
from dopd.tiny import TinySpec, build_model, build_tokenizer
from dopd.tiny.tokenizer import TEXT_TASKS
from lab.tiny import (
    RECIPES,
    Recipe,
    TextKit,
    cache,
    kits,
    measure_accuracy,
    pretrain,
    prompt_with_privilege,
    render_prompt,
    tiny_model_path,
)
from lab.tiny.recipe import HintedRecipe, MixedRecipe

SMALL = TinySpec(num_layers=1, hidden_size=16, num_heads=2, mlp_ratio=2)
RECIPE = Recipe(
    task="dag",
    knobs={"num_needed": 1, "num_variables": 2},
    levels=({}, {"num_variables": 1}),
    spec=SMALL,
    steps=4,
    batch_size=4,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_tokenizer_loses_nothing(tokenizer, name):
    example = get_task(name).example("ood", 0)
    for text in (example.prompt, example.solution, *example.privileged.values()):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_tokenizer_contract(tokenizer, tmp_path):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer("A zebra").input_ids[1] == tokenizer.unk_token_id
    padded = tokenizer(["A", "A b C"], padding=True, return_tensors="pt")
    assert padded.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert set(padded) == {"input_ids", "attention_mask"}
    assert render_prompt(tokenizer, "D 1 3 ? D") == "D 1 3 ? D :"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "D 1 3 ? D"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert tokenizer.decode(ids) == "D 1 3 ? D :"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "D 1 3 ? D :"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    assert again.padding_side == "left"
    assert again.decode(again("D 1 3 ? D :").input_ids) == "D 1 3 ? D :"


def test_chat_template_keeps_the_prompt_as_prefix(tokenizer):
    turns = [{"role": "user", "content": "D 1 3 ? D"}, {"role": "assistant", "content": "D 1 3 1 3 4"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == "D 1 3 ? D : D 1 3 1 3 4 <eos>"
    parts = [{"role": "user", "content": [{"type": "text", "text": "D 1 3 ? D"}]}]
    assert whole.startswith(tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True))


def test_model_is_a_stock_qwen3(tokenizer):
    model = build_model(SMALL, tokenizer, seed=3)
    assert type(model) is Qwen3ForCausalLM
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.rope_parameters["rope_theta"] == 100
    projection = model.model.layers[0].mlp.down_proj.weight
    assert projection.std().item() == pytest.approx(projection.shape[1] ** -0.5, rel=0.1)
    same, other = (build_model(SMALL, tokenizer, seed=seed) for seed in (3, 4))
    assert torch.equal(model.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("kind", PRIVILEGED_KINDS)
def test_training_sequences_follow_the_format_contract(tokenizer, kind):
    task = get_task("graph")
    inputs, targets = TextKit().batch(task, kind, start=0, size=3)
    input_ids = inputs["input_ids"]
    for i in range(3):
        row = task.row("train", i, kind)
        text = prompt_with_privilege(row["prompt"][0]["content"], row["privileged_context"])
        prompt = tokenizer(render_prompt(tokenizer, text)).input_ids
        completion = [*tokenizer(row["solution"]).input_ids, tokenizer.eos_token_id]
        assert targets[i][targets[i] != -100].tolist() == completion
        real = input_ids[i][input_ids[i] != tokenizer.pad_token_id].tolist()
        assert [*real, tokenizer.eos_token_id] == prompt + completion
        assert targets[i, len(prompt) - 1] == completion[0]


def test_equal_seeds_give_equal_weights():
    first, _, card = pretrain(RECIPE, seed=1, num_problems=0)
    torch.manual_seed(99)
    threads = torch.get_num_threads()
    second, _, again = pretrain(RECIPE, seed=1, num_problems=0)
    third, _, _ = pretrain(RECIPE, seed=2, num_problems=0)
    assert torch.get_num_threads() == threads
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)
    assert card["loss"] == again["loss"]


def test_training_lowers_the_loss():
    recipe = dataclasses.replace(RECIPE, batch_size=16)
    _, _, few = pretrain(recipe, num_problems=0)
    _, _, more = pretrain(dataclasses.replace(recipe, steps=80), num_problems=0)
    assert more["loss"] < few["loss"] - 0.5


class _Oracle(torch.nn.Module):
    """Writes the gold solutions of the test split; `cut` leaves the end of sequence away."""

    def __init__(self, tokenizer, task, count, cut):
        super().__init__()
        texts = [f"{row['solution']}{'' if cut else ' <eos>'}" for row in task.rows("test", count)]
        self.completions = tokenizer(texts, return_tensors="pt", padding=True).input_ids

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, **sampling):
        assert max_new_tokens >= self.completions.shape[1]
        assert not self.training
        torch.rand(3)
        return torch.cat([input_ids, self.completions], dim=1)


@pytest.mark.parametrize("cut", [False, True])
def test_accuracy_is_measured_on_whole_answers(tokenizer, cut):
    kit = TextKit()
    task = get_task("dag")
    oracle = _Oracle(tokenizer, task, 8, cut)
    state = torch.get_rng_state()
    for kind in PRIVILEGED_KINDS:
        assert measure_accuracy(oracle, kit, task, kind, num_problems=8) == (0.0 if cut else 1.0)
    assert torch.equal(state, torch.get_rng_state())
    assert oracle.training


def test_cache_is_complete_or_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("DOPD_CACHE", str(tmp_path))
    path = tiny_model_path("dag", "student", recipe=RECIPE, num_problems=4)
    assert path.parent == tmp_path / "tiny"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    card = json.loads((path / "dopd_tiny.json").read_text())
    assert card["recipe"]["steps"] == 4
    assert set(card["accuracy"]) == {*PRIVILEGED_KINDS, "none_greedy"}
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(path))

    def forbidden(*args, **kwargs):
        raise KeyboardInterrupt("interrupted")

    monkeypatch.setattr(cache, "pretrain", forbidden)
    assert tiny_model_path("dag", "student", recipe=RECIPE) == path
    with pytest.raises(KeyboardInterrupt):
        tiny_model_path("dag", "student", seed=1, recipe=RECIPE)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_cache_accepts_the_model_of_a_faster_process(tmp_path, monkeypatch):
    def raced(recipe, seed, output_dir, **kwargs):
        name = f"dag-student-seed{seed}-{cache.recipe_key(recipe, seed)}"
        for folder in (output_dir, tmp_path / "tiny" / name):
            folder.mkdir(exist_ok=True)
            (folder / "dopd_tiny.json").write_text(str(folder == output_dir))

    monkeypatch.setattr(cache, "pretrain", raced)
    path = tiny_model_path("dag", "student", recipe=RECIPE, cache_dir=tmp_path)
    assert (path / "dopd_tiny.json").read_text() == "False"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_cache_key_covers_everything_that_decides_the_weights(monkeypatch):
    key = cache.recipe_key(RECIPE, 0)
    assert key == cache.recipe_key(dataclasses.replace(RECIPE), 0)
    others = [
        cache.recipe_key(RECIPE, 1),
        cache.recipe_key(dataclasses.replace(RECIPE, steps=5), 0),
        cache.recipe_key(dataclasses.replace(RECIPE, spec=TinySpec()), 0),
        cache.recipe_key(dataclasses.replace(RECIPE, knobs={"num_needed": 2}), 0),
    ]
    monkeypatch.setattr(cache, "RECIPE_VERSION", -1)
    others.append(cache.recipe_key(RECIPE, 0))
    monkeypatch.setattr(kits, "build_tokenizer", lambda: build_tokenizer(["one", "two"]))
    others.append(cache.recipe_key(RECIPE, 0))
    assert len({key, *others}) == 7


def test_named_recipes_are_complete():
    assert {"dag", "graph", "program", "scenes"} <= set(RECIPES)
    for task, roles in RECIPES.items():
        assert {"student"} <= set(roles) and ("teacher" in roles or task == "text")
        for recipe in roles.values():
            assert task in (recipe.task, "text")
            assert get_task(recipe.task, **recipe.knobs).completion_words() <= 26
            assert recipe.knobs == roles["student"].knobs


def test_wrong_settings_are_explained(tmp_path):
    with pytest.raises(ConfigError, match="task: got 'chess', allowed: dag"):
        tiny_model_path("chess", "student", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="role: got 'boss', allowed: teacher"):
        tiny_model_path("dag", "boss", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="model 'tiny:dag/boss': role: got 'boss'"):
        resolve_model("tiny:dag/boss")
    with pytest.raises(ConfigError, match="hidden_size: got 20"):
        TinySpec(hidden_size=20, num_heads=4)
    with pytest.raises(ConfigError, match="steps: got 0"):
        Recipe(task="dag", steps=0)
    with pytest.raises(ConfigError, match="kinds: got 'plan'"):
        Recipe(task="dag", kinds={"plan": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_mixed_recipe_trains_on_every_task_and_measures_each():
    mixed = MixedRecipe(
        task="dag",
        knobs={"num_needed": 1, "num_variables": 2},
        others=(
            Recipe(task="graph", knobs={"path_length": 2, "num_forks": 1}),
            HintedRecipe(
                task="program", knobs={"num_ops": 2}, levels=({"num_ops": 1},), hinted_levels=({"num_ops": 2},)
            ),
        ),
        spec=SMALL,
        steps=4,
        batch_size=4,
    )
    rng = random.Random(0)
    drawn = [mixed.draw(step, rng) for step in range(60)]
    assert {knobs.get("name", "dag") for knobs, _ in drawn} == {"dag", "graph", "program"}
    programs = [(knobs, kind) for knobs, kind in drawn if knobs.get("name") == "program"]
    assert {(knobs["num_ops"], kind == "none") for knobs, kind in programs} == {(1, True), (2, False)}
    assert all(set(knobs) == {"name", "num_ops"} for knobs, _ in programs)
    _, _, card = pretrain(mixed, num_problems=4)
    assert set(card["accuracy_graph"]) == set(card["accuracy"]) == {*PRIVILEGED_KINDS, "none_greedy"}
    seldom = dataclasses.replace(mixed, shares=(1.0, 98.0, 1.0))
    assert [seldom.draw(step, rng)[0].get("name") for step in range(20)].count("graph") > 15
    with pytest.raises(ConfigError, match=r"shares: got \(1.0,\), allowed: one number above 0"):
        dataclasses.replace(mixed, shares=(1.0,))
    with pytest.raises(ConfigError, match="others: got the tasks dag, dag"):
        dataclasses.replace(mixed, others=(Recipe(task="dag"),))
