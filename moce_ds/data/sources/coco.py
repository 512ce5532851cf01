"""Images with boxes and masks in COCO's format: a folder of images and one JSON file of annotations.

Everything visible in the JSON is checked when the set is opened (`coco_checks`), so that faults appear before training
and not hours into it.

Axes: H x W pixels of an image.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from moce_ds.data.image_file import MAX_PIXELS, read_rgb, upright_size
from moce_ds.data.sources.coco_api import unpack
from moce_ds.data.sources.coco_checks import (
    CocoImage,
    CocoObject,
    check_files,
    check_ids,
    check_images,
    check_object,
    emptiness,
    empty_warning,
)
from moce_ds.errors import DataError
from moce_ds.storage.files import reads_from


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
            check_ids(path, kind, [thing.id for thing in things])
        check_ids(path, "annotations", [thing.id for thing in content.annotations])
        images = sorted(content.images, key=lambda image: image.id)
        check_images(path, images, max_pixels)
        check_files(path, folder, images)
        categories = {c.id: c.name for c in sorted(content.categories, key=lambda c: c.id)}
        by_id, objects, empty = {image.id: image for image in images}, defaultdict(list), {}
        for thing in content.annotations:
            check_object(path, thing, by_id.get(thing.image_id), categories)
            objects[thing.image_id].append(thing)
            if why := emptiness(thing, by_id[thing.image_id]):
                empty[thing.id] = why
        warning = empty_warning(path, empty, len(content.annotations))
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

    def _check_size(self, listed: CocoImage, size: tuple[int, int]) -> None:
        if size != (listed.width, listed.height):
            raise DataError(
                f"{self.folder / listed.file_name} has {size[0]} x {size[1]} pixels; {self.path} says "
                f"{listed.width} x {listed.height}. Expected the size after the rotation by its EXIF in both."
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
            f"{path}: {where}{_id_at(content, fault['loc'])}: {fault['msg']} ({error.error_count()} faults); expected "
            "COCO's format."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): expected COCO's instances.") from None


def _id_at(content: Any, place: tuple[int | str, ...]) -> str:
    """The id of the list entry that contains `place`, as text beside its position; "" if it has none."""
    if len(place) < 3:
        return ""
    entry = content[place[0]][place[1]]
    return f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else ""
