"""Forty kills at random moments: each run goes on to the bit, whatever it was at; every checkpoint there is whole."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launcher
import numpy as np
import pytest
import torch
import trainer_kit
import vision_kit
from resume_kit import (
    STEPS,
    in_a_process,
    killed_at_random,
    resumable,
    same_files,
    same_weights,
    status_of,
)

from dopd.trainer import DOPDTrainer, whole

pytestmark = pytest.mark.slow
LAST = f"checkpoint-{STEPS}"


def vision(folder: Path) -> DOPDTrainer:
    options: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "trace_steps": 1}
    return vision_kit.trainer("qwen3_vl", folder, **options)


# What is trained, and how often it is killed.
KINDS: dict[str, tuple[Callable[[Path], DOPDTrainer], int]] = {
    "dopd": (lambda folder: resumable(folder, steps=STEPS), 10),
    "ema": (lambda folder: resumable(folder, steps=STEPS, privileged_student="ema", save_total_limit=1), 10),
    "lora": (lambda folder: resumable(folder, steps=STEPS, peft_config=trainer_kit.lora(), save_total_limit=1), 10),
    "vision": (vision, 6),
}


def gone_on(made: DOPDTrainer, folder: Path) -> Callable[[], object]:
    return lambda: made.train(resume_from_checkpoint=bool(whole.checkpoints_of(folder)))


def check_there(folder: Path) -> None:
    """The newest checkpoint is whole; an older one may be on its way out, of which the manifest goes last."""
    found = [path for _, path in whole.checkpoints_of(folder)]
    assert all(whole.manifest_of(path) for path in found)
    assert not found or whole.damage(found[-1]) is None


def check_same(folder: Path, unbroken: Path) -> None:
    assert same_weights(folder / LAST, unbroken / LAST) and same_files(folder, unbroken)
    for name in ("privileged_student.pt", "optimizer.pt", "rng_state.pth"):
        if (unbroken / LAST / name).exists():
            mine, theirs = (torch.load(path / LAST / name, weights_only=False) for path in (folder, unbroken))
            assert same(mine, theirs), (name, [key for key in mine if not same(mine[key], theirs[key])])


def same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return bool((mine == theirs).all()) if isinstance(mine, np.ndarray) else mine == theirs


@pytest.mark.parametrize("name", KINDS)
def test_runs_that_are_killed_at_random_moments_go_on_to_the_bit(name: str, tmp_path: Path) -> None:
    make, kills = KINDS[name]
    draw, log = random.Random(name), tmp_path / "log"
    unbroken = tmp_path / "unbroken"
    made, start = make(unbroken), time.monotonic()
    assert status_of(in_a_process(made.train, log)) == 0, log.read_text()
    longest, count, rounds = time.monotonic() - start, 0, 0
    while count < kills:
        folder = tmp_path / f"run{rounds}"
        while count < kills:
            status = killed_at_random(gone_on(make(folder), folder), log, draw, longest)
            if status == 0:
                break
            assert status == -9, log.read_text()
            count += 1
            check_there(folder)
        assert status_of(in_a_process(gone_on(make(folder), folder), log)) == 0, log.read_text()
        check_same(folder, unbroken)
        shutil.rmtree(folder)
        rounds += 1


def test_two_processes_that_are_killed_at_random_moments_go_on_to_the_bit(tmp_path: Path) -> None:
    draw, unbroken, folder = random.Random(2), tmp_path / "unbroken", tmp_path / "run"
    longest = two(unbroken, tmp_path, None)
    for _ in range(4):
        two(folder, tmp_path, draw.uniform(0.1, longest))
        check_there(folder)
    two(folder, tmp_path, None)
    assert same_weights(folder / LAST, unbroken / LAST) and same_files(folder, unbroken)


def two(folder: Path, logs: Path, until: float | None) -> float:
    """Seconds that two processes trained: to the end, or until they are killed."""
    ready = [logs / f"ready-{rank}" for rank in range(2)]
    for mark in ready:
        mark.unlink(missing_ok=True)
    with launcher.started("kill_worker.py", folder, logs) as workers:
        end = time.monotonic() + 300
        while not all(mark.exists() for mark in ready) and time.monotonic() < end:
            time.sleep(0.02)
        start = time.monotonic()
        if until is None:
            codes = [worker.wait(timeout=300) for worker in workers]
            assert codes == [0, 0], "\n".join((logs / f"output{rank}.txt").read_text()[-2000:] for rank in range(2))
        else:
            time.sleep(until)
    return time.monotonic() - start
