"""The public surface: names and signatures that code written against dopd relies on. Do not fix the test."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch

import dopd

# "name" positional or keyword, "*name" keyword only, "name=" with a default
SIGNATURES = {
    "route": ["teacher_logprobs", "student_logprobs", "mask", "*trim=0.05"],
    "divergence": [
        "student_logits",
        "target_logits",
        "*kind",
        "*support='full'",
        "*top_k=128",
        "*tail='bucket'",
        "*sampled_ids=None",
    ],
    "routed_loss": ["student_logits", "targets", "completion_ids", "mask", "table"],
    "fused_routed_loss": ["student_hidden", "student_head", "targets", "completion_ids", "mask", "table"],
}
NAMES = {
    *("Regime", "route", "divergence", "Rule", "RoutingTable", "table", "routed_loss", "DOPDConfig", "DOPDTrainer"),
    *("Head", "fused_routed_loss", "Assignment"),
    *("register_divergence", "register_method", "register_signal", "register_task"),
}


def written(parameter: inspect.Parameter) -> str:
    star = "*" if parameter.kind is inspect.Parameter.KEYWORD_ONLY else ""
    default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
    return f"{star}{parameter.name}{default}"


def test_all_lists_the_public_names() -> None:
    assert set(dopd.__all__) == NAMES == set(dir(dopd))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_name_resolves(name: str) -> None:
    assert getattr(dopd, name).__doc__


def test_name_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(
        AttributeError, match=r"module 'dopd' has no attribute 'Router'; public names: Assignment, DOPDConfig"
    ):
        _ = dopd.Router


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_the_agreed_one(name: str) -> None:
    parameters = [written(parameter) for parameter in inspect.signature(getattr(dopd, name)).parameters.values()]
    agreed = SIGNATURES[name]
    assert parameters[: len(agreed)] == agreed
    assert all(extra.startswith("*") and "=" in extra for extra in parameters[len(agreed) :])  # optional, by keyword


def test_regime_numbers_are_fixed() -> None:
    assert [(regime.name, regime.value) for regime in dopd.Regime] == [("LH", 0), ("LL", 1), ("HT", 2), ("HS", 3)]


def test_rule_has_the_agreed_fields() -> None:
    names = [field.name for field in dataclasses.fields(dopd.Rule)]
    assert names[:7] == ["regime", "source", "divergence", "support", "tail", "top_k", "weight"]
    assert names[7:] == [
        *("name", "select", "scale", "advantage", "beta", "clamp", "cap", "clip"),
        *("text", "view", "outcomes_of"),
    ]


def test_routed_loss_returns_the_agreed_fields() -> None:
    logits = torch.randn(2, 3, 5)
    result = dopd.routed_loss(
        logits, {"teacher": logits}, torch.ones(2, 3).long(), torch.ones(2, 3), dopd.table("vanilla", top_k=128)
    )
    assert result.loss.shape == () and result.per_token.shape == result.regimes.shape == (2, 3)
    assert isinstance(result.stats, dict) and all(isinstance(value, float) for value in result.stats.values())


def test_trainer_and_config_extend_those_of_the_host() -> None:
    import transformers
    import trl

    assert issubclass(dopd.DOPDConfig, trl.DistillationConfig)
    assert issubclass(dopd.DOPDConfig, transformers.TrainingArguments)
    assert issubclass(dopd.DOPDTrainer, trl.DistillationTrainer)
    assert issubclass(dopd.DOPDTrainer, transformers.Trainer)
    parameters = inspect.signature(dopd.DOPDTrainer).parameters
    assert list(parameters)[:3] == ["model", "teacher_model", "args"]


@pytest.mark.parametrize(
    "statement",
    [
        "import dopd",
        "import dopd.tasks",
        "import dopd, dopd.tasks; dir(dopd)",
        "import contextlib, io; from dopd.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['tasks'])\n",
        "import contextlib, io; from dopd.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main(['train', '--help'])\n",
    ],
)
def test_import_does_not_load_torch(statement: str) -> None:
    code = f"import sys\n{statement}\nprint([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
