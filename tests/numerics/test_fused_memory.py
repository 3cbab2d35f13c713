"""Precision and memory of the fused loss: what it accumulates in, what it allocates, what it leaves out.

Shapes: B sequences, T completion tokens, H hidden size, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fused_kit import DOUBLE, RULES, Case, assert_same, make_case, one_rule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dopd.fused import fused_routed_loss, products, score_tokens
from dopd.methods import table as method


class LargestTensor(TorchDispatchMode):
    """Notes the shape of every new tensor, in the forward and in the backward; views are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _storage(tensor) not in given:
                self.shapes.add(tuple(tensor.shape))
        return out

    def largest(self, without: set[tuple[int, ...]]) -> int:
        return max(torch.Size(shape).numel() for shape in self.shapes - without)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_frozen_head_takes_no_gradient_and_no_memory() -> None:
    case, table = make_case(bias=False), method("dopd", top_k=4)
    case.head.weight.requires_grad_(False)
    ours, reference = case.run(table, "chunked"), case.run(table, "reference")
    assert ours.grads[1] is None
    assert_same(ours, reference)
    with LargestTensor() as largest:
        case.run(table, "chunked", chunk_tokens=1)
    assert (61, 6) not in largest.shapes, "a buffer for the gradient of a frozen weight was made"


def test_no_grad_makes_no_gradient() -> None:
    case, table = make_case(), method("dopd", top_k=4)
    with torch.no_grad(), LargestTensor() as largest:
        result = fused_routed_loss(case.hidden, case.head, case.targets, case.ids, case.mask, table, chunk_tokens=2)
    assert not result.loss.requires_grad
    assert (61, 6) not in largest.shapes
    torch.testing.assert_close(result.loss, case.run(table, "reference").result.loss.detach())


@pytest.mark.parametrize("name", ["dopd", "vanilla"])
def test_in_inference_mode(name: str) -> None:
    case, table = make_case(), method(name)
    with torch.inference_mode():
        targets = {source: (hidden * 1.0, head) for source, (hidden, head) in case.targets.items()}
        result = fused_routed_loss(case.hidden * 1.0, case.head, targets, case.ids, case.mask, table)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, case.run(table, "reference").result.loss.detach())


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_bf16_is_accumulated_in_float32(tail: str) -> None:
    case, table = make_case((3, 17, 64, 6007), dtype=torch.bfloat16, spread=0.4), method("dopd", top_k=16, tail=tail)
    ours = case.run(table, "chunked", chunk_tokens=7)
    exact = Case(
        case.hidden.detach().float().requires_grad_(),
        replace(
            case.head,
            weight=case.head.weight.detach().float().requires_grad_(),
            bias=case.head.bias.detach().float().requires_grad_(),
        ),
        {},
        case.ids,
        case.mask,
    )
    for source, (hidden, head) in case.targets.items():
        bias = None if head.bias is None else head.bias.detach().float()
        exact.targets[source] = (hidden.float(), replace(head, weight=head.weight.detach().float(), bias=bias))
    reference = exact.run(table, "reference")
    assert ours.result.loss.dtype == torch.float32
    # The same bf16 numbers multiplied in float32: only the final gradient is rounded to bf16, half a unit of 2^-8.
    torch.testing.assert_close(ours.result.loss.detach(), reference.result.loss.detach(), rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(ours.grads, reference.grads, strict=True):
        assert mine.dtype == torch.bfloat16
        assert float((mine.float() - theirs).norm() / theirs.norm()) < 2**-8


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_rounds_in_half_precision_what_the_fused_loss_rounds(dtype: torch.dtype, autocast: bool) -> None:
    """Factors, and no logits: rounded logits would move a loss by 1e-3."""
    given = torch.float32 if autocast else dtype
    case, table = make_case((3, 17, 64, 607), dtype=given, spread=0.4), method("dopd", top_k=16)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        chunked, reference = (case.run(table, backend).result for backend in ("chunked", "reference"))
        logits = case.head.logits(case.hidden).detach()
    torch.testing.assert_close(chunked.loss.detach(), reference.loss.detach(), rtol=2e-5, atol=1e-6)
    assert torch.equal(chunked.regimes, reference.regimes)
    by_hand = case.hidden.detach().to(dtype).double() @ case.head.weight.detach().to(dtype).double().T
    by_hand = by_hand + case.head.bias.detach().double()
    torch.testing.assert_close(logits.double(), by_hand, rtol=1e-5, atol=1e-5)


def test_float16_gradients_survive_until_the_loss_scale_arrives() -> None:
    case, table = make_case((3, 9, 32, 5003), dtype=torch.float16, spread=0.4), method("dopd", top_k=8)
    options: dict[str, Any] = {"num_sequences": 1e6}  # as in a large batch
    ours = case.run(table, "chunked", upstream=1e6, **options).grads
    plain = case.run(table, "chunked", num_sequences=1.0).grads
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-6)


def test_autocast_sets_the_dtype_of_the_products() -> None:
    case, table = make_case((2, 9, 16, 301), dtype=torch.float32, spread=0.4), method("dopd", top_k=8)
    full = case.run(table, "chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = case.run(table, "chunked")
    for mine, theirs in zip(half.grads, full.grads, strict=True):
        assert mine.dtype == torch.float32
        assert 0 < float((mine - theirs).norm() / theirs.norm()) < 0.1


@pytest.mark.parametrize(("kind", "support", "tail"), RULES)
def test_no_tensor_is_larger_than_a_chunk_of_logits(kind: str, support: str, tail: str) -> None:
    B, T, H, V, chunk_tokens = 4, 40, 2, 2003, 8
    case, table = make_case((B, T, H, V), bias=False), one_rule(kind, support, tail, top_k=6)
    with LargestTensor() as seen:
        case.run(table, "chunked", chunk_tokens=chunk_tokens)
        score_tokens(*case.targets["teacher"], case.ids, case.mask, chunk_tokens=chunk_tokens)
    assert seen.largest(without={(V, H), (H, V)}) <= chunk_tokens * V
    with LargestTensor() as seen:
        case.run(table, "reference")
    assert seen.largest(without=set()) >= B * T * V // 2, "the meter misses what the reference makes"


def test_the_default_chunk_fits_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    B, T, H, V, rows = 3, 30, 2, 1009, 7
    monkeypatch.setattr(products, "CPU_TILE_BYTES", rows * V * DOUBLE.itemsize)
    case = make_case((B, T, H, V), bias=False)
    for tail in ("bucket", "renormalize"):
        with LargestTensor() as seen:
            run = case.run(method("dopd", top_k=3, tail=tail), "chunked")
        assert seen.largest(without={(V, H), (H, V)}) <= rows * V
        assert_same(run, case.run(method("dopd", top_k=3, tail=tail), "reference"))
