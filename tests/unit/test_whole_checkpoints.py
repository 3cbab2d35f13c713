"""Weights are never invented: a tensor that is missing, cut or not the model's stops a run before training."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
import vision_kit
from compatibility import tried
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dopd.checkpoints import load
from dopd.cli.main import main
from dopd.errors import ConfigError, ModelError
from dopd.weights import read_weights

Tensors = dict[str, torch.Tensor]
NAME = "model.layers.0.mlp.down_proj.weight"
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "every tensor renamed": (lambda w: {f"net.{name}": value for name, value in w.items()}, "are missing from it"),
    "one tensor missing": (lambda w: {name: value for name, value in w.items() if name != NAME}, f"missing.*{NAME}"),
    "one tensor cut": (lambda w: {**w, NAME: w[NAME][:-1].clone()}, f"another shape.*{NAME}"),
    "one tensor too many": (
        lambda w: {**w, "value_head.weight": w[NAME].clone()},
        "not in the model .value_head.weight",
    ),
    "a layer too many": (
        lambda w: {**w, **{n.replace("layers.1.", "layers.2."): v.clone() for n, v in w.items() if "layers.1." in n}},
        "not in the model .model.layers.2",
    ),
}


def saved(folder: Path, model: Any, change: Callable[[Tensors], Tensors] | None = None) -> str:
    model.save_pretrained(folder)
    kit.TOKENIZER.save_pretrained(folder)
    file = folder / "model.safetensors"
    if change is not None:
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_a_checkpoint_that_is_not_whole_trains_nothing(tmp_path: Path, role: str, what: str) -> None:
    change, words = BROKEN[what]
    names = {
        "model": saved(tmp_path / "student", kit.student()),
        "teacher_model": saved(tmp_path / "teacher", kit.teacher()),
    }
    make = kit.student if role == "model" else kit.teacher
    names[role] = saved(tmp_path / "broken", make(), change)
    with pytest.raises(ModelError, match=words):
        kit.trainer(tmp_path / "run", **names)
    tried("checkpoint", what, "refused: names the tensors")


def test_named_checkpoints_that_are_whole_hold_the_very_weights(tmp_path: Path) -> None:
    student, teacher = kit.student(3), kit.teacher(4)
    made = kit.trainer(
        tmp_path / "run",
        model=saved(tmp_path / "student", student),
        teacher_model=saved(tmp_path / "teacher", teacher),
        processing_class=None,
    )
    for mine, theirs in ((made.unwrapped_student, student), (made.unwrapped_teacher, teacher)):
        assert mine.dtype == theirs.dtype == torch.float32
        assert all(torch.equal(value, mine.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert made.processing_class.padding_side == "left" and made.args.model_init_kwargs is None


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    model = kit.student()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    kit.trainer(tmp_path / "run", model=saved(tmp_path / "student", model))


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_that_a_file_has_beside_tied_embeddings_stays_one_in_what_is_saved(
    tmp_path: Path, trained: bool, caplog: pytest.LogCaptureFixture
) -> None:
    head = torch.rand(kit.student().lm_head.weight.shape)
    folder = Path(saved(tmp_path / "student", kit.student(), lambda w: {**w, "lm_head.weight": head} if trained else w))
    if not trained:  # one matrix, twice
        weights = load_file(folder / "model.safetensors")
        same = weights["model.embed_tokens.weight"].clone()
        save_file({**weights, "lm_head.weight": same}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    load(str(folder), dtype=torch.float32).save_pretrained(tmp_path / "again")
    kept = load_file(tmp_path / "again" / "model.safetensors")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is not trained
    assert ("different matrices" in caplog.text) is trained
    assert not trained or torch.equal(kept["lm_head.weight"], head)


def test_evaluation_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "broken", kit.student(), BROKEN["one tensor missing"][0])
    assert main(["eval", path, "--task", "dag", "--prompts", "2"]) == 2
    assert NAME in capsys.readouterr().err


@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "gemma3", "paligemma", "internvl"])
def test_a_resumed_run_reads_image_families_that_name_tensors_otherwise_in_files(name: str, tmp_path: Path) -> None:
    processor = vision_kit.processor(name)
    model, other = (vision_kit.model(name, processor, seed=seed) for seed in (0, 1))
    model.save_pretrained(tmp_path)
    expected = model.state_dict()
    assert not expected.keys() <= load_file(tmp_path / "model.safetensors").keys()
    read_weights(str(tmp_path), other)
    assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())
    tried("checkpoint", f"a run of {name}, resumed", "exact: every weight is the checkpoint's")


UNFIT: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "whole numbers": (lambda w: {**w, NAME: (w[NAME] * 100).int()}, f"whole numbers or truth values.*{NAME}"),
    "truth values": (lambda w: {name: value > 0 for name, value in w.items()}, "whole numbers or truth values"),
    "NaN in one row of the embeddings": (
        lambda w: {name: _with_nan(value) if "embed" in name else value for name, value in w.items()},
        "not finite .* in 1 tensors .model.embed_tokens.weight",
    ),
    "infinity in one weight": (lambda w: {**w, NAME: _with_nan(w[NAME], float("inf"))}, f"not finite.*{NAME}"),
}


def _with_nan(value: torch.Tensor, what: float = float("nan")) -> torch.Tensor:
    changed = value.clone()
    changed[5, 3] = what
    return changed


@pytest.mark.parametrize("what", UNFIT)
def test_weights_that_nobody_trained_are_read_by_no_command(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = UNFIT[what]
    broken = saved(tmp_path / "broken", kit.student(), change)
    with pytest.raises(ModelError, match=words):
        load(broken)
    assert main(["eval", broken, "--task", "dag", "--prompts", "2"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    tried("checkpoint", what, "refused: names the tensors")


@pytest.mark.parametrize("what", ["whole numbers", "NaN"])
def test_weights_of_an_adapter_that_nobody_trained_are_not_read(tmp_path: Path, what: str) -> None:
    folder = _adapter(tmp_path)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name].int() if what == "whole numbers" else weights[name] * float("nan")}, file)
    with pytest.raises(ModelError, match=what if what == "whole numbers" else "not finite"):
        load(str(folder))


def _adapter(tmp_path: Path) -> Path:
    base = saved(tmp_path / "base", kit.student())
    get_peft_model(kit.student(), kit.lora()).save_pretrained(tmp_path / "adapter")
    _change(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=base)
    return tmp_path / "adapter"


def _change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 100_000, "\0", '{"base_model_name_or_path": 3}'])
def test_a_configuration_of_an_adapter_that_is_none_is_one_line(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _adapter(tmp_path)
    (folder / "adapter_config.json").write_text(text)
    assert main(["eval", str(folder), "--task", "dag", "--prompts", "2"]) == 2
    said = capsys.readouterr().err
    assert "adapter_config.json" in said and "Traceback" not in said


def test_adapters_that_are_one_another_s_base_are_refused(tmp_path: Path) -> None:
    folder = _adapter(tmp_path)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    _change(folder / "adapter_config.json", base_model_name_or_path=str(other))
    _change(other / "adapter_config.json", base_model_name_or_path=str(folder))
    with pytest.raises(ModelError, match="its base is, in the end, itself"):
        load(str(folder))


def test_an_adapter_on_another_base_than_its_run_s_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, other = _adapter(tmp_path), saved(tmp_path / "other", kit.student(5))
    (folder / "config.yaml").write_text(f"model_name_or_path: {tmp_path / 'base'}\n")
    load(str(folder))
    assert "is put on" not in caplog.text
    _change(folder / "adapter_config.json", base_model_name_or_path=other)
    load(str(folder))
    assert f"is put on {other!r}" in caplog.text and f"was trained on {str(tmp_path / 'base')!r}" in caplog.text


def test_weights_that_are_all_zero_are_called_so(tmp_path: Path) -> None:
    folder = saved(tmp_path / "zero", kit.student(), lambda w: {n: torch.zeros_like(v) for n, v in w.items()})
    with pytest.raises(ModelError, match="holds nothing but zeros"):
        load(folder)
    zero = kit.student()
    zero.load_state_dict({name: torch.zeros_like(value) for name, value in zero.state_dict().items()})
    with pytest.raises(ModelError, match="are zero everywhere"):
        kit.trainer(tmp_path / "run", model=zero)


def test_a_checkpoint_packed_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "packed", kit.student())
    _change(Path(folder) / "config.json", quantization_config={"quant_method": "mine", "bits": 4})
    with pytest.raises(ModelError, match=r"quant_method \(='mine'\) must be one of .*awq"):
        kit.trainer(tmp_path / "run", model=folder)


@pytest.mark.parametrize("role", ["model", "teacher_model"])
@pytest.mark.parametrize("method", ["gptq", "hqq", "spqr", "torchao"])
def test_a_checkpoint_that_cannot_be_unpacked_here_is_told_with_its_role_and_a_way_out(
    tmp_path: Path, method: str, role: str
) -> None:
    folder = saved(tmp_path / "packed", kit.student())
    _change(Path(folder) / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=rf"{role} \(='.*packed'\).*quant_method='{method}'.*the same model unpacked"):
        kit.trainer(tmp_path / "run", **{role: folder})


@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_that_bitsandbytes_has_packed_teaches_and_does_not_train(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="packed weights need bitsandbytes: pip install 'dopd[quantized]'")
    plain, packed = saved(tmp_path / "plain", kit.teacher()), str(tmp_path / "packed")
    asked = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=asked).save_pretrained(packed)
    kit.TOKENIZER.save_pretrained(packed)
    kit.trainer(tmp_path / "run", teacher_model=packed).train()
    with pytest.raises(ConfigError, match=f"quant_method='bitsandbytes_{bits}bit'.*cannot train: set use_peft=true"):
        kit.trainer(tmp_path / "other", model=packed)


@pytest.mark.parametrize("role", ["model", "teacher_model"])
@pytest.mark.parametrize(
    ("what", "value"), [("num_hidden_layers", "3"), ("rms_norm_eps", "x"), ("head_dim", 7), ("weights", None)]
)
def test_a_damaged_checkpoint_is_one_line_that_names_the_role(tmp_path: Path, role: str, what: str, value: Any) -> None:
    folder = saved(tmp_path / "model", kit.student())
    if what == "weights":
        path = tmp_path / "model" / "model.safetensors"
        os.truncate(path, path.stat().st_size - 64)
    else:
        _change(tmp_path / "model" / "config.json", **{what: value})
    with pytest.raises(ModelError, match=role):
        kit.trainer(tmp_path / "run", **{role: folder})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, "2"]}'])
def test_ends_of_a_checkpoint_that_cannot_be_read_are_not_left_out(tmp_path: Path, text: str) -> None:
    folder = saved(tmp_path / "model", kit.student())
    (tmp_path / "model" / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors", "config.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "model", kit.student())
    (tmp_path / "model" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "model" / name)
    with pytest.raises(ModelError, match="is a pipe or a device"):
        load(folder)
