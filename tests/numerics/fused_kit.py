"""Random batches of hidden states and heads, and what it is for two losses to agree."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dopd import divergences
from dopd.fused import fused_routed_loss
from dopd.heads import Head
from dopd.kinds import WITHOUT_TARGET
from dopd.loss import RoutedLoss
from dopd.rules import Rule
from dopd.tables import RoutingTable

DOUBLE = torch.float64
SUPPORTS = [
    ("full", "bucket"),
    ("student_topk", "bucket"),
    ("student_topk", "renormalize"),
    ("target_topk", "bucket"),
    ("target_topk", "renormalize"),
    ("student_topk", "truncate"),
    ("target_topk", "truncate"),
]
RULES = [(kind, support, tail) for kind in divergences.DIVERGENCES for support, tail in SUPPORTS]
RULES += [(kind, "sampled", "bucket") for kind in ("reverse_kl", "forward_kl", "js", "nll")]


@dataclass
class Case:
    """Hidden states, heads, tokens and a mask with padding, an empty sequence and an id outside the vocabulary."""

    hidden: Tensor
    head: Head
    targets: dict[str, tuple[Tensor, Head]]
    ids: Tensor
    mask: Tensor

    def run(self, table: RoutingTable, backend: str, upstream: float = 1.0, **options: Any) -> "Run":
        leaves = [tensor for tensor in (self.hidden, self.head.weight, self.head.bias) if tensor is not None]
        for leaf in leaves:
            leaf.grad = None
        result = fused_routed_loss(
            self.hidden, self.head, self.targets, self.ids, self.mask, table, backend=backend, **options
        )
        (result.loss * upstream).backward()
        return Run(result, [leaf.grad for leaf in leaves])


@dataclass
class Run:
    result: RoutedLoss
    grads: list[Tensor | None]


def make_case(
    shape: tuple[int, int, int, int] = (4, 5, 6, 61),
    *,
    dtype: torch.dtype = DOUBLE,
    bias: bool = True,
    spread: float = 1.0,
    **head: Any,
) -> Case:
    B, T, H, V = shape
    weight = (spread * torch.randn(V, H, dtype=DOUBLE)).to(dtype).requires_grad_()
    bias_V = torch.randn(V, dtype=DOUBLE).to(dtype).requires_grad_() if bias else None
    student_head = Head(weight, bias_V, **head)
    teacher_head = Head((spread * torch.randn(V, H + 3, dtype=DOUBLE)).to(dtype), **head)

    def hidden(size: int) -> Tensor:
        return torch.randn(B, T, size, dtype=DOUBLE).to(dtype)

    ids, mask = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.long)
    mask[0, T // 2 :] = 0
    mask[-1] = 0
    ids[mask == 0] = V + 7
    targets = {"teacher": (hidden(H + 3), teacher_head), "privileged_teacher": (hidden(H + 3), teacher_head)}
    targets["privileged_student"] = (hidden(H), student_head)
    return Case(hidden(H).requires_grad_(), student_head, targets, ids, mask)


def one_rule(kind: str, support: str, tail: str, top_k: int = 5, weight: float = 0.7) -> RoutingTable:
    source = None if kind in WITHOUT_TARGET else "teacher"
    rule = Rule(source=source, divergence=kind, support=support, tail=tail, top_k=top_k, weight=weight)
    return RoutingTable(name="one", rules=(rule,))


def assert_same(ours: Run, reference: Run, tolerance: float = 1e-10) -> None:
    a, b = ours.result, reference.result
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    assert torch.equal(a.regimes, b.regimes)
    torch.testing.assert_close(a.loss.detach(), b.loss.detach(), **close)
    torch.testing.assert_close(a.per_token, b.per_token.detach(), **close)
    assert a.sums.keys() == b.sums.keys()
    for name, value in b.sums.items():
        torch.testing.assert_close(torch.as_tensor(a.sums[name]), torch.as_tensor(value), **close, msg=name)
    for mine, theirs in zip(ours.grads, reference.grads, strict=True):
        if mine is None or theirs is None:  # nothing reaches a leaf: None in one, zeros in the other
            present = theirs if mine is None else mine
            assert present is None or not present.any()
            continue
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, **close)
