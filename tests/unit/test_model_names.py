"""What names no model, and files that are none, are refused by name before weights are read."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from run_kit import Train
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dopd.cli.main import main
from dopd.errors import ConfigError, ModelError
from dopd.names import check_name
from dopd.runs import examination
from dopd.runs.build import check_files, load_model, load_tokenizer
from dopd.trainer.guards import compare_tokenizers

NO_NAMES = {
    "~": "no hub id, and no folder of that name is here",
    "~/models/x": r"no folder of that name is here \('~' is a folder in files of settings",
    "https://huggingface.co/org/name": "is an address.*its hub id is 'org/name'$",
    "https://huggingface.co/org/name/tree/v2": "its hub id is 'org/name' and revision: v2",
    "hf.co/org/name/": "no hub id",
    "s3://bucket/model": "is an address.*after fetching it from there",
    "/no/such/folder": "no hub id, and no folder",
    "./nowhere": "no hub id, and no folder",
    "a/b/c": "no hub id, and no folder",
    "": "no hub id",
    " ": "no hub id",
    "name with spaces": "no hub id",
}


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_can_be_no_model_is_refused_in_our_words(name: str) -> None:
    with pytest.raises(ModelError, match=NO_NAMES[name]):
        load_model(name)


@pytest.mark.parametrize("name", ["gpt2", "org/name", "org/name.v2-x_1"])
def test_hub_ids_are_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_a_folder_without_a_model_says_what_it_holds(file: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"without a model .*is empty\): name one that save_pretrained has written"):
        load_model(str(tmp_path / "empty"))
    saved = tmp_path / "runs" / "checkpoint-1"  # as a run whose model was never saved at its end
    saved.mkdir(parents=True)
    (saved / file).write_text("{}")
    with pytest.raises(ModelError, match=rf"holds checkpoint-1.*name one in it: {re.escape(str(saved))}"):
        load_model(str(tmp_path / "runs"))
    with pytest.raises(ModelError, match="is a file: give the folder"):
        load_model(str(saved / file))
    with pytest.raises(ModelError, match="Did you mean 'checkpoint-1'"):
        load_model(str(tmp_path / "runs" / "chekpoint-1"))


def test_a_trainer_and_an_evaluation_refuse_the_same_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ({"model": "https://host/x"}, {"teacher_model": "https://host/x"}):
        with pytest.raises(ModelError, match="'https://host/x' is an address"):
            kit.trainer(tmp_path, **given)
    assert main(["eval", "s3://bucket/model", "--task", "dag"]) == 2  # one of the web may be a server
    assert "is an address" in capsys.readouterr().err


Tensors = dict[str, torch.Tensor]
NAME = "model.layers.0.mlp.down_proj.weight"
WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "one is missing": (lambda w: {n: v for n, v in w.items() if n != NAME}, f"1 tensors are missing.*{NAME}"),
    "all are renamed": (lambda w: {f"net.{n}": v for n, v in w.items()}, "are missing from it.*are in it and not"),
    "one is too many": (lambda w: {**w, "extra": torch.zeros(2)}, "in it and not in the model .extra"),
    "one is cut": (lambda w: {**w, NAME: w[NAME][:, :1].clone()}, "another shape"),
    "whole numbers": (lambda w: {**w, NAME: w[NAME].to(torch.int32)}, "whole numbers"),
}


def damaged(folder: Path, what: str) -> str:
    """Damage a model in a folder; returns what is said of it."""
    file = folder / "model.safetensors"
    if what in WRONG:
        change, words = WRONG[what]
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return words
    content = file.read_bytes()
    file.unlink()
    if what == "there is no file":
        return "no file named model.safetensors"
    file.write_bytes(content[: len(content) // 2])
    return "SafetensorError"


@pytest.mark.parametrize("what", [*WRONG, "there is no file", "a file is torn"])
@pytest.mark.parametrize("role", ["model_name_or_path", "teacher_model_name_or_path"])
def test_a_dry_run_and_the_loader_say_the_same_of_damaged_weights(
    role: str,
    what: str,
    tmp_path: Path,
    train: Train,
    models_of_one_layer: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(models_of_one_layer[role.startswith("teacher")], folder)
    words = damaged(folder, what)
    with pytest.raises(ModelError, match=words):
        load_model(str(folder))
    monkeypatch.setattr(examination, "_loaded", lambda *_, **__: ())  # as on a machine without the memory for it
    assert train("--dry-run", f"--{role}", str(folder)) == 2
    with pytest.raises(ModelError, match=words):
        raise ModelError(" ".join("".join(capsys.readouterr()).split()))


def test_a_dry_run_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.student().save_pretrained(tmp_path)
    seen: list[Any] = []
    read = AutoModelForCausalLM.from_pretrained

    def kept(*args: Any, **options: Any) -> Any:
        made = read(*args, **options)
        seen.extend(weight.device.type for weight in made[0].parameters())
        return made

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", kept)
    check_files(str(tmp_path))
    assert set(seen) == {"meta"}


@pytest.mark.parametrize("what", ["no weights", "torn weights", "a damaged base"])
def test_files_of_an_adapter_and_of_its_base_are_looked_at(what: str, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    kit.student().save_pretrained(base)
    made = kit.lora_trainer(run, model=AutoModelForCausalLM.from_pretrained(base))
    made.save_model()
    check_files(str(run))
    file = run / "adapter_model.safetensors"
    if what == "a damaged base":
        damaged(base, "one is missing")
    elif what == "torn weights":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        file.unlink()
    with pytest.raises(
        ModelError, match={"no weights": "adapter without weights", "torn weights": "Safetensor"}.get(what, NAME)
    ):
        check_files(str(run))


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2", "gpt_neox", "t5", "xglm"])
def test_a_folder_without_a_tokenizer_is_said_as_such(tmp_path: Path, family: str) -> None:
    """transformers makes a tokenizer without words of some families' configurations; a real one is not taken for it."""
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="knows no word: there are no files of one"):
        load_tokenizer(str(tmp_path))
    empty = AutoTokenizer.from_pretrained(tmp_path)
    whole = load_tokenizer("tiny:dag/student")
    for pair in ((empty, whole), (whole, empty)):
        with pytest.raises(ModelError, match=f"the tokenizer of '{tmp_path}' knows no word"):
            compare_tokenizers(*pair)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 7}, {"hidden_size": 64}, {"pad_token_id": 99999}])
def test_fields_of_a_configuration_that_do_not_fit_the_weights_are_named(
    fields: dict[str, int], models_of_one_layer: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError, match=rf"model_init_kwargs \(=.*{next(iter(fields))}.*leave out what does not fit"):
        load_model(models_of_one_layer[0], **fields)


def test_a_folder_that_a_refused_run_has_left_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path)]) == 2
    assert "is a folder without a model" in capsys.readouterr().err
