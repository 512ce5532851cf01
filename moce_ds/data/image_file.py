"""Examines one image file: the bytes to store in a shard, or the reason to reject it.

DALI must decode every stored image, and decode it as Pillow does here, because one undecodable image ends a DALI
pipeline. Plain 8-bit JPEG and PNG are stored byte for byte; every other format that Pillow reads becomes an RGB PNG.

This module limits the size of images, in place of Pillow's own limit.
"""

import hashlib
import io
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from moce_ds.common.errors import DataError
from moce_ds.common.host.machine import machine_failed, refused
from moce_ds.data.containers import GRAY, PNG_SIGNATURE, RGB, Png, jpeg_orientation, known_orientation

EMPTY = "empty"
NOT_AN_IMAGE = "not an image"
NOT_A_FILE = "not a regular file"
DAMAGED = "damaged"
TOO_LARGE = "too large"
UNREADABLE = "unreadable"

MAX_PIXELS = 100_000_000
"""Default maximum number of pixels; a larger image may be a decompression bomb."""
MAX_SIDE = 1_000_000
"""Maximum side in pixels; libpng, and so DALI, refuses larger ones."""

# Formats with a signature that Pillow decodes itself. Excluded are those that it passes to another program (EPS, WMF)
# and those without a signature (TGA).
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")

DECODER_FAULTS = (
    OSError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError,
    EOFError, MemoryError, struct.error, zlib.error,
)  # fmt: skip
"""Errors that Pillow's decoders raise on damaged files; they have no common base class."""

# EXIF orientation -> transposition that makes the image upright. Pillow's own exif_transpose also rewrites the EXIF,
# and fails if another part of it is damaged.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_SWAPPED = (5, 6, 7, 8)
"""Orientations that exchange width and height."""

_LIMIT = threading.RLock()
"""Held while Pillow's limit is changed. A fork waits for it; otherwise a child could inherit the lock and the changed
limit."""
os.register_at_fork(before=_LIMIT.acquire, after_in_parent=_LIMIT.release, after_in_child=_LIMIT.release)


class Accepted(NamedTuple):
    """Bytes to store, and the image's size in pixels after EXIF orientation."""

    data: bytes
    height: int
    width: int


class Rejected(NamedTuple):
    """The reason why a file is not stored, and details."""

    reason: str
    detail: str


def suffixes() -> frozenset[str]:
    """File name suffixes of all accepted formats, in lower case: .jpg, .bmp, ..."""
    Image.init()
    return frozenset(suffix for suffix, format in Image.EXTENSION.items() if format in _FORMATS)


def examine(path: Path, max_pixels: int = MAX_PIXELS) -> Accepted | Rejected:
    """Decode the image at `path`. Raises DataError for a fault of the machine instead of the image."""
    try:
        with _opened(path) as file:
            return _examine(file, max_pixels)
    except OSError as fault:
        if machine_failed(fault):
            raise refused(DataError, f"{path} cannot be read", fault, path) from None
        return Rejected(UNREADABLE if fault.errno else DAMAGED, f"{type(fault).__name__}: {fault.strerror or fault}")


def examine_bytes(data: bytes, max_pixels: int = MAX_PIXELS) -> Accepted | Rejected:
    """Decode an image."""
    return _examine(io.BytesIO(data), max_pixels)


def _examine(file: BinaryIO, max_pixels: int) -> Accepted | Rejected:
    """Raises OSError for a fault of the machine instead of the image."""
    try:
        with pixel_limit(max_pixels):
            return _decide(file)
    except DECODER_FAULTS as fault:
        if isinstance(fault, OSError) and machine_failed(fault):
            raise
        # only the operating system sets errno; Pillow's own OSErrors concern the content
        reason = UNREADABLE if isinstance(fault, OSError) and fault.errno else DAMAGED
        detail = fault.strerror if reason == UNREADABLE and isinstance(fault, OSError) else fault
        return Rejected(reason, f"{type(fault).__name__}: {detail}")
    except Image.DecompressionBombError as fault:
        return Rejected(TOO_LARGE, _excess(fault, max_pixels))


