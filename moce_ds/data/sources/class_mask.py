"""A class per pixel, read from a PNG: the stored numbers, never the shades or colours that they are displayed as.

Programs interpret some kinds of PNG differently, and some tools convert one kind to another. Ambiguous files are
refused, because wrong classes look like right ones.

Axes: H x W pixels.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_ds.data.image_file import (
    DECODER_FAULTS,
    file_content,
    open_image,
    pixel_limit,
    rotated_upright,
    undecodable,
    upright,
)
from moce_ds.data.png_file import GRAY, PALETTE, Png
from moce_ds.errors import DataError

Colour = tuple[int, int, int]

_KINDS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with transparency", 6: "RGB with transparency"}
_DEPTHS = {GRAY: (8,), PALETTE: (1, 2, 4, 8)}
"""Accepted bits per value, by colour type."""
_CURE = "Write it again as a PNG of 8-bit gray, with the class of each pixel as its value"


@dataclass(frozen=True)
class ClassMask:
    """The values [H, W], uint8, and the palette colours of those that occur."""

    values_HW: NDArray[np.uint8]
    colours: dict[int, Colour]


def check_mask_header(path: Path, size: tuple[int, int]) -> None:
    """Check the header of a mask whose image has `size` (width, height). Raises DataError."""
    _opened(path, size)


def read_mask(path: Path, size: tuple[int, int], strictly: bool = True) -> ClassMask:
    """The mask at `path`, upright, of an image of `size` (width, height).

    Args:
        strictly: verify the checksums and check for missing pixels, which decompresses the PNG a second time.

    Raises:
        DataError: it is not a PNG, not of `size`, damaged, or of an ambiguous kind.
    """
    png, image = _opened(path, size)
    if strictly and (not png.is_flawless or png.inflated != (png.pixel_bytes, True)):
        raise DataError(f"{path} is damaged: {png.pixel_fault or 'its checksums are wrong'}. Restore it from a copy.")
    try:
        values_HW = np.array(rotated_upright(image))
    except DECODER_FAULTS as fault:
        raise undecodable(path, "mask", fault) from None
    palette = png.palette if png.colour == PALETTE else []
    colours = {int(value): palette[value] for value in np.unique(values_HW) if value < len(palette)}
    _check_palette(path, palette, colours)
    return ClassMask(values_HW, colours)


def _opened(path: Path, size: tuple[int, int]) -> tuple[Png, Image.Image]:
    """A mask with a valid header, not decoded yet. Raises DataError."""
    try:
        data = file_content(path)
        png = Png.of(data)
        with pixel_limit(sys.maxsize):  # the size is compared before anything is decoded
            image = open_image(io.BytesIO(data))
            mask_size = upright(image)
    except DECODER_FAULTS as fault:
        raise undecodable(path, "mask", fault) from None
    if png is None:
        lossy = ", whose compression invents classes" if image.format in ("JPEG", "MPO", "WEBP") else ""
        raise DataError(f"{path} holds {image.format}{lossy}; expected PNG, regardless of the file name. {_CURE}.")
    if png.depth not in _DEPTHS.get(png.colour, ()):
        few = ": some programs read its values as shades, others as they are" * (png.colour == GRAY and png.depth < 8)
        raise DataError(
            f"{path} holds {png.depth}-bit {_KINDS[png.colour]}; expected 8-bit gray, or a palette{few}. {_CURE}."
        )
    if png.is_animated:
        raise DataError(f"{path} holds an animation; expected one picture. {_CURE}.")
    if mask_size != size:
        raise DataError(
            f"{path} holds {mask_size[0]} x {mask_size[1]} pixels; expected the {size[0]} x {size[1]} of its image, "
            "rotated according to its EXIF."
        )
    return png, image


def _check_palette(path: Path, palette: list[Colour], colours: dict[int, Colour]) -> None:
    """Refuse a palette of grays, unless each shade equals its own number."""
    if any(len(set(colour)) > 1 for colour in palette):
        return
    for value, (shade, _, _) in colours.items():
        if shade != value:
            raise DataError(
                f"{path} is a palette of grays in which {value} shows as {shade}: the class may be either, since tools "
                f"that make PNG files smaller renumber shades. {_CURE}: if the shades are the classes, Pillow's "
                "convert('L') does it."
            )


class Palettes:
    """The colours of the values in the masks of a set, which must be the same in all masks.

    Tools that shrink PNG files, or save palettes of their own, may have numbered classes differently in each file.
    """

    def __init__(self) -> None:
        self.first: dict[int, tuple[Colour, str]] = {}

    def add(self, path: str, colours: Mapping[int, Sequence[int]]) -> None:
        """Raise DataError if a value has another colour than in an earlier mask."""
        for value, (red, green, blue) in colours.items():
            colour = (red, green, blue)
            before, where = self.first.setdefault(value, (colour, path))
            if before != colour:
                raise DataError(
                    f"{path}: the palette shows {value} as {colour}, that of {where} as {before}: the same number may "
                    "stand for different classes. Write the masks again as PNG of 8-bit gray, with the class of each "
                    "pixel as its value."
                )
