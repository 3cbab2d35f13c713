"""What is secret by name is used, and reaches no file, no screen and no log."""

import copy
import pickle
from pathlib import Path

import pytest
import trainer_kit as kit

from dopd.cli.main import main
from dopd.runs.settings import all_settings
from dopd.secrets import is_secret, without_secrets
from dopd.shown import visible

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


def test_settings_are_pickled_without_secrets_and_copied_with_them(tmp_path: Path) -> None:
    """The host pickles them beside weights, and again where it sends checkpoints to a hub."""
    args = kit.config(tmp_path, hub_token=PLANTED, run_name="named", push_to_hub=False)
    assert PLANTED.encode() not in pickle.dumps(args)
    again = pickle.loads(pickle.dumps(args))
    assert again.hub_token is None and again.run_name == "named" and again.method_options == args.method_options
    for copied in (copy.copy(args), copy.deepcopy(args)):
        assert copied.hub_token == PLANTED and copied is not args and vars(copied).keys() == vars(args).keys()


def test_a_token_of_the_environment_is_in_no_setting_and_no_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    monkeypatch.setenv("SHORT_TOKEN", "dag")  # found everywhere, and nobody's secret
    kept = without_secrets({"run_name": f"a {PLANTED}", "rows": [{"url": f"https://x:{PLANTED}@y"}], "task": "dag"})
    assert kept == {"run_name": "a <HF_TOKEN>", "rows": [{"url": "https://<user>@y"}], "task": "dag"}
    assert main(["eval", f"/no/{PLANTED}", "--task", "dag"]) == 2
    assert main(["train", "tiny-dag", "--output_dir", f"{tmp_path}/{PLANTED}", "--dry-run"]) == 0
    shown = "".join(capfd.readouterr())
    assert PLANTED not in shown and "<HF_TOKEN>" in shown


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://me:pw0123@host/x", "https://<user>@host/x"),
        ("see redis://:p@ss@host:80.", "see redis://<user>@host:80."),
        ("'ssh://me:pw@h'", "'ssh://<user>@h'"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("https://a.b/c:d and x@y", "https://a.b/c:d and x@y"),
        ("hf://datasets/a@rev:b@c", "hf://datasets/a@rev:b@c"),
    ],
)
def test_a_password_in_an_address_is_not_written_down(text: str, kept: str) -> None:
    assert without_secrets({"run_name": text}) == {"run_name": kept}
    assert visible(text) == kept


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ("model_init_kwargs", f"{{token: {{a: {PLANTED}}}}}"),
        ("seed", f"{{api_key: {PLANTED}}}"),
    ],
)
def test_a_secret_of_the_wrong_type_is_not_quoted(setting: str, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny-dag", "--dry-run", f"--{setting}", given]) == 2
    shown = "".join(capsys.readouterr())
    assert setting in shown and "<secret>" in shown and PLANTED not in shown
    _, problems = all_settings()["hub_token"].read([PLANTED])
    assert problems == ["hub_token (=<secret>) must be str, got list"]


def test_a_traceback_that_is_asked_for_holds_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    assert main(["--debug", "eval", f"/no/{PLANTED}\x1b[31m", "--task", "dag"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "<HF_TOKEN>" in shown and PLANTED not in shown and "\x1b" not in shown
