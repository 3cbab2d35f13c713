"""Images of a dataset: every kind and PIL mode, broken ones by row and column, prompts with places for them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trainer_kit
import vision_kit as kit
from compatibility import tried
from datasets import Dataset
from PIL import Image

from dopd.data.encode import PromptLengths, encode_prompts
from dopd.data.images import blank_like, image_key, image_size, open_image
from dopd.data.views import (
    Conversation,
    PrivilegedTemplate,
    lacks_privileged,
    plain_prompt,
    privileged_prompt,
    with_blank_images,
)
from dopd.errors import DataError, ModelError
from dopd.inspection.pictures import pictures_of

MODES = [
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "La",
    "RGBa",
    "RGBX",
    "I;16",
]


def in_mode(mode: str) -> Image.Image:
    """A picture whose left half is dark and whose right half is bright."""
    grey = np.zeros((4, 8), dtype=np.uint8)
    grey[:, 4:] = 255
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    picture = Image.fromarray(grey)
    steps = {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "PA": ("RGBA", "PA"), "HSV": ("RGB", "HSV")}
    for step in steps.get(mode, (mode,)):
        picture = _lab(picture) if step == "LAB" else picture.convert(step)
    assert picture.mode == mode
    return picture


def _lab(picture: Image.Image) -> Image.Image:
    from PIL import ImageCms

    rgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(picture.convert("RGB"), ImageCms.buildTransform(rgb, lab, "RGB", "LAB"))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_with_dark_dark_and_bright_bright(mode: str) -> None:
    opened = open_image(in_mode(mode))
    assert opened.mode == "RGB" and opened.size == (8, 4)
    pixels = np.asarray(opened).astype(int)
    assert pixels[:, :3].max() < 16 and pixels[:, 5:].min() > 239


def test_what_is_transparent_becomes_white_whatever_colour_is_behind_it() -> None:
    black = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 0
    for picture in (black, black.convert("LA"), palette):
        assert np.asarray(open_image(picture)).min() == 255


def test_wide_pixels_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(open_image(Image.fromarray(values)))[0, :, 0].tolist() == [0, 128, 255]


def test_every_kind_of_source_gives_the_same_pixels_and_size(tmp_path: Path) -> None:
    picture = kit.picture(3, width=8, height=6)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(buffer.getvalue())
    sources: list[Any] = [
        picture,
        str(path),
        path,
        buffer.getvalue(),
        {"bytes": buffer.getvalue(), "path": None},
        {"bytes": None, "path": str(path)},
        np.asarray(picture),
    ]
    for source in sources:
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(picture))
        assert image_size(source) == (8, 6)
        assert image_key(source) == image_key(source) != image_key(kit.picture(4, width=8, height=6))


def test_a_picture_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    buffer = io.BytesIO()
    kit.picture(0, width=8, height=6).save(buffer, "JPEG", exif=exif)
    assert open_image(buffer.getvalue()).size == image_size(buffer.getvalue()) == (6, 8)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.png", "'nowhere.png' cannot be read as an image: FileNotFoundError"),
        (b"no picture", "10 bytes cannot be read as an image: UnidentifiedImageError"),
        (7, "a int is no image: expected a PIL image, a path, bytes"),
        (np.full((2, 2, 3), 0.5), "whole numbers from 0 to 255"),
        ({"bytes": None, "path": None}, "is no image"),
    ],
)
def test_what_cannot_be_read_is_named(source: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_image(source)


def test_a_truncated_file_is_an_error_and_not_half_a_picture() -> None:
    buffer = io.BytesIO()
    kit.picture(0, width=64, height=64).save(buffer, "PNG")
    with pytest.raises(DataError, match="cannot be read as an image"):
        open_image(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def test_a_blank_picture_has_the_size_and_nothing_else() -> None:
    blank = blank_like(kit.picture(0, width=8, height=6))
    assert blank.size == (8, 6) and len(np.unique(np.asarray(blank))) == 1
    prompt = with_blank_images(kit.user("how many ?", kit.picture(0, width=8, height=6)))
    assert prompt[0]["content"][0]["image"].size == (8, 6) and prompt[0]["content"][1]["text"] == "how many ?"


# --- Prompts


def images_in(prompt: Any) -> list[Any]:
    blocks = [block for message in prompt for block in message["content"] if not isinstance(message["content"], str)]
    return [block.get("image") for block in blocks if block["type"] == "image"]


def test_images_come_first_or_where_the_conversation_has_places() -> None:
    one, two = kit.picture(0), kit.picture(1)
    text = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    prompt = plain_prompt({"prompt": text, "images": [one, two]})
    assert images_in(prompt[1:]) == [one, two] and prompt[1]["content"][2]["text"] == "q"
    # As a dataset gives it back: every block with every field.
    blocks = [
        {"type": "text", "text": "a", "image": None},
        {"type": "image", "text": None, "image": None},
        {"type": "text", "text": "b", "image": None},
    ]
    placed = plain_prompt({"prompt": [{"role": "user", "content": blocks}], "image": one})
    assert [block["type"] for block in placed[0]["content"]] == ["text", "image", "text"] and images_in(placed) == [one]
    assert plain_prompt({"prompt": text, "images": []}) is text
    assert plain_prompt({"prompt": text, "images": None, "image": None}) is text
    with pytest.raises(DataError, match="1 image blocks without an image and the row has 2 images"):
        plain_prompt({"prompt": [{"role": "user", "content": blocks}], "images": [one, two]})
    with pytest.raises(DataError, match="the row has 1 images and its conversation holds its own"):
        plain_prompt({"prompt": kit.user("q", one), "images": [two]})
    assert images_in(plain_prompt({"prompt": kit.user("q", one), "images": []})) == [one]
    assert images_in(plain_prompt({"prompt": text, "images": [], "image": one})[1:]) == [one]
    with pytest.raises(DataError, match="images need a conversation"):
        plain_prompt({"prompt": "q", "images": [one]})


def test_privileged_images_stand_behind_the_plain_ones_and_before_the_text() -> None:
    row = {"prompt": [{"role": "user", "content": "q"}], "images": ["a.png"], "privileged_images": ["crop.png"]}
    assert images_in(privileged_prompt(row, PrivilegedTemplate())) == ["a.png", "crop.png"]
    assert not lacks_privileged(row)
    both = privileged_prompt({**row, "privileged_context": "box"}, PrivilegedTemplate("{prompt} {privileged_context}"))
    assert images_in(both) == ["a.png", "crop.png"] and both[0]["content"][-1]["text"] == "q box"
    assert images_in(plain_prompt(row)) == ["a.png"]
    assert lacks_privileged({**row, "privileged_images": None, "privileged_context": " "})


@pytest.mark.parametrize("name", list(kit.FAMILIES))
def test_lengths_are_those_of_the_encoded_prompts(name: str) -> None:
    processor = kit.processor(name)
    prompts = [
        kit.user("how many red ?", kit.picture(0)),
        kit.user("how ?", kit.picture(1, width=64, height=40)),
        kit.user("how many red circle ?", kit.picture(2, width=64, height=40), kit.picture(3)),
        kit.user("red ?", kit.picture(4), kit.picture(5, width=64, height=40)),
        kit.user("red red red ?", kit.picture(6)),
    ]
    if not kit.family(name).needs_image:
        prompts.append([{"role": "user", "content": "no image"}])
    expected = [len(ids) for ids in encode_prompts(processor, prompts, {})]
    assert PromptLengths(processor, {})(prompts) == expected


# --- Datasets


def dataset(**broken: Any) -> Dataset:
    rows = kit.rows()
    for row in rows:
        row["images"] = [_png(row["images"][0])]
    rows[2].update(broken)
    return Dataset.from_list(rows)


def _png(picture: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_a_broken_image_is_named_by_row_and_column_and_left_out_only_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = dataset(images=[{"bytes": b"broken", "path": None}])
    with pytest.raises(DataError, match=r"row 2, column 'images', image 0: 6 bytes .*skip_broken_images=True"):
        kit.trainer("qwen3_vl", tmp_path, train_dataset=rows)
    made = kit.trainer("qwen3_vl", tmp_path, train_dataset=rows, skip_broken_images=True)
    assert len(made.train_dataset) == 3
    assert (
        "1 rows were dropped because an image of theirs cannot be read; the first: row 2, column 'images'"
        in caplog.text
    )


def test_a_broken_image_of_a_decoding_column_is_named_too(tmp_path: Path) -> None:
    from datasets import Image as ImageFeature
    from datasets import List

    rows = dataset(images=[{"bytes": b"broken", "path": None}]).cast_column("images", List(ImageFeature()))
    with pytest.raises(DataError, match="row 2, column 'images', image 0"):
        kit.trainer("qwen3_vl", tmp_path, train_dataset=rows)


def test_a_prompt_that_is_too_long_with_its_image_is_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = kit.rows()
    rows[1]["images"] = [kit.picture(1, width=64, height=64)]
    options = {"train_dataset": Dataset.from_list(rows), "max_prompt_length": 20}
    with pytest.raises(DataError, match="row 1: a view of the prompt has"):
        kit.trainer("qwen3_vl", tmp_path, "vanilla", **options)
    made = kit.trainer("qwen3_vl", tmp_path, "vanilla", **options, overlong_prompts="drop")
    assert len(made.train_dataset) == 3 and "1 prompts were dropped" in caplog.text


@pytest.mark.parametrize("column", ["prompt", "privileged_context"])
@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_a_placeholder_written_in_a_text_is_refused(column: str, token: str, tmp_path: Path) -> None:
    rows = kit.rows()
    rows[3][column] = f"{token} red" if column != "prompt" else [{"role": "user", "content": f"{token} red ?"}]
    with pytest.raises(DataError, match=r"row 3: .* stands for an image"):
        kit.trainer("qwen3_vl", tmp_path, train_dataset=Dataset.from_list(rows))


def test_a_video_and_images_for_a_text_model_are_refused(tmp_path: Path) -> None:
    import trainer_kit

    rows = kit.rows()
    rows[0]["prompt"] = [{"role": "user", "content": [{"type": "video", "text": "x"}, {"type": "text", "text": "?"}]}]
    for row in rows[1:]:
        row["prompt"] = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    rows[0]["images"] = []
    with pytest.raises(DataError, match="a block of type 'video'"):
        kit.trainer("qwen3_vl", tmp_path, train_dataset=Dataset.from_list(rows[:1] * 4))
    with pytest.raises(DataError, match="row 0: it has images, but the model reads text only"):
        trainer_kit.trainer(tmp_path, train_dataset=Dataset.from_list(kit.rows()))


def test_a_dataset_of_text_alone_trains_a_vision_language_model(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "images"} for row in kit.rows()]
    made = kit.trainer("qwen3_vl", tmp_path, train_dataset=Dataset.from_list(rows))
    made.train()
    assert made.state.global_step == 2


def test_a_text_prompt_with_a_picture_is_trained_as_the_users_turn_that_it_is(tmp_path: Path) -> None:
    turns = kit.rows()
    texts = [{**row, "prompt": row["prompt"][0]["content"]} for row in turns]
    losses = []
    for kind, rows in (("texts", texts), ("turns", turns)):
        made = kit.trainer("qwen3_vl", tmp_path / kind, train_dataset=Dataset.from_list(rows), max_steps=1)
        made.train()
        losses.append([record["loss"] for record in made.state.log_history if "loss" in record])
    assert len(losses[0]) == 1 and losses[0] == losses[1]


def test_a_vision_language_model_with_its_tokenizer_draws_no_placeholders(tmp_path: Path) -> None:
    processor = kit.processor("llava")
    models = [kit.model("llava", processor, seed=seed) for seed in (0, 1)]
    rows = Dataset.from_list([{key: value for key, value in row.items() if key != "images"} for row in kit.rows()])
    options = {"train_dataset": rows, "max_completion_length": 20}
    sides = {"model": models[0], "teacher_model": models[1], "processing_class": processor.tokenizer}
    made = kit.trainer("llava", tmp_path, **sides, **options)
    batch = trainer_kit.answered(made, [made.train_dataset[n] for n in range(4)] * 4)
    assert not bool((batch["completion_ids"] == models[0].config.image_token_id).any())


def test_a_model_that_needs_the_types_of_its_processor_is_not_trained_with_a_tokenizer(tmp_path: Path) -> None:
    made = kit.processor("paligemma")
    rows = [{"prompt": kit.user("how many ?"), "privileged_context": "red circle"} for _ in range(4)]
    with pytest.raises(ModelError, match=r"processing_class is a tokenizer.*pass its processor"):
        kit.DOPDTrainer(
            model=kit.model("paligemma", made),
            teacher_model=kit.model("paligemma", made, 32, seed=1),
            args=kit.DOPDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_completion_length=6),
            train_dataset=Dataset.from_list(rows),
            processing_class=made.tokenizer,
        )
    tried("image family", "paligemma with its tokenizer alone", "refused: says to pass the processor")


def test_a_template_of_the_tokenizer_alone_is_the_processors_and_a_base_model_needs_none(tmp_path: Path) -> None:
    losses = []
    for place in ("processor", "tokenizer"):
        processor = kit.processor("qwen3_vl")
        (processor if place == "tokenizer" else processor.tokenizer).chat_template = None
        made = kit.trainer("qwen3_vl", tmp_path / place, processing_class=processor, seed=5, max_steps=1)
        made.train()
        losses += [record["loss"] for record in made.state.log_history if "loss" in record]
    assert len(losses) == 2 and losses[0] == losses[1]
    processor.tokenizer.chat_template = None
    rows = Dataset.from_list([{"prompt": "how many ?", "privileged_context": "red"}] * 4)
    options = {"processing_class": processor, "train_dataset": rows, "max_steps": 1}
    made = kit.trainer("qwen3_vl", tmp_path / "base", **options)
    made.train()
    assert made.state.global_step == 1


def test_settings_of_the_processor_reach_every_row_and_come_back_as_they_were() -> None:
    """Of the run, and of one row alone; 64 x 64 pixels are 16 tokens, and 1,024 pixels are 4."""
    processor = kit.processor("qwen3_vl")
    few = {"processor_kwargs": {"size": {"shortest_edge": 256, "longest_edge": 1024}}}
    prompt = kit.user("how ?", kit.picture(0, 64, 64))
    (whole,), (fewer,) = (encode_prompts(processor, [prompt], options) for options in ({}, few))
    assert len(whole) - len(fewer) == 12 and few == {
        "processor_kwargs": {"size": {"shortest_edge": 256, "longest_edge": 1024}}
    }
    of_row = Conversation(prompt, few)
    assert encode_prompts(processor, [prompt, of_row], {}) == [whole, fewer]
    assert PromptLengths(processor, {})([prompt, of_row]) == [len(whole), len(fewer)]
    assert PromptLengths(processor, few)([prompt]) == [len(fewer)]


# --- Traces


def test_a_trace_keeps_small_pictures_and_boxes_as_fractions() -> None:
    row = {
        "prompt": [{"role": "user", "content": "q"}],
        "images": [kit.picture(0, width=40, height=20)],
        "boxes": [
            {"image": 0, "label": "red", "xyxy": [4, 5, 20, 20]},
            {"image": 0, "label": "all", "xyxy": [0, 0, 1, 1]},
            {"image": 3, "label": "of no picture", "xyxy": [1, 2, 3, 4]},
        ],
    }
    kept = pictures_of(row)
    assert kept["images"][0].startswith("data:image/jpeg;base64,")
    assert kept["boxes"] == [
        {"image": 0, "label": "red", "xyxy": [0.1, 0.25, 0.5, 1.0]},
        {"image": 0, "label": "all", "xyxy": [0.0, 0.0, 1.0, 1.0]},
    ]
    assert pictures_of({"prompt": "q"}) == {}
    assert len(pictures_of({**row, "privileged_images": [kit.picture(1)]})["images"]) == 2
