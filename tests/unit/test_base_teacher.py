"""Teacher `base` is the student with its adapter off, and privileged students under adapters are what whole copies
would be.
"""

import copy
from pathlib import Path
from typing import Any

import adapter_kit
import pytest
import torch
import trainer_kit as kit
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from dopd.cli.main import main
from dopd.errors import ConfigError
from dopd.scoring import left_padded, view_hidden_states

ADAPTERS: dict[str, Any] = {
    "LoRA": {"r": 2, "target_modules": adapter_kit.LINEAR},
    "LoRA, head and norm saved": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "DoRA": {"r": 2, "target_modules": adapter_kit.LINEAR, "use_dora": True},
}


def adapted(name: str = "LoRA", *, trained: bool = True, **options: Any) -> Any:
    """The tiny student with an adapter that has learnt something."""
    torch.manual_seed(0)
    model = get_peft_model(kit.student(), LoraConfig(**ADAPTERS[name], task_type="CAUSAL_LM", **options))
    if trained:
        generator = torch.Generator().manual_seed(1)
        for weight in (one for one in model.parameters() if one.requires_grad):
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def step_of(folder: Path, name: str, method: str, **options: Any) -> Any:
    made, _, _ = kit.one_step(folder, method, 8, 1, model=adapted(name), **options)
    return made


@pytest.mark.parametrize("method", ["vanilla", "dopd"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_step_is_that_with_a_second_model_of_the_base(name: str, method: str, tmp_path: Path) -> None:
    other = step_of(tmp_path / "other", name, method, teacher_model=kit.student())
    own = step_of(tmp_path / "own", name, method, teacher_model="base")
    assert own.teacher_model is None and other.teacher_model is not None
    trained = [weight_name for weight_name, weight in other.model.named_parameters() if weight.requires_grad]
    assert trained == [weight_name for weight_name, weight in own.model.named_parameters() if weight.requires_grad]
    expected, found = (kit.train_records(one)[0] for one in (other, own))
    for key in ("loss", "entropy", "grad_norm", *(key for key in expected if key.startswith(("share/", "gap/")))):
        assert found[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-7), key
    for (weight_name, mine), theirs in zip(own.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=weight_name)


class WholeCopies(TrainerCallback):
    """What each privileged student is by definition, kept as whole models."""

    def __init__(self, student: Any, kind: str, decay: float, steps: int) -> None:
        self.student, self.kind, self.decay, self.steps = student, kind, decay, steps
        self.copy, self.since = self.merged(), 0

    def merged(self) -> Any:
        return copy.deepcopy(self.student).merge_and_unload().eval()

    @torch.no_grad()
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.since += 1
        if self.kind == "ema":
            for kept, now in zip(self.copy.parameters(), self.merged().parameters(), strict=True):
                kept.lerp_(now, 1 - self.decay)
        elif self.kind == "snapshot" and self.since % self.steps == 0:
            self.copy = self.merged()


@pytest.mark.parametrize("trained", [False, True], ids=["a new adapter", "one that is trained further"])
@pytest.mark.parametrize("kind", ["frozen", "ema", "snapshot", "reference"])
def test_privileged_students_under_adapters_are_those_of_whole_copies(kind: str, trained: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"privileged_student": kind}
    if kind == "reference":
        options = {
            "rules": [{"source": {"teacher": 1, "reference": 0.5}, "divergence": "reverse_kl"}],
            "method": "custom",
        }
    model = adapted(trained=trained)
    made = kit.trainer(
        tmp_path, model=model, max_steps=5, learning_rate=0.02, ema_decay=0.7, snapshot_steps=2, **options
    )
    copies = WholeCopies(model, kind, 0.7, 2)
    made.add_callback(copies)
    made.train()
    view = left_padded([[5, 6, 7], [8, 9]], 0, torch.device("cpu"))
    ids = torch.tensor([[10, 11, 12, 13], [14, 15, 16, 17]])
    with (
        made.models.source_model("reference" if kind == "reference" else "privileged_student") as held,
        torch.no_grad(),
    ):
        found = view_hidden_states(held, view, ids, torch.ones_like(ids))
    with torch.no_grad():
        expected = view_hidden_states(copies.copy, view, ids, torch.ones_like(ids))
        now = view_hidden_states(model, view, ids, torch.ones_like(ids))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    assert not torch.allclose(found, now, atol=1e-3)  # it has moved since
    weights = sum(one.numel() for one in model.parameters())
    anchor = made.initial if kind == "reference" else made.anchor
    assert sum(one.numel() for one in anchor.held.values()) < weights / 4  # no second model


def test_what_cannot_have_its_base_as_teacher(tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            kit.trainer(tmp_path, teacher_model="base", **options)

    refused("has no adapter: set use_peft", model=kit.student())
    refused("is new and changes nothing", model=adapted(trained=False))
    refused("init_lora_weights", model=adapted(init_lora_weights="pissa"))
    fresh = kit.trainer(tmp_path, "privileged_teacher", teacher_model="base", model=adapted(trained=False))
    assert fresh.args.teacher_is_base and not fresh.args.loads_teacher  # it reads another prompt than the student


def test_a_run_from_the_command_line_and_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kit.student().save_pretrained(tmp_path / "student")
    kit.TOKENIZER.save_pretrained(tmp_path / "student")
    flags = [
        *("--model_name_or_path", str(tmp_path / "student"), "--teacher_model_name_or_path", "base"),
        *("--method", "privileged_teacher", "--output_dir", str(tmp_path / "run"), "--max_steps", "1"),
        *(
            "--train_prompts",
            "64",
            "--eval_prompts",
            "8",
            "--student_eval_steps",
            "null",
            "--final_eval_prompts",
            "null",
            "--trace_steps",
            "null",
        ),
    ]
    assert main(["train", "tiny-dag", *flags]) == 2
    assert "has no adapter" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main(["plan", "tiny-dag", *flags, "--use_peft"]) == 0
    assert "teacher" not in capsys.readouterr().out
    assert main(["train", "tiny-dag", *flags, "--use_peft"]) == 0
    assert "the model below the adapter" in (tmp_path / "run" / "README.md").read_text()
    assert main(["eval", str(tmp_path / "run"), "--teacher", "base", "--prompts", "2", "--json"]) == 0
    assert main(["eval", str(tmp_path / "student"), "--teacher", "base", "--task", "dag", "--prompts", "2"]) == 2
    assert "has no adapter" in capsys.readouterr().err
