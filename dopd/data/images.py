"""Images of a dataset: whatever a column holds, as an RGB picture, and a key that tells pictures apart."""

import base64
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps

from dopd.data.blocks import as_data_uri, is_data_uri
from dopd.errors import DataError, cut

COLUMNS = ("images", "image")  # of which a row may fill one
PRIVILEGED_COLUMN = "privileged_images"
_SIXTEEN_BITS = 65535
_ORIENTATION = 0x0112  # EXIF tag; from 5 on, width and height change places
_KINDS = "a PIL image, a path, bytes, base64, a data URI, an (H, W, C) uint8 array or {'bytes': ..., 'path': ...}"
_HELD_UNDER = ("bytes", "path", "url", "base64")  # keys of a mapping, the first with something in it
_BY_OTHER_PROGRAMS = ("EPS",)  # Pillow starts Ghostscript
_MOST_QUOTED = 100  # characters
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64,}=*\s*")  # longer than names of files tend to be
_ADDRESS = re.compile(r"[a-z0-9+.\-]{2,}://", re.IGNORECASE)
_FILE_URI = re.compile(r"file:(//(localhost(?=/))?)?", re.IGNORECASE)
_CHANNELS = (1, 3, 4)
# Parts of names of columns that people keep pictures in, and parts of names that say something of pictures.
_PICTURES = re.compile(
    r"image|img|picture|photo|pixel|screenshot|thumbnail|video|audio|frames?$"
    r"|^(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|mp4|webm|wav|mp3|flac)$",
    re.IGNORECASE,
)
_ABOUT = re.compile(
    r"(^(num|n|has|is)_)|(id|ids|index|width|height|sizes?|count|hash|caption|description|label|type)s?$"
)


class BrokenImageError(DataError):
    """A picture that cannot be read, or a prompt whose pictures its processor refuses."""


def unread_columns(columns: Sequence[str]) -> list[str]:
    """Columns whose names say that they hold pictures, videos or sound, and that nothing reads."""
    read = {*COLUMNS, PRIVILEGED_COLUMN}
    return [name for name in columns if name not in read and _PICTURES.search(name) and not _ABOUT.search(name)]


def is_array(value: Any) -> bool:
    """Whether nested lists are one picture, which datasets make of an array: numbers (H, W) or (H, W, C)."""
    depth, inner = 0, value
    while isinstance(inner, list | tuple) and inner:
        depth, last, inner = depth + 1, len(inner), inner[0]
    if isinstance(inner, bool) or not isinstance(inner, int | float):
        return False
    return depth == 2 or (depth == 3 and last in _CHANNELS)


def open_image(source: Any) -> Image.Image:
    """An RGB picture, upright as its EXIF says, of any PIL mode; what is transparent becomes white.

    Args:
        source: a PIL image, a path, bytes, a uint8 array (H, W) or (H, W, C), or a mapping with `bytes` or `path`.

    Raises:
        DataError: it cannot be read; the message names no row, which the caller knows.
    """
    try:
        return _as_rgb(_upright(_opened(source)))
    except DataError:
        raise
    except Exception as error:  # decoders fail with OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise DataError(f"{_named(source)} cannot be read as an image: {in_short(error)}") from error


def in_short(error: BaseException) -> str:
    """The kind of an error and the beginning of its first line: messages of libraries quote whole files."""
    first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {cut(first, 2 * _MOST_QUOTED)}"


def image_size(source: Any) -> tuple[int, int]:
    """Width and height of a picture as `open_image` gives it, from its header where that is enough."""
    source = _held(source)
    if isinstance(source, str | Path | bytes | bytearray):
        try:
            with _file(source) as picture:
                width, height = picture.size
                sideways = picture.getexif().get(_ORIENTATION, 1) >= 5
                return (height, width) if sideways else (width, height)
        except Exception:  # the full reading says what is wrong
            return open_image(source).size
    return open_image(source).size


def image_key(source: Any) -> str:
    """The same text for the same picture, without decoding it: of its bytes, its path, or its pixels."""
    source = _held(source)
    if isinstance(source, str | Path):
        return f"path:{source}"
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, bytes | bytearray):
        digest.update(source)
    elif isinstance(source, Image.Image):
        digest.update(f"{source.mode} {source.size} {source.getexif().get(_ORIENTATION)}".encode())
        digest.update(source.tobytes())
        digest.update(bytes(source.getpalette() or []))
    else:
        array = np.asarray(source)
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def blank_like(image: Image.Image) -> Image.Image:
    """A grey picture of the same size: what a model answers to it, it does not read off the image."""
    return Image.new("RGB", image.size, (128, 128, 128))


