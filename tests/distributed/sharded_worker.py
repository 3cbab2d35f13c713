"""What each of two processes runs for test_sharded.py: FSDP2 on CPUs, where accelerate does not offer it."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import trainer_kit as kit
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from torch.distributed.tensor import DTensor

torch.set_num_threads(1)
_init = PartialState.__init__


def as_accelerators(self: Any, *args: Any, **kwargs: Any) -> None:
    """accelerate chooses FSDP only where it finds several accelerators; gloo and CPUs do for the code after that."""
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def main() -> None:
    folder = Path(sys.argv[1])
    PartialState.__init__ = as_accelerators  # type: ignore[method-assign]
    results = {}
    for method in ("vanilla", "dopd"):
        made, _, _ = kit.one_step(
            folder / method,
            method,
            4,
            1,
            fsdp=True,
            fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
            verifier=kit.TASK.verify,
            eval_dataset=Dataset.from_list(kit.task_rows(3, split="test")),
            student_eval_steps=1,
            student_eval_batch_size=1,
            save_strategy="steps",
            save_steps=1,
        )
        sharded = all(isinstance(parameter, DTensor) for parameter in made.model.parameters())
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
