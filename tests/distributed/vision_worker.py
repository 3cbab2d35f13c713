"""What each of two gloo processes runs for test_two_processes_vision.py; the main process writes what it saw."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import vision_kit as kit
from accelerate.utils import gather_object
from datasets import Dataset

torch.set_num_threads(1)


def one_step(folder: Path, name: str, size: int) -> dict[str, Any]:
    """Record and update of one step over four prompts, of which the last two have no image."""
    rows = [{**row, "images": row["images"] if number < 2 else []} for number, row in enumerate(kit.rows(4))]
    made = kit.trainer(
        name,
        folder,
        train_dataset=Dataset.from_list(rows),
        shuffle_dataset=False,
        per_device_train_batch_size=size,
        generation_kwargs={"do_sample": False},
        off_policy_rollouts=True,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    before = {key: value.detach().clone() for key, value in made.model.named_parameters()}
    with_images: list[int] = []
    original = made.scored_batch

    def scored(inputs: Any) -> Any:
        parts = original(inputs)
        with_images.append(sum(images is not None for images in parts[0].view.images))
        return parts

    made.scored_batch = scored  # type: ignore[method-assign]
    made.train()
    update = {key: value.detach() - before[key] for key, value in made.unwrapped_student.named_parameters()}
    record = next(record for record in made.state.log_history if "loss" in record)
    return {"record": record, "update": update, "with_images": with_images}


def main() -> None:
    folder = Path(sys.argv[1])
    results: dict[str, Any] = {}
    for name in ("qwen3_vl", "idefics3"):
        results[name] = one_step(folder / name, name, 4)
        results[name]["by_rank"] = gather_object([results[name]["with_images"]])
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
