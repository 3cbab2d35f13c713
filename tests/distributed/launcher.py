"""Runs a worker script as two gloo processes and reads the file that its main process writes."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


def run(script: str, folder: Path, settings: Mapping[str, str] | None = None) -> dict[str, Any]:
    with started(script, folder, folder, settings) as workers:
        codes = [worker.wait(timeout=600) for worker in workers]
    outputs = [(folder / f"output{rank}.txt").read_text()[-3000:] for rank in range(2)]
    assert codes == [0, 0], "\n".join(outputs)
    return torch.load(folder / "results.pt", weights_only=False)


@contextlib.contextmanager
def started(
    script: str, folder: Path, logs: Path, settings: Mapping[str, str] | None = None
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Two processes of a script with a folder as its argument, which are killed at the end if they have not ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **(settings or {}),
    }
    with contextlib.ExitStack() as stack:
        # Files and not pipes: a full pipe of one worker would keep both waiting.
        files = [stack.enter_context((logs / f"output{rank}.txt").open("w")) for rank in range(2)]
        workers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name(script)), str(folder)],
                    env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=files[rank],
                    stderr=subprocess.STDOUT,
                )
            )
            for rank in range(2)
        ]
        try:
            yield workers
        finally:
            for worker in workers:
                worker.kill()
