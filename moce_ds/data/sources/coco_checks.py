"""Checks of a set in COCO's format before training: names, sizes, boxes and masks.

Faults that cannot be repaired are refused and named. Objects without pixels are skipped with a warning if there are
few: most sets, including COCO itself, have some. Many of them mean that a converter went wrong.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from moce_ds.data.image_file import MAX_SIDE
from moce_ds.data.sources.coco_api import has_pixels, polygons_of, segmentation_fault
from moce_ds.data.sources.walk import ODD, leads_out, list_folder
from moce_ds.errors import DataError
from moce_ds.host.machine import machine_failed, refused
from moce_ds.text import part_of

SLACK = 2.0
"""Pixels by which a box or a corner may leave its image; such rounding errors are clipped."""

_MOST_EMPTY = 0.1  # share of the annotations
_NAMED = 3


@dataclass(frozen=True)
class CocoImage:
    """An image of the JSON file, sizes in pixels."""

    id: int
    file_name: str
    width: Annotated[int, Field(gt=0)]
    height: Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class CocoObject:
    """An annotation of the JSON file.

    Attributes:
        bbox: x, y, width, height in pixels.
        segmentation: polygons or RLE.
        area: of the mask.
    """

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    segmentation: Any = None
    iscrowd: int = 0
    area: float | None = None


def check_ids(path: Path, kind: str, ids: list[int]) -> None:
    """Raise DataError if an id occurs twice."""
    for most, times in Counter(ids).most_common(1):
        if times > 1:
            raise DataError(f"{path}: {kind}: {times} have the id {most}; expected another id for each.")


def check_images(path: Path, images: list[CocoImage], max_pixels: int) -> None:
    """Check that names stay in their folder and sizes are valid. Raises DataError."""
    for image in images:
        where, name = f"{path}: image {image.id}", image.file_name
        if leads_out(name):
            raise DataError(
                f"{where}: file_name {name!r}; expected the path of a file below the folder of images, such as "
                "'train/1.jpg'. Pass the folder that contains all images, and paths relative to it."
            )
        if image.width * image.height > max_pixels or max(image.width, image.height) > MAX_SIDE:
            raise DataError(
                f"{where} ({name}) has {image.width} x {image.height} pixels; expected {max_pixels} in all and "
                f"{MAX_SIDE} along a side at most. Make it smaller, or raise data.max_pixels."
            )


def check_files(path: Path, folder: Path, images: list[CocoImage]) -> None:
    """Raise DataError if an image is missing."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: expected the images of {path}.")
    present = {name for name, size in list_folder(folder).items() if size != ODD}
    missing = [i for i in images if i.file_name not in present and not _is_there(folder / i.file_name)]
    if missing:
        first = missing[0]
        raise DataError(
            f"{folder / first.file_name} not found: it is image {first.id} of {path}; "
            f"{part_of(len(missing), len(images), 'image')} missing. Pass the folder that contains them."
        )


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError as error:  # such as a link to itself, or a name that is too long
        if machine_failed(error):
            raise refused(DataError, f"{file} cannot be read", error, file) from None
        return False


def check_object(path: Path, thing: CocoObject, image: CocoImage | None, categories: dict[int, str]) -> None:
    """Raise DataError if an annotation has an unknown image or category, leaves its image, or has no valid mask."""
    where = f"{path}: annotation {thing.id}"
    if image is None:
        raise DataError(f"{where} belongs to image {thing.image_id}, which is not among `images`.")
    if thing.category_id not in categories:
        raise DataError(f"{where} has category {thing.category_id}, which is not among `categories`.")
    if thing.iscrowd not in (0, 1):
        raise DataError(f"{where}: iscrowd is {thing.iscrowd}; expected 0 or 1.")
    if thing.area is not None and not 0 <= thing.area < math.inf:
        raise DataError(f"{where}: area is {thing.area}; expected the pixels of its mask, or no `area`.")
    x, y, width, height = thing.bbox
    inside = x >= -SLACK and y >= -SLACK and x + width <= image.width + SLACK and y + height <= image.height + SLACK
    if not inside or not width >= 0 or not height >= 0:
        raise DataError(
            f"{where}: box {[x, y, width, height]} (x, y, width, height) is not inside its image {image.file_name} of "
            f"{image.width} x {image.height} pixels."
        )
    if fault := segmentation_fault(thing.segmentation, image.height, image.width, SLACK):
        raise DataError(f"{where}: segmentation {fault}.")


def emptiness(thing: CocoObject, image: CocoImage) -> str | None:
    """Why a checked object has nothing to learn from; None if it has."""
    x, y, width, height = thing.bbox
    if not width or not height:
        return f"a box of {width:g} x {height:g} pixels"
    if min(image.width, image.height) > 1:
        corners = polygons_of(thing.segmentation)
        if max(x + width, y + height) <= 1 or (corners and max(map(max, corners)) <= 1):
            return "inside the first pixel, like coordinates relative to the image size"
    return None if has_pixels(thing.segmentation, image.height, image.width) else "a mask without a pixel"


def empty_warning(path: Path, empty: dict[int, str], count: int) -> str | None:
    """A warning about objects without anything to learn from, of `count` objects; None if there are none.

    Raises:
        DataError: there are too many.
    """
    if not empty:
        return None
    named = "".join(f"\n  annotation {number}: {why}" for number, why in list(empty.items())[:_NAMED])
    more = f"\n  and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
    if len(empty) > _MOST_EMPTY * count:
        raise DataError(
            f"{path}: {part_of(len(empty), count, 'annotation', ('has', 'have'))} nothing to learn from; "
            "expected a tenth of them at most, with boxes and polygons in pixels, inside of their image. Convert the "
            f"set again.{named}{more}"
        )
    return f"{path}: {part_of(len(empty), count, 'annotation')} skipped in training:{named}{more}"
