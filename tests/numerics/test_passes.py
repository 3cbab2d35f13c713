"""What models are tried on before they are trained, evaluated or shown: that nothing is read before it is said, and
that no sequence changes another one.
"""

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import text_kit
import torch
import trainer_kit as kit
import transformers as tf
import vision_kit
from compatibility import tried
from datasets import Dataset
from torch import Tensor

from dopd.data.encode import encode_view
from dopd.data.views import plain_prompt
from dopd.errors import ModelError, ScoringError
from dopd.generation import check_generation
from dopd.runs.evaluate import evaluate_checkpoint
from dopd.runs.inspection import inspect_prompt
from dopd.scoring import left_padded, view_hidden_states
from dopd.trainer import passes, trials

SMALL = {"vocab_size": 63, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
NOT_CAUSAL = {
    "bert": lambda: tf.BertConfig(**SMALL),
    "roberta": lambda: tf.RobertaConfig(**SMALL, max_position_embeddings=128),
    "xlnet": lambda: tf.XLNetConfig(vocab_size=63, d_model=32, n_layer=2, n_head=4, d_inner=48),
}
HALVES = [torch.float32, torch.bfloat16]


def untrained(config: Any) -> Any:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", text_kit.FAMILIES)
def test_causal_families_pass_without_a_limit(name: str, dtype: torch.dtype) -> None:
    if name == "xlstm" and dtype != torch.float32:
        pytest.skip("its own forward pass mixes precisions")
    passes.check_passes("model", text_kit.build(name).to(dtype), longest=64)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_model_that_reads_what_follows_is_refused_however_little_it_takes_from_there(
    name: str, dtype: torch.dtype
) -> None:
    model = untrained(NOT_CAUSAL[name]()).to(dtype)
    view = left_padded([[3, 4, 5]], 0, torch.device("cpu"))
    ids = torch.tensor([[6, 7, 8], [6, 7, 9]])
    ones = torch.ones(1, 3)
    with torch.no_grad():
        first, second = (view_hidden_states(model, view, row.unsqueeze(0), ones) for row in ids)
    assert 0 < (first - second).abs().max() < 0.05 * first.abs().max()  # below the rounding that half precision has
    with pytest.raises(ModelError, match=r"model: .* is not causal here"):
        passes.check_causal("model", model)
    tried("text family", name, "refused: not causal")


def test_experts_that_get_one_token_more_are_no_leak() -> None:
    """Their rounding depends on the group that they compute; then the gradient decides, and it is exactly 0."""
    asked: list[bool] = []
    for seed in range(6):
        model = text_kit.build("qwen3 moe", seed)
        view, ids = left_padded([[6, 7]], 0, torch.device("cpu")), torch.tensor([[3, 4, 5]])
        asked.append(passes._reads_the_last_token(model, view, ids, torch.ones_like(ids), view_hidden_states))
        passes.check_causal("model", model)
    assert not any(asked)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_completions_that_are_marked_as_prompt_are_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PaliGemma reads tokens of type 0 in both directions: what it predicts then saw what it is scored on."""
    monkeypatch.setattr("dopd.scoring.types_behind", marked_as_prompt)
    processor = vision_kit.processor("paligemma")
    student, teacher = (vision_kit.model("paligemma", processor, seed=seed).to(dtype) for seed in (0, 1))
    view = encode_view(processor, [plain_prompt(row) for row in vision_kit.rows(2)], {}, "cpu")
    with pytest.raises(ModelError, match=r"model: PaliGemma.* is not causal here.*token_type_ids"):
        passes.check_causal("model", student, view)
    with pytest.raises(ModelError, match=r"PaliGemma.* is not causal here"):
        vision_kit.trainer("paligemma", tmp_path, model=student, teacher_model=teacher)


def marked_as_prompt(model: Any, types: dict[str, Tensor], num_tokens: int) -> dict[str, Tensor]:
    return {name: torch.nn.functional.pad(values, (0, num_tokens)) for name, values in types.items()}


def saved(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    kit.TOKENIZER.save_pretrained(folder)
    return str(folder)


def test_evaluation_and_inspection_try_their_models_too(tmp_path: Path) -> None:
    """In half precision, where the limits on rounding would let this one through."""
    bert = saved(tmp_path / "bert", untrained(NOT_CAUSAL["bert"]()))
    good = saved(tmp_path / "llama", text_kit.build("llama"))
    with pytest.raises(ModelError, match="model: BertLMHeadModel is not causal here"):
        evaluate_checkpoint(bert, "dag", prompts=4, max_new_tokens=4, dtype="bfloat16")
    with pytest.raises(ModelError, match="teacher: BertLMHeadModel is not causal here"):
        evaluate_checkpoint(good, "dag", prompts=4, max_new_tokens=4, dtype="bfloat16", teacher_name=bert)
    with pytest.raises(ModelError, match="teacher: BertLMHeadModel is not causal here"):
        inspect_prompt(good, bert, "1 + 2", "3", max_new_tokens=4, dtype="bfloat16")


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoders_are_refused_by_name_before_weights_are_read(name: str, tmp_path: Path) -> None:
    config: Any = tf.BartConfig(vocab_size=63, d_model=32) if name == "bart" else tf.T5Config(vocab_size=63, d_model=32)
    config.save_pretrained(tmp_path)
    kit.TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"model.*\(model_type '{name}'\) is an encoder-decoder.*decoder-only"):
        evaluate_checkpoint(str(tmp_path), "dag")
    with pytest.raises(ModelError, match=r"teacher_model: .* is an encoder-decoder"):
        kit.trainer(tmp_path / "run", teacher_model=str(tmp_path))
    tried("text family", name, "refused: encoder-decoder")


# --- Lengths


def lengthening(model: Any) -> Any:
    """A model whose frequencies depend on the furthest position, and whose configuration does not say so."""
    rotary = model.model.rotary_emb
    original = rotary.forward

    def forward(x: Tensor, position_ids: Tensor, **more: Any) -> Any:
        return original(x, position_ids * (1.0 if position_ids.max() < 20 else 0.5), **more)

    rotary.forward = forward
    return model


def test_frequencies_that_depend_on_the_length_in_an_unknown_way_are_refused(tmp_path: Path) -> None:
    model = lengthening(text_kit.build("llama"))
    with pytest.raises(ModelError, match=r"model: LlamaForCausalLM gives the first tokens .* other states"):
        passes.check_length("model", model, 64)
    passes.check_length("model", model, 20)  # no sequence of such a run gets there
    with pytest.raises(ModelError, match="its positions depend on the length"):
        kit.trainer(tmp_path, model=model, teacher_model=text_kit.build("llama", 1))


def test_split_models_of_several_frequencies_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would run as many passes as its own sequences need, and they wait for one another."""
    student, teacher = (text_kit.build("phi3 longrope", seed) for seed in (0, 1))
    made = kit.trainer(tmp_path, model=student, teacher_model=teacher)
    monkeypatch.setattr(made, "is_fsdp_enabled", True)
    with pytest.raises(ModelError, match=r"model: Phi3ForCausalLM changes its rotation frequencies behind 24 tokens"):
        trials.check_passes(made, None, frozenset())
    made.args.max_prompt_length = text_kit.SWITCH - made.max_completion_length
    trials.check_passes(made, None, frozenset())


# --- Rollouts


def test_a_model_that_draws_from_another_distribution_is_refused(tmp_path: Path) -> None:
    model = text_kit.build("llama")
    model.prepare_inputs_for_generation = without_positions(model.prepare_inputs_for_generation)
    with pytest.raises(ModelError, match="draws tokens from another distribution than it is scored by"):
        check_generation("model", model)
    with pytest.raises(ModelError, match="draws tokens from another distribution"):
        kit.trainer(tmp_path, model=model, teacher_model=text_kit.build("llama", 1))


def without_positions(original: Any) -> Any:
    """Positions that start anew at every token, as after a lost cache position."""

    @wraps(original)
    def prepare(*arguments: Any, **named: Any) -> dict[str, Any]:
        inputs = original(*arguments, **named)
        inputs["position_ids"] = torch.zeros_like(inputs["position_ids"])
        return dict(inputs)

    return prepare


def test_a_split_model_is_tried_with_its_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are whole there only. Once for each source, by the trainer's own route."""
    made = kit.trainer(tmp_path)
    monkeypatch.setattr(type(made), "is_split", True)
    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        "dopd.trainer.models.check_causal",
        lambda name, model, view, **options: seen.append((name, options["gradients"])),
    )
    kit.rollout(made)
    kit.rollout(made)
    assert sorted(seen) == [("privileged_student", False), ("privileged_teacher", False)]


