"""Whole optimizer steps: rollout, scoring, training; TRL's DistillationTrainer against DOPDTrainer.

All trainers get equal students and the same teacher, prompts, number of completions and completion length (ends are
suppressed), and run interleaved in one process: a round is one optimizer step of each. Reported are medians, of the
clock and of processor time; ratios are of the clock on a GPU, and of processor time on a CPU (one thread). Models are
untrained Qwen3 models, large enough that backbone and head both matter; weights do not change what a step costs,
except through the share of full-vocabulary tokens, which is reported.

Memory is measured in a process of its own for each trainer: the high-water mark of a step above what was resident
before it (gradients, optimizer state and activations, without the models).

Examples:
    python benchmarks/step.py
    python benchmarks/step.py --repeats 10 --csv benchmarks/results/step_cpu.csv
    python benchmarks/step.py --prompt-tokens 320 --completion-tokens 80 --only trl dopd
    python benchmarks/step.py --student-hidden 512 --student-layers 8 --vocab 32768 --no-memory
"""

import argparse
import dataclasses
import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import MIB, append_csv, machine, print_table, reset_high_water, resident
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from dopd.tiny.models import TinySpec, build_model
from dopd.tiny.tokenizer import build_tokenizer
from dopd.trainer import DOPDConfig, DOPDTrainer

Seconds = tuple[float, float]  # on the clock, of processor time
PHASES = ("step", "rollout", "scoring", "forwards", "training")
YARDSTICK = "trl"
CONTESTANTS: dict[str, dict[str, Any]] = {
    YARDSTICK: {},
    "vanilla": {"method": "vanilla", "method_options": {"divergence": "reverse_kl"}},
    "vanilla, unshared": {
        "method": "vanilla",
        "method_options": {"divergence": "reverse_kl"},
        "share_prompts": False,
    },
    "dopd": {"method": "dopd"},
    "dopd, unshared": {"method": "dopd", "share_prompts": False},
}


class Stopwatch(TrainerCallback):
    """Seconds per phase of one optimizer step; phases may lie inside each other."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, Seconds] = defaultdict(lambda: (0.0, 0.0))
        self._start = (0.0, 0.0)

    def now(self) -> Seconds:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def add(self, phase: str, start: Seconds) -> None:
        self.seconds[phase] = tuple(
            total + end - begin for total, end, begin in zip(self.seconds[phase], self.now(), start, strict=True)
        )

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(phase, start)

        return call

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.add("step", self._start)


class Timed:
    """An object of which one method is timed."""

    def __init__(self, inner: Any, method: str, watch: Stopwatch, phase: str) -> None:
        self._inner, self._method = inner, method
        self._timed = watch.timed(phase, getattr(inner, method))

    def __getattr__(self, name: str) -> Any:
        return self._timed if name == self._method else getattr(self._inner, name)


def make_trainer(name: str, options: argparse.Namespace, folder: str) -> tuple[DistillationTrainer, Stopwatch]:
    """A trainer with a stopwatch in it."""
    # Word-level: a prompt of n words has n tokens.
    words = [f"w{n}" for n in range(options.vocab - 3)]
    tokenizer = build_tokenizer(words)
    generator = torch.Generator().manual_seed(0)

    def text(tokens: int) -> str:
        return " ".join(words[n] for n in torch.randint(len(words), (tokens,), generator=generator).tolist())

    rows = [
        {"prompt": text(options.prompt_tokens), "privileged_context": text(options.privileged_tokens)}
        for _ in range(options.prompts)
    ]
    student = build_model(model_spec(options.student_hidden, options.student_layers), tokenizer, seed=0)
    teacher = build_model(model_spec(options.teacher_hidden, options.teacher_layers), tokenizer, seed=1)
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": options.prompts * options.rollouts,
        "max_completion_length": options.completion_tokens,
        "generation_kwargs": {"min_new_tokens": options.completion_tokens},
        "max_steps": 1,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "use_cpu": options.device == "cpu",
        "bf16": options.bf16,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    models = {"model": student, "teacher_model": teacher, "processing_class": tokenizer}
    if name == YARDSTICK:
        # This trainer makes one completion of each row, so a prompt with several rollouts is several rows.
        repeated = [{"prompt": row["prompt"]} for row in rows for _ in range(options.rollouts)]
        config = DistillationConfig(**settings, beta=1.0)
        trainer = DistillationTrainer(args=config, train_dataset=Dataset.from_list(repeated), **models)
    else:
        template = "{prompt} {privileged_context}"
        config = DOPDConfig(
            **settings,
            num_generations=options.rollouts,
            off_policy_rollouts=True,  # no answer ends before its last token
            privileged_template=template,
            **CONTESTANTS[name],
        )
        trainer = DOPDTrainer(args=config, train_dataset=Dataset.from_list(rows), **models)
    trainer.remove_callback(PrinterCallback)
    watch = Stopwatch(options.device)
    trainer.add_callback(watch)
    attach(trainer, watch)
    return trainer, watch


def model_spec(hidden: int, layers: int) -> TinySpec:
    return TinySpec(num_layers=layers, hidden_size=hidden, num_heads=hidden // 64)


def attach(trainer: Any, watch: Stopwatch) -> None:
    """Time rollouts, scoring and the backbones' passes without gradient in scoring."""
    if isinstance(trainer, DOPDTrainer):
        trainer.engine = Timed(trainer.engine, "generate", watch, "rollout")
        forwards = Timed(trainer.models, "hidden_states", watch, "forwards")
        scorer = dataclasses.replace(trainer.step.scorer, models=forwards)
        trainer.step = Timed(dataclasses.replace(trainer.step, scorer=scorer), "score", watch, "scoring")
        return
    trainer._generate = watch.timed("rollout", trainer._generate)
    redirect = trainer._forward_redirection
    teacher = watch.timed("scoring", watch.timed("forwards", redirect))
    # The host runs its teacher inside the loss.
    trainer._forward_redirection = lambda wrapper, *args, **kwargs: (
        teacher if wrapper is trainer.teacher_model else redirect
    )(wrapper, *args, **kwargs)


