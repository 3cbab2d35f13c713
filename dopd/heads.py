"""From last hidden states to logits: what a model does after its backbone, as data that a fused loss can read."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from dopd.errors import ModelError
from dopd.quantized import is_quantized, whole_weight
from dopd.vision.tokens import placeholder_ids


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and of accumulated gradients: float32, or float64 if that is what came in."""
    return torch.promote_types(dtype, torch.float32)


def working_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the factors of every product: autocast's where it is on, else that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature.

    Attributes:
        weight (`Tensor` (V, H)): output embedding; may require a gradient.
        bias (`Tensor` (V,), *optional*): added to the projection.
        logit_scale (`float`): factor on the logits (Cohere, Granite, Falcon-H1).
        softcap (`float`, *optional*): final soft cap (Gemma, RecurrentGemma, xLSTM), applied after the scale.
        temperature (`float`): divides the logits last; 1 unless rollouts are sampled at another temperature.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @cached_property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V), float32 or wider.

        This defines what logits are in half precision: factors are rounded to it, their products and sums are not.
        """
        dtype, head = working_dtype(hidden), self.on(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            factors = (hidden.to(dtype).to(widened(dtype)), head.weight.to(dtype).to(widened(dtype)))
            logits = torch.nn.functional.linear(*factors)
        if head.bias is not None:
            logits = logits + head.bias.to(logits.dtype)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits

    def gathered(self, dtype: torch.dtype | None = None) -> "Head":
        """The head with whole tensors: a sharded (DTensor) weight is collected once, here, and not once per chunk."""
        return replace(
            self, weight=_whole(self.weight, dtype), bias=None if self.bias is None else _whole(self.bias, None)
        )

    def on(self, device: torch.device) -> "Head":
        """The head on the device of hidden states, from which a `device_map` may have parted it; gradients go back."""
        if self.weight.device == device:
            return self
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def finishes_as(self, other: "Head") -> bool:
        """Whether another head does the same behind its product: scale, soft cap, temperature, and bias."""
        mine, theirs = self.bias, other.bias
        settings = [(one.logit_scale, one.softcap, one.temperature) for one in (self, other)]
        if settings[0] != settings[1] or (mine is None) != (theirs is None):
            return False
        return mine is None or theirs is None or (mine.shape == theirs.shape and torch.equal(mine, theirs))

    @classmethod
    def joined(cls, heads: "Sequence[Head]") -> "Head":
        """One head for the states of several models, which stand side by side in a vector: those of a model in its own
        places, and zeros in the places of the others, which add nothing to a product.

        Args:
            heads (`list[Head]`): each (V, H_i), and all of one way to finish (`finishes_as`).

        Returns:
            `Head` of (V, H_1 + H_2 + ...).
        """
        return heads[0] if len(heads) == 1 else replace(heads[0], weight=torch.cat([head.weight for head in heads], 1))

    @classmethod
    def of(cls, head: "Head | nn.Linear | Tensor") -> "Head":
        """A `Head` from a `Head`, an `nn.Linear` or a (V, H) weight."""
        if isinstance(head, Head):
            return head
        if isinstance(head, nn.Linear):
            return cls(head.weight, head.bias)
        if isinstance(head, Tensor):
            return cls(head)
        raise ModelError(f"head is a {type(head).__name__}: pass a dopd.Head, an nn.Linear or a (V, H) weight tensor")

    @classmethod
    def of_model(cls, model: Any, temperature: float = 1.0, vocab_size: int | None = None) -> "Head":
        """The head of a transformers causal or vision-language model, with the scale and cap that its config declares.

        They count where the model's code reads them: vision-language models may leave out what the configuration of
        their language model declares (Aya Vision, LLaVA-NeXT with Granite).

        Tokens that stand for a piece of an image get probability 0: they are not sampled, so they are not scored.

        Args:
            model: an unwrapped transformers model.
            temperature (`float`): divides the logits.
            vocab_size (`int`, *optional*): ids from 0 on that are outcomes, where another model has fewer than this
                one (`dopd.vocabulary`); all of them if left out.

        Raises:
            ModelError: the model has no output embedding.
        """
        output = model.get_output_embeddings()
        if output is None:
            raise ModelError(
                f"{type(model).__name__} has no output embedding: dopd needs a model with a language-model head"
            )
        settings = _Settings(model, output)
        weight = whole_weight(output) if is_quantized(output) else output.weight
        bias = _without(placeholder_ids(model.config), output, weight)
        if vocab_size is not None and vocab_size < weight.shape[0]:
            # A part of a sharded weight is cut out of the whole.
            weight, bias = _whole(weight, None)[:vocab_size], None if bias is None else _whole(bias, None)[:vocab_size]
        return cls(
            weight,
            bias,
            logit_scale=_logit_scale(settings),
            softcap=settings.first_of("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
            temperature=temperature,
        )


def _whole(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if isinstance(tensor, DTensor):
        # Every rank has the gradient of its own part of the batch; FSDP averages those, and so does this.
        tensor = tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
    return tensor if dtype is None else tensor.to(dtype)


def _without(ids: list[int], output: Any, weight: Tensor) -> Tensor | None:
    """The bias of an output embedding with -inf at some ids; as it is where there are none."""
    bias = getattr(output, "bias", None)
    if not ids:
        return bias
    forbidden = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
    forbidden[ids] = -torch.inf
    return forbidden if bias is None else _whole(bias, None) + forbidden


class _Settings:
    """What a model declares of its logits, as far as its code reads it.

    Args:
        model: a transformers model.
        output (`nn.Module`): its output embedding.
    """

    def __init__(self, model: Any, output: nn.Module) -> None:
        # On vision-language models the text part of the config holds these.
        self.config = model.config.get_text_config()
        self._classes = _classes_above(model, output)

    def first_of(self, *names: str) -> float | None:
        """The first of these that is declared and read: one thing, under the names that the model families give it."""
        for name in names:
            value = getattr(self.config, name, None)
            if value is not None and (not self._classes or any(_names(kind, name) for kind in self._classes)):
                return float(value)
        return None


def _classes_above(model: nn.Module, output: nn.Module) -> list[type]:
    """Classes of the modules that hold an output embedding, of which one makes the logits; none if it is not found."""
    path: list[str] = next((name.split(".") for name, module in model.named_modules() if module is output and name), [])
    return [type(model.get_submodule(".".join(path[:depth]))) for depth in range(len(path))]


@cache
def _names(kind: type, setting: str) -> bool:
    """Whether the code of a model's class names a setting; taken for granted where there is no code to look at."""
    for base in kind.__mro__:
        if base is not nn.Module and "forward" in vars(base):
            try:
                if re.search(rf"\b{setting}\b", inspect.getsource(base)):
                    return True
            except (OSError, TypeError):
                return True
    return False


def _logit_scale(settings: _Settings) -> float:
    factor = settings.first_of("logit_scale", "output_multiplier", "lm_head_multiplier")
    if factor is not None:
        return factor
    divisor = settings.first_of("logits_scaling")
    if divisor is None:
        return 1.0
    # Granite and MiniCPM3 divide by logits_scaling; HyperCLOVA X multiplies.
    return divisor if settings.config.model_type == "hyperclovax" else 1.0 / divisor