def decoded(data: bytes, size: tuple[int, int], name: str, strictly: bool = False) -> Image.Image:
    """An image that was accepted with this `size` (width, height), upright and RGB.

    Args:
        strictly: check for missing pixels, as for new images; earlier versions did not.

    Raises:
        DataError: it has another size, or is not a complete image; the message begins with `name`.
    """
    try:
        with pixel_limit(size[0] * size[1]):
            file = io.BytesIO(data)
            opened = open_image(file)
            png = _png_in(opened, file) if strictly else None
            image = to_rgb(opened)
        fault = (png and png.pixel_fault) or f"{image.width} x {image.height} pixels" * (image.size != size)
    except (*DECODER_FAULTS, Image.DecompressionBombError) as error:
        fault = fault_text(error)
    if fault:
        raise DataError(
            f"{name} is not a complete image of {size[0]} x {size[1]} pixels ({fault}), but it was written as one. "
            "An earlier version may have accepted it: write the set again with `moce shards`, into another folder, "
            "to skip such images."
        )
    return image


def read_rgb(path: Path, max_pixels: int = MAX_PIXELS, strictly: bool = True) -> Image.Image:
    """The image at `path`, upright and RGB.

    Args:
        strictly: check for missing pixels, which decompresses a PNG a second time.

    Raises:
        DataError: it cannot be read, or is larger than `max_pixels`.
    """
    with _image_at(path, max_pixels) as (image, file):
        if strictly and (png := _png_in(image, file)) and (fault := png.pixel_fault):
            raise ValueError(fault)
        return to_rgb(image)


def upright_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the image that `read_rgb` returns for `path`, from its header. Raises DataError."""
    with _image_at(path, max_pixels) as (image, _):
        return upright(image)


def upright(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image after its EXIF rotation."""
    return image.size[::-1] if _orientation(image) in _SWAPPED else image.size


@contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """In this block Pillow opens images of up to `pixels` without a warning, and refuses larger ones.

    Blocks of several threads run one after the other: Pillow's limit and Python's warning filter are global.

    Raises:
        PIL.Image.DecompressionBombError: an image is larger.
    """
    with _LIMIT:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = pixels / 2  # type: ignore[assignment]  # warns above this, raises above twice this
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _image_at(path: Path, max_pixels: int) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """The undecoded image at `path`, and its file. Raises DataError, also for decoding errors in the block."""
    try:
        with _opened(path) as file, pixel_limit(max_pixels):
            yield open_image(file), file
    except Image.DecompressionBombError as fault:
        raise DataError(f"{path}: {_excess(fault, max_pixels)}. Make it smaller, or raise data.max_pixels.") from None
    except DECODER_FAULTS as fault:
        raise undecodable(path, "image", fault) from None


def undecodable(path: Path, kind: str, fault: BaseException) -> DataError:
    """The error for an unreadable file of a `kind`, with the status of a machine fault if that is the cause."""
    if isinstance(fault, OSError) and machine_failed(fault):
        return refused(DataError, f"{path} cannot be read", fault, path)
    return DataError(f"{path} is not a readable {kind} ({fault_text(fault)}).")


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """An open file. Refuses a pipe with OSError, because opening it would block."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
        yield file


def file_content(path: Path) -> bytes:
    """The bytes of a regular file. Raises OSError."""
    with _opened(path) as file:
        return file.read()


def file_digest(path: Path) -> str:
    """Hex SHA-256 of the bytes of a regular file. Raises OSError."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault_text(fault: BaseException) -> str:
    """The text of a decoder error, without Pillow's name for an in-memory object."""
    if isinstance(fault, UnidentifiedImageError):
        return "its format is not supported"
    return str(fault) if isinstance(fault, OSError | SyntaxError | ValueError) else f"{type(fault).__name__}: {fault}"


