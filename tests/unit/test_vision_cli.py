"""A vision-language run from a config file: pictures in files, a run folder like that of a text run, inspection."""

import json
from pathlib import Path
from typing import Any

import pytest
import vision_kit as kit
import yaml
from transformers import AutoModelForImageTextToText

from dopd.cli.main import main
from dopd.runs.settings import load_settings
from dopd.runs.train import peft_config_of
from dopd.vision import load_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vision")
    processor = kit.processor("qwen3_vl")
    for name, hidden, seed in (("student", 24, 0), ("teacher", 36, 1)):
        kit.model("qwen3_vl", processor, hidden, seed).save_pretrained(place / name)
        processor.save_pretrained(place / name)
    with (place / "train.jsonl").open("w") as file:
        for number, row in enumerate(kit.rows(8)):
            path = place / f"{number}.png"
            kit.picture(number, width=64, height=32).save(path)
            boxes = [{"image": 0, "label": "red circle", "xyxy": [16, 8, 32, 32]}]
            file.write(json.dumps({**row, "images": [str(path)], "boxes": boxes}) + "\n")
    return place


def settings(folder: Path, **more: Any) -> str:
    values = {
        "model_name_or_path": str(folder / "student"),
        "teacher_model_name_or_path": str(folder / "teacher"),
        "dataset_name": str(folder / "train.jsonl"),
        "dataset_test_split": "train",
        "verifier": "exact",
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 5,
        "trace_steps": 1,
        "trace_probes": 1,
        "student_eval_steps": 1,
        "student_eval_prompts": 4,
        "final_eval_prompts": 4,
        "overwrite": True,
        "save_strategy": "no",
        "report_to": "none",
        **more,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_a_run_leaves_a_student_a_report_with_pictures_and_the_blank_control(folder: Path) -> None:
    assert main(["train", settings(folder)]) == 0
    run = folder / "run"
    result = json.loads((run / "result.json").read_text())
    assert {"accuracy_greedy", "accuracy_blank", "accuracy_privileged"} <= result["metrics"].keys()
    traces = [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]
    assert {trace["kind"] for trace in traces} == {"batch", "probe"}
    for trace in traces:
        assert trace["images"][0].startswith("data:image/jpeg;base64,")
        assert trace["boxes"] == [{"image": 0, "label": "red circle", "xyxy": [0.25, 0.25, 0.5, 1.0]}]
    page = (run / "report.html").read_text()
    assert "data:image/jpeg" in page and "greedy, grey images" in page and "red circle" in page
    # The folder is a checkpoint: model and processor.
    AutoModelForImageTextToText.from_pretrained(run)
    assert load_processor(str(run)).image_processor.patch_size == kit.PATCH


def test_inspect_looks_at_a_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--student", str(folder / "student"), "--teacher", str(folder / "teacher")]
    asked = ["--prompt", "how many red ?", "--privileged", "box 1 2", "--max-new-tokens", "4", "--json"]
    records = []
    for picture in ("0.png", "1.png"):
        main(["inspect", *names, *asked, "--image", str(folder / picture), "--privileged-image", str(folder / "2.png")])
        records.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert records[0]["prompt_key"] != records[1]["prompt_key"]
    assert all(len(record["images"]) == 2 for record in records)  # that of the prompt, and that of p
    assert records[0]["tokens"] != records[1]["tokens"]


def test_what_is_wrong_with_an_image_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[5]["images"] = [str(folder / "nothing.png")]
    broken = folder / "broken.jsonl"
    broken.write_text("\n".join(map(json.dumps, rows)))
    assert main(["train", settings(folder, dataset_name=str(broken), output_dir=str(folder / "other"))]) == 2
    error = capsys.readouterr().err
    assert "row 5, column 'images', image 0" in error and "skip_broken_images=True" in error
    assert not (folder / "other").exists()


def test_a_model_that_reads_no_prompt_without_a_picture_is_not_blamed_for_its_padding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = kit.processor("paligemma")
    kit.model("paligemma", processor).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    kit.picture(0).save(tmp_path / "0.png")
    asked = ["--student", str(tmp_path), "--teacher", str(tmp_path), "--prompt", "how ?", "--max-new-tokens", "2"]
    assert main(["inspect", *asked]) == 2
    assert "PaliGemmaProcessor cannot read the prompt with its 0 images" in capsys.readouterr().err
    assert main(["inspect", *asked, "--image", str(tmp_path / "0.png")]) == 0


def test_a_teacher_of_another_vocabulary_is_refused_where_nothing_is_trained_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = kit.processor("llava")
    kit.model("llava", processor).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    asked = ["--student", str(folder / "student"), "--teacher", str(tmp_path), "--prompt", "how ?"]
    assert main(["inspect", *asked]) == 2
    assert "Token-level distillation needs one vocabulary" in capsys.readouterr().err


def test_lora_without_target_modules_takes_those_that_peft_knows(folder: Path) -> None:
    made = peft_config_of(load_settings(settings(folder), use_peft="true"))
    assert made is not None and made.target_modules is None