@pytest.mark.parametrize("family", ["phi3 longrope", "llama dynamic"])
def test_answers_that_cross_a_change_of_frequencies_are_told_and_stop_the_run(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are drawn with the frequencies of a prefix, and scored with those of the whole."""
    rows = Dataset.from_list(kit.uneven_rows(8))  # of 3 to 24 tokens; the switch is at 24
    options: dict[str, Any] = {"train_dataset": rows, "method": "vanilla", "max_completion_length": 8}
    models = {"model": text_kit.build(family), "teacher_model": text_kit.build(family, 1)}
    made = kit.trainer(tmp_path / "refused", **models, **options)
    assert "changes its rotation frequencies behind 24 tokens" in caplog.text
    with pytest.raises(ScoringError, match=r"of 8 answers grew across 24 tokens.*off_policy_rollouts"):
        kit.rollout(made)
    kit.rollout(kit.trainer(tmp_path / "allowed", **models, off_policy_rollouts=True, **options))
    short = options | {"train_dataset": rows.select(range(4)), "per_device_train_batch_size": 4}
    kit.rollout(kit.trainer(tmp_path / "short", **models, **short))
    tried("text family", f"{family}, answers that cross its switch", "refused unless off_policy_rollouts; then told")


def test_a_model_that_cannot_run_is_named_with_what_its_own_code_says() -> None:
    """xLSTM mixes precisions in half precision."""
    with pytest.raises(ModelError, match=r"model: xLSTMForCausalLM cannot run a few tokens in torch.bfloat16: "):
        passes.check_passes("model", text_kit.build("xlstm").to(torch.bfloat16))
