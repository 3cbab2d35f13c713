"""The Triton kernels against plain torch: under the interpreter on a CPU, and on CUDA where there is a device.

The interpreter is chosen when triton is imported, so those checks run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dopd import divergences
from dopd.fused import fused_routed_loss, score_tokens
from dopd.fused.tiles import TileOperations
from dopd.heads import Head
from dopd.methods import table as method

pytest.importorskip("triton")

SHAPES = [(1, 1), (3, 33), (5, 4096), (2, 9001)]
HEADS = [{}, {"logit_scale": 0.6, "softcap": 4.0, "temperature": 1.3}]


def tiles(shape: tuple[int, int], head: Head, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    student, target = (5 * torch.randn(2, *shape)).to(device)
    if head.softcap is not None:
        student = head.softcap * torch.tanh(student / head.softcap) / head.temperature
    student[0, 0] = -1e30  # a token that the head forbids
    student[-1, -1] = 60.0 if head.softcap is None else student[-1, -1]
    return student, target, torch.rand(shape[0], device=device) - 0.5


def check_tile_operations(device: str) -> None:
    from dopd.fused.triton import TritonTileOperations

    for shape in SHAPES:
        for options in HEADS:
            head = Head(torch.empty(shape[1], 1), **options)
            student, target, scale = tiles(shape, head, device)
            for write in (None, head):
                ours, theirs = student.clone(), student.clone()
                a, b = TritonTileOperations().softmax_(ours, write), TileOperations().softmax_(theirs, write)
                torch.testing.assert_close(a.logsumexp_C, b.logsumexp_C, rtol=1e-6, atol=1e-5)
                torch.testing.assert_close(a.neg_entropy_C, b.neg_entropy_C, rtol=1e-5, atol=1e-5)
                if write is not None:
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
            for function in divergences.DIVERGENCES.values():
                ours, theirs = student.clone(), student.clone()
                a, b = (
                    rows.full_(function, tile, target.clone(), scale, head)
                    for rows, tile in ((TritonTileOperations(), ours), (TileOperations(), theirs))
                )
                torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
                torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)


def check_loss(device: str) -> None:
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        for tail in ("bucket", "renormalize"):
            torch.manual_seed(0)
            B, T, H, V = 2, 9, 8, 701
            weight = torch.randn(V, H, device=device, dtype=dtype, requires_grad=True)
            hidden = torch.randn(B, T, H, device=device, dtype=dtype, requires_grad=True)
            states = torch.randn(2, B, T, H, device=device, dtype=dtype)
            targets = {"privileged_teacher": (states[0], weight), "privileged_student": (states[1], weight)}
            ids, mask = torch.randint(V, (B, T), device=device), torch.ones(B, T, device=device)
            mask[0, 5:] = 0
            results = []
            for backend in ("chunked", "triton"):
                result = fused_routed_loss(
                    hidden,
                    weight,
                    targets,
                    ids,
                    mask,
                    method("dopd", top_k=6, tail=tail),
                    backend=backend,
                    chunk_tokens=4,
                )
                scores = score_tokens(hidden, weight, ids, mask, backend=backend)
                values = (result.loss.detach(), result.per_token, scores.logprobs, scores.entropy)
                results.append((*torch.autograd.grad(result.loss, (hidden, weight)), *values))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance)


def test_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, "compile"],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def compile_kernels() -> None:
    """To machine code of compute capability 9.0; no device is needed for it."""
    from triton import compile as compile_to
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dopd.fused import triton as kernels

    numbers = {"scale": "fp32", "inverse_cap": "fp32", "num_columns": "i32"}
    tensors = ("s_ptr", "t_ptr", "grad_scale_ptr", "value_ptr", "entropy_ptr")
    full = {**dict.fromkeys(tensors, "*fp32"), "s_stride": "i32", "t_stride": "i32", **numbers}
    softmax = {"z_ptr": "*fp32", "stride": "i32", "logsumexp_ptr": "*fp32", "neg_entropy_ptr": "*fp32", **numbers}
    jobs = [(kernels._full_kernel, full, {"KIND": kind, "HAS_CAP": kind == 2, "BLOCK": 256}) for kind in range(3)]
    jobs.append((kernels._softmax_kernel, softmax, {"WRITE": True, "HAS_CAP": True, "BLOCK": 256}))
    for kernel, types, constants in jobs:
        names = [name for name in kernel.arg_names if name not in constants]
        signature = {name: types[name] for name in names} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert "cubin" in compile_to(source, target=GPUTarget("cuda", 90, 32)).asm


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    check_tile_operations("cuda")
    check_loss("cuda")


if __name__ == "__main__":
    if sys.argv[1:] == ["compile"]:
        compile_kernels()
        sys.exit()
    torch.set_num_threads(1)
    check_tile_operations("cpu")
    check_loss("cpu")
