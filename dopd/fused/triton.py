"""Tile operations as Triton kernels: one program for a token, the vocabulary in blocks, the gradient written in place.

The dense products stay with cuBLAS; what comes between them is limited by memory traffic, and these kernels read each
logit two or three times where a chain of elementwise operations reads and writes it a dozen times. A divergence that
has no kernel, and float64, take the path of `TileOperations`.
Shapes: C tokens of a chunk, V vocabulary.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dopd.divergences import Divergence, forward_kl, js, reverse_kl
from dopd.fused.tiles import Stats, TileOperations
from dopd.heads import Head

MAX_BLOCK = 4096
NUM_WARPS = 8  # 16 logits of a block for each thread
KERNEL_OF: dict[Callable[[Tensor, Tensor], Tensor], int] = {forward_kl: 0, reverse_kl: 1, js: 2}
FORWARD_KL, REVERSE_KL = tl.constexpr(0), tl.constexpr(1)
# Below every logit, but finite: -inf - -inf would be a NaN.
LOWEST = tl.constexpr(-3.0e38)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _empty():
    """What `_fold` starts from."""
    zero = tl.full((), 0.0, tl.float32)
    return zero + LOWEST, zero, zero


@triton.jit
def _fold(z, mask, top, total, weighted):
    """Fold one block of logits into the running maximum, the sum of e = exp(z - maximum), and that of e * log e."""
    z = tl.where(mask, z, LOWEST)
    new_top = tl.maximum(top, tl.max(z, axis=0))
    rescale = tl.exp(top - new_top)
    e = tl.where(mask, tl.exp(z - new_top), 0.0)
    weighted = rescale * (weighted + total * (top - new_top)) + tl.sum(e * tl.where(mask, z - new_top, 0.0), axis=0)
    return new_top, total * rescale + tl.sum(e, axis=0), weighted


@triton.jit
def _logit_gradient(z, scale, inverse_cap, HAS_CAP: tl.constexpr):
    """d logits / d (hidden @ weight.T), from the logits; inverse_cap is temperature / softcap."""
    if HAS_CAP:
        ratio = tl.minimum(tl.maximum(z * inverse_cap, -1.0), 1.0)
        return scale * (1.0 - ratio * ratio)
    else:
        return scale + tl.zeros_like(z)


@triton.jit
def _softmax_kernel(
    z_ptr,  # [C, V]
    stride,
    logsumexp_ptr,  # [C]
    neg_entropy_ptr,  # [C]
    num_columns,
    scale,
    inverse_cap,
    WRITE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    z_token_ptr = z_ptr + token * stride
    top, total, weighted = _empty()
    for start in range(0, num_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < num_columns
        top, total, weighted = _fold(tl.load(z_token_ptr + offsets, mask=mask, other=0.0), mask, top, total, weighted)
    log_total = tl.log(total)
    tl.store(logsumexp_ptr + token, top + log_total)
    tl.store(neg_entropy_ptr + token, weighted / total - log_total)
    if WRITE:
        for start in range(0, num_columns, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            mask = offsets < num_columns
            z = tl.load(z_token_ptr + offsets, mask=mask, other=0.0)
            p = tl.exp((z - top) - log_total)
            tl.store(z_token_ptr + offsets, p * _logit_gradient(z, scale, inverse_cap, HAS_CAP), mask=mask)


@triton.jit
def _terms(log_s, log_t, mask, KIND: tl.constexpr):
    """For every outcome: S, T, its term of the divergence, and the ratio that the gradient compares with its mean."""
    s = tl.where(mask, tl.exp(log_s), 0.0)
    t = tl.where(mask, tl.exp(log_t), 0.0)
    if KIND == FORWARD_KL:
        return s, t, t * tl.where(mask, log_t - log_s, 0.0), s * 0.0
    elif KIND == REVERSE_KL:
        ratio = tl.where(mask, log_s - log_t, 0.0)
        return s, t, s * ratio, ratio
    else:
        high, low = tl.maximum(log_s, log_t), tl.minimum(log_s, log_t)
        log_m = high + tl.log(1.0 + tl.exp(low - high)) - LN_2
        ratio = tl.where(mask, log_s - log_m, 0.0)
        return s, t, 0.5 * (s * ratio + t * tl.where(mask, log_t - log_m, 0.0)), 0.5 * ratio


@triton.jit
def _full_kernel(
    s_ptr,  # [C, V] logits of the student; becomes the gradient
    s_stride,
    t_ptr,  # [C, V] logits of the target
    t_stride,
    grad_scale_ptr,  # [C]
    value_ptr,  # [C]
    entropy_ptr,  # [C]
    num_columns,
    scale,
    inverse_cap,
    KIND: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    s_token_ptr, t_token_ptr = s_ptr + token * s_stride, t_ptr + token * t_stride
    s_top, s_total, s_weighted = _empty()
    t_top, t_total, t_weighted = _empty()
    for start in range(0, num_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < num_columns
        zs = tl.load(s_token_ptr + offsets, mask=mask, other=0.0)
        zt = tl.load(t_token_ptr + offsets, mask=mask, other=0.0)
        s_top, s_total, s_weighted = _fold(zs, mask, s_top, s_total, s_weighted)
        t_top, t_total, t_weighted = _fold(zt, mask, t_top, t_total, t_weighted)
    s_log, t_log = tl.log(s_total), tl.log(t_total)
    tl.store(entropy_ptr + token, s_log - s_weighted / s_total)

    value, mean = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, num_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < num_columns
        log_s = (tl.load(s_token_ptr + offsets, mask=mask, other=0.0) - s_top) - s_log
        log_t = (tl.load(t_token_ptr + offsets, mask=mask, other=0.0) - t_top) - t_log
        s, _t, terms, ratio = _terms(log_s, log_t, mask, KIND)
        value += tl.sum(terms, axis=0)
        mean += tl.sum(s * ratio, axis=0)
    tl.store(value_ptr + token, value)

    grad_scale = tl.load(grad_scale_ptr + token)
    for start in range(0, num_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < num_columns
        zs = tl.load(s_token_ptr + offsets, mask=mask, other=0.0)
        log_t = (tl.load(t_token_ptr + offsets, mask=mask, other=0.0) - t_top) - t_log
        s, t, _terms_unused, ratio = _terms((zs - s_top) - s_log, log_t, mask, KIND)
        grad = s - t if KIND == FORWARD_KL else s * (ratio - mean)
        tl.store(s_token_ptr + offsets, grad * grad_scale * _logit_gradient(zs, scale, inverse_cap, HAS_CAP), mask=mask)


class TritonTileOperations(TileOperations):
    """Tile operations on float32 tiles of a CUDA device."""

    def softmax_(self, logits_CV: Tensor, head: Head | None) -> Stats:
        if logits_CV.dtype != torch.float32 or not logits_CV.shape[0]:
            return super().softmax_(logits_CV, head)
        num_tokens, num_columns = logits_CV.shape
        logsumexp_C, neg_entropy_C = logits_CV.new_empty(2, num_tokens)
        scale, inverse_cap = _logit_gradient_factors(head)
        _softmax_kernel[(num_tokens,)](
            logits_CV,
            logits_CV.stride(0),
            logsumexp_C,
            neg_entropy_C,
            num_columns,
            scale,
            inverse_cap or 0.0,
            WRITE=head is not None,
            HAS_CAP=inverse_cap is not None,
            BLOCK=_block(num_columns),
            num_warps=NUM_WARPS,
        )
        return Stats(logsumexp_C, neg_entropy_C)

    def full_(
        self, function: Divergence, student_CV: Tensor, target_CV: Tensor, scale_C: Tensor, head: Head
    ) -> tuple[Tensor, Tensor]:
        number = KERNEL_OF.get(function)
        if number is None or student_CV.dtype != torch.float32 or not student_CV.shape[0]:
            return super().full_(function, student_CV, target_CV, scale_C, head)
        num_tokens, num_columns = student_CV.shape
        value_C, entropy_C = student_CV.new_empty(2, num_tokens)
        scale, inverse_cap = _logit_gradient_factors(head)
        _full_kernel[(num_tokens,)](
            student_CV,
            student_CV.stride(0),
            target_CV,
            target_CV.stride(0),
            scale_C,
            value_C,
            entropy_C,
            num_columns,
            scale,
            inverse_cap or 0.0,
            KIND=number,
            HAS_CAP=inverse_cap is not None,
            BLOCK=_block(num_columns),
            num_warps=NUM_WARPS,
        )
        return value_C, entropy_C


def _logit_gradient_factors(head: Head | None) -> tuple[float, float | None]:
    if head is None:
        return 1.0, None
    return head.logit_scale / head.temperature, None if head.softcap is None else head.temperature / head.softcap


def _block(num_columns: int) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(num_columns))
