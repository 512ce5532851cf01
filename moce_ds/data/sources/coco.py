"""Images with boxes and masks in COCO's format: a folder of images and one JSON file of annotations.

Everything visible in the JSON is checked when the set is opened, so that faults appear before training. Faults that
cannot be repaired are refused and named. Objects without pixels are skipped with a warning if there are few: most sets,
including COCO itself, have some. Many of them indicate a fault of the converter.

Axes: H x W pixels of an image.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError

from moce_ds.common.errors import DataError
from moce_ds.common.host.machine import machine_failed, refused
from moce_ds.common.storage.files import reads_from
from moce_ds.common.text import listed, part_of
from moce_ds.common.validation import expectation
from moce_ds.data.image_file import MAX_PIXELS, MAX_SIDE, read_rgb, upright_size
from moce_ds.data.sources.coco_api import has_pixels, polygons_of, segmentation_fault, unpack
from moce_ds.data.sources.image_folder import ODD, leads_out, list_folder

_SLACK = 2.0
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


@dataclass(frozen=True)
class _Category:
    id: int
    name: str


@dataclass(frozen=True)
class _Content:
    images: list[CocoImage]
    annotations: list[CocoObject]
    categories: list[_Category]


@dataclass(frozen=True)
class CocoSet:
    """An opened set.

    Attributes:
        path: the JSON file.
        folder: the folder of the images.
        images: all images, by id.
        objects: the objects of each image, in the file's order, including crowds.
        categories: names by the file's category id, by rising id: their order gives the labels 0, 1, ...
        max_pixels: larger images are refused.
        empty: objects with nothing to learn from, by id, with the reason; they still count in the average precision.
        warning: a message about them, if there are any.
    """

    path: Path
    folder: Path
    images: list[CocoImage]
    objects: list[list[CocoObject]]
    categories: dict[int, str]
    max_pixels: int
    empty: dict[int, str]
    warning: str | None

    @classmethod
    def open(cls, path: Path, folder: Path, max_pixels: int = MAX_PIXELS) -> "CocoSet":
        """Read and check a set.

        Raises:
            DataError: the JSON is not COCO's; an id appears twice; an image is missing, outside of the folder, or
                larger than `max_pixels`; an annotation (which is named) has an unknown image or category, a box or
                corner outside of the image, or a missing or invalid segmentation; or more than a tenth of the
                annotations have nothing to learn from.
        """
        content = _read(path)
        for kind, things in (("images", content.images), ("categories", content.categories)):
            if not things:
                raise DataError(f"{path}: `{kind}` is empty; expected at least one.")
            _check_ids(path, kind, [thing.id for thing in things])
        _check_ids(path, "annotations", [thing.id for thing in content.annotations])
        images = sorted(content.images, key=lambda image: image.id)
        _check_images(path, images, max_pixels)
        _check_files(path, folder, images)
        categories = {c.id: c.name for c in sorted(content.categories, key=lambda c: c.id)}
        by_id, objects, empty = {image.id: image for image in images}, defaultdict(list), {}
        for thing in content.annotations:
            _check_object(path, thing, by_id.get(thing.image_id), categories)
            objects[thing.image_id].append(thing)
            if why := _emptiness(thing, by_id[thing.image_id]):
                empty[thing.id] = why
        warning = _empty_warning(path, empty, len(content.annotations))
        return cls(
            path, folder, images, [objects[image.id] for image in images], categories, max_pixels, empty, warning
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> dict[int, int]:
        """The label, from 0, of each category id."""
        return {category: label for label, category in enumerate(self.categories)}

    @property
    def with_objects(self) -> list[int]:
        """Numbers of the images with an object to learn from."""
        return [n for n in range(len(self)) if self.to_learn(n)]

    def to_learn(self, number: int) -> list[CocoObject]:
        """The objects of image number `number` to learn from: no crowds and no empty ones."""
        return [thing for thing in self.objects[number] if not thing.iscrowd and thing.id not in self.empty]

    @property
    def truth(self) -> dict[str, Any]:
        """Ground truth for pycocotools.

        It treats the id 0 as no annotation, so annotations are numbered from 1. Optional keys of the file get default
        values.
        """
        things = [thing for objects in self.objects for thing in objects]
        return {
            "info": {},
            "images": [dict(vars(image)) for image in self.images],
            "categories": [{"id": category, "name": name} for category, name in self.categories.items()],
            "annotations": [
                {**vars(t), "id": n, "bbox": list(t.bbox), "area": t.bbox[2] * t.bbox[3] if t.area is None else t.area}
                for n, t in enumerate(things, 1)
            ],
        }

    def look(self, number: int) -> None:
        """Read image number `number` strictly. Raises DataError as `image`, or if pixels are missing."""
        self._read(number, strictly=True)

    def check_headers(self, numbers: Iterable[int] | None = None) -> None:
        """Check the headers of images `numbers`, by default all.

        Raises:
            DataError: a file is not an image, or its size differs from the JSON.
        """
        for image in self.images if numbers is None else (self.images[number] for number in numbers):
            self._check_size(image, upright_size(self.folder / image.file_name, self.max_pixels))

    def image(self, number: int) -> Image.Image:
        """Image number `number`, RGB. Raises DataError if it cannot be read or its size differs from the JSON."""
        return self._read(number, strictly=False)

    def _read(self, number: int, strictly: bool) -> Image.Image:
        image = read_rgb(self.folder / self.images[number].file_name, self.max_pixels, strictly)
        self._check_size(self.images[number], image.size)
        return image

    def _check_size(self, image: CocoImage, size: tuple[int, int]) -> None:
        if size != (image.width, image.height):
            raise DataError(
                f"{self.folder / image.file_name} has {size[0]} x {size[1]} pixels; {self.path} says "
                f"{image.width} x {image.height}. Expected the size after the rotation by its EXIF in both."
            )

    def mask(self, number: int, thing: CocoObject) -> NDArray[np.uint8]:
        """The mask of an object of image number `number`, [H, W] of 0 and 1."""
        image = self.images[number]
        return unpack(thing.segmentation, image.height, image.width)


def _read(path: Path) -> _Content:
    with reads_from(path, "expected COCO's instances in JSON.", DataError):
        data = path.read_bytes()
    content: Any = None
    try:
        content = json.loads(data)
        return TypeAdapter(_Content).validate_python(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise DataError(
            f"{path}: {where}{_id_at(content, fault['loc'])}: {expectation(fault)} ({error.error_count()} faults); the "
            "file is not in COCO's format."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): expected COCO's instances.") from None


def _id_at(content: Any, place: tuple[int | str, ...]) -> str:
    """The id of the list entry that contains `place`, as text beside its position; "" if it has none."""
    if len(place) < 3:
        return ""
    entry = content[place[0]][place[1]]
    return f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else ""


def _check_ids(path: Path, kind: str, ids: list[int]) -> None:
    """Raise DataError if an id occurs twice."""
    for most, times in Counter(ids).most_common(1):
        if times > 1:
            raise DataError(f"{path}: {kind}: {times} have the id {most}; expected another id for each.")


def _check_images(path: Path, images: list[CocoImage], max_pixels: int) -> None:
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


def _check_files(path: Path, folder: Path, images: list[CocoImage]) -> None:
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


def _check_object(path: Path, thing: CocoObject, image: CocoImage | None, categories: dict[int, str]) -> None:
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
    inside = x >= -_SLACK and y >= -_SLACK and x + width <= image.width + _SLACK and y + height <= image.height + _SLACK
    if not inside or not width >= 0 or not height >= 0:
        raise DataError(
            f"{where}: box {[x, y, width, height]} (x, y, width, height) is not inside its image {image.file_name} of "
            f"{image.width} x {image.height} pixels."
        )
    if fault := segmentation_fault(thing.segmentation, image.height, image.width, _SLACK):
        raise DataError(f"{where}: segmentation {fault}.")


def _emptiness(thing: CocoObject, image: CocoImage) -> str | None:
    """Why a checked object contributes nothing to training; None if it does."""
    x, y, width, height = thing.bbox
    if not width or not height:
        return f"a box of {width:g} x {height:g} pixels"
    if min(image.width, image.height) > 1:
        corners = polygons_of(thing.segmentation)
        if max(x + width, y + height) <= 1 or (corners and max(map(max, corners)) <= 1):
            return "inside the first pixel, like coordinates relative to the image size"
    return None if has_pixels(thing.segmentation, image.height, image.width) else "a mask without a pixel"


def _empty_warning(path: Path, empty: dict[int, str], count: int) -> str | None:
    """A warning about objects without anything to learn from, of `count` objects; None if there are none.

    Raises:
        DataError: there are too many.
    """
    if not empty:
        return None
    named = listed([f"annotation {number}: {why}" for number, why in list(empty.items())[:_NAMED]], len(empty))
    if len(empty) > _MOST_EMPTY * count:
        raise DataError(
            f"{path}: {part_of(len(empty), count, 'annotation', ('has', 'have'))} nothing to learn from; "
            "expected a tenth of them at most, with boxes and polygons in pixels, inside of their image. Convert the "
            f"set again.{named}"
        )
    return f"{path}: {part_of(len(empty), count, 'annotation')} skipped in training:{named}"
