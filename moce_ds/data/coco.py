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

from moce_ds.data.coco_api import segmentation_fault, unpack
from moce_ds.data.image_file import read_rgb, upright_size
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
    """An annotation of the JSON file; `bbox` is x, y, width, height in pixels, `segmentation` polygons or RLE, `area`
    that of the mask."""

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
                named, has an unknown image or category, a box that leaves the image, no segmentation, or one that
                cannot be.
        """
        content = _read(path)
        for kind, things in (("images", content.images), ("categories", content.categories)):
            if not things:
                raise DataError(f"{path}: `{kind}` is empty; expected at least one.")
            _check_ids(path, kind, [thing.id for thing in things])
        _check_ids(path, "annotations", [thing.id for thing in content.annotations])
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

    @property
    def truth(self) -> dict[str, Any]:
        """What pycocotools compares detections with. It takes 0 for the id of no annotation, so they are numbered from
        1; only crowds and servers need what a file may leave out."""
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

    def check_sizes(self) -> None:
        """Look at the headers of all images. Raises DataError: one is no image, or its size is not the JSON's."""
        for image in self.images:
            self._check_size(image, upright_size(self.folder / image.file_name))

    def image(self, number: int) -> Image.Image:
        """Image number `number`, RGB. Raises DataError: it cannot be read, or its size is not the JSON's."""
        image = read_rgb(self.folder / self.images[number].file_name)
        self._check_size(self.images[number], image.size)
        return image

    def _check_size(self, told: CocoImage, size: tuple[int, int]) -> None:
        if size != (told.width, told.height):
            raise DataError(
                f"{self.folder / told.file_name} has {size[0]} x {size[1]} pixels; {self.path} says "
                f"{told.width} x {told.height}."
            )

    def mask(self, number: int, thing: CocoObject) -> NDArray[np.uint8]:
        """The mask of an object of image number `number`, [H, W] of 0 and 1."""
        image = self.images[number]
        return unpack(thing.segmentation, image.height, image.width)


def _read(path: Path) -> _Content:
    content: Any = None
    try:
        content = json.loads(path.read_bytes())
        return TypeAdapter(_Content).validate_python(content)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): expected COCO's instances in JSON.") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise DataError(
            f"{path}: {where}{_id_at(content, fault['loc'])}: {fault['msg']} ({error.error_count()} faults); expected "
            "COCO's format."
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): expected COCO's instances.") from None


def _id_at(content: Any, place: tuple[int | str, ...]) -> str:
    """The id of the entry of a list that `place` lies in, to be told beside its position; "" where it has none."""
    if len(place) < 3:
        return ""
    entry = content[place[0]][place[1]]
    return f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else ""


def _check_ids(path: Path, kind: str, ids: list[int]) -> None:
    for most, times in Counter(ids).most_common(1):
        if times > 1:
            raise DataError(f"{path}: {kind}: {times} have the id {most}; expected another id for each.")


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
    if fault := segmentation_fault(thing.segmentation, image.height, image.width):
        raise DataError(f"{where}: segmentation {fault}.")
