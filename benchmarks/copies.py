"""Peak memory of a step under LoRA: the teacher as a second model or as the base, and each privileged student.

python benchmarks/copies.py --csv benchmarks/results/copies_cpu.csv
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import MIB, append_csv, machine, print_table, reset_high_water, resident
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from dopd.tasks import get_task
from dopd.tiny import TinySpec, build_model, build_tokenizer
from dopd.trainer import DOPDConfig, DOPDTrainer

CASES: dict[str, dict[str, Any]] = {
    "teacher loaded, student current": {},
    "teacher base, student current": {"base": True},
    "teacher base, student frozen": {"base": True, "privileged_student": "frozen"},
    "teacher base, student snapshot": {"base": True, "privileged_student": "snapshot"},
    "teacher base, student ema": {"base": True, "privileged_student": "ema"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--case", choices=CASES, help="run one, and print what it took")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        print(json.dumps(measured(arguments)))
        return
    rows = []
    for case in CASES:
        flags = [f"--{name}={getattr(arguments, name)}" for name in ("hidden", "layers", "rank")]
        command = [sys.executable, __file__, *flags, "--case", case]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append({"case": case, **json.loads(done.stdout.splitlines()[-1])})
        print(rows[-1], flush=True)
    print_table(rows, ["case", "weights", "start", "peak"])
    if arguments.csv:
        about = {"hidden": arguments.hidden, "layers": arguments.layers, "rank": arguments.rank, **machine("cpu", 1)}
        append_csv(arguments.csv, [row | about for row in rows])


def measured(arguments: argparse.Namespace) -> dict[str, int]:
    """MiB of the student's weights, and resident above what the libraries take: before the first step, and at most."""
    options = dict(CASES[arguments.case])
    tokenizer = build_tokenizer()
    spec = TinySpec(num_layers=arguments.layers, hidden_size=arguments.hidden)
    before = reset_high_water()
    student = build_model(spec, tokenizer)
    weights = sum(one.numel() * one.element_size() for one in student.parameters())
    set_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    student = get_peft_model(student, LoraConfig(r=arguments.rank, target_modules=targets, task_type="CAUSAL_LM"))
    for name, weight in student.named_parameters():
        if "lora_B" in name:  # an adapter that has learnt something
            torch.nn.init.normal_(weight, std=0.02)
    teacher: Any = "base" if options.pop("base", False) else build_model(spec, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        args = DOPDConfig(
            folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=4,
            max_completion_length=8,
            max_steps=2,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            privileged_template="{prompt} {privileged_context}",
            **options,
        )
        rows = Dataset.from_list(get_task("dag").rows("train", 8, "hints_without_execution"))
        trainer = DOPDTrainer(student, teacher, args, rows, processing_class=tokenizer)
        start = resident("VmRSS")
        trainer.train()
        peak = resident("VmHWM")
    return {"weights": weights // MIB, "start": (start - before) // 1024, "peak": (peak - before) // 1024}


if __name__ == "__main__":
    main()
