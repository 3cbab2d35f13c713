"""Tiny untrained text models of many families, and what each of them says of one sequence that is not padded.

Their weights are wide enough that a wrong position, mask or frequency moves log-probs by far more than rounding does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

VOCAB = 63
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_OLD = {
    "vocab_size": VOCAB,
    "n_positions": 256,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
# As published checkpoints declare it: a trained view is as it is scored only where all of it is switched off.
_DROPS = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "layerdrop": 0.5}
SWITCH = 24  # positions behind which the two families of length-dependent rotations use other frequencies


def _longrope() -> Any:
    factors = [1.0, 1.3, 1.7, 2.0]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4 * f for f in factors],
        "original_max_position_embeddings": SWITCH,
    }
    return tf.Phi3Config(**_GROUPED, rope_parameters=rope, original_max_position_embeddings=SWITCH)


def _dynamic() -> Any:
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": SWITCH,
    }
    return tf.LlamaConfig(**{**_GROUPED, "max_position_embeddings": SWITCH}, rope_parameters=rope)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**_GROUPED, head_dim=8),
    "gemma2": lambda: tf.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3 text": lambda: tf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "mistral sliding": lambda: tf.MistralConfig(**_GROUPED, sliding_window=8),
    "mixtral": lambda: tf.MixtralConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5
    ),
    "qwen3 moe": lambda: tf.Qwen3MoeConfig(
        **_GROUPED,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    ),
    "gpt2": lambda: tf.GPT2Config(**_OLD),
    "gpt neo": lambda: tf.GPTNeoConfig(
        **_IDS,
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=256,
        resid_dropout=0.1,
        embed_dropout=0.1,
        attention_dropout=0.1,
    ),
    "gpt bigcode": lambda: tf.GPTBigCodeConfig(**_OLD),
    "biogpt": lambda: tf.BioGptConfig(
        **{**_SMALL, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "activation_dropout": 0.1},
        layerdrop=0.5,
    ),
    "xglm": lambda: tf.XGLMConfig(
        **_IDS,
        **_DROPS,
        vocab_size=VOCAB,
        d_model=32,
        ffn_dim=48,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=256,
    ),
    "opt": lambda: tf.OPTConfig(
        **_IDS,
        **_DROPS,
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
    ),
    "seed oss": lambda: tf.SeedOssConfig(**_GROUPED, head_dim=8, attention_dropout=0.1, residual_dropout=0.1),
    "gpt neox": lambda: tf.GPTNeoXConfig(**_SMALL),
    "gptj": lambda: tf.GPTJConfig(**_OLD, rotary_dim=8),
    "bloom": lambda: tf.BloomConfig(
        **_IDS, vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1, attention_dropout=0.1
    ),
    "mpt": lambda: tf.MptConfig(**_IDS, vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=2, max_seq_len=256),
    "falcon": lambda: tf.FalconConfig(
        **_IDS, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "falcon alibi": lambda: tf.FalconConfig(
        **_IDS,
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        new_decoder_architecture=False,
        multi_query=True,
        parallel_attn=False,
    ),
    "recurrent gemma": lambda: tf.RecurrentGemmaConfig(
        **{**_GROUPED, "num_hidden_layers": 3},
        lru_width=32,
        attention_window_size=8,
        head_dim=8,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "rwkv": lambda: tf.RwkvConfig(
        **_IDS,
        vocab_size=VOCAB,
        hidden_size=32,
        attention_hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        context_length=256,
    ),
    "xlstm": lambda: tf.xLSTMConfig(
        **_IDS,
        vocab_size=VOCAB,
        hidden_size=64,
        embedding_dim=64,
        num_hidden_layers=2,
        num_blocks=2,
        num_heads=4,
        qk_dim_factor=1.0,
        chunk_size=8,
        mode="inference",
        max_inference_chunksize=64,
    ),
    "mamba": lambda: tf.MambaConfig(
        **_IDS, vocab_size=VOCAB, hidden_size=32, state_size=8, num_hidden_layers=2, intermediate_size=64
    ),
    "mamba2": lambda: tf.Mamba2Config(
        **_IDS,
        vocab_size=VOCAB,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=8,
    ),
    "falcon mamba": lambda: tf.FalconMambaConfig(
        **_IDS, vocab_size=VOCAB, hidden_size=32, state_size=8, num_hidden_layers=2, intermediate_size=64
    ),
    "jamba": lambda: tf.JambaConfig(
        **_GROUPED,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "bamba": lambda: tf.BambaConfig(
        **_GROUPED,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_expand=2,
        mamba_chunk_size=8,
    ),
    "qwen3 next": lambda: tf.Qwen3NextConfig(
        **_GROUPED,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": lambda: tf.Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention"]),
    "phi3 longrope": _longrope,
    "llama dynamic": _dynamic,
    "llama4 text": lambda: tf.Llama4TextConfig(
        **_GROUPED,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        moe_layers=[1],
        use_qk_norm=True,
    ),
}


def build(family: str, seed: int = 0, std: float = 0.3, **changes: Any) -> Any:
    """An untrained model of a family, in evaluation mode, with every matrix drawn from N(0, `std`^2)."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    kind = tf.Llama4ForCausalLM if family == "llama4 text" else tf.AutoModelForCausalLM
    model = kind(config) if family == "llama4 text" else kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std)
    return model.eval()


def own_logits(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Logits (T, V) behind which a completion stands, by the model's own forward pass over one sequence, without
    padding or mask. Models with "dynamic" rotations remember longer passes: give them fresh.
    """
    ids = torch.tensor([[*prompt, *completion]])
    quiet = {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}
    return model(input_ids=ids, use_cache=False, **quiet).logits[0, len(prompt) - 1 : -1]


@torch.no_grad()
def own_logprobs(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Log-probs (T,) of a completion, from `own_logits`, in float64."""
    logprobs = own_logits(model, prompt, completion).double().log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)


def fresh(model: Any) -> Any:
    """A model with equal weights that has run nothing yet."""
    made = type(model)(model.config)
    made.load_state_dict(model.state_dict())
    return made.eval()
