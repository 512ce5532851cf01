"""Images with a class per pixel in ADE20K's format: a folder of images and one of PNG masks with the same names.

A mask holds 1 to K for the classes and 0 for pixels without one, which are ignored by loss and score
(`reduce_zero_label`); or 0 to K - 1, where 255 is ignored. The classes are the numbers that the PNG stores, never the
shades or colours that they are displayed as. Programs interpret some kinds of PNG differently, and some tools convert
one kind to another. Ambiguous files are refused, because wrong classes look like right ones.

Axes: H x W pixels of an image.
"""

import hashlib
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_ds.common.errors import DataError
from moce_ds.common.host.program import warn
from moce_ds.common.text import in_line, listed, part_of
from moce_ds.data.containers import GRAY, PALETTE, Png
from moce_ds.data.image_file import (
    DECODER_FAULTS,
    MAX_PIXELS,
    NOT_AN_IMAGE,
    Rejected,
    file_content,
    open_image,
    pixel_limit,
    read_rgb,
    rotated_upright,
    suffixes,
    undecodable,
    upright,
    upright_size,
)
from moce_ds.data.sources.image_folder import ODD, list_folder, why_odd

IGNORED = 255
"""The label of ignored pixels."""

Colour = tuple[int, int, int]

_PNG_KINDS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with transparency", 6: "RGB with transparency"}
_MASK_DEPTHS = {GRAY: (8,), PALETTE: (1, 2, 4, 8)}
"""Accepted bits per value of a mask, by colour type."""
_CURE = "Write it again as a PNG of 8-bit gray, with the class of each pixel as its value"
_SKIPPED_SHOWN = 3


@dataclass(frozen=True)
class Ade20kSet:
    """An opened set.

    Attributes:
        images: its image files, sorted.
        masks: the folder of their masks.
        classes: K.
        max_pixels: larger images are refused.
    """

    images: list[Path]
    masks: Path
    classes: int
    reduce_zero_label: bool
    max_pixels: int

    @classmethod
    def open(cls, folder: Path, classes: int, reduce_zero_label: bool, max_pixels: int = MAX_PIXELS) -> "Ade20kSet":
        """Open `folder` with images/ and annotations/ inside; or images/NAME, whose masks are in annotations/NAME.

        Raises:
            DataError: a folder is missing or cannot be listed, there are no images, or an image has no mask.
        """
        images, masks = folder / "images", folder / "annotations"
        if not images.is_dir() and folder.parent.name == "images":
            images, masks = folder, folder.parent.parent / "annotations" / folder.name
        for part in (images, masks):
            if not part.is_dir():
                raise DataError(
                    f"{part} is not a folder: expected ADE20K's format, with images/ and annotations/ in {folder}, or "
                    "with images/NAME given and annotations/NAME beside it."
                )
        files = _pairs(images, masks)
        return cls(files, masks, classes, reduce_zero_label, max_pixels)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and sizes of all files."""
        files = [*self.images, *map(self._mask_of, self.images)]
        return hashlib.sha256(repr([(file.name, file.stat().st_size) for file in files]).encode()).hexdigest()

    def check_headers(self, numbers: Iterable[int] | None = None) -> None:
        """Check the headers of images `numbers`, by default all, and of their masks; `look` checks the pixels.

        Raises:
            DataError: a file cannot be read, sizes differ, or a mask is of an ambiguous kind.
        """
        for number in range(len(self)) if numbers is None else numbers:
            image = self.images[number]
            check_mask_header(self._mask_of(image), upright_size(image, self.max_pixels))

    def read(self, number: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Image number `number`, RGB, and its labels [H, W]: 0 to K - 1, or `IGNORED`.

        Does not verify checksums or the number of compressed pixels; `look` does, once before training.

        Raises:
            DataError: a file cannot be read, sizes differ, a label is not one of the classes, or the mask is of an
                ambiguous kind.
        """
        image, labels_HW, _ = self._read(number, strictly=False)
        return image, labels_HW

    def look(self, number: int) -> tuple[str, dict[int, Colour]]:
        """Read image number `number` and its mask strictly; returns the mask's file and its colours (see `Palettes`).

        Raises:
            DataError: as `read`; or a checksum is wrong, or pixels are missing.
        """
        return str(self._mask_of(self.images[number])), self._read(number, strictly=True)[2]

    def _read(self, number: int, strictly: bool) -> tuple[Image.Image, NDArray[np.uint8], dict[int, Colour]]:
        image = read_rgb(self.images[number], self.max_pixels, strictly)
        path = self._mask_of(self.images[number])
        mask = read_mask(path, image.size, strictly)
        labels_HW = mask.values_HW
        if self.reduce_zero_label:
            labels_HW = labels_HW - 1  # 8 bits, so 0 becomes 255
        if (beyond := labels_HW[(labels_HW >= self.classes) & (labels_HW != IGNORED)]).size:
            raise DataError(
                f"{path} holds the class {int(beyond.max()) + self.reduce_zero_label}; data.classes={self.classes} "
                f"{'from 1' if self.reduce_zero_label else 'from 0'} were expected."
            )
        return image, labels_HW, mask.colours

    def _mask_of(self, image: Path) -> Path:
        return self.masks / f"{image.stem}.png"


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


