"""`dopd eval`: judging models, and results that were kept."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dopd.cli.values import (
    above_zero,
    add_asking,
    add_rows,
    add_server,
    as_asked,
    count,
    positive,
    prompt_count,
    rows_as_given,
    seconds,
    seed,
    share,
)
from dopd.errors import ConfigError
from dopd.files import check_plain
from dopd.interrupts import Stopped
from dopd.shown import visible

if TYPE_CHECKING:
    from dopd.evaluation.kept import Evaluated
    from dopd.runs.evaluate import EvaluationSettings

_LABELS = {"accuracy_privileged": "accuracy_greedy WITH p", "accuracy_blank": "accuracy_greedy, grey images"}
_NOT_SHOWN = (
    "accuracy",
    "pass@",
    "num_",
    "eos_ratio",
    "refused_ratio",
)  # with an interval or in the title, or in other words
_MEASURES = ("greedy", "sampled", "privileged", "blank")  # as `dopd.evaluation.results` has them, which is slower


def add_eval(commands: Any, command: Any) -> None:
    """The parser of `dopd eval`; `command` makes a subparser (`dopd.cli.main`)."""
    parser = command(
        commands,
        "eval",
        "accuracy of checkpoints on a task or on held-out rows, without privileged context and beside it with it",
        "  dopd eval tiny:dag/student\n  dopd eval runs/quickstart/dopd-seed0 --split ood --json\n"
        "  dopd eval tiny:dag/student --task dag --task-options '{num_needed: 4}' --output answers.jsonl\n"
        "  dopd eval tiny:dag/student --prompts 64 --samples 8\n"
        "  dopd eval tiny:dag/student tiny:dag/teacher --prompts 64 --output both\n"
        "  dopd eval --compare both/tiny-dag-student.jsonl both/tiny-dag-teacher.jsonl\n"
        "  dopd eval Qwen/Qwen3-1.7B --dataset-name test.jsonl --columns '{prompt: question}' --verifier math "
        "--samples 16 --temperature 0.6 --top-p 0.95\n"
        "  dopd eval Qwen/Qwen3-1.7B runs/dopd --benchmark gsm8k,math500 --limit 200 --output benchmarks\n"
        "  dopd eval Qwen/Qwen3-1.7B --task dag --chat-template-kwargs '{enable_thinking: false}'\n"
        "  dopd eval Qwen/Qwen3-8B=http://localhost:8000 runs/mine --dataset-name test.jsonl --verifier math "
        "--concurrency 64 --output answers\n"
        "the folder of a run brings what it was trained with, and the rows that it held out; a tiny model the options "
        "of its task; flags come first. Several models answer the problems of the first. Replies of a server are kept "
        "in OUTPUT.journal.jsonl as they come, and not paid for twice",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="hub id, folder, tiny:TASK/ROLE, or NAME=URL")
    parser.add_argument(
        "--compare", nargs="+", metavar="FILE", help="compare results that --output has kept, in the place of models"
    )
    parser.add_argument(
        "--benchmark",
        metavar="NAMES",
        help="of the field, with commas between, in the place of a task or rows: gsm8k, math500, aime24, aime25, "
        "ceval, mmlu_pro, gpqa_diamond, bbh; needs 'dopd[benchmarks]'. --output is a folder then",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="documents of each task of a benchmark")
    parser.add_argument("--task", help="a name that `dopd tasks` lists (default: that of the run)")
    parser.add_argument("--task-options", help="difficulty knobs, as YAML: '{num_needed: 3}'")
    parser.add_argument("--split", choices=["train", "test", "ood"], help="of the task's problems (default test)")
    add_rows(parser)
    parser.add_argument("--prompts", type=prompt_count, default=512, help="problems, or rows at most (default 512)")
    parser.add_argument("--privileged-kind", help="see `dopd tasks NAME` (default: the task's own choice)")
    add_asking(parser)
    _add_answers(parser)
    add_server(parser.add_argument_group("a model on a server, NAME=URL"), "DOPD_EVAL_API_KEY")
    parser.add_argument(
        "--engine", choices=["transformers", "vllm"], default="transformers", help="of models of this machine"
    )
    parser.add_argument("--engine-options", help="of vLLM, as YAML: '{gpu_memory_utilization: 0.8}'")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--teacher", help="also measure the divergence to this plain teacher")
    parser.add_argument(
        "--verifier-timeout", type=seconds, default=60.0, help="seconds to judge an answer (default 60)"
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON, with every prompt's score")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="keep every answer as it comes (JSON lines); the same command goes on behind them. Of several models a "
        "folder, with a file for each",
    )
    parser.set_defaults(run=_eval)


def _add_answers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--measures",
        nargs="+",
        choices=_MEASURES,
        default=list(_MEASURES),
        metavar="NAME",
        help="which are asked for: greedy, sampled, privileged (greedy, with p), blank (greedy, to grey images); "
        "default: all that the rows allow",
    )
    group.add_argument(
        "--samples", type=positive, default=1, metavar="K", help="drawn for each prompt: avg@K, and pass@k up to K"
    )
    group.add_argument("--temperature", type=above_zero, default=1.0, help="of drawn answers (default 1)")
    group.add_argument("--top-p", type=share, default=1.0, help="of drawn answers (default 1, all tokens)")
    group.add_argument("--top-k", type=count, default=0, help="of drawn answers (default 0, all tokens)")
    group.add_argument("--max-new-tokens", type=positive, help="of an answer (default: as trained, or 256)")


def _eval(arguments: argparse.Namespace) -> None:
    if bool(arguments.models) == bool(arguments.compare):
        fault = "both are named" if arguments.models else "neither is"
        raise ConfigError(f"dopd eval judges MODEL, or compares results (--compare FILE FILE): {fault}")
    if arguments.benchmark is not None:
        _run_benchmarks(arguments)
        return
    if arguments.limit is not None:
        raise ConfigError(f"--limit (={arguments.limit}) is of benchmarks: rows are limited by --prompts")
    evaluations = _compared(arguments.compare) if arguments.compare else _evaluated(arguments)
    print_evaluations(evaluations, as_json=arguments.json)


def _compared(files: Sequence[str]) -> "list[Evaluated]":
    from dopd.evaluation.comparing import check_same_rows, named_apart
    from dopd.evaluation.kept import read_evaluated

    if len(files) < 2:
        raise ConfigError(f"--compare (={files[0]!r}) needs two files or more, which dopd eval --output has written")
    evaluations = [read_evaluated(file) for file in files]
    check_same_rows(evaluations)
    return named_apart(evaluations, files)


def _evaluated(arguments: argparse.Namespace) -> "list[Evaluated]":
    from dopd.runs.evaluate import evaluate_models
    from dopd.runs.quiet import quiet_libraries

    quiet_libraries()
    settings = _settings(arguments)
    first = None
    for model in arguments.models:
        asked, note = settings.asked_of(model, first)
        first = first or asked
        if note:
            print(visible(note), file=sys.stderr)
    if arguments.output is not None and len(arguments.models) == 1:
        check_plain("output", arguments.output)
    try:
        return evaluate_models(arguments.models, settings, output=arguments.output)
    except Stopped as stop:
        way_out = (
            f"the answers so far are in {arguments.output}, and the same command goes on behind them"
            if arguments.output is not None
            else "no answer is kept; with --output FILE the same command would go on where it was"
        )
        raise Stopped(stop.signal, f"{stop.message}: {way_out}") from None


def _run_benchmarks(arguments: argparse.Namespace) -> None:
    from dopd.runs.benchmarks import BenchmarkSettings, benchmarks_of, run_benchmarks
    from dopd.runs.quiet import quiet_libraries
    from dopd.runs.settings import yaml_mapping

    if not arguments.models:
        raise ConfigError("--benchmark needs a MODEL, and compares none of the results that --compare names")
    for name in ("task", "task_options", "split", "dataset_name", "verifier", "teacher"):
        if getattr(arguments, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            value = getattr(arguments, name)
            raise ConfigError(f"{flag} (={value!r}) is not of benchmarks: leave it or --benchmark out")
    benchmarks = benchmarks_of(arguments.benchmark.split(","))
    quiet_libraries()
    settings = BenchmarkSettings(
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        seed=arguments.seed,
        chat_template_kwargs=yaml_mapping("--chat-template-kwargs", arguments.chat_template_kwargs),
    )
    found = run_benchmarks(arguments.models, benchmarks, settings, output=arguments.output)
    if arguments.json:
        print(json.dumps({"benchmarks": {name: as_record(evaluations) for name, evaluations in found.items()}}))
        return
    for name, evaluations in found.items():
        print(f"benchmark {name}")
        print_evaluations(evaluations, as_json=False)


def _settings(arguments: argparse.Namespace) -> "EvaluationSettings":
    from dopd.evaluation.results import Sampling
    from dopd.runs.asking import AskerSettings
    from dopd.runs.evaluate import EvaluationSettings
    from dopd.runs.settings import yaml_mapping

    return EvaluationSettings(
        task=arguments.task,
        task_options=yaml_mapping("--task-options", arguments.task_options),
        privileged_kind=arguments.privileged_kind,
        **rows_as_given(arguments),
        **as_asked(arguments),
        max_new_tokens=arguments.max_new_tokens,
        split=arguments.split,
        prompts=arguments.prompts,
        measures=arguments.measures,
        sampling=Sampling(arguments.samples, arguments.temperature, arguments.top_p, arguments.top_k),
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        seed=arguments.seed,
        teacher_name=arguments.teacher,
        verifier_timeout=arguments.verifier_timeout,
        engine=arguments.engine,
        engine_options=yaml_mapping("--engine-options", arguments.engine_options) or {},
        server=AskerSettings(
            "",
            key_variable=arguments.key_variable,
            concurrency=arguments.concurrency,
            timeout=arguments.timeout,
            retries=arguments.retries,
            price_in=arguments.price_in,
            price_out=arguments.price_out,
            budget=arguments.budget,
            request=yaml_mapping("--request", arguments.request) or {},
        ),
    )


def as_record(evaluations: "Sequence[Evaluated]") -> dict[str, Any]:
    """One evaluation, or several with their paired differences, as JSON has them."""
    from dopd.evaluation.comparing import comparison_json

    return evaluations[0].to_json() if len(evaluations) == 1 else comparison_json(evaluations)


def print_evaluations(evaluations: "Sequence[Evaluated]", *, as_json: bool) -> None:
    """Evaluations as tables, several with their paired differences; or as one JSON object."""
    from rich.console import Console

    from dopd.evaluation.comparing import settings_that_differ

    if as_json:
        print(json.dumps(as_record(evaluations)))
        return
    console = Console()
    for one in evaluations:
        _print_one(console, one)
    if len(evaluations) > 1:
        _print_differences(console, evaluations)
    differing = settings_that_differ(evaluations) if len(evaluations) > 1 else {}
    if differing:
        _print_settings(differing)


def _print_one(console: Any, evaluated: "Evaluated") -> None:
    from dopd.report.closing import in_percent
    from dopd.report.terminal import print_table

    result = evaluated.result
    rows = []
    for name, interval in result.intervals().items():
        is_average = name == "accuracy_sampled" and result.num_samples > 1
        label = f"accuracy_sampled, avg@{result.num_samples}" if is_average else _LABELS.get(name, name)
        rows.append([label, in_percent(interval)])
    for name, value in result.metrics().items():
        if not name.startswith(_NOT_SHOWN):
            rows.append([name, f"{value:.4g}"])
    if evaluated.bill:
        tokens = f"{evaluated.bill['prompt_tokens']:.0f} and {evaluated.bill['completion_tokens']:.0f} tokens"
        replies = f"{evaluated.bill['num_asked']:.0f}, and {evaluated.bill['num_kept']:.0f} that were there"
        rows.append(["replies", f"{replies}: {tokens}, cost {evaluated.bill['cost']:.4f}"])
    if result.ended:
        rows.append(["sampled answers cut at the length limit", f"{1 - result.metrics()['eos_ratio']:.1%}"])
    if any(result.refused):
        refused = f"{sum(result.refused):.0f} of {len(result.refused)}"
        rows.append(["requests that the server refused, counted as wrong answers", refused])
    title = f"{evaluated.name}: {result.num_prompts} prompts"
    print_table(console, ["what", "value [95% interval over prompts]"], rows, title=title)


def _print_differences(console: Any, evaluations: "Sequence[Evaluated]") -> None:
    from dopd.evaluation.comparing import paired_differences
    from dopd.report.terminal import print_table

    rows = []
    for one in paired_differences(evaluations):
        mean, low, high = (100 * value for value in (one.interval.mean, one.interval.low, one.interval.high))
        rows.append([f"{one.second} - {one.first}", one.measure, f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", one.says])
    title = "paired differences, points [95% interval over prompts, not corrected for their number]"
    print_table(console, ["models", "measure", "difference", "second is"], rows, title=title)


def _print_settings(differing: Mapping[str, Sequence[Any]]) -> None:
    for name, values in differing.items():
        shown = ", ".join(json.dumps(value, default=str)[:60] for value in values)
        print(visible(f"note: {name} differs: {shown}"), file=sys.stderr)
