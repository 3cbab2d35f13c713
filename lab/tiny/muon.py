"""Muon in single precision, for tiny models on processors of any kind.

`torch.optim.Muon` iterates in bfloat16, which most processors only emulate: there it takes three quarters of a training
step of the tiny models. This one computes what that one rounds, several times faster, all matrices of a shape at once.

Shapes: K matrices of one shape, (R, C) rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, as published with Muon
_EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for the matrices of hidden layers ("Muon is Scalable for LLM Training",
    arXiv 2502.16982): Nesterov's momentum, decoupled weight decay, updates with the root mean square that AdamW's have.

    Args:
        parameters: matrices.
        lr (`float`): as of AdamW.
        weight_decay (`float`): share of `lr` that a weight loses in a step.
        momentum (`float`): decay of the moving average of gradients.
        ns_steps (`int`): Newton-Schulz iterations.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        ns_steps: int = 4,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        updates = []
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            average.lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(average, group["momentum"]))
        directions_KRC = orthogonalised(torch.stack(updates), group["ns_steps"])
        scale = 0.2 * max(parameters[0].shape) ** 0.5
        for parameter, direction in zip(parameters, directions_KRC, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-group["lr"] * scale)


def orthogonalised(matrices_KRC: Tensor, steps: int) -> Tensor:
    """Matrices with the same singular vectors and singular values near 1, by Newton-Schulz iteration."""
    a, b, c = _COEFFICIENTS
    tall = matrices_KRC.shape[1] > matrices_KRC.shape[2]
    x = matrices_KRC.mT if tall else matrices_KRC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
