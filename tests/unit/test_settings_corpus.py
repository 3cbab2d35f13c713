"""Wrong values for every setting there is: each is refused by the name of its key, or kept as it was meant."""

import inspect
import itertools
import logging
import math
import os
import re
import subprocess
import sys
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from settings_kit import BASE
from transformers import GenerationConfig
from transformers.trainer_pt_utils import AcceleratorConfig

from dopd.cli.main import main
from dopd.errors import ConfigError
from dopd.methods import METHODS
from dopd.rules import Rule
from dopd.runs.settings import RunSettings, all_settings, load_settings
from dopd.runs.train import make_config
from dopd.settings import settings_of_call
from dopd.signals import SIGNALS
from dopd.tasks import TASKS
from dopd.trainer import DOPDConfig, host_settings
from dopd.trainer.host_generation import GENERATION

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[2]
NAN, INF = math.nan, math.inf
NEVER = [NAN, INF, -INF, 10**30, -(10**30), 10**6000, [[]], [NAN], {1: NAN}, {"a": [INF]}]  # of no setting
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2.5,
    "1e999",
    "",
    "x",
    "no",
    "true",
    "3",
    "5e-6",
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
]
# What names the key in messages about what is inside of it.
INSIDE = {"task_options": "knob", "method_options": "has no option", "rules": "has no rules"}
WORDS = {"true": True, "yes": True, "no": False}


def outcome(given: dict[str, Any], names: tuple[str, ...]) -> RunSettings | None:
    """The settings, or `None` where they were refused in our form; anything else fails."""
    try:
        settings = load_settings(None, **BASE | given)
        make_config(settings, elsewhere=True)
        return settings
    except ConfigError as error:
        assert any(name in str(error) for name in names), f"{given!r}: {error}"
        assert len(str(error)) < 4000
        return None


def kept(value: Any, read: Any) -> bool:
    """Whether a value that was taken means what was written."""
    if isinstance(value, str) and not isinstance(read, str):
        return read is WORDS[value] if isinstance(read, bool) else read == float(value)
    if value is False and read == "no":
        return True
    return read == value and isinstance(read, bool) == isinstance(value, bool)