def _excess(fault: Image.DecompressionBombError, max_pixels: int) -> str:
    count = re.search(r"\d+", str(fault))
    return f"{count[0] if count else 'many'} pixels; max_pixels={max_pixels} were allowed"


def _decide(file: BinaryIO) -> Accepted | Rejected:
    try:
        image = open_image(file)
    except UnidentifiedImageError:
        file.seek(0)
        return Rejected(NOT_AN_IMAGE, f"begins with {file.read(16)!r}")
    if max(image.size) > MAX_SIDE:
        return Rejected(TOO_LARGE, f"{image.width} x {image.height} pixels; a side may have at most {MAX_SIDE}")
    image.load()
    png = _png_in(image, file)
    if png and (fault := png.pixel_fault):
        return Rejected(DAMAGED, fault)
    if png or image.format in ("JPEG", "MPO"):
        data = _content(file)
        if _is_plain(image, data, png):
            width, height = upright(image)
            return Accepted(data, height, width)
    rgb = to_rgb(image)
    return Accepted(as_png(rgb), rgb.height, rgb.width)


def _png_in(image: Image.Image, file: BinaryIO) -> Png | None:
    return Png.of(_content(file)) if image.format == "PNG" else None


def _content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def as_png(rgb: Image.Image) -> bytes:
    """An image as a PNG that every decoder reads."""
    encoded = io.BytesIO()
    rgb.save(encoded, "PNG")
    return encoded.getvalue()


def _is_plain(image: Image.Image, data: bytes, png: Png | None) -> bool:
    """Whether DALI decodes `data` to the same pixels as Pillow, so that it can be stored unchanged."""
    if png is None:  # MPO is a JPEG followed by further pictures, which DALI ignores too
        return image.mode in ("L", "RGB") and _orientation(image) == jpeg_orientation(data)
    return (
        png.depth == 8  # Pillow's mode does not distinguish 16-bit from 8-bit colour
        and png.colour in (GRAY, RGB)
        and not image.has_transparency_data
        and not png.is_animated
        and _orientation(image) == 1
        and png.is_flawless
        and png.has_small_metadata
        and png.is_wide_enough
        and png.inflated == (png.pixel_bytes, True)
    )


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image of an accepted format, undecoded, with the orientation that DALI sees.

    Reads only those chunks of a PNG that its pixels depend on: text and profiles may have any size.

    Raises:
        PIL.UnidentifiedImageError: it has none of the accepted formats.
    """
    Image.init()
    if file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE and (png := Png.of(_content(file))):
        file = io.BytesIO(png.bare)
    file.seek(0)
    image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
    if image.format in ("JPEG", "MPO"):
        image.info.pop("xmp", None)  # Pillow also reads the orientation from XMP; DALI reads EXIF only
    return image


def _orientation(image: Image.Image) -> int:
    return known_orientation(image.getexif().get(ExifTags.Base.Orientation, 1))


def rotated_upright(image: Image.Image) -> Image.Image:
    """`image`, decoded and rotated according to its EXIF."""
    image.load()
    orientation = _orientation(image)
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` upright, 8-bit RGB, without metadata; transparency over white.

    16-bit gray is divided by 257. 32-bit integers and floats have no fixed range, so the minimum and maximum of the
    image become 0 and 255.
    """
    image = rotated_upright(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_stretch(np.asarray(image, dtype=np.float64)))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(layer)
    rgb = image.convert("RGB")
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())  # drops profiles and other metadata


def _stretch(pixels: np.ndarray) -> np.ndarray:
    if not np.isfinite(pixels).all():
        raise ValueError("pixel values that are not finite")
    low, high = pixels.min(), pixels.max()
    return np.rint((pixels - low) * (255 / max(high - low, np.finfo(np.float64).tiny))).astype(np.uint8)
