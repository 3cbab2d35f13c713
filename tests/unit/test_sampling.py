"""What answers are drawn from: nothing of a checkpoint's own settings, and what is scored is what is sampled."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from compatibility import tried
from transformers import GenerationConfig

from dopd.errors import ConfigError, ModelError, ScoringError
from dopd.runs.inspection import inspect_prompt
from dopd.sampling import Ending, drawn, ends_of, sampling_config

# What published checkpoints declare, and what somebody may have written beside it.
DECLARED = {
    "qwen2.5": {"do_sample": True, "top_p": 0.8, "top_k": 20, "temperature": 0.7, "repetition_penalty": 1.1},
    "min_p": {"do_sample": True, "min_p": 0.3, "typical_p": 0.3},
    "no_repeat": {"no_repeat_ngram_size": 1, "bad_words_ids": [[5], [6], [7]]},
    "lengths": {"min_new_tokens": 7, "min_length": 30, "max_length": 9},
    "cutoffs": {"epsilon_cutoff": 0.05, "eta_cutoff": 0.05, "top_h": 0.1},
    "forced": {"forced_eos_token_id": 1, "suppress_tokens": [5, 6, 7, 8], "sequence_bias": [[[9], 20.0]]},
    "engines": {"prompt_lookup_num_tokens": 3, "penalty_alpha": 0.6, "renormalize_logits": True, "guidance_scale": 2.0},
}
EOS = kit.TOKENIZER.eos_token_id


def declaring(model: Any, settings: dict[str, Any]) -> Any:
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0, **settings)
    return model


def by_hand(model: Any, prompts: list[list[int]], count: int, seed: int | None) -> list[list[int]]:
    """Token by token from the model's own full logits; `None` takes the likeliest token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    if seed is not None:
        torch.manual_seed(seed)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(count):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1].float()
        next_B = logits.argmax(-1) if seed is None else torch.multinomial(logits.softmax(-1), 1).squeeze(1)
        next_B = torch.where(done, 0, next_B)
        ids, mask = torch.cat([ids, next_B[:, None]], 1), torch.cat([mask, torch.ones_like(next_B)[:, None]], 1)
        done |= next_B == EOS
        if done.all():
            break
    return [Ending([EOS]).cut(row) for row in ids[:, width:].tolist()]


@torch.no_grad()
@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.parametrize("seed", [None, 3])
def test_nothing_that_a_checkpoint_declares_reaches_an_answer(name: str, seed: int | None) -> None:
    model = declaring(kit.student().eval(), DECLARED[name])
    rows = kit.task_rows(6)
    evaluator = kit.evaluator(rows, lambda text, row: 0.0, 12, seed=0)
    prompts = [kit.TOKENIZER.apply_chat_template(r["prompt"], add_generation_prompt=True)["input_ids"] for r in rows]
    torch.manual_seed(3)
    answers = evaluator.answers(model, [row["prompt"] for row in rows], sampled=seed is not None)
    assert answers == by_hand(model, prompts, 12, seed)
    assert model.generation_config.to_diff_dict().items() >= DECLARED[name].items(), "what will be saved is as it was"
    tried("checkpoint", f"generation config: {', '.join(DECLARED[name])}", "none of it reaches rollouts or evaluation")


@pytest.mark.parametrize("adapter", [False, True])
def test_rollouts_are_those_of_a_checkpoint_that_declares_nothing(tmp_path: Path, adapter: bool) -> None:
    both = []
    for settings in ({}, {**DECLARED["qwen2.5"], **DECLARED["min_p"], **DECLARED["no_repeat"], "min_new_tokens": 5}):
        options = {"peft_config": kit.lora()} if adapter else {}
        made = kit.trainer(tmp_path, model=declaring(kit.student(), settings), **options)
        both.append(kit.rollout(made)["completion_ids"])
    assert torch.equal(*both)