@dataclass(frozen=True)
class ClassMask:
    """The values [H, W], uint8, and the palette colours of those that occur."""

    values_HW: NDArray[np.uint8]
    colours: dict[int, Colour]


def check_mask_header(path: Path, size: tuple[int, int]) -> None:
    """Check the header of a mask whose image has `size` (width, height). Raises DataError."""
    _opened_mask(path, size)


def read_mask(path: Path, size: tuple[int, int], strictly: bool = True) -> ClassMask:
    """The mask at `path`, upright, of an image of `size` (width, height).

    Args:
        strictly: verify the checksums and check for missing pixels, which decompresses the PNG a second time.

    Raises:
        DataError: it is not a PNG, not of `size`, damaged, or of an ambiguous kind.
    """
    png, image = _opened_mask(path, size)
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


def _pairs(images: Path, masks: Path) -> list[Path]:
    """The images with a mask, sorted; logs a warning about skipped files.

    Raises:
        DataError: there are none, or an image has no mask.
    """
    known, mask_sizes = suffixes(), list_folder(masks)
    files, odd = [], {}
    for name, size in sorted(list_folder(images).items()):
        image, mask = images / name, masks / f"{Path(name).stem}.png"
        if image.suffix.lower() not in known:
            odd[image] = Rejected(NOT_AN_IMAGE, "its name is not that of an image")
        elif size == ODD:
            odd[image] = why_odd(image)
        elif mask_sizes.get(mask.name) == ODD:
            odd[mask] = why_odd(mask)
        else:
            files.append(image)
    if not files:
        raise DataError(f"{images} holds no .jpg or .png files, nor images of other formats.{_reasons(odd)}")
    if lost := [image for image in files if f"{image.stem}.png" not in mask_sizes]:
        raise DataError(
            f"{in_line(masks / lost[0].stem)}.png not found: the mask of {in_line(lost[0])}; "
            f"{part_of(len(lost), len(files), 'image', ('has', 'have'))} none. Masks are PNG files "
            "with the names of their images."
        )
    if odd:
        warn(f"{images}: {part_of(len(odd), len(odd) + len(files), 'file')} skipped:{_reasons(odd)}")
    return files


def _reasons(odd: Mapping[Path, Rejected]) -> str:
    """Some of the skipped files, each with the reason."""
    lines = [in_line(f"{path}: {why.reason} ({why.detail})") for path, why in odd.items()]
    return listed(lines[:_SKIPPED_SHOWN], len(lines))


def _opened_mask(path: Path, size: tuple[int, int]) -> tuple[Png, Image.Image]:
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
    if png.depth not in _MASK_DEPTHS.get(png.colour, ()):
        few = ": some programs read its values as shades, others as they are" * (png.colour == GRAY and png.depth < 8)
        raise DataError(
            f"{path} holds {png.depth}-bit {_PNG_KINDS[png.colour]}; expected 8-bit gray, or a palette{few}. {_CURE}."
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
