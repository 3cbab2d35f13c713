"""A signal gets what it was registered with; names of models and methods are the same from Python and commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trainer_kit import task_rows, trainer
from transformers import AutoModelForCausalLM

import dopd
from dopd.cli.main import main
from dopd.errors import ConfigError
from dopd.signals import SignalBatch, signal_values
from dopd.tiny import tiny_model_path

pytestmark = pytest.mark.usefixtures("registries")  # they are left as they were

READS: dict[str, tuple[Callable[[SignalBatch], Any], str]] = {
    "source": (lambda b: b.logprobs["teacher"], r"logprobs\['teacher'\].*: add sources=\['student', 'teacher'\]"),
    "entropy": (lambda b: b.entropies["teacher"], r"entropies\['teacher'\].*: add sources=\['student', 'teacher'\]"),
    "measure": (lambda b: b.measures["reverse_kl"], r"measures\['reverse_kl'\].*: add measures=\['reverse_kl'\]"),
    "rewards": (lambda b: b.rewards, r"batch\.rewards .*: add needs_rewards=True"),
    "rewards of groups": (lambda b: b.rewards_of_groups(), r"batch\.rewards .*: add needs_rewards=True"),
    "scores": (lambda b: b.scores_of_groups(), r"batch\.scores .*: add needs_scores=True"),
}


def batch() -> SignalBatch:
    ones = torch.ones(2, 3)
    both = {"student": ones, "teacher": ones}
    return SignalBatch(ones, both, both, {"reverse_kl": ones}, rewards=torch.ones(2), scores=torch.ones(2))


@pytest.mark.parametrize("what", READS)
def test_a_signal_reads_what_it_was_registered_with(what: str) -> None:
    read, words = READS[what]
    name = f"undeclared_{what.replace(' ', '_')}"

    def compute(batch: SignalBatch) -> Any:
        return read(batch) * batch.logprobs["student"]

    dopd.register_signal(name, sources=["student"])(compute)
    with pytest.raises(ConfigError, match=rf"signal '{name}' reads batch\.{words}|signal '{name}' reads {words}"):
        signal_values(name, batch(), {})


def test_what_is_declared_is_there() -> None:
    @dopd.register_signal(
        "declared_all", sources=["student", "teacher"], measures=["reverse_kl"], needs_rewards=True, needs_scores=True
    )
    def everything(batch: SignalBatch) -> torch.Tensor:
        judged = batch.rewards_of_groups() + batch.scores_of_groups()
        return batch.per_token(judged.flatten()) * batch.entropies["teacher"] * batch.measures["reverse_kl"]

    assert signal_values("declared_all", batch(), {}).tolist() == [[2.0] * 3] * 2


def test_a_method_of_ones_own_is_shown_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_plain.py").write_text("import dopd\ndef plain():\n    return dopd.table('vanilla')\n")
    assert main(["methods", f"{tmp_path / 'my_plain.py'}:plain"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "your own" in said and "confidence" not in said and "none known" not in said


def test_embedded_models_go_by_name_in_python(tmp_path: Path) -> None:
    rows = Dataset.from_list(task_rows())
    made = trainer(
        tmp_path,
        model="tiny:dag/student",
        teacher_model="tiny:dag/teacher",
        processing_class=None,
        train_dataset=rows,
        model_init_kwargs={"dtype": "float32"},
    )
    for role, model in (("student", made.unwrapped_student), ("teacher", made.unwrapped_teacher)):
        stored = AutoModelForCausalLM.from_pretrained(tiny_model_path("dag", role, 0), dtype=torch.float32)
        weights = dict(stored.named_parameters())
        assert all(torch.equal(weights[name], value.cpu()) for name, value in model.named_parameters())
    with pytest.raises(ConfigError, match="must look like tiny:TASK/ROLE"):
        trainer(tmp_path, model="tiny:dag", train_dataset=rows)