def one_step(trainer: DistillationTrainer, watch: Stopwatch) -> dict[str, Seconds]:
    """Seconds of every phase of one optimizer step."""
    gc.collect()
    watch.seconds.clear()
    trainer.train()
    seconds = {phase: watch.seconds[phase] for phase in PHASES}
    rest = (seconds["step"][which] - seconds["rollout"][which] - seconds["scoring"][which] for which in (0, 1))
    return seconds | {"training": tuple(rest)}


def measure_time(options: argparse.Namespace, folder: str) -> tuple[dict[str, list[dict[str, Seconds]]], dict]:
    """Seconds of every round after one warm-up, trainers in turn; and the share of full-vocabulary tokens by name."""
    trainers = {name: make_trainer(name, options, f"{folder}/{name}") for name in options.only}
    steps: dict[str, list[dict[str, Seconds]]] = {name: [] for name in trainers}
    for repeat in range(options.repeats + 1):
        for name, (trainer, watch) in trainers.items():
            seconds = one_step(trainer, watch)
            if repeat:
                steps[name].append(seconds)
        if repeat:
            print(f"round {repeat}:", {name: round(runs[-1]["step"][1], 2) for name, runs in steps.items()}, flush=True)
    shares = {}
    for name, (trainer, _) in trainers.items():
        logged = [record["share/HT"] for record in trainer.state.log_history if "share/HT" in record]
        shares[name] = round(logged[-1], 3) if logged else 1.0  # without routing it is every token
    return steps, shares


