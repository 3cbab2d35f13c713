"""What is secret by name is used, and reaches no file, no screen and no log."""

from pathlib import Path

import pytest

from dopd.cli.main import main
from dopd.secrets import is_secret, without_secrets

PLANTED = "hf_planted0123456789"


@pytest.mark.parametrize(
    "name", ["hub_token", "token", "push_to_hub_token", "api_key", "OPENAI_API_KEY", "wandb_password", "client_secret"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "loss_chunk_tokens",
        "eos_token_id",
        "pad_token",
        "max_completion_length",
        "trainable_token_indices",
        "num_tokens",
    ],
)
def test_numbers_and_names_of_tokens_are_none(name: str) -> None:
    assert not is_secret(name)


def test_secrets_are_taken_out_at_any_depth() -> None:
    values = {
        "hub_token": PLANTED,
        "model_init_kwargs": {"token": PLANTED, "revision": "a"},
        "rows": [{"password": PLANTED}],
    }
    assert (
        PLANTED not in str(without_secrets(values)) and without_secrets(values)["model_init_kwargs"]["revision"] == "a"
    )


def test_a_planted_token_is_in_no_file_of_a_run_and_on_no_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    flags = [
        "--output_dir",
        str(folder),
        "--max_steps",
        "1",
        "--hub_token",
        PLANTED,
        "--per_device_train_batch_size",
        "8",
    ]
    flags += ["--train_prompts", "8", "--eval_prompts", "4", "--save_strategy", "steps", "--save_steps", "1"]
    flags += ["--student_eval_steps", "null", "--final_eval_prompts", "4", "--gradient_accumulation_steps", "1"]
    assert main(["train", "tiny-dag", *flags, "--dry-run"]) == 0
    assert main(["train", "tiny-dag", *flags]) == 0
    shown = "".join(capfd.readouterr()) + caplog.text
    assert PLANTED not in shown
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8 and [path.name for path in files if PLANTED.encode() in path.read_bytes()] == []


def test_a_token_of_the_environment_is_in_no_setting_and_no_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    monkeypatch.setenv("SHORT_TOKEN", "dag")  # found everywhere, and nobody's secret
    kept = without_secrets({"run_name": f"a {PLANTED}", "rows": [{"url": f"https://x:{PLANTED}@y"}], "task": "dag"})
    assert kept == {"run_name": "a <HF_TOKEN>", "rows": [{"url": "https://x:<HF_TOKEN>@y"}], "task": "dag"}
    assert main(["eval", f"/no/{PLANTED}", "--task", "dag"]) == 2
    assert main(["train", "tiny-dag", "--output_dir", f"{tmp_path}/{PLANTED}", "--dry-run"]) == 0
    shown = "".join(capfd.readouterr())
    assert PLANTED not in shown and "<HF_TOKEN>" in shown
