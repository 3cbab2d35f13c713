"""A head that FSDP2 keeps sharded: collected once a call, and its gradient averaged over the ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dopd.assignment import Assignment
from dopd.fused import fused_routed_loss
from dopd.heads import Head
from dopd.methods import table as method

WORLD = 2
B, T, H, V = 4, 3, 5, 203


def run_rank(rank: int) -> None:
    """Half of the batch on every rank, against the whole batch with whole heads."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    linear = nn.Linear(H, V).double()
    states = torch.randn(3, B, T, H, dtype=torch.float64)
    ids, mask = torch.randint(V, (B, T)), torch.ones(B, T)
    regimes = torch.randint(4, (B, T))
    table = method("dopd", top_k=3)

    def loss(head: Head, part: slice, num_sequences: float) -> torch.Tensor:
        targets = {"privileged_teacher": (states[1, part], head), "privileged_student": (states[2, part], head)}
        arguments = (states[0, part], head, targets, ids[part], mask[part], table)
        return fused_routed_loss(
            *arguments, assignment=Assignment(regimes[part]), num_sequences=num_sequences, chunk_tokens=2
        ).loss

    whole = Head(linear.weight.detach().clone().requires_grad_(), linear.bias.detach().clone().requires_grad_())
    loss(whole, slice(0, B), B).backward()

    fully_shard(linear)
    assert isinstance(linear.weight, DTensor)
    gathers = []
    original = DTensor.full_tensor
    DTensor.full_tensor = lambda self, **options: (gathers.append(self.shape), original(self, **options))[1]
    step = B // WORLD
    loss(Head.of(linear), slice(rank * step, (rank + 1) * step), B / WORLD).backward()
    DTensor.full_tensor = original
    assert sum(len(shape) == 2 for shape in gathers) == 1, f"the weight was collected {len(gathers)} times"
    for sharded, reference in ((linear.weight, whole.weight), (linear.bias, whole.bias)):
        assert isinstance(sharded.grad, DTensor)
        torch.testing.assert_close(sharded.grad.full_tensor(), reference.grad, rtol=1e-12, atol=1e-14)
    dist.destroy_process_group()


def test_sharded_head() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    root = str(Path(__file__).parents[2])
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank)], env=environment, cwd=root, stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * WORLD, "\n".join(errors)[-3000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_rank(int(sys.argv[1]))
