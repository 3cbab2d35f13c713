"""`dopd plan CONFIG`: memory, time and money of a run before anything is there for it."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dopd.cli.launch import add_launch, launched_settings
from dopd.cli.values import above_zero, positive, share
from dopd.shown import visible

_DEVICES = ("a100", "h100", "h200", "l40s", "rtx4090")
_GB = 1e9


def add_plan(commands: Any, command: Any) -> None:
    """The parser of `dopd plan`; `command` makes a subparser (`dopd.cli.main`)."""
    parser = command(
        commands,
        "plan",
        "memory of each phase, seconds of a step, GPU hours and cost, and what to change where it does not fit",
        "  dopd plan tiny-dag\n  dopd plan tiny-dag --gpus 8 --gpu a100 --accelerate_config fsdp2 --json\n"
        "  dopd plan tiny-dag --gpu-memory 24 --gpu-price 0.4 --use_peft\n"
        "  dopd plan qwen3-8b-to-1.7b --gpus 8 --gpu-memory 80 --gpu-price 2.5\n"
        "takes every flag of train; reads the models' configurations (config.json), no weight and no row",
    )
    parser.usage = "dopd plan [CONFIG] [--gpus 8] [--gpu h100] [--gpu-memory 80] [--key value ...]"
    parser.add_argument(
        "--gpus", type=positive, help="devices that share a step (default: of --accelerate_config, or 1)"
    )
    parser.add_argument("--gpu", choices=_DEVICES, default="h100", help="its published figures (default %(default)s)")
    parser.add_argument("--gpu-memory", type=above_zero, help="GB of each (default: of --gpu)")
    parser.add_argument("--gpu-price", type=above_zero, help="of one for an hour, in any currency")
    parser.add_argument("--answer-tokens", type=positive, help="of a mean answer, for the time (default: the longest)")
    parser.add_argument("--mfu", type=share, default=0.4, help="share of the FLOP/s reached (default %(default)s)")
    parser.add_argument("--bandwidth-use", type=share, default=0.6, help="share of bandwidths (default %(default)s)")
    parser.add_argument(
        "--layer-milliseconds",
        type=above_zero,
        default=0.8,
        help="that generate takes for a layer of a token at least; vLLM a tenth (default %(default)s)",
    )
    parser.add_argument("--server-model", metavar="MODEL", help="on teacher_server (default: teacher_server_model)")
    parser.add_argument("--server-gpus", type=positive, help="of that server (default: what its weights need)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_launch(parser)
    parser.set_defaults(run=print_plan)


def print_plan(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from dopd.progress import say
    from dopd.runs.effort import DEVICES, Efficiency
    from dopd.runs.planning import Machine, make_plan
    from dopd.runs.quiet import quiet_libraries
    from dopd.runs.settings import all_settings, settings_of_command, split_arguments
    from dopd.runs.splits import split_of
    from dopd.runs.train import make_config
    from dopd.settings.foreign import FOREIGN

    quiet_libraries()
    name, flags = split_arguments(arguments.rest)
    arguments.parser.check_none_meant(flags, [*all_settings(), *FOREIGN])
    settings = settings_of_command("plan", name, flags)
    config = make_config(settings, elsewhere=True)
    device = DEVICES[arguments.gpu]
    if arguments.gpu_memory is not None:
        device = replace(device, memory=arguments.gpu_memory)
    machine = Machine(
        device,
        split_of(config, launched_settings(arguments), arguments.gpus),
        Efficiency(arguments.mfu, arguments.bandwidth_use, arguments.layer_milliseconds),
        arguments.answer_tokens,
        arguments.server_model or config.teacher_server_model,
        arguments.server_gpus,
    )
    plan = make_plan(settings, config, machine)
    text = json.dumps(_as_json(plan, arguments), indent=1) if arguments.json else "\n".join(_lines(plan, arguments))
    say(visible(text))
    return 0


def _lines(plan: Any, arguments: argparse.Namespace) -> Iterator[str]:
    split, device = plan.machine.split, plan.machine.device
    count = f"{split.devices} x " if split.devices > 1 else ""
    way = f", {split.name}" if split.devices > 1 else ""
    yield (
        f"{count}{arguments.gpu} with {device.memory:g} GB{way}: {plan.answers} answers a step, prompts of "
        f"{plan.prompt} tokens, answers of {plan.answer} on average and at most {plan.config.max_completion_length}"
    )
    yield ""
    yield "GB on each device        together  of it"
    for phase, parts in plan.memory.items():
        total = sum(parts.values())
        shown = {name: one for name, one in parts.items() if one >= max(0.05 * _GB, 0.005 * total)}
        largest = ", ".join(f"{name} {one / _GB:.1f}" for name, one in sorted(shown.items(), key=_by_size))
        yield f"{phase:<24} {total / _GB:8.1f}  {largest}"
    yield ""
    yield "a step                    seconds  sending  TFLOP on each device"
    for phase, effort in plan.effort.items():
        yield f"{phase:<24} {effort.seconds:8.1f} {effort.communication:8.1f}  {effort.flop / 1e12:.0f}"
    yield f"{'together':<24} {plan.seconds:8.1f}"
    yield ""
    servers = f" ({plan.server_devices} of them for the teacher's server)" if plan.server_devices else ""
    price = "" if arguments.gpu_price is None else f", cost {plan.gpu_hours * arguments.gpu_price:.0f}"
    hours = plan.seconds * 1000 / 3600
    yield f"1,000 steps: {hours:.1f} hours, {plan.gpu_hours:.1f} GPU hours{servers}{price}"
    if plan.config.teacher_server is not None and not plan.server_devices:
        yield "the teacher's server is not counted: name its model with --server-model"
    if plan.waiting:
        yield (
            f"the teachers wait in {plan.waiting / _GB:.1f} GB of the CPU's memory for each device, and every row "
            "counts as if the largest of them read it"
        )
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield f"{verdict}: {plan.peak / _GB:.1f} GB of {plan.room / _GB:.1f}"
    for change in plan.changes:
        enough = "fits" if change.peak <= plan.room else "not enough"
        yield f"  {change.text}: {change.peak / _GB:.1f} GB, {enough}"


def _by_size(part: tuple[str, float]) -> float:
    return -part[1]


def _as_json(plan: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "devices": plan.machine.split.devices,
        "split": plan.machine.split.name,
        "answers": plan.answers,
        "bytes": {phase: {name: round(one) for name, one in parts.items()} for phase, parts in plan.memory.items()},
        "peak": round(plan.peak),
        "room": round(plan.room),
        "fits": plan.fits,
        "phases": {phase: vars(effort) for phase, effort in plan.effort.items()},
        "seconds": plan.seconds,
        "server_devices": plan.server_devices,
        "waiting": plan.waiting,
        "gpu_hours_of_1000_steps": plan.gpu_hours,
        "cost_of_1000_steps": None if arguments.gpu_price is None else plan.gpu_hours * arguments.gpu_price,
        "changes": [{"change": one.text, "peak": round(one.peak)} for one in plan.changes],
    }
