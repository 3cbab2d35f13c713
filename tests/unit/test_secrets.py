"""What is secret by name is used, and reaches no file, no screen and no log."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import trainer_kit as kit
from transformers import AutoModelForCausalLM

from dopd.cli.main import main
from dopd.runs.settings import all_settings
from dopd.secrets import is_secret, without_secrets
from dopd.shown import visible

PLANTED = "hf_planted0123456789"


@pytest.mark.parametrize(
    "name",
    [
        *("hub_token", "token", "push_to_hub_token", "api_key", "OPENAI_API_KEY", "wandb_password", "client_secret"),
        *("GH_PAT", "HF_AUTH", "NPM_AUTH", "MYSQL_PWD", "SLACK_WEBHOOK", "SLACK_WEBHOOK_URL", "SSH_PRIVATE_KEY"),
    ],
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
        "max_tokens",
        "GIT_AUTHOR_NAME",
        "PATH",
        "PWD",
        "OLDPWD",
        "pattern",
        "second_pass",
        "SSH_AUTH_SOCK",
        "TOKENIZERS_PARALLELISM",
        "dispatch",
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


def test_passwords_and_keys_of_the_environment_are_found_and_paths_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {"GH_PAT": "ghp_planted", "INDEX": "https://planted0123456789@host", "PROXY": "http://assistant@host"}
    given |= {"DB_PASS": "planted;pass", "DATABASE_URL": "postgres://u:pl%40nted-pw@host/db"}
    for name, value in {**given, "MYSQL_PWD": str(tmp_path), "LONGER_TOKEN": "ghp_planted_and_more"}.items():
        monkeypatch.setenv(name, value)
    text = "planted0123456789, assistant, "
    text += f"ghp_planted, ghp_planted_and_more, planted;pass, pl%40nted-pw, pl@nted-pw, {tmp_path}"
    kept = "<INDEX>, assistant, "
    kept += f"<GH_PAT>, <LONGER_TOKEN>, <DB_PASS>, <DATABASE_URL>, <DATABASE_URL>, {tmp_path}"
    assert without_secrets({"run_name": text}) == {"run_name": kept}


def test_a_token_in_the_data_and_in_settings_is_in_no_file_and_a_run_goes_on_from_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quoted_token, named = 'pl"nted\\token', "planted-by-name"
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    monkeypatch.setenv("OTHER_TOKEN", quoted_token)
    row = {"prompt": "a 3 b a 4 ? b", "privileged_context": f"plan {PLANTED} {quoted_token}", "answer": PLANTED}
    data = tmp_path / "data.jsonl"
    data.write_text(f"{json.dumps(row)}\n" * 8)
    settings = {
        "output_dir": str(tmp_path / f"run-{PLANTED}"),
        **{"model_name_or_path": "tiny:dag/student", "teacher_model_name_or_path": "tiny:dag/teacher"},
        "dataset_name": str(data),
        "privileged_template": f"{{prompt}} {{privileged_context}} {PLANTED}",
        "chat_template_kwargs": {"x": {"password": named}},
        **{"max_completion_length": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        **{"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "trace_steps": 1, "use_cpu": True, "bf16": False},
    }

    def train(*flags: str, **changes: object) -> int:
        (tmp_path / "c.yaml").write_text(json.dumps(settings | changes))
        return main(["train", str(tmp_path / "c.yaml"), *flags])

    assert train() == 0, capfd.readouterr().err
    run = Path(str(settings["output_dir"]))
    assert main(["report", str(run)]) == 0
    written = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    texts = [text for value in (PLANTED, quoted_token, named) for text in (value, json.dumps(value)[1:-1])]
    found = [(path.name, text) for path, content in written.items() for text in texts if text.encode() in content]
    assert found == [] and (run / "report.html") in written
    assert b"<HF_TOKEN>" in written[run / "trace.jsonl"] and b"<OTHER_TOKEN>" in written[run / "trace.jsonl"]
    resume = ("--resume_from_checkpoint", str(run / "checkpoint-1"))
    assert train(*resume, chat_template_kwargs={"x": {"password": "another-one"}}) == 2
    assert train(*resume, privileged_template=f"{{prompt}} {{privileged_context}} {PLANTED[::-1]}") == 2
    shown = "".join(capfd.readouterr())
    assert "chat_template_kwargs" in shown and "privileged_template" in shown
    assert not any(text in shown for text in (*texts, "another-one"))
    monkeypatch.delenv("HF_TOKEN")  # what a checkpoint was written without is known again without it
    assert train(*resume) == 0, capfd.readouterr().err


def files_with(value: str, folder: Path) -> list[str]:
    content = value.encode()
    return sorted({path.name for path in folder.rglob("*") if path.is_file() and content in path.read_bytes()})


@pytest.mark.parametrize("adapter", [False, True])
def test_what_libraries_write_beside_weights_holds_no_token_of_the_environment(
    adapter: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    base = tmp_path / PLANTED
    model = kit.student()
    model.config.written_by = model.generation_config.written_by = PLANTED
    model.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = copy.deepcopy(kit.TOKENIZER)
    tokenizer.init_kwargs["written_by"] = PLANTED
    if not adapter:
        tokenizer.add_tokens([PLANTED])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    options = {"peft_config": kit.lora()} if adapter else {}
    made = kit.trainer(
        tmp_path / "run",
        model=model,
        teacher_model=None,
        method="privileged_student",
        processing_class=tokenizer,
        save_strategy="steps",
        save_steps=1,
        **options,
    )
    made.state.log_history.append({"note": PLANTED})
    made.train()
    made.save_model()
    made.save_state()
    left = [] if adapter else ["tokenizer.json"]  # of which it is a word
    assert files_with(PLANTED, tmp_path / "run") == left
    assert adapter or "tokenizer.json holds a value" in caplog.text
    written = "adapter_config.json" if adapter else "config.json"
    assert {"tokenizer_config.json", written} <= set(files_with("<HF_TOKEN>", tmp_path / "run"))
    assert PLANTED not in json.dumps(kit.config(tmp_path, run_name=f"a {PLANTED}").to_dict(), default=str)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://me:pw0123@host/x", "https://<user>@host/x"),
        ("see redis://:p@ss@host:80.", "see redis://<user>@host:80."),
        ("'ssh://me:pw@h'", "'ssh://<user>@h'"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("pip install git+https://ghp_0123456789@host/x", "pip install git+https://<user>@host/x"),
        ("HTTP://token@host", "HTTP://<user>@host"),
        ("ssh://git@host/x", "ssh://git@host/x"),
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
