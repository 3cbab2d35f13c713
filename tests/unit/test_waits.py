"""What the host waits for in a step on a device, by growth: with tokens, with layers, with micro-batches."""

import multiprocessing
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lab import pretend_device
from lab.waits import waits_of

pytestmark = pytest.mark.slow  # a process of its own
SIZES: dict[str, dict[str, int]] = {"plain": {}, "tokens": {"tokens": 32}, "layers": {"layers": 4}}
SIZES |= {"micro-batches": {"micro_batches": 4}}
# Where a micro-batch may wait: the loss as a number, which the host asks for, and guards of one look each.
ASKED_OF_MICRO_BATCHES = {"assignment.py", "loss.py", "fused/chunk_pass.py", "trainer/host.py"}


def _counted(connection: Any, folder: Path) -> None:
    pretend_device.register()
    for name, sizes in SIZES.items():
        try:
            connection.send((waits_of(str(folder / name), "dopd", **sizes), dict(pretend_device.mixed)))
        except BaseException:
            connection.send((Counter(), {traceback.format_exc(): 1}))


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[str]]:
    """Waits of a step by place, for each size; no operation had tensors of two devices."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_counted, args=(there, tmp_path_factory.mktemp("waits")))
    process.start()
    there.close()
    found = {}
    for name in SIZES:
        found[name], mixed = here.recv()
        assert mixed == {}
    process.join()
    return found


@pytest.mark.parametrize("size", ["tokens", "layers"])
def test_waits_do_not_grow_with(counts: dict[str, Counter[str]], size: str) -> None:
    assert counts["plain"].total() > 0
    assert counts[size] == counts["plain"]


def test_of_a_micro_batch_the_host_waits_for_its_loss_and_guards_alone(counts: dict[str, Counter[str]]) -> None:
    grown = counts["micro-batches"] - counts["plain"]
    own = {place.partition(" at dopd/")[2].partition(":")[0] for place in grown if " at dopd/" in place}
    assert own == ASKED_OF_MICRO_BATCHES
    assert all(count == 2 for place, count in grown.items() if " at dopd/" in place)  # two more of them
