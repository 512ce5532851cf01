"""Data sets with splits as text or JSON lists: Aircraft, DTD, Food101, Pets, SUN397, VOC2007."""

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from moce_ds.data.sources.listing import Listed
from moce_ds.data.sources.public.dataset_splits import (
    DatasetSplits,
    first_existing,
    for_validation,
    read_lines,
    read_text,
)
from moce_ds.errors import DataError


def aircraft(source: Path, seed: int) -> DatasetSplits:
    """FGVC Aircraft by variant (100), official splits: `data/images_variant_{train,val,test}.txt`."""
    data = first_existing(source, "fgvc-aircraft-2013b/data", "data")

    def split(name: str) -> list[Listed]:
        rows = read_lines(data / f"images_variant_{name}.txt", 2)
        return [Listed(f"images/{image}.jpg", (variant,)) for image, variant in rows]

    return DatasetSplits(data, {name: split(name) for name in ("train", "val", "test")})


def dtd(source: Path, seed: int) -> DatasetSplits:
    """Describable textures (47), the first of the ten official splits: `labels/{train,val,test}1.txt`."""
    root = first_existing(source, "dtd/labels", "labels").parent

    def split(name: str) -> list[Listed]:
        return [_in_its_folder("images/", path) for (path,) in read_lines(root / f"labels/{name}1.txt")]

    return DatasetSplits(root, {name: split(name) for name in ("train", "val", "test")})


def food101(source: Path, seed: int) -> DatasetSplits:
    """Food (101): `meta/{train,test}.json`; a tenth of the training images of each class is for validation."""
    root = first_existing(source, "food-101/meta", "meta").parent

    def split(name: str) -> list[Listed]:
        path = root / f"meta/{name}.json"
        try:
            names = TypeAdapter(dict[str, list[str]]).validate_python(json.loads(read_text(path)))
        except (ValidationError, ValueError, RecursionError):
            raise DataError(f"{path} is not a list of images by class: unpack the data set again.") from None
        return [Listed(f"images/{image}.jpg", (food,)) for food, images in names.items() for image in images]

    train, val = for_validation(split("train"), seed, 0.1)
    return DatasetSplits(root, {"train": train, "val": val, "test": split("test")})


def pets(source: Path, seed: int) -> DatasetSplits:
    """Oxford-IIIT Pets by breed (37): `annotations/{trainval,test}.txt`; a fifth of trainval is for validation."""

    def split(name: str) -> list[Listed]:
        rows = read_lines(first_existing(source, f"annotations/{name}.txt"), 2)
        return [Listed(f"images/{image}.jpg", (image.rpartition("_")[0],)) for image, _ in rows]

    train, val = for_validation(split("trainval"), seed, 0.2)
    return DatasetSplits(source, {"train": train, "val": val, "test": split("test")})


def sun397(source: Path, seed: int) -> DatasetSplits:
    """Scenes (397), the first of the ten official partitions: `{Training,Testing}_01.txt`, beside the images or in
    `Partitions`.

    A fifth of the training images is for validation.
    """
    root = first_existing(source, "SUN397/ClassName.txt", "ClassName.txt").parent
    folder = first_existing(source, "Training_01.txt", "Partitions/Training_01.txt", "SUN397/Training_01.txt").parent

    def split(name: str) -> list[Listed]:
        return [_in_its_folder("", path.lstrip("/")) for (path,) in read_lines(folder / f"{name}_01.txt")]

    train, val = for_validation(split("Training"), seed, 0.2)
    return DatasetSplits(root, {"train": train, "val": val, "test": split("Testing")})


def voc2007(source: Path, seed: int) -> DatasetSplits:
    """PASCAL VOC 2007 (20), several classes per image: `ImageSets/Main/CLASS_{train,val,test}.txt`.

    trainval and test must be unpacked into the same folder. Classes marked as difficult (0 in the list) are ignored.
    """
    root = first_existing(source, "VOCdevkit/VOC2007/ImageSets", "VOC2007/ImageSets", "ImageSets").parent
    lists = root / "ImageSets/Main"
    classes = sorted(path.name.removesuffix("_train.txt") for path in lists.glob("[!.]*_train.txt"))
    if not classes:
        raise DataError(f"{lists} holds no CLASS_train.txt: unpack the data set again.")

    def split(name: str) -> list[Listed]:
        shown: dict[str, dict[str, list[str]]] = {}
        for object_class in classes:
            for image, state in read_lines(lists / f"{object_class}_{name}.txt", 2):
                shown.setdefault(image, {"1": [], "0": [], "-1": []}).setdefault(state, []).append(object_class)
        return [
            Listed(f"JPEGImages/{image}.jpg", tuple(states["1"]), tuple(states["0"])) for image, states in shown.items()
        ]

    return DatasetSplits(root, {name: split(name) for name in ("train", "val", "test")}, multi_label=True)


def _in_its_folder(prefix: str, path: str) -> Listed:
    return Listed(prefix + path, (path.rpartition("/")[0],))
