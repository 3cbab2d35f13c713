"""Runs that are cut off and gone on with: the same trainer in any process, its files, and processes that are killed."""

import contextlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trainer_kit as kit
from datasets import Dataset

from dopd.inspection.schema import read_json_lines
from dopd.trainer import DOPDTrainer
from dopd.trainer.trace import read_trace

NOT_REPEATED = ("seconds/", "step_time", "train_", "eval_runtime", "eval_samples", "eval_steps")
STEPS = 8
EMA: dict[str, Any] = {"privileged_student": "ema", "save_total_limit": 1}


def resumable(folder: Path, *, steps: int, **options: Any) -> DOPDTrainer:
    given: dict[str, Any] = {
        "max_steps": steps,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "trace_steps": 1,
        "trace_examples": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "verifier": kit.TASK.verify,
        "eval_dataset": Dataset.from_list(kit.task_rows(4, split="test")),
        "student_eval_steps": 2,
        "train_dataset": Dataset.from_list(kit.task_rows(6)),
    }
    return kit.trainer(folder, **(given | options))


def comparable(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if not key.startswith(NOT_REPEATED)}
        for record in read_json_lines(folder / "metrics.jsonl")
        if "train_runtime" not in record
    ]


def same_files(folder: Path, other: Path) -> bool:
    """Whether two runs have logged and traced the same, each step once."""
    return comparable(folder) == comparable(other) and read_trace(folder / "trace.jsonl") == read_trace(
        other / "trace.jsonl"
    )


def in_a_process(do: Callable[[], object], log: Path) -> int:
    """Start a copy of this process that does something and ends with status 0, or 1 with a traceback in `log`."""
    state = random.getstate()
    child = os.fork()
    if child:
        return child
    random.setstate(state)  # Python gives a copy another one
    try:
        # The test's own output is not the copy's.
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(file), "w", buffering=1) for _ in range(2))
        do()
        os._exit(0)
    except SystemExit as error:
        os.write(file, f"{error}\n".encode())
        os._exit(int(error.code or 0))
    except BaseException:
        os.write(file, traceback.format_exc().encode())
    finally:
        os._exit(1)


def status_of(child: int) -> int:
    """The exit status of a process that has ended, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_random(do: Callable[[], object], log: Path, draw: random.Random, longest: float) -> int:
    """Kill a copy of this process after a random time, in seconds below `longest`; its status as of `status_of`."""
    child = in_a_process(do, log)
    time.sleep(draw.uniform(0.0, longest))
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return status_of(child)


def kill_me(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        f"{path.name} {name}": value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def same_weights(folder: Path, other: Path) -> bool:
    mine, theirs = weights_of(folder), weights_of(other)
    return bool(mine) and mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
