"""How often the host waits for the device in a training step, on a pretended device (`lab.pretend_device`).

A wait is an operation that needs a value, or a size, from the device: `.item()`, `.tolist()`, a mask as an index, a
copy to the CPU. Answers come from an engine that draws nothing, as those of `generate` wait once for every token they
have. Counted is the second optimizer step; beside it the same step with twice the tokens of an answer, twice the
layers, and twice the micro-batches, in which the number should be the same.

Examples:
    python benchmarks/waits.py
    python benchmarks/waits.py --places dopd
    python benchmarks/waits.py --csv benchmarks/results/waits.csv
"""

import argparse
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from common import append_csv, print_table
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from dopd.step import Request
from dopd.tasks import get_task
from dopd.tiny.models import TinySpec, build_model
from dopd.tiny.tokenizer import build_tokenizer
from dopd.trainer import DOPDConfig, DOPDTrainer
from lab import pretend_device

ANSWERS = 8  # of a step, four to each prompt
CASES: dict[str, dict[str, Any]] = {
    "vanilla": {"method": "vanilla"},
    "dopd": {"method": "dopd"},
    "dopd, no shared prompts": {"method": "dopd", "share_prompts": False},
    "dopd, LoRA": {"method": "dopd", "lora": True},
    "dopd_ema": {"method": "dopd_ema"},
    "dopd, traced": {"method": "dopd", "trace_steps": 1},
}
SIZES: dict[str, dict[str, int]] = {
    "as it is": {},
    "2 x tokens": {"tokens": 32},
    "2 x layers": {"layers": 4},
    "2 x micro-batches": {"micro_batches": 4},
}


class FixedAnswers:
    """An engine that answers with the same tokens whatever it is asked."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def generate(self, request: Request) -> list[list[int]]:
        return [[5 + (place + n) % 7 for n in range(min(self.tokens, request.max_new_tokens))] for place in range(len(request.prompts))]


class SecondStep(TrainerCallback):
    """Counts the waits of the second step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            pretend_device.waits.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.waits = Counter(pretend_device.waits)


def waits_of(
    folder: str, method: str, *, tokens: int = 16, layers: int = 2, micro_batches: int = 2, lora: bool = False, **more: Any
) -> Counter[str]:
    """Waits of one step of a method, by operation and line."""
    tokenizer = build_tokenizer()
    models = [build_model(TinySpec(num_layers=layers, hidden_size=size), tokenizer, seed) for seed, size in ((0, 32), (1, 48))]
    for model in models:
        pretend_device.move(model)
    counting = SecondStep()
    options: dict[str, Any] = {
        "output_dir": folder,
        "bf16": False,
        "per_device_train_batch_size": ANSWERS // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "num_generations": 4,
        "max_completion_length": tokens,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "activation_checkpointing": False,
        "off_policy_rollouts": True,
    }
    config = DOPDConfig(**options, method=method, **more)
    # What the libraries find out of the machine when a config is made.
    PartialState._shared_state["device"] = vars(config)["_setup_devices"] = pretend_device.device()
    with pretend_device.Pretended():
        trainer = DOPDTrainer(
            model=models[0],
            teacher_model=models[1],
            args=config,
            train_dataset=Dataset.from_list(get_task("dag").rows("train", 32, "hints_without_execution")),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
            rollout_engine=FixedAnswers(tokens),
            callbacks=[counting],
        )
        trainer.train()
    return counting.waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", choices=CASES, help="print where one case waits")
    parser.add_argument("--csv", type=Path, help="append the counts to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pretend_device.register()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (case, options) in enumerate(CASES.items()):
            if args.places in (None, case):
                counts = {
                    size: waits_of(f"{folder}/{number}-{place}", **options, **sizes)
                    for place, (size, sizes) in enumerate(SIZES.items())
                }
                rows.append({"case": case} | {size: found.total() for size, found in counts.items()})
                if args.places:
                    for where in sorted(set().union(*counts.values())):
                        print(*(f"{found[where]:4d}" for found in counts.values()), where)
    print_table(rows, list(rows[0]))
    if pretend_device.mixed:
        print("operations with tensors of both devices:", dict(pretend_device.mixed))
    if args.csv:
        append_csv(args.csv, [{"torch": torch.__version__, **row} for row in rows])


if __name__ == "__main__":
    main()
