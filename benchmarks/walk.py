"""How far a reader walks: files, functions and changes of file of one text-only training step, DOPD beside TRL.

The second optimizer step of tiny models is profiled. Counted are calls of Python functions of the package: a *function*
is one that was called at least once, a *change of file* a call whose nearest caller within the package stands in
another file, and a *crossing* a call whose own caller does not belong to the package although some caller further up
does (the host calls back). Besides: lines of the package, and seconds of its import, of `dopd --help`, and of a step
without the profiler.

Examples:
    python benchmarks/walk.py
    python benchmarks/walk.py --files
    python benchmarks/walk.py --csv benchmarks/results/walk.csv
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from common import append_csv, machine, print_table
from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

import dopd
from dopd.tasks import get_task
from dopd.tiny.models import TinySpec, build_model
from dopd.tiny.tokenizer import build_tokenizer
from dopd.trainer import DOPDConfig, DOPDTrainer

PROFILED = 1  # steps made before the one that is profiled


class Walk:
    """Follows calls into the files below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder) + os.sep
        self.files: Counter[str] = Counter()
        self.functions: set[tuple[str, str]] = set()
        self.changes = self.crossings = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event != "call" or not path.startswith(self.folder) or frame.f_code.co_name.startswith("<"):
            return
        self.files[path.removeprefix(self.folder)] += 1
        self.functions.add((path, frame.f_code.co_qualname))
        caller = frame.f_back
        outside = caller is not None and not caller.f_code.co_filename.startswith(self.folder)
        while caller is not None and not caller.f_code.co_filename.startswith(self.folder):
            caller = caller.f_back
        if caller is not None:
            self.changes += caller.f_code.co_filename != path
            self.crossings += outside


class Profiled(TrainerCallback):
    """Profiles one step, and times the others."""

    def __init__(self, walk: Walk | None) -> None:
        self.walk, self.seconds, self._start = walk, list[float](), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def profiled(trainer: Any, walk: Walk) -> Callable[..., Any]:
    """The trainer's training step, followed by `walk` where it is the profiled one."""
    original = trainer.training_step

    def training_step(*arguments: Any, **named: Any) -> Any:
        if trainer.state.global_step != PROFILED:
            return original(*arguments, **named)
        sys.setprofile(walk)
        try:
            return original(*arguments, **named)
        finally:
            sys.setprofile(None)

    return training_step


def trainer(name: str, folder: str, steps: int) -> Any:
    tokenizer = build_tokenizer()
    options: dict[str, Any] = {
        "output_dir": f"{folder}/{name}-{steps}",
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "max_steps": steps,
        "max_completion_length": 16,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    own = {"num_generations": 4, "activation_checkpointing": False}
    kinds = {"dopd": (DOPDConfig, DOPDTrainer, own), "trl": (DistillationConfig, DistillationTrainer, {})}
    config, kind, more = kinds[name]
    return kind(
        model=build_model(TinySpec(num_layers=2, hidden_size=32), tokenizer, 0),
        teacher_model=build_model(TinySpec(num_layers=2, hidden_size=48), tokenizer, 1),
        args=config(**options, **more),
        train_dataset=Dataset.from_list(get_task("dag").rows("train", 32, "hints_without_execution")),
        processing_class=tokenizer,
    )


def measured(name: str, package: Path, folder: str, repeats: int) -> tuple[dict[str, Any], Walk]:
    walk = Walk(package)
    walked = trainer(name, folder, PROFILED + 1)
    walked.training_step = profiled(walked, walk)
    walked.train()
    timed, clock = trainer(name, folder, repeats + 2), Profiled(None)
    timed.add_callback(clock)
    timed.train()
    row = {
        "trainer": name,
        "files": len(walk.files),
        "functions": len(walk.functions),
        "changes": walk.changes,
        "crossings": walk.crossings,
        "step_ms": round(1000 * statistics.median(clock.seconds[2:]), 1),
    }
    return row, walk


def seconds_of(command: list[str], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--files", action="store_true", help="also print the calls into each file")
    parser.add_argument("--csv", type=Path, help="append the figures to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    package = Path(dopd.__file__).parent
    trl_folder = Path(sys.modules[DistillationTrainer.__module__].__file__ or "").parents[1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, place in (("trl", trl_folder), ("dopd", package)):
            row, walk = measured(name, place, folder, args.repeats)
            rows.append(row)
            if args.files:
                for path, calls in walk.files.most_common():
                    print(f"{calls:6d}  {path}")
    lines = sum(len(path.read_text().splitlines()) for path in package.rglob("*.py"))
    imported = seconds_of([sys.executable, "-c", "import dopd"], 3)
    helped = seconds_of([sys.executable, "-m", "dopd.cli.main", "--help"], 3)
    columns = list(rows[0])
    print_table(rows, columns)
    print(f"lines of the package: {lines}; import dopd: {imported} s; dopd --help: {helped} s")
    if args.csv:
        fields = machine("cpu", 1)
        append_csv(
            args.csv, [{**fields, **row, "lines": lines, "import_s": imported, "help_s": helped} for row in rows]
        )


if __name__ == "__main__":
    main()