def measure_memory(name: str, options: argparse.Namespace) -> float:
    """MiB of one step above what was there before it: resident on a CPU, allocated on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = make_trainer(name, options, folder)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.synchronize()
            started = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            return (torch.cuda.max_memory_allocated() - started) / MIB
        before = reset_high_water()
        trainer.train()
        return (resident("VmHWM") - before) / 1024


def memory_in_own_process(name: str, options: argparse.Namespace) -> float:
    job = json.dumps(vars(options) | {"only": [name], "csv": None})
    done = subprocess.run([sys.executable, __file__, "--memory-job", job], capture_output=True, text=True)
    if done.returncode:
        print(f"  {name}: no figure, {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return float("nan")
    return float(done.stdout.strip().splitlines()[-1])


def report(options: argparse.Namespace, steps: dict, shares: dict, peaks: dict) -> list[dict[str, Any]]:
    """One row for each trainer, shown as a table with the targets below it."""
    which = 0 if options.device == "cuda" else 1
    median = {
        name: {phase: tuple(statistics.median(run[phase][i] for run in runs) for i in (0, 1)) for phase in PHASES}
        for name, runs in steps.items()
    }
    shape = {key: value for key, value in vars(options).items() if key not in ("only", "csv", "memory_job", "memory")}
    rows = []
    for name, phases in median.items():
        row: dict[str, Any] = {"contestant": name}
        for phase in PHASES:
            row |= {f"{phase}_s": round(phases[phase][which], 3)}
        answers = options.prompts * options.rollouts * options.completion_tokens
        row["answer tokens / s"] = round(answers / phases["step"][which], 1)
        row["clock_step_s"] = round(phases["step"][0], 3)
        row["fastest_step_s"] = round(min(run["step"][which] for run in steps[name]), 3)
        for column, value in ratios(phases, median.get(YARDSTICK), which).items():
            row[column] = value
        row |= {"peak_mib": round(peaks.get(name, float("nan")), 1), "full_vocabulary_share": shares[name]}
        rows.append(row | shape)
    columns = [
        "contestant",
        *[f"{phase}_s" for phase in PHASES],
        "fastest_step_s",
        "answer tokens / s",
        "step / trl",
        "without rollout / trl",
        "peak_mib",
    ]
    print("\nmedian seconds, " + ("by the clock" if which == 0 else "processor time"))
    print_table(rows, [*columns, "full_vocabulary_share"])
    if YARDSTICK in median and "dopd" in median:
        ratio = median["dopd"]["step"][which] / median[YARDSTICK]["step"][which]
        print(f"dopd step / TRL step: {ratio:.2f} (target: at most 1.25)")
    for name in ("vanilla", "dopd"):
        if name in median and f"{name}, unshared" in median:
            ratio = median[f"{name}, unshared"]["forwards"][which] / median[name]["forwards"][which]
            print(f"{name}: passes without gradient, unshared / shared: {ratio:.2f} (target: at least 2)")
    return rows


def ratios(phases: dict[str, Seconds], yardstick: dict[str, Seconds] | None, which: int) -> dict[str, float]:
    if yardstick is None:
        return dict.fromkeys(("step / trl", "without rollout / trl"), float("nan"))

    def rest(of: dict[str, Seconds]) -> float:
        return of["scoring"][which] + of["training"][which]

    return {
        "step / trl": round(phases["step"][which] / yardstick["step"][which], 3),
        "without rollout / trl": round(rest(phases) / rest(yardstick), 3),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="different prompts in a step")
    parser.add_argument("--rollouts", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--privileged-tokens", type=int, default=32, help="the privileged view's tokens beside these")
    parser.add_argument("--completion-tokens", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--student-hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--teacher-hidden", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--teacher-layers", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each trainer, after one warm-up")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the memory out")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--memory-job", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    logging.getLogger("dopd").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if options.memory_job:
        options = argparse.Namespace(**json.loads(options.memory_job))
        torch.set_num_threads(options.threads)
        print(measure_memory(options.only[0], options))
        return
    torch.set_num_threads(options.threads)
    about = machine(options.device, options.threads)
    print(about)
    with tempfile.TemporaryDirectory() as folder:
        steps, shares = measure_time(options, folder)
    measured = options.only if options.memory else []
    peaks = {name: memory_in_own_process(name, options) for name in measured}
    rows = report(options, steps, shares, peaks)
    if options.csv:
        append_csv(options.csv, [row | about for row in rows])


if __name__ == "__main__":
    main()