def counted(cases: Iterator[tuple[tuple[str, ...], Any, dict[str, Any]]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for names, value, given in cases:
        made = outcome(given, names)
        counts["refused" if made is None else "accepted"] += 1
        if made is None:
            continue
        key = names[0]
        if key in given:
            read = made.trainer[key] if key in made.trainer else getattr(made, key)
            assert kept(value, read) or (key == "privileged_kind" and value is None), (key, value, read)
    return counts


def test_a_wrong_value_of_any_key_is_refused_by_name_or_means_what_it_says() -> None:
    logging.disable(logging.WARNING)
    try:
        keys = [*all_settings()]
        counts = counted(
            ((key, INSIDE.get(key, key)), value, {key: value}) for key in keys for value in (*VALUES, *NEVER)
        )
    finally:
        logging.disable(logging.NOTSET)
    assert counts.total() == len(keys) * 30 and len(keys) > 200
    assert counts["refused"] > 4 * counts["accepted"] > 0


@pytest.mark.parametrize("value", NEVER, ids=lambda value: repr(value)[:20] if not isinstance(value, int) else "large")
def test_numbers_without_an_end_are_no_ones(value: Any) -> None:
    assert [key for key, setting in all_settings().items() if not setting.read(value)[1]] == []


def test_null_is_refused_where_the_annotation_has_none() -> None:
    hints = typing.get_type_hints(DOPDConfig) | typing.get_type_hints(RunSettings)
    scalars = [key for key, hint in hints.items() if hint in (int, float, bool, str) and key in all_settings()]
    assert len(scalars) > 80
    for key in scalars:
        with pytest.raises(ConfigError, match=f"{key} (has no value|is missing)"):
            load_settings(None, **BASE | {key: None})


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("lora_r", [0, -1], [1, 64]),
        ("lora_dropout", [-0.1, 1.0], [0.0, 0.5]),
        ("per_device_train_batch_size", [0, -4], [4, 8]),
        ("gradient_accumulation_steps", [0, -1], [2]),
        ("learning_rate", [-1e-5, "-1", 1e30], [0, 1e-3, "1e-3"]),
        ("max_steps", [0, -2, True], [-1, 1]),
        ("num_train_epochs", [0, -1], [0.5]),
        ("save_total_limit", [0, -1], [1, None]),
        ("final_eval_prompts", [0, -1], [1, None]),
        ("train_prompts", [0, 10**9], [1]),
        ("warmup_steps", [-1, 1.5, 1e30], [0, 0.1, 3, "3", 3.0]),
        ("logging_steps", [0, 2.5], [0.5, 1, 2.0, "0.5"]),
        ("save_steps", [0, -1, 1.5, True], [0.5, 7]),
        ("eval_steps", [0, 1.5], [None]),
        ("adam_beta2", [-0.1, 1.0, 2], [0.95]),
        ("seed", [-1, 2**32], [0, 2**32 - 1]),
        ("top_p", [0, 1.5], [1.0]),
        ("weight_decay", [-1, 1e30], [0.1]),
        ("adam_epsilon", [0, 1e30], [1e-8, 1]),
        ("temperature", [0, -1, 1e-300, 1e300], [0.7, 1e-4]),
        ("dataloader_num_workers", [-1, 9999, 10**9], [0, 2]),
        ("ema_decay", [0, 1], [0.9]),
        ("dtype", ["foo", "Float32", "nn"], ["auto", "bfloat16"]),
        ("verifier", ["foo", "a b:c", "a:", ":b", "a:b-c"], ["math", "my.module:function"]),
        ("save_strategy", ["never", True], ["no", False, "steps"]),
        ("report_to", ["wandbb", ["none", "x"]], ["none", "wandb", ["tensorboard"]]),
        ("lr_scheduler_type", ["cosin", "cosine_with_min_lr"], ["linear"]),
        ("optim_args", ["rank", "rank=", "=1", "a=b=c", "rank=64, scale=0.25"], [None]),
        ("dataset_name", ["", [], [""]], []),
        (
            "privileged_template",
            ["", "{prompt}", "{prompt} {prompt} {privileged_context}"]
            + [f"{{prompt}} {{privileged_context}} {field}" for field in ("{anwser}", "{0}", "{12}")],
            ["{prompt} {privileged_context} \\frac{1}{2} x^{2} { 0 } \\boxed{answer} x_{max} {{json}} { answer } {a}"],
        ),
        ("chat_template_kwargs", [{"tokenize": True}, [1]], [{"enable_thinking": False}]),
        ("metric_for_best_model", ["eval_foo", "eval_accuracy", "lose"], ["loss", "eval_loss", "runtime"]),
        ("save_strategy", ["best"], ["epoch"]),
        ("dataloader_multiprocessing_context", ["spawn", "x"], [None]),
        (
            "generation_kwargs",
            [{"compile_config": {"a": 1}}, {"watermarking_config": {"a": 1}}, {"sequence_bias": [[1]]}],
            [{"cache_implementation": "static"}, {"stop_strings": ["x"]}],
        ),
        ("gradient_checkpointing_kwargs", [{"determinism_check": "foo"}], [{"use_reentrant": False}]),
        ("liger_kernel_config", [{"rope": 3}], [{"rope": True}]),
        ("accelerator_config", ["no-such-file.json", {"split_batch": True}, {"gradient_accumulation_kwargs": {"a": 1}}],
         [{"split_batches": False}]),
    ],
)  # fmt: skip
def test_limits_are_where_they_belong(key: str, wrong: list[Any], right: list[Any]) -> None:
    for value in wrong:
        assert outcome({key: value}, (key, "privileged_template")) is None, value
    for value in right:
        assert outcome({key: value}, (key,)) is not None, value


# --- What is inside of mappings


