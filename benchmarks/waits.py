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
from pathlib import Path
from typing import Any

import torch
from common import append_csv, print_table

from lab import pretend_device
from lab.waits import waits_of

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
