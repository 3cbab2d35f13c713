"""`dopd doctor`: what this machine has, and whether a config's models, data and table fit together."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from rich.console import Console
from rich.markup import escape

from dopd.errors import DopdError
from dopd.launched import is_main_process
from dopd.progress import say
from dopd.runs.examination import Finding, examine
from dopd.runs.quiet import quiet_libraries
from dopd.runs.settings import settings_of_command
from dopd.settings import SettingsError
from dopd.shown import visible

_REQUIRED = ("torch", "transformers", "trl", "accelerate", "datasets")
_OPTIONAL = {
    "peft": "LoRA (pip install 'dopd[lora]')",
    "bitsandbytes": "students in 4 and 8 bit (pip install 'dopd[quantized]')",
    "math_verify": "the verifier 'math' and gsm_symbolic (pip install 'dopd[math]')",
    "reasoning_gym": "the task gsm_symbolic (pip install 'dopd[reasoning-gym]')",
    "num2words": "SmolVLM (pip install 'dopd[vision]')",
    "lm_eval": "dopd eval --benchmark (pip install 'dopd[benchmarks]')",
    "vllm": "faster rollouts on GPUs (pip install 'dopd[vllm]')",
}
_SIGNS = {
    "ok": "[green]ok[/green]  ",
    "note": "[yellow]note[/yellow]",
    "here": "[red]HERE[/red]",
    "fail": "[red]FAIL[/red]",
}


def run_doctor(config: str | None, flags: Sequence[str], *, token_ids: bool, local_teacher: str | None = None) -> int:
    """Print findings; exit status 2 if something cannot work on this machine."""
    asked = of_config(config, flags, token_ids=token_ids, local_teacher=local_teacher)
    findings = chain(environment(), asked if config or flags or local_teacher else ())
    failed = print_findings(findings, ("fail", "here"))
    say("all well" if not failed else f"{failed} problem(s)")
    return 2 if failed else 0


def print_findings(findings: Iterable[Finding], counted: Sequence[str]) -> int:
    """Print findings as they are made; returns how many have one of the levels that are counted."""
    console, count = Console(soft_wrap=True, quiet=not is_main_process()), 0
    for finding in findings:
        console.print(f"{_SIGNS[finding.level]}  {escape(visible(finding.text))}")
        count += finding.level in counted
    return count


def of_config(
    config: str | None, flags: Sequence[str], *, token_ids: bool, local_teacher: str | None = None
) -> Iterator[Finding]:
    """What a config would meet, settings that cannot work among it."""
    quiet_libraries()
    try:
        yield from examine(
            settings_of_command("doctor", config, flags), token_ids=token_ids, local_teacher=local_teacher
        )
    except SettingsError as error:
        yield from (Finding("fail", problem) for problem in error.problems)
    except DopdError as error:
        yield Finding("fail", str(error))


def environment() -> Iterator[Finding]:
    """Versions, devices, threads, disk."""
    yield Finding("ok", f"Python {platform.python_version()}, {os.cpu_count()} cores")
    for name in _REQUIRED:
        yield Finding("ok", f"{name} {importlib.metadata.version(name)}")
    trl = importlib.metadata.version("trl")
    if not trl.startswith("1.16."):
        yield Finding("fail", f"trl {trl}: dopd overrides hooks of trl 1.16 (pip install 'trl>=1.16,<1.17')")
    for name, purpose in _OPTIONAL.items():
        found = importlib.util.find_spec(name) is not None
        yield Finding("ok" if found else "note", f"{name}: {'installed' if found else 'not installed'}; for {purpose}")
    yield _torchvision()
    yield from _devices()
    free = shutil.disk_usage(".").free / 2**30
    yield Finding("ok" if free > 5 else "note", f"{free:.0f} GiB free here")


def _torchvision() -> Finding:
    from dopd.vision.processors import torchvision_works

    try:
        works = torchvision_works()
    except DopdError as error:
        return Finding("fail", str(error))
    return Finding("ok", f"torchvision: {'installed' if works else 'not installed'}; images do not need it, videos do")


def _devices() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        yield Finding("note", "no GPU: tiny models train in minutes here, with bf16=false and use_cpu=true")
        if torch.get_num_threads() > 1:
            yield Finding(
                "note",
                f"torch uses {torch.get_num_threads()} threads; with anything else running on these cores one is "
                "faster (OMP_NUM_THREADS=1)",
            )