def small_data_uri(source: Any) -> str:
    """A picture as a JPEG data URI of at most 320 pixels a side."""
    picture = open_image(source)
    picture.thumbnail((320, 320))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _held(source: Any) -> Any:
    """What a mapping holds, and what a data URI or base64 encodes, as bytes; anything else as it is.

    Raises:
        DataError: a data URI that is none, or an address in a network.
    """
    if isinstance(source, Mapping):
        name = next((name for name in _HELD_UNDER if source.get(name)), None)
        source = None if name is None else source[name]
        source = as_data_uri(source) if name == "base64" else source
    if not isinstance(source, str):
        return source
    if is_data_uri(source):
        return _decoded(source)
    source = _local(source)
    if _ADDRESS.match(source):
        raise DataError(
            f"{_named(source)} is an address: pictures are not fetched while training. Download it, and give the file"
        )
    if _BASE64.fullmatch(source) and not _is_file(source):
        try:
            return _from_base64(source)
        except ValueError:
            return source
    return source


def _decoded(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    try:
        data = _from_base64(unquote(body)) if header.lower().endswith(";base64") else unquote_to_bytes(body)
    except ValueError as error:
        raise DataError(f"{_named(uri)} cannot be read as an image: {in_short(error)}") from error
    if not comma or not data:
        raise DataError(f"{_named(uri)} holds no data: expected data:image/png;base64, and the encoded file")
    return data


def _from_base64(text: str) -> bytes:
    plain = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # longer than a name may be
        return False


def _opened(source: Any) -> Image.Image:
    original, source = source, _held(source)
    if isinstance(source, Image.Image):
        picture = source
    elif isinstance(source, str | Path | bytes | bytearray):
        picture = _file(source)
    elif isinstance(source, np.ndarray) or (isinstance(source, list) and source):
        array = np.asarray(source)
        if array.dtype != np.uint8 and not (array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255):
            raise DataError(f"{_named(source)}: values of an array must be whole numbers from 0 to 255")
        grey = array.ndim == 3 and array.shape[2] == 1  # which PIL knows as (H, W) alone
        picture = Image.fromarray((array[..., 0] if grey else array).astype(np.uint8))
    else:
        raise DataError(f"{_named(original)} is no image: expected {_KINDS}")
    picture.load()  # the file is read here, and not where nobody expects an error
    if 0 in picture.size:
        raise DataError(f"{_named(source)} has no pixels: {picture.size[0]} x {picture.size[1]}")
    return picture


def _file(source: str | Path | bytes | bytearray) -> Image.Image:
    """A picture whose pixels are not read yet.

    Raises:
        DataError: a pipe or a device, or a format that another program would be started for.
    """
    if not isinstance(source, bytes | bytearray) and Path(source).exists() and not Path(source).is_file():
        raise DataError(f"{_named(source)} is no file: folders, pipes and devices are no pictures")
    picture = Image.open(io.BytesIO(source) if isinstance(source, bytes | bytearray) else source)
    if picture.format in _BY_OTHER_PROGRAMS:
        raise DataError(
            f"{_named(source)} is a program in PostScript, which is not run: save it as a picture (PNG, JPEG)"
        )
    return picture


def path_in(value: Any) -> Path | None:
    """The path that a value of a column or a block is; `None` where it is another thing."""
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        held = _held(value)
    except DataError:  # what is wrong with it is said where it is opened
        return None
    return Path(held) if isinstance(held, str) else None


def _local(source: str) -> str:
    """The path that a file URI stands for; anything else as it stands.

    Many write a path behind `file://` as it is, where a URI has `%20` for a blank: what is there is meant.
    """
    found = _FILE_URI.match(source)
    if found is None:
        return source
    path = source[found.end() :]
    return path if _is_file(path) else unquote(path)


def _upright(picture: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(picture) or picture


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture.copy()
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        return Image.fromarray(_eight_bits(np.asarray(picture))).convert("RGB")
    if picture.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in picture.info:
        # The colour behind transparent pixels is arbitrary, often black: a model must not see it.
        straight = {"La": "LA", "RGBa": "RGBA"}.get(picture.mode)
        layered = (picture.convert(straight) if straight else picture).convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Wide pixels in 0..255: converting them with PIL alone clips everything above 255 to white."""
    values = np.nan_to_num(values.astype(np.float64))
    largest = float(values.max())
    if largest <= 1.0 and not np.all(values == np.round(values)):
        scale = 255.0
    elif largest > 255.0:
        scale = 255.0 / (_SIXTEEN_BITS if largest <= _SIXTEEN_BITS else math.ceil(largest))
    else:
        scale = 1.0
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)


def _named(source: Any) -> str:
    """A source in a message, never a whole picture."""
    if isinstance(source, Mapping):
        held = next((source[name] for name in ("path", "url", "bytes", "base64") if source.get(name)), None)
        return f"a mapping with {', '.join(map(repr, source)) or 'nothing'}" if held is None else _named(held)
    if isinstance(source, bytes | bytearray):
        return f"{len(source)} bytes"
    if isinstance(source, str) and is_data_uri(source):
        return f"a data URI ({cut(source.partition(',')[0], _MOST_QUOTED)}, {len(source)} characters)"
    if not isinstance(source, str | Path):
        return f"a {type(source).__name__}"
    text = str(source)
    return repr(text) if len(text) <= _MOST_QUOTED else f"{cut(text, _MOST_QUOTED)!r} ({len(text)} characters)"
