"""Images with a class per pixel in ADE20K's format: a folder of images and one of PNG masks with the same names.

A mask holds 1 to K for the classes and 0 for pixels without one, which are ignored by loss and score
(`reduce_zero_label`); or 0 to K - 1, where 255 is ignored.

Axes: H x W pixels of an image.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_ds.console import warn
from moce_ds.data.image_file import MAX_PIXELS, NOT_AN_IMAGE, Rejected, read_rgb, suffixes, upright_size
from moce_ds.data.sources.class_mask import Colour, check_mask_header, read_mask
from moce_ds.data.sources.skipped_files import listed_reasons
from moce_ds.data.sources.walk import ODD, list_folder, why_odd
from moce_ds.errors import DataError
from moce_ds.text import in_line, part_of

IGNORED = 255
"""The label of ignored pixels."""


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
    max_pixels: int = MAX_PIXELS

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
        raise DataError(f"{images} holds no .jpg or .png files, nor images of other formats.{listed_reasons(odd)}")
    if lost := [image for image in files if f"{image.stem}.png" not in mask_sizes]:
        raise DataError(
            f"{in_line(masks / lost[0].stem)}.png not found: the mask of {in_line(lost[0])}; "
            f"{part_of(len(lost), len(files), 'image', ('has', 'have'))} none. Masks are PNG files "
            "with the names of their images."
        )
    if odd:
        warn(f"{images}: {part_of(len(odd), len(odd) + len(files), 'file')} skipped:{listed_reasons(odd)}")
    return files