def inside() -> Iterator[tuple[tuple[str, ...], Any, dict[str, Any]]]:
    values = [*VALUES, NAN, 10**30]
    for method, build in METHODS.items():
        for option in inspect.signature(build).parameters:
            for value in values:
                yield (option, method), value, {"method": method, "method_options": {option: value}}
    for task, kind in TASKS.items():
        for knob in (field.name for field in fields(kind) if field.init):
            for value in values:
                yield (knob, task), value, {"task": task, "task_options": {knob: value}}
    rows = (
        {"source": "teacher"},
        {"source": "teacher", "support": "target_topk"},
        {"divergence": "policy_gradient", "support": "sampled", "advantage": "privilege_gap"},
    )
    for field in fields(Rule):
        for value in values:
            for row in rows:
                names = (
                    field.name,
                    *("regime", "rule", "source")[: 3 if field.name in ("regime", "divergence") else 1],
                )
                yield names, value, {"rules": [row | {field.name: value}]}
    for name, signal in SIGNALS.items():
        for option in list(settings_of_call(signal.compute))[1:]:
            for value in values:
                yield (option,), value, {"rules": [{"source": "teacher", "scale": {"signal": name, option: value}}]}
    for key in ("kind", "share", "strength", "seed"):
        for value in values:
            yield (key,), value, {"privileged_noise": {"kind": "noisy", key: value}}
    for key in GenerationConfig().to_dict():
        for value in values:
            yield (key,), value, {"generation_kwargs": {key: value}, "off_policy_rollouts": True}
    for key in host_settings.LOADING:
        for value in values:
            yield (key,), value, {"model_init_kwargs": {key: value}}
    for key in (field.name for field in fields(AcceleratorConfig)):
        for value in values:
            yield (key,), value, {"accelerator_config": {key: value}}
    for scheduler in ("cosine", "cosine_with_min_lr", "warmup_stable_decay", "polynomial", "reduce_lr_on_plateau"):
        for key in ("num_cycles", "min_lr", "power", "num_decay_steps", "patience", "last_epoch", "decay_type"):
            for value in values:
                evaluated = {"eval_strategy": "steps", "eval_steps": 1}
                kwargs = {"lr_scheduler_type": scheduler, "lr_scheduler_kwargs": {key: value}}
                yield (key, "lr_scheduler_kwargs"), value, kwargs | evaluated


def test_a_wrong_value_inside_of_any_mapping_is_refused_by_name() -> None:
    logging.disable(logging.WARNING)
    try:
        # Every third: methods share the code that reads their options, and each value comes to each third of them.
        counts = counted(itertools.islice(inside(), 0, None, 3))
    finally:
        logging.disable(logging.NOTSET)
    assert counts.total() > 2200
    assert counts["refused"] > 4 * counts["accepted"] > 0


def test_every_setting_of_generation_has_a_type_or_is_refused() -> None:
    from dopd.rollout_settings import _ELSEWHERE, _OTHER_WAYS

    refused = {*_ELSEWHERE, *_OTHER_WAYS}
    assert set(GenerationConfig().to_dict()) - refused - set(GENERATION) == set()


@pytest.mark.parametrize(
    ("key", "inner", "known"),
    [
        ("generation_kwargs", "topp", "top_p"),
        ("model_init_kwargs", "atn_implementation", "attn_implementation"),
        ("gradient_checkpointing_kwargs", "use_rentrant", "use_reentrant"),
        ("lr_scheduler_kwargs", "num_cycle", "num_cycles"),
        ("accelerator_config", "split_batch", "split_batches"),
        ("task_options", "num_neded", "num_needed"),
        ("privileged_noise", "knd", "kind"),
    ],
)
def test_a_misspelt_key_inside_of_a_mapping_is_told(key: str, inner: str, known: str) -> None:
    with pytest.raises(ConfigError, match=known):
        make_config(load_settings(None, **BASE | {key: {inner: 1}}), elsewhere=True)


# --- End to end


