"""Everything that only a GPU can tell, in parts of less than nine minutes each; figures go into CSV files.

Parts: the compiled kernels against the reference; time and memory of the loss phase beside TRL and Liger, in bfloat16
and float32; whole steps beside TRL's at three sizes of models, with memory and tokens a second; images; and the recipe
with real weights, where they are at hand. A part whose time is over or that fails is said, and the others go on; one
that is done is not run again (`--again`).

Examples:
    python benchmarks/gpu.py
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --parts kernels loss_bf16
    python benchmarks/gpu.py --smoke
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
LIMIT = 530.0  # seconds of a part
RECIPE = "qwen2.5-coder-1.5b-to-0.5b"


@dataclass(frozen=True)
class Part:
    """A command of its own.

    Attributes:
        command (`str`): arguments of Python; `{csv}` is the file that its figures are added to.
        smoke (`str`): further arguments with which it ends in seconds on a CPU.
    """

    command: str
    smoke: str = ""


_TINY_STEP = (
    "--vocab 512 --student-hidden 64 --student-layers 1 --teacher-hidden 64 --teacher-layers 1 --prompts 1 "
    "--prompt-tokens 8 --privileged-tokens 4 --completion-tokens 4 --repeats 1 --device cpu"
)
_TINY_LOSS = "--vocab 512 --hidden 32 --tokens 16 --repeats 1 --device cpu"


def _step(student: str, teacher: str, more: str) -> Part:
    sizes = [
        f"--{who}-hidden {hidden} --{who}-layers {layers}"
        for who, (hidden, layers) in (("student", student.split("x")), ("teacher", teacher.split("x")))
    ]
    command = (
        f"benchmarks/step.py --bf16 --device cuda --vocab 151936 {' '.join(sizes)} --prompts 8 --prompt-tokens 256 "
        f"--privileged-tokens 128 --completion-tokens 256 {more} --csv {{csv}}"
    )
    return Part(command, _TINY_STEP)


PARTS = {
    "kernels": Part("-m pytest -m gpu tests", "--collect-only"),
    "loss_bf16": Part(
        "benchmarks/fused_loss.py --device cuda --dtype bfloat16 --vocab 151936 --hidden 1024 2048 4096 "
        "--tokens 8192 --memory-tokens 8192 --csv {csv}",
        f"{_TINY_LOSS} --memory-tokens 16",
    ),
    "loss_f32": Part(
        "benchmarks/fused_loss.py --device cuda --vocab 4096 151936 --hidden 1024 --tokens 4096 --memory-tokens 0 "
        "--csv {csv}",
        _TINY_LOSS,
    ),
    "loss_fractions": Part(
        "benchmarks/fused_loss.py --device cuda --dtype bfloat16 --vocab 151936 --hidden 2048 --tokens 8192 "
        "--fraction 0 0.1 0.5 1 --memory-tokens 0 --csv {csv}",
        _TINY_LOSS,
    ),
    # Student and teacher as large as Qwen3's 0.6B and 1.7B, 1.7B and 4B, 4B and 8B.
    "step_small": _step("1024x28", "2048x28", ""),
    "step_medium": _step("2048x28", "2560x36", ""),
    "step_large": _step("2560x36", "4096x36", "--repeats 4"),
    "images": Part(
        "benchmarks/images.py --device cuda --side 448 --prompts 4 --hidden 1024 --layers 24 --vision-hidden 1024 "
        "--vision-layers 24 --vocab 32768 --csv {csv}",
        "--device cpu --side 56 --prompts 1 --rollouts 2 --hidden 64 --head 32 --layers 1 --vision-hidden 64 "
        "--vision-layers 1 --vocab 512 --repeats 1 --prompt-tokens 8 --completion-tokens 4",
    ),
    "recipe": Part(
        f"-m dopd.cli.main train {RECIPE} --max_steps 20 --student_eval_steps null --final_eval_prompts 64 "
        "--output_dir runs/benchmark-recipe",
        "--dry-run",
    ),
}


def run(name: str, csv: Path, *, smoke: bool) -> str:
    """How a part ended, in a word or a line."""
    part = PARTS[name]
    arguments = part.command.format(csv=csv).split() + (part.smoke.split() if smoke else [])
    print(f"--- {name}: python {' '.join(arguments)}", flush=True)
    try:
        status = subprocess.run([sys.executable, *arguments], cwd=HERE.parent, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        return f"not done after {LIMIT:g} s"
    return "done" if status == 0 else f"status {status}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--list", action="store_true", help="print the parts and their commands")
    parser.add_argument("--again", action="store_true", help="also run parts that are done")
    parser.add_argument("--smoke", action="store_true", help="the same commands with tiny sizes on a CPU: do they run?")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the CSV files")
    args = parser.parse_args()
    if args.list:
        for name, part in PARTS.items():
            print(f"{name:15s} python {part.command.format(csv=f'{args.results.name}/{name}_gpu.csv')}")
        return
    if not args.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --smoke tries the commands with tiny sizes on a CPU, --list shows them")
    state = args.results / "gpu_parts.json"
    ended = json.loads(state.read_text()) if state.exists() and not args.again else {}
    for name in args.parts:
        if ended.get(name) == "done" and not args.smoke:
            continue
        start = time.monotonic()
        outcome = run(name, args.results.resolve() / f"{name}_gpu.csv", smoke=args.smoke)
        print(f"{name}: {outcome}, {time.monotonic() - start:.0f} s", flush=True)
        ended[name] = outcome
        if not args.smoke:
            state.parent.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps(ended, indent=1) + "\n")
    failed = [name for name in args.parts if ended[name] != "done"]
    if failed:
        sys.exit(f"not done: {', '.join(failed)}")


if __name__ == "__main__":
    main()
