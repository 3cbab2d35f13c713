"""What a step asks of a device grows neither with its tokens nor by copies of its largest tensors: operations are
counted, whatever they take.
"""

import collections
from dataclasses import replace
from typing import Any

import pytest
import torch
from fused_kit import make_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dopd.methods import table
from dopd.trainer.step_metrics import StepSums


class Operations(TorchDispatchMode):
    """Counts operations by name, and keeps the shapes of what they make in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        out = function(*arguments, **(named or {}))
        self.names[function.__name__.split(".")[0]] += 1
        tensors = [one for one in tree_flatten(out)[0] if isinstance(one, torch.Tensor)]
        self.shapes |= {tuple(one.shape) for one in tensors if one.dtype == torch.float64}
        return out


@pytest.mark.parametrize("seed", range(2))
def test_operations_of_the_loss_do_not_grow_with_its_tokens(seed: int) -> None:
    """Tokens whose gradient is that of a few columns stand in front of those with one of the whole vocabulary."""
    counts = []
    named = table("dopd")
    few, whole = {"support": "student_topk", "tail": "renormalize", "top_k": 2}, {"support": "sampled"}
    rules = tuple(
        replace(rule, divergence="reverse_kl", weight=1.0, **(few if number < 2 else whole))
        for number, rule in enumerate(named.rules)
    )
    for num_tokens in (16, 64):
        torch.manual_seed(seed)
        case = make_case((4, num_tokens, 6, 601), dtype=torch.float32)
        with Operations() as operations:
            case.run(replace(named, rules=rules), "chunked")
        counts.append(sum(operations.names.values()))
    assert abs(counts[1] - counts[0]) < 60  # some branches are taken for some tokens; 200 more of them have turned up


def test_norms_of_gradients_make_no_wider_copy_of_them() -> None:
    named, sums = table("dopd"), StepSums()
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    regimes = torch.arange(10).view(2, 5) % 4
    scale = torch.linspace(0.5, 2, 10).view(2, 5, 1)
    sums.add_gradients(hidden, regimes, named)
    with Operations() as operations:
        (hidden * scale).sum().backward()
    assert (2, 5, 16) not in operations.shapes
    for rule in named.rules:
        expected = 4.0 * scale.squeeze(-1)[regimes == int(rule.regime)].double().sum()  # type: ignore[arg-type]
        assert float(sums._sums[f"gradient/{rule.label}"]) == pytest.approx(float(expected), rel=1e-6)
