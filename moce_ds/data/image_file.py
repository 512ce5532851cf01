"""The verdict on one file: what of it goes into a shard, or why nothing does.

What goes into a shard must be decoded by DALI as Pillow decodes it here, since one image that is not ends a DALI
pipeline. Plain 8-bit JPEG and PNG are stored byte for byte; all else that Pillow reads becomes an RGB PNG.
"""

import io
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from moce_ds.data.containers import is_flawless_png, jpeg_orientation, known_orientation
from moce_ds.errors import DataError

EMPTY = "empty"
NOT_AN_IMAGE = "not an image"
NOT_A_FILE = "not a regular file"
DAMAGED = "damaged"
TOO_LARGE = "too large"
UNREADABLE = "unreadable"

# Formats with a signature that Pillow decodes by itself. Left out: those it hands to another program (EPS, WMF) and
# those that any bytes can be taken for (TGA).
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")

# What Pillow's decoders were seen to raise on damaged files; they have no common base.
_DECODER_FAULTS = (
    OSError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError,
    EOFError, MemoryError, struct.error, zlib.error,
)  # fmt: skip

# EXIF orientation -> what brings the image upright. Pillow's own exif_transpose also rewrites the EXIF and fails
# where that is damaged elsewhere.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_LYING = (5, 6, 7, 8)
"""Orientations that exchange width and height."""


class Accepted(NamedTuple):
    """Bytes to store, and the image's size in pixels after EXIF orientation."""

    data: bytes
    height: int
    width: int


class Rejected(NamedTuple):
    """Why a file is not stored: one of the reasons above, and the particulars."""

    reason: str
    detail: str


def suffixes() -> frozenset[str]:
    """What names of images end with, of all accepted formats, in lower case: .jpg, .bmp, ..."""
    Image.init()
    return frozenset(suffix for suffix, format in Image.EXTENSION.items() if format in _FORMATS)


def examine(path: Path) -> Accepted | Rejected:
    """Decode the image at `path`; never raises. Pillow's own pixel limit holds where its warning is an error."""
    try:
        with open(path, "rb") as opened:
            return _decide(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as fault:
        return Rejected(TOO_LARGE, str(fault))
    except _DECODER_FAULTS as fault:
        # Only the operating system sets errno; Pillow's own OSErrors are about the content.
        reason = UNREADABLE if isinstance(fault, OSError) and fault.errno else DAMAGED
        detail = fault.strerror if reason == UNREADABLE and isinstance(fault, OSError) else fault
        return Rejected(reason, f"{type(fault).__name__}: {detail}")


def read_rgb(path: Path) -> Image.Image:
    """The image at `path`, upright and RGB. Raises DataError."""
    try:
        with open(path, "rb") as opened:
            return to_rgb(open_image(opened))
    except _DECODER_FAULTS as fault:
        raise DataError(f"{path} is no image that can be read ({type(fault).__name__}: {fault}).") from None


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of the image at `path` as `read_rgb` gives it, from its header. Raises DataError."""
    try:
        with open(path, "rb") as opened:
            image = open_image(opened)
            return image.size[::-1] if _orientation(image) in _LYING else image.size
    except _DECODER_FAULTS as fault:
        raise DataError(f"{path} is no image that can be read ({type(fault).__name__}: {fault}).") from None


def _decide(file: BinaryIO) -> Accepted | Rejected:
    try:
        image = open_image(file)
    except UnidentifiedImageError:
        file.seek(0)
        return Rejected(NOT_AN_IMAGE, f"begins with {file.read(16)!r}")
    image.load()
    if image.format in ("JPEG", "MPO", "PNG"):
        file.seek(0)
        data = file.read()
        if _is_plain(image, data):
            width, height = image.size[::-1] if _orientation(image) in _LYING else image.size
            return Accepted(data, height, width)
    rgb = to_rgb(image)
    encoded = io.BytesIO()
    rgb.save(encoded, "PNG")
    return Accepted(encoded.getvalue(), rgb.height, rgb.width)


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether DALI decodes `data` to the pixels that Pillow sees, so that it can be stored unchanged."""
    if image.format in ("JPEG", "MPO"):  # MPO: a JPEG with further pictures behind it, which DALI ignores too
        return image.mode in ("L", "RGB") and _orientation(image) == jpeg_orientation(data)
    bit_depth, colour_type = data[24], data[25]  # Pillow's mode does not tell 16-bit colour from 8-bit
    return (
        bit_depth == 8
        and colour_type in (0, 2)
        and not image.has_transparency_data
        and not getattr(image, "is_animated", False)
        and _orientation(image) == 1
        and is_flawless_png(data)
    )


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image of an accepted format, undecoded; its orientation is the one that DALI sees.

    Raises:
        PIL.UnidentifiedImageError: it is none of the accepted formats.
    """
    Image.init()
    image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
    if image.format in ("JPEG", "MPO"):
        image.info.pop("xmp", None)  # Pillow would also take the orientation from here; DALI reads EXIF only
    return image


def _orientation(image: Image.Image) -> int:
    return known_orientation(image.getexif().get(ExifTags.Base.Orientation, 1))


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` upright, 8-bit RGB, without metadata; transparency over white.

    16-bit gray is divided by 257; 32-bit integers and floats have no fixed range, so the image's own minimum and
    maximum become 0 and 255.
    """
    image.load()
    orientation = _orientation(image)
    if orientation != 1:
        image = image.transpose(_TURNS[orientation])
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_stretch(np.asarray(image, dtype=np.float64)))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(layer)
    rgb = image.convert("RGB")
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())  # leaves profiles and other metadata behind


def _stretch(pixels: np.ndarray) -> np.ndarray:
    if not np.isfinite(pixels).all():
        raise ValueError("pixels that are not finite numbers")
    low, high = pixels.min(), pixels.max()
    return np.rint((pixels - low) * (255 / max(high - low, np.finfo(np.float64).tiny))).astype(np.uint8)
