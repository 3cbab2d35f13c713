"""Images of a dataset: whatever a column holds, as an RGB picture, and a key that tells pictures apart."""

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dopd.errors import DataError

COLUMNS = ("images", "image")  # the first with something in it counts
PRIVILEGED_COLUMN = "privileged_images"
_SIXTEEN_BITS = 65535
_ORIENTATION = 0x0112  # EXIF tag; from 5 on, width and height change places
_KINDS = "a PIL image, a path, bytes, an (H, W, C) uint8 array or {'bytes': ..., 'path': ...}"


class BrokenImageError(DataError):
    """A picture that cannot be read, named by row and column."""


def images_of(row: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> list[Any]:
    """What a row has in its image columns, one entry per image, not opened; empty for a row without images."""
    for column in columns:
        value = row.get(column)
        entries = list(value) if isinstance(value, list | tuple) else [value]
        found = [entry for entry in entries if entry is not None]
        if found:
            return found
    return []


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
        words = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"{_named(source)} cannot be read as an image: {type(error).__name__}: {words}") from error


def image_size(source: Any) -> tuple[int, int]:
    """Width and height of a picture as `open_image` gives it, from its header where that is enough."""
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str | Path | bytes | bytearray):
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes | bytearray) else _path(source)) as picture:
                width, height = picture.size
                sideways = picture.getexif().get(_ORIENTATION, 1) >= 5
                return (height, width) if sideways else (width, height)
        except Exception:  # the full reading says what is wrong
            return open_image(source).size
    return open_image(source).size


def image_key(source: Any) -> str:
    """The same text for the same picture, without decoding it: of its bytes, its path, or its pixels."""
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
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


def small_data_uri(source: Any, side: int = 320) -> str:
    """A picture as a JPEG data URI of at most `side` pixels a side."""
    import base64

    picture = open_image(source)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _opened(source: Any) -> Image.Image:
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        picture = source
    elif isinstance(source, bytes | bytearray):
        picture = Image.open(io.BytesIO(source))
    elif isinstance(source, str | Path):
        picture = Image.open(_path(source))
    elif isinstance(source, np.ndarray) or (isinstance(source, list) and source):
        array = np.asarray(source)
        if array.dtype != np.uint8 and not (array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255):
            raise DataError(f"{_named(source)}: values of an array must be whole numbers from 0 to 255")
        picture = Image.fromarray(array.astype(np.uint8))
    else:
        raise DataError(f"{_named(source)} is no image: expected {_KINDS}")
    picture.load()  # the file is read here, and not where nobody expects an error
    if 0 in picture.size:
        raise DataError(f"{_named(source)} has no pixels: {picture.size[0]} x {picture.size[1]}")
    return picture


def _path(source: str | Path) -> str:
    return str(source).removeprefix("file://")


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
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("bytes")
    if isinstance(source, bytes | bytearray):
        return f"{len(source)} bytes"
    return repr(str(source)) if isinstance(source, str | Path) else f"a {type(source).__name__}"
