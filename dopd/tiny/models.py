"""Real `Qwen3ForCausalLM` models, small enough to train in a minute on one core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from dopd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TinySpec:
    """Size of a tiny model.

    Args:
        num_layers: Decoder layers.
        hidden_size: Width; a multiple of `2 * num_heads` (rotary embeddings pair the channels of a head).
        num_heads: Attention heads, all with their own keys and values.
        mlp_ratio: Width of the gated MLP over `hidden_size`.
    """

    num_layers: int = 3
    hidden_size: int = 64
    num_heads: int = 4
    mlp_ratio: int = 3

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, allowed: at least 1. Pass a positive integer.")
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                f"hidden_size: got {self.hidden_size}, allowed: a multiple of 2 * num_heads = {2 * self.num_heads}. "
                "Change one of the two."
            )


def build_model(spec: TinySpec, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Qwen3ForCausalLM:
    """An untrained model for `tokenizer`; equal `spec`, vocabulary size and `seed` give equal weights.

    Matrices start with standard deviation `1 / sqrt(fan_in)`, embeddings with 1 (a smaller one is drowned by what the
    layers add, and looking words up is learnt two to three times later), and the rotary base is 100: sequences are
    short and training lasts a minute or two. The head is not tied.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.mlp_ratio * spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_heads,
        head_dim=spec.hidden_size // spec.num_heads,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    initialise(model, tokenizer, seed)
    return model


def initialise(model: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Set weights as `build_model` says, with 0.5 for positions in an image, and the ids of the tokenizer, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        std = 1.0 if "embed_tokens" in name else 0.5 if "pos_embed" in name else parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
