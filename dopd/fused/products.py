"""Products with an output head, on a chunk of tokens: dense over the vocabulary, or on K columns of it.

Inputs may be half precision; every result is float32 or wider, and sums are accumulated in it.
Shapes: C tokens of a chunk, H hidden size, V vocabulary, K columns.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dopd.heads import Head, widened

# Bytes of the (chunk x vocabulary) float32 tiles that exist at a time: C = budget / (tiles * 4 V). On a CPU 256 MiB
# are 220 tokens at V = 151,936 with two tiles. A GPU needs about 900 tokens (1 GiB) before a product is limited by
# arithmetic and not by reading the head.
CPU_TILE_BYTES = 256 * 2**20
GPU_TILE_BYTES = 1024 * 2**20
# Rows of the head gathered for K columns at a time.
GATHER_BYTES = 32 * 2**20
# V / K from which a product on K columns is cheaper than a dense one. The first moves 3 K H numbers through memory; the
# second makes V H multiply-adds, dozens of which take as long as moving one number, and hundreds on a GPU.
CPU_SPARSE_RATIO = 64
GPU_SPARSE_RATIO = 400
# A logit that stands for -inf: its exponential is exactly 0, and 0 times it is 0.
LOG_ZERO = -1e30
# Nats that no two distributions of finite logits are apart: a larger value has met LOG_ZERO on one side alone.
_FARTHEST = 1e12


def chunk_size(device: torch.device, vocab_size: int, itemsize: int, tiles: int) -> int:
    """Tokens of a chunk whose `tiles` tensors of (tokens, V) fit the budget of the device; at least 1."""
    budget = CPU_TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES
    return max(1, budget // (vocab_size * itemsize * tiles))


def sparse_is_cheaper(device: torch.device, num_columns: int, vocab_size: int) -> bool:
    ratio = CPU_SPARSE_RATIO if device.type == "cpu" else GPU_SPARSE_RATIO
    return num_columns * ratio <= vocab_size


def working_head(head: Head, dtype: torch.dtype) -> Head:
    """The head as data for the products: whole, without gradient, the weight in `dtype`, the bias widened."""
    head = head.gathered()
    # A bias of -inf forbids a token. As a large finite number it does so without making 0 * inf on the way.
    bias = None if head.bias is None else head.bias.detach().to(widened(dtype)).clamp(min=LOG_ZERO)
    return replace(head, weight=head.weight.detach().to(dtype), bias=bias)


def with_infinities(value: Tensor) -> Tensor:
    """Divergences, infinite where an outcome is impossible on one side alone: there `LOG_ZERO` has made them large."""
    return torch.where(value.abs() > _FARTHEST, value.sign() * torch.inf, value)


def raw_logits(hidden_CH: Tensor, head: Head, out_CV: Tensor) -> Tensor:
    """hidden @ weight.T into a float32 or float64 tile, without rounding to half precision in between."""
    if hidden_CH.dtype == out_CV.dtype:
        return torch.mm(hidden_CH, head.weight.t(), out=out_CV)
    if hidden_CH.is_cuda:
        return torch.mm(hidden_CH, head.weight.t(), out_dtype=out_CV.dtype, out=out_CV)
    widened_CH = hidden_CH.to(out_CV.dtype)
    for tokens in _vocab_slices(head.weight):
        torch.mm(widened_CH, head.weight[tokens].to(out_CV.dtype).t(), out=out_CV[:, tokens])
    return out_CV


def finish_(logits: Tensor, head: Head, bias: Tensor | None) -> Tensor:
    """What a head does after its product (see `Head`), in place."""
    if bias is not None:
        logits.add_(bias)
    if head.logit_scale != 1.0:
        logits.mul_(head.logit_scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    if head.temperature != 1.0:
        logits.div_(head.temperature)
    return logits


def dense_logits(hidden_CH: Tensor, head: Head, out_CV: Tensor) -> Tensor:
    return finish_(raw_logits(hidden_CH, head, out_CV), head, head.bias)


def logit_gradient(head: Head, logits: Tensor) -> Tensor | float:
    """d logits / d (hidden @ weight.T), from the finished logits."""
    scale = head.logit_scale / head.temperature
    if head.softcap is None:
        return scale
    # Clamped: a logit of LOG_ZERO lies outside the cap and would overflow.
    return scale * (1 - (logits * (head.temperature / head.softcap)).clamp_(-1, 1).square_())


def column_logits(hidden_CH: Tensor, head: Head, ids_CK: Tensor) -> Tensor:
    """Logits of K tokens of the vocabulary at every position: (C, H), (C, K) -> (C, K)."""
    dtype = widened(hidden_CH.dtype)
    out_CK = torch.empty(ids_CK.shape, dtype=dtype, device=hidden_CH.device)
    for part in _gather_slices(hidden_CH, ids_CK):
        weight_CKH = _gathered_weight(head.weight, ids_CK[part], dtype)
        torch.bmm(weight_CKH, hidden_CH[part].to(dtype).unsqueeze(2), out=out_CK[part].unsqueeze(2))
    return finish_(out_CK, head, None if head.bias is None else head.bias[ids_CK])


def dense_hidden_grad(grad_CV: Tensor, head: Head) -> Tensor:
    """grad @ weight: (C, V) -> (C, H), widened."""
    if head.weight.dtype == grad_CV.dtype:
        return torch.mm(grad_CV, head.weight)
    if grad_CV.is_cuda:
        return torch.mm(grad_CV.to(head.weight.dtype), head.weight, out_dtype=grad_CV.dtype)
    out_CH = grad_CV.new_zeros(grad_CV.shape[0], head.weight.shape[1])
    for tokens in _vocab_slices(head.weight):
        out_CH.addmm_(grad_CV[:, tokens], head.weight[tokens].to(grad_CV.dtype))
    return out_CH


def dense_weight_grad(grad_CV: Tensor, hidden_CH: Tensor) -> Tensor:
    """grad.T @ hidden, widened: the first of a sum, without writing zeros before it."""
    if grad_CV.is_cuda and hidden_CH.dtype != grad_CV.dtype:
        return torch.mm(grad_CV.to(hidden_CH.dtype).t(), hidden_CH, out_dtype=grad_CV.dtype)
    return torch.mm(grad_CV.t(), hidden_CH.to(grad_CV.dtype))


def add_dense_weight_grad(total_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """total += grad.T @ hidden, accumulated in the dtype of `total`."""
    if grad_CV.is_cuda and hidden_CH.dtype != total_VH.dtype:
        torch.addmm(total_VH, grad_CV.to(hidden_CH.dtype).t(), hidden_CH, out_dtype=total_VH.dtype, out=total_VH)
    else:
        total_VH.addmm_(grad_CV.t(), hidden_CH.to(total_VH.dtype))


def column_hidden_grad(grad_CK: Tensor, head: Head, ids_CK: Tensor) -> Tensor:
    """The same as `dense_hidden_grad` where only K columns of the gradient are not zero."""
    out_CH = grad_CK.new_empty(grad_CK.shape[0], head.weight.shape[1])
    for part in _gather_slices(out_CH, ids_CK):
        weight_CKH = _gathered_weight(head.weight, ids_CK[part], grad_CK.dtype)
        torch.bmm(grad_CK[part].unsqueeze(1), weight_CKH, out=out_CH[part].unsqueeze(1))
    return out_CH


def add_column_weight_grad(total_VH: Tensor, grad_CK: Tensor, hidden_CH: Tensor, ids_CK: Tensor) -> None:
    """The same as `add_dense_weight_grad` where only K columns of the gradient are not zero."""
    for part in _gather_slices(hidden_CH, ids_CK):
        outer_CKH = grad_CK[part].unsqueeze(2) * hidden_CH[part].to(grad_CK.dtype).unsqueeze(1)
        total_VH.index_add_(0, ids_CK[part].flatten(), outer_CKH.flatten(0, 1))


def _gathered_weight(weight: Tensor, ids_CK: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.index_select(0, ids_CK.flatten()).view(*ids_CK.shape, -1).to(dtype)


def _gather_slices(hidden_CH: Tensor, ids_CK: Tensor) -> list[slice]:
    per_token = ids_CK.shape[1] * hidden_CH.shape[1] * widened(hidden_CH.dtype).itemsize
    step = max(1, GATHER_BYTES // max(per_token, 1))
    return [slice(start, start + step) for start in range(0, hidden_CH.shape[0], step)]


def _vocab_slices(weight: Tensor) -> list[slice]:
    # A half-precision head is widened a part at a time: a whole float32 copy would be larger than the chunk's logits.
    step = max(1, GATHER_BYTES // (weight.shape[1] * 4))
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]