OFF_POLICY = [
    {"top_p": 0.9},
    {"top_k": 20},
    {"min_p": 0.1},
    {"repetition_penalty": 1.1},
    {"generation_kwargs": {"do_sample": False}},
    {"generation_kwargs": {"min_new_tokens": 4}},
    {"generation_kwargs": {"typical_p": 0.9}},
    {"generation_kwargs": {"no_repeat_ngram_size": 3}},
    {"generation_kwargs": {"cache_implementation": "quantized"}},  # keys and values in few bits
    {"cache_implementation": "quantized"},
]


@pytest.mark.parametrize("options", OFF_POLICY, ids=str)
def test_a_setting_that_the_scores_do_not_follow_needs_leave(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)another distribution.*off_policy_rollouts"):
        kit.config(tmp_path, **{"off_policy_rollouts": False} | options)
    kit.config(tmp_path, off_policy_rollouts=True, **options)
    ((name, value),) = options.get("generation_kwargs", options).items()
    name = f"{name}={value}" if isinstance(value, str) else name
    tried("setting", f"{name} in rollouts", "refused unless off_policy_rollouts; then told")


def test_an_allowed_setting_acts_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = kit.trainer(tmp_path, top_k=1, off_policy_rollouts=True)
    assert "top_k=1" in caplog.text
    greedy = kit.trainer(tmp_path, generation_kwargs={"do_sample": False})
    assert torch.equal(kit.rollout(made)["completion_ids"], kit.rollout(greedy)["completion_ids"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generation_kwargs": {"temperature": 0.1}}, "key temperature"),
        ({"generation_kwargs": {"max_new_tokens": 4}}, "max_completion_length"),
        ({"generation_kwargs": {"num_return_sequences": 4}}, "num_generations"),
        ({"generation_kwargs": {"top_pp": 0.4}}, "Did you mean 'top_p'"),
        ({"generation_kwargs": {"stop": ["w1"]}}, "Did you mean 'stop_strings'"),  # vLLM's name of it
        ({"temperature": 0}, "of at least 0.0001"),
        ({"temperature": -1.0}, "of at least 0.0001"),
        ({"temperature": float("nan")}, "of at least 0.0001"),
        ({"max_completion_length": 0}, "at least 1"),
        ({"max_completion_length": None}, "at least 1"),
        ({"remove_unused_columns": True}, "privileged_context"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_refused_with_its_fix(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        kit.config(tmp_path, **{"off_policy_rollouts": False} | options)


@pytest.mark.parametrize("declared", [False, True])
def test_stop_strings_end_an_answer_and_count_as_an_end(tmp_path: Path, declared: bool) -> None:
    words = kit.TOKENIZER.decode(list(range(10, 40))).split()
    model = declaring(kit.student(), {"stop_strings": words} if declared else {})
    options = {} if declared else {"generation_kwargs": {"stop_strings": words}, "off_policy_rollouts": False}
    made = kit.trainer(tmp_path, model=model, verifier=lambda text, row: 1.0, **options)
    batch = kit.rollout(made)
    ended = 0
    for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
        text = kit.TOKENIZER.decode(ids[mask.bool()].tolist())
        assert not any(word in text.removesuffix(text.split()[-1]) for word in words), "nothing follows a stop string"
        ended += any(word in text for word in words) or EOS in ids[mask.bool()].tolist()
    metrics = made._metrics["train"]
    assert metrics["completions/eos_ratio"][-1] == metrics["rollout/accuracy"][-1] == ended / len(batch["prompt_ids"])
    tried(
        "setting",
        "stop strings of " + ("the checkpoint" if declared else "generation_kwargs"),
        "used; they end answers",
    )


def test_ids_outside_of_the_models_vocabulary_are_named_before_a_device_would_fail() -> None:
    model, ending = kit.student(), Ending([EOS])
    config = sampling_config(ending, max_new_tokens=2, pad_token_id=0, sampled=False)
    with pytest.raises(ModelError, match="resize_token_embeddings"):
        ids = torch.tensor([[5, model.config.vocab_size]])
        drawn(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, config, ending)


@pytest.mark.parametrize("value", [-100, 1.5, float("nan"), None, "yes"])
def test_a_score_outside_of_0_and_1_is_no_accuracy(tmp_path: Path, value: Any) -> None:
    model = kit.many_ends(kit.student(), 40)
    with pytest.raises(ScoringError, match="number from 0"):
        kit.rollout(kit.trainer(tmp_path, model=model, verifier=lambda text, row: value))


CONTRADICTORY = {
    "temperature and top_p without do_sample": ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True}),
    "cache_implementation without a cache": ({"cache_implementation": "static", "use_cache": False}, {}),
    "early_stopping without beams": ({"early_stopping": True, "length_penalty": 0.5, "stop_strings": ["w"]}, {}),
}


@pytest.mark.parametrize("name", CONTRADICTORY)
def test_a_generation_config_that_transformers_would_not_save_is_mended_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """transformers loads it with a warning, and raises when the trained model is saved."""
    settings, added = CONTRADICTORY[name]
    given = GenerationConfig(eos_token_id=[EOS, 7], pad_token_id=0)
    given.update(**settings)
    model = kit.student()
    model.generation_config = given
    kit.trainer(tmp_path, model=model, save_strategy="steps", save_steps=1).train()
    assert "generation_config.json will be saved with" in caplog.text
    saved = GenerationConfig.from_pretrained(tmp_path / "checkpoint-1")
    assert saved.eos_token_id == [EOS, 7] and saved.stop_strings == settings.get("stop_strings")
    if added:
        assert saved.to_diff_dict().items() >= {**settings, **added}.items()
    tried("checkpoint", f"generation config that contradicts itself: {name}", "trained and saved; told")


def test_a_sound_generation_config_is_saved_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = kit.trainer(tmp_path, model=declaring(kit.student(), DECLARED["qwen2.5"]))
    assert "generation_config.json" not in caplog.text
    assert made.unwrapped_student.generation_config.to_diff_dict().items() >= DECLARED["qwen2.5"].items()


def test_a_tokenizer_without_an_end_takes_that_of_the_model(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(kit.TOKENIZER)
    tokenizer.eos_token = tokenizer.pad_token = None
    model = declaring(kit.student(), {})
    made = kit.trainer(tmp_path, model=model, processing_class=copy.deepcopy(tokenizer))
    assert made.ending.token_ids == [EOS] and made.tokenizer.pad_token_id == EOS
    kit.rollout(made)
    model.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match=r"no token ends an answer.*tokenizer\.eos_token"):
        ends_of(model, tokenizer)


@pytest.mark.parametrize(("end", "pad"), [(999, 0), ([EOS, -5], 0), (EOS, 999)])
def test_an_end_or_padding_outside_of_the_vocabulary_is_refused_where_answers_are_drawn(end: Any, pad: int) -> None:
    tokenizer = copy.deepcopy(kit.TOKENIZER)
    if pad == 999:
        tokenizer.add_tokens([f"more{count}" for count in range(3)])
        tokenizer.pad_token = "more2"
        pad = tokenizer.pad_token_id
    number = pad or (end if isinstance(end, int) else end[1])
    model = kit.student()
    model.generation_config.eos_token_id = end
    words = rf"\(id {number}\) is outside of the model's vocabulary of {len(kit.TOKENIZER)} tokens"
    with pytest.raises(ModelError, match=words):
        ends_of(model, tokenizer)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_return_sequences": 4}, r"its generation_config\.json contradicts itself, correct it there.*Greedy"),
        ({"cache_implementation": "none"}, r"its generation_config\.json contradicts itself, correct it there"),
        ({"eos_token_id": "<|im_end|>"}, r"(?=.*generation_config\.json).*eos_token_id \(='<\|im_end\|>'\)"),
    ],
    ids=str,
)
def test_a_generation_config_that_cannot_be_read_is_named(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    folder = tmp_path / "model"
    kit.student().save_pretrained(folder)
    kit.TOKENIZER.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ModelError, match=words):
        kit.trainer(tmp_path / "run", model=str(folder))
    with pytest.raises(ModelError, match=words):
        inspect_prompt(str(folder), None, "a", "b", method="privileged_student", max_new_tokens=2)
    tried("checkpoint", f"generation config that cannot be read: {next(iter(settings))}", "refused: names the file")
