"""Images with boxes and masks in COCO's format: a folder of images and one JSON file of annotations.

Everything that can be seen in the JSON is checked when the set is opened, so that a fault is told before training and
not hours into it.

Axes: H x W pixels of an image.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError

from moce_ds.data.coco_api import is_polygons, is_rle, unpack
from moce_ds.data.image_file import read_rgb
from moce_ds.errors import DataError

_SLACK = 2.0  # pixels by which a box may leave its image: rounding


@dataclass(frozen=True)
class CocoImage:
    """An image of the JSON file, sizes in pixels."""

    id: int
    file_name: str
    width: Annotated[int, Field(gt=0)]
    height: Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class CocoObject:
    """An annotation of the JSON file; `bbox` is x, y, width, height in pixels, `segmentation` polygons or RLE."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    segmentation: Any = None
    iscrowd: int = 0


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
        folder: where the images are.
        images: all of them, by id.
        objects: for each image its objects, in the file's order; crowds too.
        categories: names by the file's category id, by rising id: their order gives the labels 0, 1, ...
    """

    path: Path
    folder: Path
    images: list[CocoImage]
    objects: list[list[CocoObject]]
    categories: dict[int, str]

    @classmethod
    def open(cls, path: Path, folder: Path) -> "CocoSet":
        """Read and check a set.

        Raises:
            DataError: the JSON is not COCO's; an id appears twice; an image is not there; an annotation, which is then
                named, has an unknown image or category, or a box that leaves the image.
        """
        content = _read(path)
        for kind, things in (("images", content.images), ("categories", content.categories)):
            if not things:
                raise DataError(f"{path}: `{kind}` is empty; expected at least one.")
            (most, times), *_ = Counter(thing.id for thing in things).most_common(1)
            if times > 1:
                raise DataError(f"{path}: {kind}: {times} have the id {most}; expected another id for each.")
        images = sorted(content.images, key=lambda image: image.id)
        _check_files(path, folder, images)
        categories = {c.id: c.name for c in sorted(content.categories, key=lambda c: c.id)}
        by_id, objects = {image.id: image for image in images}, defaultdict(list)
        for thing in content.annotations:
            _check_object(path, thing, by_id.get(thing.image_id), categories)
            objects[thing.image_id].append(thing)
        return cls(path, folder, images, [objects[image.id] for image in images], categories)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> dict[int, int]:
        """The label, from 0, of each category id."""
        return {category: label for label, category in enumerate(self.categories)}

    @property
    def with_objects(self) -> list[int]:
        """Numbers of the images that have an object to learn from, which is no crowd."""
        return [n for n, objects in enumerate(self.objects) if any(not thing.iscrowd for thing in objects)]

    def image(self, number: int) -> Image.Image:
        """Image number `number`, RGB. Raises DataError: it cannot be read, or its size is not the JSON's."""
        told = self.images[number]
        image = read_rgb(self.folder / told.file_name)
        if image.size != (told.width, told.height):
            raise DataError(
                f"{self.folder / told.file_name} has {image.width} x {image.height} pixels; {self.path} says "
                f"{told.width} x {told.height}."
            )
        return image

    def mask(self, number: int, thing: CocoObject) -> NDArray[np.uint8]:
        """The mask of an object of image number `number`, [H, W] of 0 and 1.

        Raises:
            DataError: there is none, it is neither polygons nor RLE, or it is of another size than the image.
        """
        image, shape = self.images[number], thing.segmentation
        where = f"{self.path}: annotation {thing.id}: segmentation"
        if is_rle(shape):
            if list(shape["size"]) != [image.height, image.width]:
                raise DataError(
                    f"{where} is of height and width {shape['size']}; its image has {[image.height, image.width]}."
                )
        elif not is_polygons(shape):
            raise DataError(f"{where} is neither polygons, of three points or more, nor RLE.")
        return unpack(shape, image.height, image.width)


def _read(path: Path) -> _Content:
    try:
        return TypeAdapter(_Content).validate_python(json.loads(path.read_bytes()))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): expected COCO's instances in JSON.") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise DataError(
            f"{path}: {where}: {fault['msg']} ({error.error_count()} faults); expected COCO's format."
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): expected COCO's instances.") from None


def _check_files(path: Path, folder: Path, images: list[CocoImage]) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: expected the images of {path}.")
    there = {file.name for file in folder.iterdir()}
    missing = [i for i in images if i.file_name not in there and not (folder / i.file_name).is_file()]
    if missing:
        first = missing[0]
        raise DataError(
            f"{folder / first.file_name} not found: {path} has it as image {first.id}; {len(missing)} of {len(images)} "
            "images are missing. Give the folder that holds them."
        )


def _check_object(path: Path, thing: CocoObject, image: CocoImage | None, categories: dict[int, str]) -> None:
    where = f"{path}: annotation {thing.id}"
    if image is None:
        raise DataError(f"{where} belongs to image {thing.image_id}, which is not among `images`.")
    if thing.category_id not in categories:
        raise DataError(f"{where} has category {thing.category_id}, which is not among `categories`.")
    x, y, width, height = thing.bbox
    inside = x >= -_SLACK and y >= -_SLACK and x + width <= image.width + _SLACK and y + height <= image.height + _SLACK
    if not inside or width < 0 or height < 0:
        raise DataError(
            f"{where}: box {[x, y, width, height]} (x, y, width, height) leaves its image {image.file_name} of "
            f"{image.width} x {image.height} pixels."
        )
