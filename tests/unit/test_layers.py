"""A student made of some layers is the model without the others, as it trains and as its checkpoint opens."""

from pathlib import Path
from typing import Any

import pytest
import text_kit as kit
import torch
import transformers as tf
from compatibility import tried
from torch import nn

from dopd.errors import ConfigError
from dopd.layers import keep_layers

_SMALL = {
    "vocab_size": kit.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": [1, 3, 5, 7],  # as many as layers
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
_LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 24, "head_dim": 8}
_OLD = {"vocab_size": kit.VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 2, "eos_token_id": 1}

FAMILIES: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**_SMALL),
    "gpt2": lambda: tf.GPT2Config(**_OLD),
    "smollm3": lambda: tf.SmolLM3Config(**_SMALL, no_rope_layers=[1, 0, 1, 1]),
    "qwen2 moe": lambda: tf.Qwen2MoeConfig(
        **_SMALL, **_EXPERTS, mlp_only_layers=[1], shared_expert_intermediate_size=24
    ),
    "qwen3 next": lambda: tf.Qwen3NextConfig(
        **_SMALL, **_EXPERTS, **_LINEAR, layer_types=["linear_attention", "full_attention"] * 2
    ),
}


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    made = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return made.eval()


class Nothing(nn.Module):
    """A layer that leaves the states as they are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name in ("layer_type", "attention_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden: Any, *rest: Any, **options: Any) -> Any:
        return hidden


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_student_is_the_model_without_the_other_layers(tmp_path: Path, family: str) -> None:
    kept = [1, 2]
    ids = torch.tensor([[5, 6, 7, 30, 31, 32, 33, 34]])
    whole, student = model_of(FAMILIES[family]()), keep_layers(model_of(FAMILIES[family]()), kept)
    layers = whole.get_decoder().h if family == "gpt2" else whole.get_decoder().layers
    for index in range(4):
        if index not in kept:
            layers[index] = Nothing(layers[index])
    expected = whole(input_ids=ids, use_cache=False).logits
    student.save_pretrained(tmp_path)
    opened = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for made in (student, opened):
        torch.testing.assert_close(made(input_ids=ids, use_cache=False).logits, expected)
    assert opened.config.eos_token_id == FAMILIES[family]().eos_token_id
    generated = student.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)  # with its cache
    uncached = student(input_ids=generated, use_cache=False).logits[0, ids.shape[1] - 1 : -1].argmax(-1)
    assert generated[0, ids.shape[1] :].tolist() == uncached.tolist()
    tried("setting", f"student_keep_layers, {family}", "exact: the model without the other layers, also as saved")


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({"decoder_sparse_step": 2}, [1, 2]), ({"decoder_sparse_step": 2}, [0, 2, 3])],
)
def test_layers_that_no_configuration_describes_are_refused(changes: dict[str, Any], kept: list[int]) -> None:
    model = model_of(tf.Qwen2MoeConfig(**_SMALL, **_EXPERTS, **changes, shared_expert_intermediate_size=24))
    message = rf"^student_keep_layers \(=\[{kept[0]}, .* its checkpoint would open as another model: mlp is Qwen2Moe"
    with pytest.raises(ConfigError, match=message):
        keep_layers(model, kept)
    tried("setting", "student_keep_layers that no configuration of the family describes", "refused: names the layer")


def test_layers_that_the_model_does_not_have_are_refused() -> None:
    model = model_of(FAMILIES["llama"]())
    with pytest.raises(ConfigError, match="must name layers of the model: 0 to 3"):
        keep_layers(model, [4])
    model.config.num_hidden_layers = 5
    with pytest.raises(ConfigError, match="no list of the 5 layers"):
        keep_layers(model, [0])
