"""What each of two processes runs for test_sharded.py: FSDP2 on CPUs, where accelerate does not offer it."""

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import trainer_kit as kit
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from resume_kit import comparable, resumable
from torch.distributed.tensor import DTensor

from dopd.trainer.whole import checkpoints_of

torch.set_num_threads(1)
_init = PartialState.__init__


def as_accelerators(self: Any, *args: Any, **kwargs: Any) -> None:
    """accelerate chooses FSDP only where it finds several accelerators; gloo and CPUs do for the code after that."""
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


SHARDED: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
}


EVALUATED: dict[str, Any] = {
    "verifier": kit.TASK.verify,
    "eval_dataset": Dataset.from_list(kit.task_rows(3, split="test")),
    "student_eval_steps": 1,
    "student_eval_batch_size": 1,
}
# Privileged students of an earlier time, and steps after which they are not the student.
ANCHORED: dict[str, dict[str, Any]] = {
    "dopd_ema": {"max_steps": 3, "ema_decay": 0.7},
    "dopd_frozen": {"max_steps": 2},
    "dopd_snapshot": {"max_steps": 3, "snapshot_steps": 2},
}


def ended(folder: Path) -> dict[str, Any]:
    """A run of four steps, gone on with from what is in its folder."""
    options = {"privileged_student": "ema", "ema_decay": 0.5, **SHARDED}
    made = resumable(folder, steps=4, per_device_train_batch_size=2, save_total_limit=2, **options)
    made.train(resume_from_checkpoint=bool(checkpoints_of(folder)))
    return {"weights": kit.parameters(made.model), "steps": made.state.global_step, "records": comparable(folder)}


def cut_off(folder: Path, run: Path, *, torn: bool) -> None:
    """A copy of a run as it was after two steps, or while a later checkpoint was torn."""
    if torch.distributed.get_rank() == 0:
        shutil.copytree(run, folder)
        if torn:
            files = [path for path in folder.glob("checkpoint-4/**/*") if path.is_file()]
            largest = max(files, key=lambda path: path.stat().st_size)
            largest.write_bytes(largest.read_bytes()[:-1])
        else:
            shutil.rmtree(folder / "checkpoint-4")
    torch.distributed.barrier()


def resumed(folder: Path) -> dict[str, Any]:
    """A run that is not cut off, and two that are."""
    found = {"whole": ended(folder / "whole")}
    for name in ("killed", "torn"):
        cut_off(folder / name, folder / "whole", torn=name == "torn")
        found[name] = ended(folder / name)
        found[name]["checkpoints"] = [step for step, _ in checkpoints_of(folder / name)]
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    PartialState.__init__ = as_accelerators  # type: ignore[method-assign]
    results: dict[str, Any] = {"resumed": resumed(folder)}
    for method, options in ANCHORED.items():
        made, _, _ = kit.one_step(folder / method, method, 4, 1, **SHARDED, **options)
        results[method] = {"records": kit.train_records(made), "weights": kit.parameters(made.model)}
    for method in ("vanilla", "dopd"):
        made, _, _ = kit.one_step(
            folder / method,
            method,
            4,
            1,
            **SHARDED,
            **EVALUATED,
            save_strategy="steps",
            save_steps=1,
        )
        models = (made.model, made.teacher_model)
        sharded = all(isinstance(parameter, DTensor) for model in models for parameter in model.parameters())
        evaluated = [record for record in made.state.log_history if "eval_num_prompts" in record]
        results[method] = {
            "record": kit.train_records(made)[0],
            "sharded": sharded,
            "evaluated": evaluated,
            "weights": kit.parameters(made.model),
        }
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
