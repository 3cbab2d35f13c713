"""Arguments that `DOPDConfig` and `DOPDTrainer` do not have are answered with what to write, as keys of a file are."""

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DistillationConfig

from dopd import DOPDConfig, DOPDTrainer
from dopd.errors import ConfigError
from dopd.settings.foreign import FOREIGN
from dopd.trainer.arguments import as_name


def refused(words: str, made: Any, **arguments: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        made(**arguments)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lmbda", FOREIGN["lmbda"]),
        ("max_new_tokens", "here it is max_completion_length"),
        ("model_name_or_path", "here it is model of DOPDTrainer"),
        ("student", "here it is model of DOPDTrainer"),
        ("use_lora", "here it is peft_config of DOPDTrainer"),
        ("final_eval_prompts", "call trainer.final_evaluation(PROMPTS)"),
        ("lerning_rate", "Did you mean 'learning_rate'?"),
    ],
)
def test_a_setting_that_is_not_there(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^DOPDConfig has no argument '{name}'[:.] {re.escape(words)}"):
        DOPDConfig("x", **{name: 1})


def test_the_configuration_is_a_dataclass_as_before() -> None:
    config = DOPDConfig("x", learning_rate=1e-4, use_cpu=True, bf16=False)
    assert (config.output_dir, config.learning_rate) == ("x", 1e-4)
    assert DOPDConfig.__init__.__name__ == "__init__"
    refused("'lmbda'", DOPDConfig, output_dir="x", lmbda=1, lerning_rate=1)
    refused("'lerning_rate'", DOPDConfig, output_dir="x", lmbda=1, lerning_rate=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"teacher": "t"}, "DOPDTrainer has no argument 'teacher': here it is teacher_model of DOPDTrainer"),
        ({"tokenizer": "t"}, "here it is processing_class of DOPDTrainer"),
        ({"method": "vanilla"}, "here it is args=DOPDConfig(method=...)"),
        ({"verifierr": "math"}, "DOPDTrainer has no argument 'verifierr'. Did you mean 'verifier'?"),
        ({"args": {"output_dir": "x"}}, "args (a dict) must be a DOPDConfig"),
        ({"args": DistillationConfig("x", bf16=False)}, "args (a DistillationConfig) must be a DOPDConfig"),
        ({"peft_config": {"r": 8}}, "peft_config (a dict) must be one of peft's"),
        ({"callbacks": object()}, "callbacks (a object) must be a list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_argument_of_the_trainer_that_nothing_can_be_done_with(arguments: dict[str, Any], words: str) -> None:
    refused(words, DOPDTrainer, model="no/model", train_dataset=Dataset.from_list([{"prompt": "a"}]), **arguments)


def test_a_folder_may_be_a_path() -> None:
    model = object()
    assert as_name(Path("runs") / "mine") == "runs/mine" and as_name("a/b") == "a/b" and as_name(model) is model
