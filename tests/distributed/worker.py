"""What each of two gloo processes runs for test_two_processes.py; the main process writes what it saw as a file."""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import trainer_kit as kit
import yaml
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset

import dopd.cli.main

torch.set_num_threads(1)
MIXED = {"lmbda": 0.5, "seed": 3}  # some rows are trained on answers, others on reference texts


def equivalence(folder: Path, method: str, size: int, cuts: int, **options: object) -> dict[str, object]:
    made, batch, update = kit.one_step(folder, method, size, cuts, **options)
    own_tokens = int(batch["completion_mask"].sum())
    return {
        "record": kit.train_records(made)[0],
        "update": update,
        "tokens_by_rank": gather_object([own_tokens]),
        "regimes": gather_object([kit.by_completion(batch, "regimes")]) if method == "dopd" else None,
    }


def orders(folder: Path) -> dict[str, object]:
    """Prompts of two epochs: unbroken, and resumed in the second."""
    rows = Dataset.from_list(kit.task_rows(4))
    options = {"train_dataset": rows, "per_device_train_batch_size": 2, "num_generations": 2, "save_steps": 1}
    seen: dict[str, object] = {}
    for name, checkpoint in (("unbroken", None), ("resumed", folder / "orders" / "checkpoint-3")):
        made = kit.trainer(folder / "orders", "vanilla", max_steps=4, save_strategy="steps", **options)
        batches = kit.scored(made)
        made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        mine = [batch["prompt_ids"].tolist() for batch in batches]
        seen[name] = gather_object([mine])
    return seen


def whole_run(folder: Path) -> dict[str, object]:
    made = kit.trainer(
        folder / "run",
        per_device_train_batch_size=4,
        max_steps=2,
        eval_dataset=Dataset.from_list(kit.task_rows(7, split="test")),
        verifier=kit.TASK.verify,
        student_eval_steps=1,
        trace_steps=1,
        trace_probes=1,
        privileged_student="ema",
        save_strategy="steps",
        save_steps=1,
    )
    made.train()
    evaluated = made.evaluate()
    weights = torch.cat([value.flatten() for value in kit.parameters(made.model).values()])
    return {"log": made.state.log_history, "evaluated": evaluated, "weights": gather_object([weights.tolist()])}


def stream(folder: Path) -> dict[str, object]:
    rows = kit.task_rows(8)
    made = kit.trainer(
        folder / "stream",
        train_dataset=IterableDataset.from_generator(lambda: iter(rows)),
        per_device_train_batch_size=4,
        shuffle_dataset=False,
    )
    batches = kit.scored(made)
    made.train()
    return {"prompts": gather_object([batches[0]["prompt_ids"].tolist()])}


def command(folder: Path) -> list[int]:
    """Statuses of `dopd train`, without and with --dry-run, on every process."""
    said: dict[str, object] = {"max_steps": 1, "per_device_train_batch_size": 4, "dtype": "float32"}
    said |= {"model_name_or_path": "tiny:dag/student", "teacher_model_name_or_path": "tiny:dag/teacher", "task": "dag"}
    said |= {"privileged_template": "{prompt} {privileged_context}", "train_prompts": 8, "eval_prompts": 4}
    said |= {"use_cpu": True, "bf16": False, "max_completion_length": 5, "output_dir": str(folder / "command")}
    (folder / "command.yaml").write_text(yaml.safe_dump(said))
    arguments = ["train", str(folder / "command.yaml")]
    return [dopd.cli.main.main(arguments), dopd.cli.main.main([*arguments, "--dry-run"])]


def main() -> None:
    folder = Path(sys.argv[1])
    kit.config(folder)
    logging.getLogger("dopd.trainer").warning("what a process warns of")
    results = {
        "dopd": equivalence(folder / "dopd", "dopd", 4, 1),
        "dopd_cut": equivalence(folder / "dopd_cut", "dopd", 2, 2),
        "vanilla": equivalence(folder / "vanilla", "vanilla", 4, 1),
        # Picks the tokens with the highest scores of the whole batch, scaled by its extremes.
        "tip_cut": equivalence(folder / "tip_cut", "tip", 2, 2),
        "rewarded": equivalence(folder / "rewarded", "rewarded", 4, 1, **kit.rewarded()),
        "dapd_cut": equivalence(folder / "dapd_cut", "dapd", 2, 2),
        "gkd": equivalence(folder / "gkd", "gkd", 4, 1, method_options=MIXED),
        "orders": orders(folder),
        "run": whole_run(folder),
        "stream": stream(folder),
        "command": gather_object([command(folder)]),
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