ENDINGS = {
    "a rank of 0": ["--use_peft", "--lora_r", "0"],
    "a batch of 0": ["--per_device_train_batch_size", "0"],
    "several at once": ["--learning_rate=-1", "--dtype", "foo", "--save_total_limit", "0"],
    "a metric that is not measured": [
        *("--metric_for_best_model", "eval_foo", "--load_best_model_at_end", "--eval_strategy", "steps"),
        *("--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "2"),
    ],
}


def test_commands_say_it_in_one_go_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ENDINGS.values():
        for more in ([], ["--dry-run"]):
            assert main(["train", *flags, *more, "tiny-dag", "--output_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 2 * len(ENDINGS)
    for line in (
        "lora_r (=0) must be int of at least 1",
        "per_device_train_batch_size (=0) must be int of at least 1",
        "3 settings cannot be used:\n  learning_rate (=-1) must be float of at least 0",
        "of the host (eval_strategy): loss, runtime",
    ):
        assert line in said
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_each_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(BASE | {"learning_rate": -1, "lora_r": 0, "sed": 1}))
    assert main(["doctor", str(path)]) == 2
    said = capsys.readouterr().out
    assert "3 problem(s)" in said and "Did you mean 'seed'" in said and "lora_r (=0)" in said


LATE = {
    "teacher_model_init_kwargs: {attn_implementation: foo}": "teacher_model .* cannot be read .*attn_implementation",
    "teacher_model_init_kwargs: {a: 1}": "teacher_model .* cannot be read",
    "teacher_model_init_kwargs: {device_map: x}": "teacher_model .* cannot be read",
    "model_init_kwargs: {attn_implementation: foo}": "attn_implementation",
    "fsdp: full_shard": r"fsdp \(=True\) splits weights over processes.*--num_processes",
    "accelerator_config: {dispatch_batches: true}": "dispatch_batches",
}


@pytest.mark.parametrize("text", LATE)
def test_what_the_host_finds_when_models_are_loaded_is_one_line_too(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, _, value = text.partition(": ")
    assert main(["train", "tiny-dag", f"--{key}={value}", "--output_dir", str(tmp_path / "run")]) == 2
    assert re.search(LATE[text], capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_one_name_of_a_parameter_is_a_list_of_it() -> None:
    made = load_settings(None, **BASE, use_peft=True, lora_target_parameters="experts.down_proj")
    make_config(made, elsewhere=True)


@pytest.mark.parametrize(
    "command",
    [
        "eval m --prompts 0",
        "eval m --prompts -1",
        "eval m --prompts 99999999999",
        "eval m --prompts 1.5",
        "eval m --seed -1",
        "eval m --seed 4294967296",
        "eval m --batch-size 0",
        "eval m --max-new-tokens 0",
        "eval m --split foo",
        "tiny dag --seed -1",
        "quickstart --jobs -1",
        "quickstart --jobs 0",
        "quickstart --seeds 0",
        "experiment figure3 --jobs -1",
        "experiment figure3 --seeds 0",
        "inspect --student s --prompt p --rollouts 0",
        "inspect --student s --prompt p --max-new-tokens -5",
        "inspect --student s --prompt p --seed x",
    ],
)
def test_counts_of_commands_have_a_lowest_and_a_highest(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    assert "must be a whole number of at least" in capsys.readouterr().err or "--split" in command


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "dopd,dopd"], "dopd is named more than once"),
        (["--methods", "dodp"], "Did you mean 'dopd'"),
        (["--config", "no-such-recipe"], "no recipe of that name"),
    ],
)
def test_a_quickstart_that_cannot_be_made_is_refused_before_it_begins(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quickstart", *flags, "--output-dir", str(tmp_path / "quick")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "quick").exists()


def test_a_run_folder_whose_config_was_changed_by_hand_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, words in (
        ("max_completion_length: -3", "max_completion_length"),
        ("chat_template_kwargs: '{x'", "is not JSON"),
        ("task: dag\ntask: graph", "there twice"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        assert main(["eval", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    for flags in ENDINGS.values():
        command = [sys.executable, "-m", "dopd.cli.main", "train", *flags, "tiny-dag", "--output_dir", "run"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert list(tmp_path.iterdir()) == []
