"""Heads: from last hidden states to the logits that the model itself gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import dopd
from dopd.errors import ModelError
from dopd.heads import Head

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def qwen3(**options: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **options))


def gemma2(**options: Any) -> Any:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, sliding_window=8, **options))


def gemma3(**options: Any) -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, sliding_window=8, **options))


def cohere() -> Any:
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.0625))


def granite() -> Any:
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=8.0))


def hyperclovax() -> Any:
    return transformers.HyperCLOVAXForCausalLM(transformers.HyperCLOVAXConfig(**SIZES, logits_scaling=0.125))


def minicpm3() -> Any:
    sizes = {key: value for key, value in SIZES.items() if key not in ("head_dim", "num_key_value_heads")}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    config = transformers.MiniCPM3Config(**sizes, num_key_value_heads=2, **latent, dim_model_base=4)
    return transformers.MiniCPM3ForCausalLM(config)


def recurrent_gemma() -> Any:
    sizes = {key: value for key, value in SIZES.items() if key not in ("max_position_embeddings", "head_dim")} | {
        "num_hidden_layers": 3
    }
    config = transformers.RecurrentGemmaConfig(**sizes, lru_width=16, logits_soft_cap=0.5, attention_window_size=8)
    return transformers.RecurrentGemmaForCausalLM(config)


def phi() -> Any:
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return transformers.PhiForCausalLM(transformers.PhiConfig(**sizes))


def mpt() -> Any:
    config = transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=50, logit_scale=0.5)
    return transformers.MptForCausalLM(config)


def qwen3_vl() -> Any:
    text = SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    return transformers.Qwen3VLForConditionalGeneration(config)


TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def aya_vision() -> Any:
    text = transformers.Cohere2Config(**SIZES, logit_scale=0.0625)
    config = transformers.AyaVisionConfig(text_config=text, vision_config=transformers.SiglipVisionConfig(**TOWER))
    return transformers.AyaVisionForConditionalGeneration(config)


def llava_next_of_granite() -> Any:
    text = transformers.GraniteConfig(**SIZES, logits_scaling=8.0)
    config = transformers.LlavaNextConfig(text_config=text, vision_config=transformers.CLIPVisionConfig(**TOWER))
    return transformers.LlavaNextForConditionalGeneration(config)


def paligemma2() -> Any:
    text = transformers.Gemma2Config(**SIZES, sliding_window=8, final_logit_softcapping=0.5)
    vision = {"model_type": "siglip_vision_model", "projection_dim": 16, "vision_use_head": False, **TOWER}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=16, image_token_index=99
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3 tied": lambda: qwen3(tie_word_embeddings=True),
    "qwen3 untied": lambda: qwen3(tie_word_embeddings=False),
    "gemma2 soft cap": lambda: gemma2(final_logit_softcapping=0.5),
    "gemma2 without": lambda: gemma2(final_logit_softcapping=None),
    "gemma3 soft cap": lambda: gemma3(final_logit_softcapping=0.5),
    "recurrent_gemma soft cap": recurrent_gemma,
    "cohere logit_scale": cohere,
    "granite divides": granite,
    "hyperclovax multiplies": hyperclovax,
    "minicpm3 divides the hidden states": minicpm3,
    "mpt declares a scale that it never reads": mpt,
    "phi bias": phi,
    "qwen3_vl": qwen3_vl,
    "aya vision leaves its language model's scale out": aya_vision,
    "llava-next leaves its language model's scale out": llava_next_of_granite,
    "paligemma soft cap": paligemma2,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    built = MODELS[request.param]().eval()
    with torch.no_grad():  # large enough for a cap, a scale or a bias to show
        for parameter in built.get_output_embeddings().parameters():
            parameter.normal_(std=0.5)
    return built


def hidden_and_logits(model: Any) -> tuple[Tensor, Tensor]:
    ids = torch.arange(3, 13).view(2, 5)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden, model(input_ids=ids, attention_mask=mask).logits


def test_head_of_a_model_gives_the_models_own_logits(model: Any) -> None:
    hidden, expected = hidden_and_logits(model)
    torch.testing.assert_close(Head.of_model(model).logits(hidden).detach(), expected.float(), rtol=1e-5, atol=1e-6)


def test_bare_weight_would_not_give_the_logits_of_a_scaled_or_capped_model(model: Any) -> None:
    """Guards the test above: every special case of a model shows in its logits."""
    hidden, expected = hidden_and_logits(model)
    head = Head.of_model(model)
    special = head.bias is not None or head.logit_scale != 1.0 or head.softcap is not None
    bare = Head(head.weight).logits(hidden).detach()
    assert torch.allclose(bare, expected.float(), rtol=1e-3, atol=1e-3) != special


def test_temperature_divides_the_capped_logits(model: Any) -> None:
    hidden, expected = hidden_and_logits(model)
    logits = Head.of_model(model, temperature=0.7).logits(hidden).detach()
    torch.testing.assert_close(logits, expected.float() / 0.7, rtol=1e-5, atol=1e-5)


def test_head_shares_the_models_weight_so_that_a_tied_embedding_is_trained() -> None:
    for tied in (True, False):
        model = qwen3(tie_word_embeddings=tied)
        head = Head.of_model(model)
        assert head.weight is model.lm_head.weight
        assert (head.weight is model.model.embed_tokens.weight) == tied
        assert head.vocab_size == 50
        head.logits(torch.randn(3, 16)).sum().backward()
        assert model.lm_head.weight.grad is not None


def test_model_without_a_language_model_head_is_refused() -> None:
    with pytest.raises(ModelError, match="Qwen3Model has no output embedding"):
        Head.of_model(qwen3().model)


def test_logits_in_order_scale_cap_temperature() -> None:
    weight, bias = torch.randn(5, 3), torch.randn(5)
    hidden = torch.randn(2, 4, 3)
    head = Head(weight, bias, logit_scale=2.0, softcap=1.5, temperature=0.5)
    expected = 1.5 * torch.tanh(2.0 * (hidden @ weight.T + bias) / 1.5) / 0.5
    torch.testing.assert_close(head.logits(hidden), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_are_float32_or_wider(dtype: torch.dtype) -> None:
    logits = Head(torch.randn(5, 3), torch.randn(5)).logits(torch.randn(2, 3).to(dtype))
    assert logits.dtype == torch.promote_types(dtype, torch.float32)


def test_head_of_a_linear_a_weight_or_a_head() -> None:
    linear = nn.Linear(3, 5)
    hidden = torch.randn(2, 3)
    torch.testing.assert_close(Head.of(linear).logits(hidden), linear(hidden))
    torch.testing.assert_close(Head.of(linear.weight).logits(hidden), hidden @ linear.weight.T)
    head = Head(linear.weight)
    assert Head.of(head) is head
    with pytest.raises(ModelError, match=r"head is a str: pass a dopd.Head, an nn.Linear or a"):
        Head.of("lm_head")  # type: ignore[arg-type]


def test_gathered_head_keeps_everything_but_the_dtype_and_its_gradient() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    head = Head(weight, torch.randn(5), logit_scale=2.0, softcap=3.0, temperature=0.5)
    gathered = head.gathered(torch.float64)
    assert gathered.weight.dtype == torch.float64
    assert (gathered.logit_scale, gathered.softcap, gathered.temperature) == (2.0, 3.0, 0.5)
    gathered.logits(torch.randn(2, 3, dtype=torch.float64)).sum().backward()
    assert weight.grad is not None and dopd.Head is Head
