"""Time and peak memory of the loss phase: scoring, forward and backward, from hidden states and output heads.

Contestants run interleaved in one process, on the same synthetic hidden states, and medians are reported, of the clock
and of processor time; ratios are of the clock on a GPU, and of processor time on a CPU (one thread). Memory is
measured in a process of its own for each: the high-water mark above what was resident before the call.

Examples:
    python benchmarks/fused_loss.py
    python benchmarks/fused_loss.py --vocab 151936 --hidden 1024 2048 --tokens 128 --repeats 10 --csv out.csv
    python benchmarks/fused_loss.py --vocab 4096 --hidden 256 --fraction 0.06 0.15 1.0
    python benchmarks/fused_loss.py --vocab 151936 --hidden 1024 --spread 12 --memory-tokens 0
    python benchmarks/fused_loss.py --vocab 151936 --hidden 1024 --repeats 0 --memory-tokens 1536
    python benchmarks/fused_loss.py --profile --only "dopd bucket"

Shapes: N tokens, H hidden size, V vocabulary.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import MIB, append_csv, machine, print_table, reset_high_water, resident
from torch import Tensor

from dopd.assignment import Assignment
from dopd.fused import fused_routed_loss, score_tokens
from dopd.heads import Head
from dopd.methods import table as method
from dopd.routing import Regime

LABELS = ("clock", "cpu")  # the two ways in which a run is timed
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Standard deviation of the logits: at V = 151,936 an entropy of about 4 nats.
LOGIT_SPREAD = 4.0
# How far the privileged student's and the teacher's hidden states lie from the student's.
NOISE = {"student": 0.0, "privileged_student": 0.3, "privileged_teacher": 0.6, "teacher": 0.6}


class Problem:
    """Hidden states of every view, two heads, sampled ids, and regimes with a given fraction of HT tokens."""

    def __init__(
        self, num_tokens: int, hidden: int, vocab: int, fraction: float, spread: float, dtype: str, device: str
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        weight = normal(vocab, hidden) * (spread / hidden**0.5)
        self.teacher_weight = (weight + 0.3 * normal(vocab, hidden) * weight.std()).to(DTYPES[dtype])
        self.weight = weight.to(DTYPES[dtype]).requires_grad_()
        plain = normal(1, num_tokens, hidden)
        self.views = {
            name: (plain + noise * normal(1, num_tokens, hidden)).to(DTYPES[dtype]) for name, noise in NOISE.items()
        }
        self.hidden = self.views["student"].requires_grad_()
        self.ids = torch.randint(vocab, (1, num_tokens), generator=generator).to(device)
        self.mask = torch.ones_like(self.ids)
        num_full = round(fraction * num_tokens)
        others = torch.tensor([Regime.LH, Regime.LL, Regime.HS]).repeat(num_tokens)[: num_tokens - num_full]
        regimes = torch.cat([torch.full((num_full,), int(Regime.HT)), others])
        self.regimes = regimes[torch.randperm(num_tokens, generator=generator)].unsqueeze(0).to(device)

    def targets(self, *sources: str) -> dict[str, tuple[Tensor, Head]]:
        heads = {"privileged_student": self.weight.detach()}
        return {source: (self.views[source], Head(heads.get(source, self.teacher_weight))) for source in sources}

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def dopd_loss(problem: Problem, tail: str, backend: str, worst: bool = False) -> None:
    regimes = torch.full_like(problem.regimes, int(Regime.HT)) if worst else problem.regimes
    targets = problem.targets("privileged_teacher", "privileged_student")
    scores = {}
    if backend != "reference":
        scores = {source: score_tokens(*pair, problem.ids, problem.mask) for source, pair in targets.items()}
    options: dict[str, Any] = {"assignment": Assignment(regimes), "scores": scores, "backend": backend}
    table = method("dopd", tail=tail)
    fused_routed_loss(
        problem.hidden, problem.weight, targets, problem.ids, problem.mask, table, **options
    ).loss.backward()


def one_target(problem: Problem, kind: str, backend: str) -> None:
    table = method("vanilla", divergence=kind)
    targets = problem.targets("teacher")
    result = fused_routed_loss(
        problem.hidden, problem.weight, targets, problem.ids, problem.mask, table, backend=backend
    )
    result.loss.backward()


def scoring(problem: Problem) -> None:
    for pair in problem.targets("privileged_teacher", "privileged_student").values():
        score_tokens(*pair, problem.ids, problem.mask)


def trl(problem: Problem, beta: float) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence_N, _ = ChunkedDivergenceFunction.apply(
        problem.hidden[0], problem.weight, None, problem.views["teacher"][0], problem.teacher_weight, None, beta
    )
    divergence_N.mean().backward()


def liger(problem: Problem) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
    loss(
        problem.hidden[0], problem.weight, problem.views["teacher"][0], problem.teacher_weight, problem.ids[0]
    ).backward()


CONTESTANTS: dict[str, Callable[[Problem], None]] = {
    "trl jsd": lambda problem: trl(problem, 0.5),
    "trl reverse kl": lambda problem: trl(problem, 1.0),
    "liger jsd": liger,
    "dopd bucket": lambda problem: dopd_loss(problem, "bucket", "auto"),
    "dopd renormalize": lambda problem: dopd_loss(problem, "renormalize", "auto"),
    "dopd, all tokens full": lambda problem: dopd_loss(problem, "bucket", "auto", worst=True),
    "naive dopd bucket": lambda problem: dopd_loss(problem, "bucket", "reference"),
    "js, one target": lambda problem: one_target(problem, "js", "auto"),
    "reverse kl, one target": lambda problem: one_target(problem, "reverse_kl", "auto"),
    "scoring alone": scoring,
}
# These read `fraction`; the others do the same work whatever it is.
ROUTED = ("dopd bucket", "dopd renormalize", "naive dopd bucket")


def measure_time(problem: Problem, names: list[str], repeats: int, device: str) -> dict[str, list[tuple[float, float]]]:
    """(seconds on the clock, seconds of processor time) of every run after one warm-up, contestants in turn."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        for name in names:
            problem.clear()
            gc.collect()
            _wait(device)
            start, start_cpu = time.perf_counter(), time.process_time()
            CONTESTANTS[name](problem)
            _wait(device)
            if repeat:
                seconds[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
        if repeat:
            last = {name: round(runs[-1][1], 2) for name, runs in seconds.items()}
            print(f"round {repeat}, processor time:", last, flush=True)
    return seconds


def measure_memory(name: str, shape: tuple[int, int, int, float, float, str, str]) -> float:
    """MiB above the inputs at the peak of one call, gradients included. On a CPU it must own its process."""
    device = shape[-1]
    small = Problem(8, 16, 512, 0.5, LOGIT_SPREAD, "float32", device)
    CONTESTANTS[name](small)  # imports, thread pools and scratch buffers of the libraries
    problem = Problem(*shape)
    gc.collect()
    if device == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        CONTESTANTS[name](problem)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    before = reset_high_water()
    CONTESTANTS[name](problem)
    return (resident("VmHWM") - before) / 1024


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory_in_own_process(name: str, shape: tuple[Any, ...], threads: int) -> float:
    job = json.dumps({"name": name, "shape": shape, "threads": threads})
    done = subprocess.run([sys.executable, __file__, "--memory-job", job], capture_output=True, text=True)
    if done.returncode:
        print(f"  {name}: no figure, {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return float("nan")
    return float(done.stdout.strip().splitlines()[-1])


def runnable(names: list[str], device: str) -> list[str]:
    """Names that run here; says why the others do not."""
    kept = []
    for name in names:
        try:
            CONTESTANTS[name](Problem(8, 16, 512, 0.5, LOGIT_SPREAD, "float32", device))
            kept.append(name)
        except Exception as error:  # whatever another library raises is the finding
            print(f"  {name} does not run here: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
    return kept


def bench(options: argparse.Namespace, hidden: int, vocab: int, fraction: float, names: list[str]) -> list[dict]:
    """One table: every contestant at one shape."""
    shape = (options.tokens, hidden, vocab, fraction, options.spread, options.dtype, options.device)
    seconds = {name: [(float("nan"),) * 2] for name in names}
    if options.repeats:
        seconds = measure_time(Problem(*shape), names, options.repeats, options.device)
    # On a machine that others use, the clock also counts their turns; processor time of one thread does not.
    clock, cpu = (
        {name: statistics.median(run[which] for run in runs) for name, runs in seconds.items()} for which in (0, 1)
    )
    median = clock if options.device == "cuda" else cpu
    print({name: round(value, 3) for name, value in median.items()}, flush=True)
    memory_shape = (options.memory_tokens, *shape[1:])
    gradients = vocab * hidden * DTYPES[options.dtype].itemsize / MIB
    rows = []
    for name in names:
        peak = memory_in_own_process(name, memory_shape, options.threads) if options.memory_tokens else float("nan")
        row = {"contestant": name, "vocab": vocab, "hidden": hidden, "fraction": fraction}
        row |= {"spread": options.spread, "dtype": options.dtype}
        row |= {"tokens": options.tokens, "repeats": options.repeats}
        row |= {"clock_s": round(clock[name], 4), "cpu_s": round(cpu[name], 4)}
        row |= {f"fastest_{label}_s": round(min(run[i] for run in seconds[name]), 4) for i, label in enumerate(LABELS)}
        for other in ("trl jsd", "trl reverse kl"):
            row[f"time / {other}"] = round(median[name] / median[other], 3) if other in median else float("nan")
        row |= {"memory_tokens": options.memory_tokens, "peak_mib": round(peak, 1)}
        rows.append(row | {"head_gradient_mib": round(gradients, 1)})
    return rows


def show(rows: list[dict]) -> None:
    columns = [
        "contestant",
        "clock_s",
        "cpu_s",
        "fastest_cpu_s",
        "time / trl jsd",
        "time / trl reverse kl",
        "peak_mib",
    ]
    first = rows[0]
    print(
        f"\nV {first['vocab']}, H {first['hidden']}, N {first['tokens']} (memory: {first['memory_tokens']}), "
        f"full-vocabulary fraction {first['fraction']}, {first['dtype']}; "
        f"the head's gradient alone is {first['head_gradient_mib']} MiB"
    )
    print_table(rows, columns)


def profile(options: argparse.Namespace, names: list[str]) -> None:
    """Where the time of each contestant goes, by operator."""
    problem = Problem(
        options.tokens,
        options.hidden[0],
        options.vocab[0],
        options.fraction[0],
        options.spread,
        options.dtype,
        options.device,
    )
    for name in names:
        CONTESTANTS[name](problem)
        problem.clear()
        with torch.profiler.profile() as profiler:
            CONTESTANTS[name](problem)
        print(f"\n{name}\n{profiler.key_averages().table(sort_by='self_cpu_time_total', row_limit=14)}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("Shapes:")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[151936, 4096])
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 2048], help="Qwen3-0.6B: 1024, 1.7B: 2048")
    parser.add_argument("--fraction", type=float, nargs="+", default=[0.1], help="tokens whose row is full-vocabulary")
    parser.add_argument(
        "--spread", type=float, default=LOGIT_SPREAD, help="standard deviation of the logits; large: sure targets"
    )
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--memory-tokens", type=int, default=512, help="0 leaves the memory out")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each, after one warm-up; 0: none")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--profile", action="store_true", help="operators of each contestant, at the first shape")
    parser.add_argument("--memory-job", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.memory_job:
        job = json.loads(options.memory_job)
        torch.set_num_threads(job["threads"])
        print(measure_memory(job["name"], tuple(job["shape"])))
        return
    torch.set_num_threads(options.threads)
    about = machine(options.device, options.threads)
    print(about)
    names = runnable(options.only, options.device)
    if options.profile:
        profile(options, names)
        return
    for vocab in options.vocab:
        for hidden in options.hidden:
            for fraction in options.fraction:
                # Only the first fraction needs the contestants that do not read it, but for the two yardsticks.
                first = fraction == options.fraction[0]
                chosen = [name for name in names if first or name in ROUTED or name.startswith("trl")]
                rows = bench(options, hidden, vocab, fraction, chosen)
                show(rows)
                if options.csv:
                    append_csv(options.csv, [row | about for row in rows])


if __name__ == "__main__":
    main()
