"""How large models are, from their configurations: nothing is loaded for it."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dopd.adapters import has_adapters, without_adapters
from dopd.checkpoints import config_of, family_of, resolve_model, where_of
from dopd.runs.settings import RunSettings
from dopd.runs.train import peft_config_of
from dopd.settings import as_mapping
from dopd.trainer import DOPDConfig

_EXPERTS = "experts"  # part of the names of weights of which each token reads a few


@dataclass(frozen=True)
class ModelSize:
    """What the memory and the time of a model's passes depend on.

    Attributes:
        weights (`int`): bytes.
        trainable, trained (`int`): weights with a gradient, in numbers and in bytes.
        largest (`int`): bytes of the largest trained weight.
        element (`int`): bytes of a number of its weights.
        layers, hidden, vocabulary (`int`): numbers.
        queries, keys (`int`): numbers of a token's queries, and of its keys, in a layer.
        inner (`int`): numbers between the matrices of a layer's gated MLP, of those experts that a token reads.
        matrices, active (`int`): numbers of the layers' matrices, and of those that a token is multiplied with.
        normed (`bool`): queries and keys are normed.
        adapted (`bool`): only adapters train.
        adapters (`int`): bytes of a number of theirs; 0 without.
        head_trains (`bool`): the output head, or the embedding that is one with it, has a gradient.
        waiting (`int`): bytes of all teachers that wait on the CPU for their turn, of which this is the largest; 0 for
            a model that stays where it is.
        heads (`int`): bytes of their output heads, which stay on the device.
    """

    weights: int
    trainable: int
    trained: int
    largest: int
    element: int
    layers: int
    hidden: int
    vocabulary: int
    queries: int
    keys: int
    inner: int
    matrices: int
    active: int
    normed: bool = False
    adapted: bool = False
    adapters: int = 0
    head_trains: bool = False
    waiting: int = 0
    heads: int = 0

    @property
    def cached(self) -> int:
        """Numbers that the cache of keys and values holds for each token."""
        return 2 * self.layers * self.keys

    @classmethod
    def of(cls, model: Any) -> "ModelSize":
        """That of a transformers model, with adapters or without; it may be on the device `meta`."""
        text: Any = model.config.get_text_config()
        heads = text.num_attention_heads
        per_head = getattr(text, "head_dim", None) or text.hidden_size // heads
        named = dict(model.named_parameters())
        trained = [one for one in named.values() if one.requires_grad]
        adapted = has_adapters(model)
        own = [one for name, one in named.items() if adapted and "lora_" in name and one.requires_grad]
        inner, share = _of_mlp(text)
        embeddings = {id(one) for one in _embeddings(model)}
        layers = {name: one for name, one in named.items() if one.dim() > 1 and id(one) not in embeddings}
        matrices = sum(one.numel() for one in layers.values())
        of_experts = sum(one.numel() for name, one in layers.items() if _EXPERTS in name.split("."))
        head = without_adapters(model).get_output_embeddings()
        return cls(
            weights=sum(one.numel() * one.element_size() for one in named.values()),
            trainable=sum(one.numel() for one in trained),
            trained=sum(one.numel() * one.element_size() for one in trained),
            largest=max((one.numel() * one.element_size() for one in trained), default=0),
            element=_element(one for name, one in named.items() if "lora_" not in name),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            vocabulary=text.vocab_size,
            queries=heads * per_head,
            keys=(getattr(text, "num_key_value_heads", None) or heads) * per_head,
            inner=inner,
            matrices=matrices,
            active=matrices - of_experts + int(of_experts * share),
            normed=any("q_norm" in name for name in named),
            adapted=adapted,
            adapters=_element(own) if own else 0,
            head_trains=head is not None and any(one.requires_grad for one in head.parameters()),
        )


def _element(weights: Any) -> int:
    return max((one.element_size() for one in weights if one.is_floating_point()), default=4)


def _embeddings(model: Any) -> list[Any]:
    whole = without_adapters(model)
    parts = [whole.get_input_embeddings(), whole.get_output_embeddings()]
    return [one for part in parts if part is not None for one in part.parameters()]


def _of_mlp(text: Any) -> tuple[int, float]:
    """Numbers between the matrices of a token's MLP, and the share of all experts that it reads."""
    experts = next(
        (
            count
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
            if (count := getattr(text, name, 0))
        ),
        0,
    )
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    if not experts:
        return int(inner), 1.0
    read = getattr(text, "num_experts_per_tok", None) or 1
    return read * int(getattr(text, "moe_intermediate_size", None) or inner), read / experts


def sizes_of_run(settings: RunSettings, config: DOPDConfig) -> tuple[ModelSize, ModelSize | None]:
    """Student and teacher of a run; no teacher where the table reads none, or it is on a server.

    Of several teachers the largest stands for all: every row counts as if it were read by that one.

    Raises:
        DopdError, and what readers of configurations raise: a model whose configuration cannot be read.
    """
    options = as_mapping(config.model_init_kwargs)
    dtype = options.pop("dtype", None) or settings.dtype
    student = student_size(settings, dtype, options)
    of_teacher = {"dtype": "auto", **as_mapping(config.teacher_model_init_kwargs)}
    dtype = of_teacher.pop("dtype") or "auto"
    name = config.teacher_model_name_or_path if config.loads_teacher else None
    names = [*config.several_teachers.values()] or ([] if name is None else [name])
    teachers = [ModelSize.of(unloaded(one, dtype, of_teacher)) for one in names]
    if len(teachers) < 2:
        return student, teachers[0] if teachers else None
    largest = max(teachers, key=lambda size: size.weights)
    waiting, heads = (
        sum(numbers)
        for numbers in zip(*((s.weights, s.vocabulary * s.hidden * s.element) for s in teachers), strict=True)
    )
    return student, dataclasses.replace(largest, waiting=waiting, heads=heads)


def student_size(settings: RunSettings, dtype: Any, options: dict[str, Any]) -> ModelSize:
    """That of the student as it is trained: its weights packed, with an adapter, or whole."""
    model = unloaded(settings.model_name_or_path, dtype, options)
    bits = 4 if settings.load_in_4bit else 8 if settings.load_in_8bit else None
    base = ModelSize.of(model)
    packed = base.weights if bits is None else base.weights * bits // (8 * base.element)
    if not settings.use_peft or importlib.util.find_spec("peft") is None:
        packed_weights = dataclasses.replace(base, weights=packed)
        return base if bits is None else dataclasses.replace(packed_weights, trainable=0, trained=0, head_trains=False)
    from peft import get_peft_model

    with torch.device("meta"):
        whole = ModelSize.of(get_peft_model(model, peft_config_of(settings)))
    return dataclasses.replace(whole, weights=packed + whole.weights - base.weights)


def unloaded(name: str, dtype: Any, options: dict[str, Any]) -> PreTrainedModel:
    """A model of the shapes of a checkpoint; no weight is read for it."""
    path, where = resolve_model(name), where_of(options)
    config = config_of(path, **where)
    chosen = config.dtype if dtype in (None, "auto") else dtype
    chosen = getattr(torch, chosen, None) if isinstance(chosen, str) else chosen
    with torch.device("meta"):
        return family_of(path, **where).from_config(config, dtype=chosen or torch.float32)
