"""Where pictures are looked for: columns, blocks, every way to write one; what is not read is said."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import trainer_kit
import vision_kit as kit
from compatibility import tried
from datasets import Dataset, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from dopd.data.encode import encode_prompts, image_sources
from dopd.data.images import image_key, image_size, open_image, unread_columns
from dopd.data.views import PrivilegedTemplate, images_of, plain_prompt, privileged_prompt
from dopd.errors import DataError
from dopd.inspection.pictures import pictures_of


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def encoded(picture: Image.Image) -> str:
    return base64.b64encode(png(picture)).decode()


PICTURE = kit.picture(3, width=8, height=6)
TEXT = encoded(PICTURE)
WRITTEN = {
    "data URI": f"data:image/png;base64,{TEXT}",
    "data URI without a type": f"data:;base64,{TEXT}",
    "data URI in lines": "data:image/png;base64," + "\n".join(TEXT[n : n + 76] for n in range(0, len(TEXT), 76)),
    "data URI for addresses": "data:image/png;base64," + TEXT.replace("+", "-").replace("/", "_").rstrip("="),
    "data URI in capitals": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    "base64": TEXT,
    "mapping with base64": {"base64": TEXT, "bytes": None},
    "mapping with a data URI": {"url": f"data:image/png;base64,{TEXT}"},
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_picture_written_as_text_is_read_like_its_file(how: str) -> None:
    source = WRITTEN[how]
    assert np.array_equal(np.asarray(open_image(source)), np.asarray(PICTURE))
    assert image_size(source) == (8, 6) and image_key(source) == image_key(png(PICTURE))
    assert pictures_of({"prompt": "?", "images": [source]})["images"][0].startswith("data:image/jpeg;base64,")
    tried("dataset", f"image column: {how}", "exact: the pixels of the file")


LONG = "data:image/png;base64," + base64.b64encode(b"x" * 1_500_000).decode()


@pytest.mark.parametrize(
    "how",
    ["file://PATH", "file://localhost/PATH", "FILE://PATH", "file:PATH", "file://QUOTED", "file://localhostQUOTED"],
)
def test_a_file_is_read_under_every_address_that_means_it(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a picture, 50%20.png"  # a blank is %20 in an address, and a name may hold that, too
    path.write_bytes(png(PICTURE))
    address = how.replace("QUOTED", quote(str(path))).replace("PATH", str(path)).replace("localhost//", "localhost/")
    assert np.array_equal(np.asarray(open_image(address)), np.asarray(PICTURE))
    assert image_size(address) == PICTURE.size and image_key(address) == image_key(str(path))
    tried("dataset", "image column: file://, file://localhost/, %20", "exact: the pixels of the file")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (LONG, r"a data URI \(data:image/png;base64, 2000022 characters\) cannot be read as an image"),
        ({"url": LONG}, r"a data URI \(data:image/png;base64, 2000022 characters\) cannot be read"),
        ("data:image/png;base64,###", r"a data URI .* cannot be read as an image"),
        ("data:image/png;base64", r"a data URI .* holds no data"),
        ("x" * 9000, r"x{100}\.\.\.' \(9000 characters\) cannot be read"),
        (LONG.partition(",")[2], r"\.\.\.' \(2000000 characters\) cannot be read"),
        ("https://a.example/cat.png", "is an address: pictures are not fetched while training. Download it"),
        ({"picture": "a.png"}, "a mapping with 'picture' is no image: expected a PIL image, a path, bytes, base64"),
    ],
)
def test_what_cannot_be_read_is_named_and_never_quoted_whole(source: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        open_image(source)
    assert len(str(caught.value)) < 600


# --- Blocks


def conversation(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    # As a dataset gives it back: every block with every field.
    names = {name: None for block in blocks for name in block} | {"text": None}
    return [{"role": "user", "content": [{**names, **block} for block in (*blocks, {"type": "text", "text": "how ?"})]}]


PICTURES = {
    "image: PIL": {"type": "image", "image": PICTURE},
    "image: bytes and path": {"type": "image", "image": {"bytes": png(PICTURE), "path": None}},
    "path": {"type": "image", "path": "PATH"},
    "url: file": {"type": "image", "url": "file://PATH"},
    "url: data URI": {"type": "image", "url": WRITTEN["data URI"]},
    "base64": {"type": "image", "base64": TEXT},
    "image_url of OpenAI": {"type": "image_url", "image_url": {"url": WRITTEN["data URI"], "detail": "high"}},
    "image_url as text": {"type": "image_url", "image_url": WRITTEN["data URI"]},
}


@pytest.mark.parametrize("how", PICTURES)
def test_an_image_block_is_read_under_every_key_that_transformers_reads(how: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png(PICTURE))
    block = {k: v.replace("PATH", str(path)) if isinstance(v, str) else v for k, v in PICTURES[how].items()}
    prompt = plain_prompt({"prompt": conversation(block), "images": None})
    (source,) = image_sources(prompt)
    assert np.array_equal(np.asarray(open_image(source)), np.asarray(PICTURE))
    processor = kit.processor("qwen3_vl")
    assert encode_prompts(processor, [prompt], {}) == encode_prompts(processor, [kit.user("how ?", PICTURE)], {})
    # A column beside it is not read in its place.
    with pytest.raises(DataError, match="the row has 1 images and its conversation holds its own"):
        plain_prompt({"prompt": conversation(block), "images": [kit.picture(9)]})
    tried("prompt", f"image block, {how}", "exact: the pixels of the file")


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"type": "image", "image": PICTURE, "path": "a.png"}, "'image' and 'path': give one picture to a block"),
        ({"type": "image", "data": TEXT}, "a block of type 'image' holds 'data', which nothing reads"),
        ({"type": "image", "image": PICTURE, "max_pixels": 9}, "'max_pixels', which nothing reads"),
        ({"type": "image", "image_url": "a.png"}, "'image_url', which nothing reads"),
        ({"type": "image_url", "url": "a.png"}, "a block of type 'image_url' holds 'url', which nothing reads"),
        ({"type": "text", "text": "x", "image": PICTURE}, "a block of type 'text' holds 'image'"),
        ({"image": PICTURE}, "holds 'image', which only a block of type 'image' may hold"),
        ({"type": "video", "video": "a.mp4"}, "a block of type 'video'; only text and image can be read"),
        ({"type": "audio", "audio": "a.wav"}, "a block of type 'audio'; only text and image can be read"),
        ({"type": "input_image", "image_url": "a.png"}, "a block of type 'input_image'; only text and image"),
    ],
)
def test_a_block_that_would_be_read_otherwise_than_it_was_meant_is_refused(block: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        plain_prompt({"prompt": conversation(block)})
    with pytest.raises(DataError, match=words):
        encode_prompts(kit.processor("qwen3_vl"), [conversation(block)], {})


def test_an_index_says_which_image_of_the_row_stands_in_a_block() -> None:
    one, two = kit.picture(1), kit.picture(2)

    def placed(*numbers: int | None) -> list[Any]:
        blocks = [{"type": "image", "index": number} for number in numbers]
        return image_sources(plain_prompt({"prompt": conversation(*blocks), "images": [one, two]}))

    assert placed(0, 1) == placed(None, None) == [one, two]
    assert placed(1, 0) == [two, one] and placed(1, 0, 1) == [two, one, two]
    for wrong in ((0, 2), (0, 0), (0, None)):
        with pytest.raises(DataError, match="each image needs a block"):
            placed(*wrong)
    tried("prompt", "image blocks with an index", "used: which image of the row stands there")


def test_traces_show_the_pictures_of_blocks_as_datasets_give_them_back(tmp_path: Path) -> None:
    places = [
        {"type": "image", "image": None, "text": None},
        {"type": "image", "image": WRITTEN["base64"], "text": None},
    ]
    words = {"type": "text", "image": None, "text": "how many red ?"}
    rows = [{**row, "prompt": [{"role": "user", "content": [*places, words]}]} for row in kit.rows()]
    options = {"trace_steps": 1, "trace_probes": 1, "train_dataset": Dataset.from_list(rows)}
    kit.trainer("qwen3_vl", tmp_path, **options).train()
    for line in (tmp_path / "trace.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert len(record["images"]) == 2 and record["prompt"].split() == ["how", "many", "red", "?"]
        assert all(picture.startswith("data:image/jpeg;base64,") for picture in record["images"])


# --- Columns


def test_two_filled_image_columns_are_refused_by_row(tmp_path: Path) -> None:
    rows = kit.rows()
    for n, row in enumerate(rows):
        row["image"] = kit.picture(9) if n == 2 else None
    with pytest.raises(DataError, match=r"row 2: columns 'images' and 'image' both hold pictures"):
        kit.trainer("qwen3_vl", tmp_path, train_dataset=Dataset.from_list(rows))
    tried("dataset", "both 'image' and 'images' filled in a row", "refused: names row and columns")


def test_columns_whose_names_say_pictures_and_that_nothing_reads_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["img", "picture", "image_path", "pixel_values", "privileged_image", "video", "audio", "frames"]
    names += ["jpg", "jpeg", "png", "webp", "JPG", "mp4", "thumbnail"]
    others = ["image", "images", "privileged_images", "boxes", "image_id", "num_images", "image_width", "prompt"]
    assert unread_columns([*names, *others, "image_caption", "solution"]) == names
    rows = Dataset.from_list([{**row, "img": "a.png", "image_id": 3} for row in kit.rows()])
    kit.trainer("qwen3_vl", tmp_path, train_dataset=rows)
    assert caplog.text.count("column(s) 'img' hold pictures or sound by type or name, and nothing reads them") == 1
    caplog.clear()
    made = kit.trainer("qwen3_vl", tmp_path / "stream", train_dataset=rows.to_iterable_dataset())
    list(made.train_dataset)
    assert caplog.text.count("column(s) 'img' hold pictures or sound") == 1
    tried("dataset", "columns img, picture, image_path, pixel_values and the like", "told: nothing reads them")


@pytest.mark.parametrize("channels", [(), (1,), (3,)], ids=["grey", "grey of one channel", "RGB"])
def test_an_array_that_a_dataset_made_lists_of_is_one_picture(channels: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, *channels), dtype=np.uint8)
    rows = Dataset.from_list([{"image": pixels, "images": [pixels, pixels[::-1]]}])
    (one,) = images_of(rows[0], ("image",))
    two = images_of(rows[0], ("images",))
    for source, expected in zip([one, *two], [pixels, pixels, pixels[::-1]], strict=True):
        in_colour = np.broadcast_to(expected.reshape(5, 6, -1), (5, 6, 3))
        assert np.array_equal(np.asarray(open_image(source)), in_colour)
        assert image_size(source) == (6, 5)


def test_privileged_images_are_read_in_every_way_that_images_are() -> None:
    for source in WRITTEN.values():
        row = {"prompt": [{"role": "user", "content": "how ?"}], "privileged_images": source}
        (held,) = image_sources(privileged_prompt(row, PrivilegedTemplate()))
        assert np.array_equal(np.asarray(open_image(held)), np.asarray(PICTURE))


# --- What a processor refuses about one row


def with_images_in_row(number: int, *images: Any) -> list[dict[str, Any]]:
    return [row | ({"images": list(images)} if n == number else {}) for n, row in enumerate(kit.rows())]


THIN = kit.picture(2, width=900, height=4)  # Qwen's processors refuse sides of more than 200 to 1
REFUSALS = {
    "a shape": ("qwen3_vl", {"images": [THIN]}, "'images'", r"its 1 images \(900 x 4\): ValueError: .*200"),
    "a shape of p": (
        "qwen3_vl",
        {"privileged_images": [THIN]},
        "'images' and 'privileged_images'",
        r"its 2 images \(32 x 32, 900 x 4\): ValueError: .*200",
    ),
    "a shape in a block": (
        "qwen3_vl",
        {"prompt": kit.user("how ?", THIN), "images": []},
        "'prompt'",
        r"its 1 images \(900 x 4\): ValueError: .*200",
    ),
    "no image": ("paligemma", {"images": []}, "'images'", r"its 0 images \(none\): ValueError: `images` are expected"),
}


@pytest.mark.parametrize("kind", ["dataset", "stream", "eval dataset"])
@pytest.mark.parametrize("what", REFUSALS)
def test_what_a_processor_refuses_about_a_row_names_it_or_leaves_it_out(
    what: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, fields, columns, words = REFUSALS[what]
    rows = [{**dict.fromkeys(fields), **row} for row in kit.rows()]
    if "prompt" in fields:  # every row of a dataset has contents of one kind
        rows = [{**row, "prompt": kit.user("how ?", kit.picture(n)), "images": []} for n, row in enumerate(rows)]
    rows[2] |= fields

    def prepared(**options: Any) -> list[Any]:
        data: Any = Dataset.from_list(rows)
        data = data.to_iterable_dataset() if kind == "stream" else data
        place = {"eval_dataset": data} if kind == "eval dataset" else {"train_dataset": data}
        made = kit.trainer(name, tmp_path, **place, **options)
        return list(made.eval_dataset if kind == "eval dataset" else made.train_dataset)

    message = rf"row 2, column {columns}: \w+ cannot read the prompt with {words}.*skip_broken_images=True"
    with pytest.raises(DataError, match=message):
        prepared()
    caplog.clear()
    assert len(prepared(skip_broken_images=True)) == 3
    assert "row 2 of the stream dropped" in caplog.text if kind == "stream" else "1 rows were dropped" in caplog.text
    tried("dataset", f"a row of a {kind} whose processor refuses {what}", "refused: names row and column; or counted")


def test_a_broken_picture_deep_in_a_block_names_its_row(tmp_path: Path) -> None:
    rows = [{**row, "prompt": kit.user("how ?", kit.picture(n)), "images": []} for n, row in enumerate(kit.rows())]
    whole = Dataset.from_list(rows)
    broken = [row["prompt"] for row in whole.cast_column("prompt", _as_stored(whole.features["prompt"]))]
    broken[2][0]["content"][0]["image"]["bytes"] = b"broken"
    data = Dataset.from_list([{**row, "prompt": prompt} for row, prompt in zip(rows, broken, strict=True)])
    data = data.cast_column("prompt", whole.features["prompt"])
    with pytest.raises(DataError, match=r"row 2, column 'prompt', image 0: 6 bytes cannot be read"):
        kit.trainer("qwen3_vl", tmp_path, train_dataset=data)
    assert len(kit.trainer("qwen3_vl", tmp_path, train_dataset=data, skip_broken_images=True).train_dataset) == 3


@pytest.mark.parametrize("streamed", [False, True], ids=["dataset", "stream"])
def test_a_column_that_cannot_be_decoded_and_that_nothing_reads_is_told_and_left_alone(
    streamed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Dataset.from_list([{**row, "seen": [{"bytes": b"x", "path": None}]} for row in kit.rows()])
    data = data.cast_column("seen", List(ImageFeature()))
    given = data.to_iterable_dataset() if streamed else data
    made = kit.trainer("qwen3_vl", tmp_path, train_dataset=given, max_steps=1)
    assert "column(s) 'seen' hold pictures or sound by type or name, and nothing reads them" in caplog.text
    made.train()
    assert made.state.global_step == 1
    tried("dataset", "a column of pictures that nothing reads, undecodable", "told by its type; not opened")


def _as_stored(kind: Any) -> Any:
    if isinstance(kind, ImageFeature):
        return {"bytes": Value("binary"), "path": Value("string")}
    if isinstance(kind, dict):
        return {name: _as_stored(inner) for name, inner in kind.items()}
    return List(_as_stored(kind.feature)) if isinstance(kind, List) else kind


def test_a_dataset_of_which_no_row_is_left_says_why(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "images": [THIN]} for row in kit.rows()])
    with pytest.raises(DataError, match=r"no row is left: 4 have images that cannot be read, the first: row 0"):
        kit.trainer("qwen3_vl", tmp_path, train_dataset=rows, skip_broken_images=True)


def test_a_row_that_the_teachers_own_processor_refuses_or_makes_too_long_is_named(tmp_path: Path) -> None:
    own = kit.processor("qwen3_vl")
    own.image_processor.size = {"shortest_edge": 16 * 16, "longest_edge": 128 * 128}
    rows = with_images_in_row(3, kit.picture(3, width=128, height=128))  # 64 tokens to the teacher, 16 to the student
    options = {"train_dataset": Dataset.from_list(rows), "teacher_processing_class": own, "max_prompt_length": 60}
    with pytest.raises(DataError, match=r"row 3: a view of the prompt has \d+ tokens, 60 are allowed"):
        kit.trainer("qwen3_vl", tmp_path, "vanilla", **options)
    options["teacher_processing_class"] = kit.processor("qwen3_vl")
    assert len(kit.trainer("qwen3_vl", tmp_path, "vanilla", **options).train_dataset) == 4


def test_a_picture_that_goes_while_a_run_goes_on_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    kit.picture(2).save(path)
    made = kit.trainer("qwen3_vl", tmp_path, train_dataset=Dataset.from_list(with_images_in_row(1, str(path))))
    rows = [made.train_dataset[n] for n in range(2)]
    path.unlink()
    with pytest.raises(DataError, match=r"prompt 1 of a batch of 2: .*picture\.png' cannot be read as an image"):
        trainer_kit.answered(made, rows)


def test_what_is_no_picture_is_neither_waited_for_nor_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for source, words in (
        (tmp_path / "pipe.png", "is no file"),
        (Path("/dev/zero"), "is no file"),
        (program, "not run"),
    ):
        for read in (open_image, image_size):
            with pytest.raises(DataError, match=words):
                read(source)
