"""Random distributions and gradients for tests of divergences."""

from collections.abc import Callable

import torch
from torch import Tensor


def random_logits(seed: int, num_tokens: int = 4, vocab: int = 11, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, target = scale * torch.randn(2, num_tokens, vocab, generator=generator, dtype=torch.float64)
    return student, target


def gradient_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    function(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad
