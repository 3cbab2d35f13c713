"""Processors without torchvision: made, saved and read again; what cannot work says so."""

import importlib.metadata
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vision_kit as kit
from compatibility import tried
from transformers import (
    LlavaProcessor,
    MiniCPMV4_6ImageProcessorPil,
    Qwen3VLProcessor,
    SmolVLMProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from vision_families import tokenizer_of

from dopd.data.encode import encode_prompts
from dopd.errors import ModelError
from dopd.trainer import DOPDConfig, images
from dopd.trainer.images import processor_for
from dopd.vision import image_only, load_processor
from dopd.vision.processors import torchvision_works

PROMPTS = [kit.user("how many red ?", kit.picture(0))]
without_torchvision = pytest.mark.skipif(
    any(True for d in importlib.metadata.distributions(name="torchvision")), reason="torchvision is installed"
)


def test_only_the_video_processor_goes_and_every_other_argument_keeps_its_name() -> None:
    for base in (Qwen3VLProcessor, SmolVLMProcessor):
        mine = list(inspect.signature(image_only(base).__init__).parameters)
        assert mine == [name for name in inspect.signature(base.__init__).parameters if name != "video_processor"]
        assert image_only(base) is image_only(base) and issubclass(image_only(base), base)
    idefics = type(kit.processor("idefics3"))
    assert image_only(idefics) is idefics


def with_videos() -> list[type]:
    """Every processor class of transformers that has a video processor."""
    names = {
        name for kinds in PROCESSOR_MAPPING_NAMES.values() for name in ([kinds] if isinstance(kinds, str) else kinds)
    }
    classes = [processor_class_from_name(name) for name in sorted(filter(None, names))]
    return [kind for kind in classes if "video_processor" in inspect.signature(kind.__init__).parameters]


# What one family or another asks its tokenizer for.
TOKENS = ["image", "video", "audio", "boi", "eoi", "boa", "eoa", "start_image", "end_image", "context_image"]
TOKENS += [f"{what}_{end}" for what in ("image", "video", "slice", "image_id") for end in ("start", "end")]
TOKENS += [f"{what}_{end}" for what in ("vision", "audio") for end in ("bos", "eos")]


@without_torchvision
def test_every_processor_of_transformers_with_videos_is_made_saved_and_read_again_or_refused(tmp_path: Path) -> None:
    named = {f"{token}_token": f"<{token}>" for token in TOKENS}
    made, refused = [], []
    for base in with_videos():
        name, arguments = base.__name__, inspect.signature(base.__init__).parameters
        if not {"image_processor", "tokenizer"} <= arguments.keys():
            with pytest.raises(ModelError, match=f"{name} reads no prompts with images"):
                image_only(base)
            refused.append(name)
            continue
        family = replace(kit.family("qwen3_vl"), special=tuple(named.values()), named=named)
        images = MiniCPMV4_6ImageProcessorPil() if "MiniCPM" in name else kit.processor("qwen3_vl").image_processor
        parts = {"image_processor": images, "tokenizer": tokenizer_of(family)}
        if "feature_extractor" in arguments:
            parts["feature_extractor"] = WhisperFeatureExtractor()
        processor = image_only(base)(**parts)
        assert all(getattr(processor, part) is value for part, value in parts.items()), name
        with pytest.raises(ModelError, match="videos need torchvision"):
            processor.video_processor(videos=[])
        processor.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "processor_config.json").read_text())["processor_class"] == name
        again = load_processor(str(tmp_path / name))
        assert type(again) is image_only(base) and again.to_dict() == processor.to_dict()
        made.append(name)
    assert {"Qwen3VLProcessor", "Gemma4Processor", "LlavaNextVideoProcessor", "PerceptionLMProcessor"} <= set(made)
    assert {"VideoLlavaProcessor", "MiniCPMV4_6Processor", "Qwen2_5OmniProcessor"} <= set(made)
    assert "InstructBlipVideoProcessor" in refused
    tried("image family", "every processor class with a video processor", "made, saved and read again without it")


@without_torchvision
@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_a_processor_is_of_the_class_that_its_checkpoint_names(file: str, tmp_path: Path) -> None:
    made = kit.processor("llava_next")
    kit.model("llava", made).save_pretrained(tmp_path)  # whose config alone would give a LlavaProcessor
    made.save_pretrained(tmp_path)
    made.image_processor.save_pretrained(tmp_path)  # preprocessor_config.json, where older checkpoints keep it

    def name_in(place: str, value: str | None) -> None:
        path = tmp_path / place
        values = json.loads(path.read_text()) if path.exists() else {}
        values.pop("processor_class", None)
        path.write_text(json.dumps(values | ({"processor_class": value} if value else {})))

    for place in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        name_in(place, "LlavaNextProcessor" if place == file else None)
    again = load_processor(str(tmp_path))
    assert type(again) is type(made)
    assert encode_prompts(again, PROMPTS, {}) == encode_prompts(made, PROMPTS, {})
    name_in(file, "PixtralProcessor")
    with pytest.raises(ModelError, match=r"PixtralProcessor reads images with torchvision only\. pip install"):
        load_processor(str(tmp_path))
    name_in(file, "LaterProcessor")
    with pytest.raises(ModelError, match=r"names 'LaterProcessor' .* which transformers \S+ does not have"):
        load_processor(str(tmp_path))
    name_in(file, None)
    assert type(load_processor(str(tmp_path))) is LlavaProcessor
    tried("checkpoint", f"processor_class in {file}", "used; refused by name where the class needs torchvision")


@without_torchvision
def test_a_folder_without_a_processor_says_so(tmp_path: Path) -> None:
    kit.model("llava", kit.processor("llava")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be made: .*processor\.save_pretrained\(folder\)"):
        load_processor(str(tmp_path))


@without_torchvision
@pytest.mark.parametrize("name", [name for name in kit.FAMILIES if kit.family(name).reloads])
def test_a_saved_processor_comes_back_with_all_its_settings(name: str, tmp_path: Path) -> None:
    made = kit.processor(name)
    kit.model(name, made).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    again = load_processor(str(tmp_path))
    assert encode_prompts(again, PROMPTS, {}) == encode_prompts(made, PROMPTS, {})
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    # The name of the original class, so that the checkpoint opens where torchvision is installed.
    assert saved["processor_class"] == made.__class__.__name__.removeprefix("image_only")
    assert not saved["processor_class"].endswith("ImageOnly")


@without_torchvision
def test_what_a_checkpoint_says_of_videos_is_kept(tmp_path: Path) -> None:
    made = kit.processor("qwen3_vl")
    kit.model("qwen3_vl", made).save_pretrained(tmp_path / "hub")
    made.save_pretrained(tmp_path / "hub")
    section = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 3}
    (tmp_path / "hub" / "video_preprocessor_config.json").write_text(json.dumps(section))
    config = tmp_path / "hub" / "processor_config.json"
    values = json.loads(config.read_text())
    assert values.pop("video_processor") == {"video_processor_type": "Qwen3VLVideoProcessor"}
    config.write_text(json.dumps(values))
    load_processor(str(tmp_path / "hub")).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text())["video_processor"] == section


def test_reading_a_video_says_what_it_needs() -> None:
    with pytest.raises(ModelError, match="videos need torchvision"):
        kit.processor("qwen3_vl").video_processor(videos=[])


@without_torchvision
def test_a_family_that_needs_torchvision_says_so_with_the_install(tmp_path: Path) -> None:
    config = {"model_type": "lfm2_vl", "text_config": {"model_type": "lfm2"}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kit.processor("llava").tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Lfm2VlImageProcessor"}))
    with pytest.raises(ModelError, match=r"with torchvision only\. pip install torchvision"):
        load_processor(str(tmp_path))


def test_a_torchvision_that_is_there_and_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def broken(name: str, package: Any = None) -> Any:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, package)

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.28.0")
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModelError, match=r"torchvision 0.28.0 is installed but cannot be imported .*pip uninstall"):
        torchvision_works()


def test_a_missing_package_of_one_family_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = kit.processor("smolvlm")
    kit.model("smolvlm", made).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    monkeypatch.setattr(sys.modules[SmolVLMProcessor.__module__], "num2words", None)
    with pytest.raises(ModelError, match=r"needs num2words: pip install 'dopd\[vision\]'"):
        load_processor(str(tmp_path))


def test_the_trainer_finds_the_processor_of_a_model_that_came_without(tmp_path: Path) -> None:
    made = kit.processor("qwen3_vl")
    model = kit.model("qwen3_vl", made)
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    found = processor_for(str(tmp_path), None)
    assert encode_prompts(found, PROMPTS, {}) == encode_prompts(made, PROMPTS, {})
    assert processor_for(model, made) is made
    assert type(processor_for(type(model).from_pretrained(tmp_path), None)) is type(made)


def test_files_of_a_revision_and_code_of_a_checkpoint_are_asked_for_as_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = kit.processor("qwen3_vl")
    kit.model("qwen3_vl", made).save_pretrained(tmp_path / "model")
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        images, "load_processor", lambda path, **options: asked.append({"path": path, **options}) or made
    )
    options = {"trust_remote_code": True, "model_init_kwargs": {"revision": "v2"}, "teacher_model_revision": "v3"}
    args = DOPDConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    processor_for(str(tmp_path / "model"), None, **images.where_from(args))
    (student,) = asked
    assert (student["revision"], student["trust_remote_code"]) == ("v2", True)
    assert images.where_from(args, teacher=True) == {"revision": "v3", "trust_remote_code": True}
    assert images.where_from(DOPDConfig(str(tmp_path), use_cpu=True, bf16=False)) == {}
