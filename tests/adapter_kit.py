"""Adapters of every kind on tiny models, and what PEFT itself says that they amount to."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
import trainer_kit as kit
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

LINEAR = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(3, 15).unsqueeze(0)
TEXT: dict[str, Any] = {
    "vocab_size": len(kit.TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "bos_token_id": None,
    "eos_token_id": kit.TOKENIZER.eos_token_id,
    "pad_token_id": kit.TOKENIZER.pad_token_id,
}


def _lora(**options: Any) -> Callable[[], Any]:
    given = {"r": 2, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options
    return lambda: peft.LoraConfig(**given)


def _other(name: str, **options: Any) -> Callable[[], Any]:
    given = {"target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options
    return lambda: getattr(peft, f"{name}Config")(**given)


# What is tried -> a fresh configuration.
ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA": _lora(),
    "rsLoRA": _lora(use_rslora=True),
    "DoRA": _lora(use_dora=True),
    "LoRA started as PiSSA": _lora(init_lora_weights="pissa"),
    "LoRA with biases": _lora(bias="all"),
    "LoRA on embeddings": _lora(target_modules=[*LINEAR, "embed_tokens"]),
    "DoRA on embeddings": _lora(target_modules=[*LINEAR, "embed_tokens"], use_dora=True),
    "LoRA with modules_to_save lm_head and norm": _lora(modules_to_save=["lm_head", "norm"]),
    "LoRA with modules_to_save embed_tokens": _lora(modules_to_save=["embed_tokens"]),
    "LoRA with trainable_token_indices": _lora(trainable_token_indices=[1, 2, 3]),
    "TrainableTokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2, 3], task_type="CAUSAL_LM"),
    "IA3": _other("IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": _other("OFT", oft_block_size=4),
    "LoHa": _other("LoHa", r=2),
    "LoKr": _other("LoKr", r=2),
    "VeRA": _other("Vera", r=2, target_modules=["q_proj", "o_proj"]),
    "LNTuning": _other("LNTuning", target_modules=["input_layernorm", "norm"]),
    "HRA": _other("HRA", r=2),
    "MiSS": _other("Miss", r=2),
    "RandLoRA": _other("RandLora", r=2),
}
# Of releases of PEFT that have them.
NEWER: dict[str, Callable[[], Any]] = {
    "LoRA with rank_pattern and alpha_pattern": _lora(rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 3}),
    "LoRA with layers_to_transform": _lora(layers_to_transform=[1]),
    "LoRA on all-linear": _lora(target_modules="all-linear"),
    "LoRA started as OLoRA": _lora(init_lora_weights="olora"),
    "QALoRA": _lora(use_qalora=True, qalora_group_size=4),
    "BOFT": _other("BOFT", boft_block_size=4),
    "SHiRA": _other("Shira", r=2),
    "FourierFT": _other("FourierFT", n_frequency=50),
    "VBLoRA": _other("VBLoRA", r=2, num_vectors=8, vector_length=8),
    "C3A": _other("C3A", block_size=8),
    "WaveFT": _other("WaveFT", n_frequency=20),
    "RoAd": _other("Road", variant="road_1", group_size=4),
    "DeLoRA": _other("Delora", r=2),
    "GraLoRA": _other("Gralora", r=4),
    "OSF": _other("OSF", effective_rank=8),
    "TinyLoRA": _other("TinyLora", r=2),
    "UniLoRA": _other("UniLora", r=2),
    "PSOFT": _other("Psoft", r=2),
    "PVeRA": _other("Pvera", r=4, target_modules=["q_proj", "v_proj"]),
    "GLoRA": _other("Glora", r=2),
    "HiRA": _other("Hira", r=8),
    "DEFT": _other("Deft"),
    "PEANuT": _other("Peanut", r=2),
}
ON_TIED = (
    "LoRA",
    "LoRA on embeddings",
    "LoRA with modules_to_save lm_head and norm",
    "LoRA with modules_to_save embed_tokens",
    "LoRA with trainable_token_indices",
)


def tied(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**TEXT, tie_word_embeddings=True)).eval()


def gemma(seed: int = 0) -> Any:
    """Embeddings are scaled in their forward pass, and tied."""
    torch.manual_seed(seed)
    return Gemma3ForCausalLM(Gemma3TextConfig(**TEXT)).eval()


def experts(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(**TEXT, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    return Qwen3MoeForCausalLM(config).eval()


def gpt2(seed: int = 0) -> Any:
    """Its layers hold their weights transposed, with biases, and its embeddings are tied."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(kit.TOKENIZER), **sizes)).eval()


def adapted(config: Any, base: Any = None, seed: int = 9) -> Any:
    """A model with an adapter that does something."""
    return moved(peft.get_peft_model(kit.student() if base is None else base, config).eval(), seed)


@torch.no_grad()
def moved(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.clone()


def merged(model: Any) -> Any:
    """PEFT's own merged model. What is tied is untied first: merging into one would change the other."""
    plain = copy.deepcopy(model)
    inner = plain.base_model.model
    inner.config.tie_word_embeddings = False
    owners: dict[int, int] = {}
    for module in inner.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in owners and owners[id(parameter)] != id(module):
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
            owners.setdefault(id(parameter), id(module))
    return plain.merge_and_unload().eval()


def average_of(models: list[Any], decay: float) -> Any:
    """The moving average of plain models' weights, the first one being its start, as a model."""
    average = copy.deepcopy(models[0])
    with torch.no_grad():
        for model in models[1:]:
            current = dict(model.named_parameters())
            for name, parameter in average.named_parameters():
                parameter.copy_(decay * parameter + (1 - decay) * current[name])
    return average
