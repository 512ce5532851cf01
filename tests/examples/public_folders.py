"""Miniatures of the public data sets: the folders and files that they ship, with a few tiny images."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(value).integers(0, 255, (12, 10, 3), np.uint8)).save(path, "JPEG")


def pictures(root: Path, names: Iterable[str]) -> None:
    for value, name in enumerate(names):
        picture(root / name, value)


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def aircraft(root: Path) -> None:
    rows = {"train": ["10 707-320", "11 F/A-18"], "val": ["20 F/A-18"], "test": ["30 707-320", "31 A300 B4"]}
    rows["train"].append("12 A300 B4")
    for split, lines in rows.items():
        text(root / f"data/images_variant_{split}.txt", *lines)
        pictures(root, [f"data/images/{line.split()[0]}.jpg" for line in lines])


def caltech101(root: Path) -> None:
    for name, count in (("BACKGROUND_Google", 33), ("accordion", 6), ("yin_yang", 40)):
        text(root / "101_ObjectCategories" / name / "tmp", "no image")
        pictures(root / "101_ObjectCategories" / name, [f"image_{i:04d}.jpg" for i in range(1, count + 1)])


def _annotations(rows: list[tuple[str, int]]) -> dict[str, Any]:
    kind = [("bbox_x1", "f8"), ("class", "f8"), ("fname", object)]
    return {"annotations": np.array([(1.0, number, name) for name, number in rows], kind)}


def cars(root: Path) -> None:
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": np.array(["AM General Hummer", "Acura RL"], object)})
    train, test = [(f"{i:05d}.jpg", 1 + i % 2) for i in range(10)], [("00001.jpg", 2), ("00002.jpg", 1)]
    savemat(root / "devkit/cars_train_annos.mat", _annotations(train))
    savemat(root / "cars_test_annos_withlabels.mat", _annotations(test))
    pictures(root / "cars_train", [name for name, _ in train])
    pictures(root / "cars_test", [name for name, _ in test])


def _cifar_rows(labels: Iterable[tuple[int, ...]]) -> bytes:
    pixels = np.arange(3 * 32 * 32, dtype=np.uint32)
    rows = (bytes(label) + (pixels * number % 251).astype(np.uint8).tobytes() for number, label in enumerate(labels, 1))
    return b"".join(rows)


def cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    text(folder / "batches.meta.txt", "airplane", "automobile", "")
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(_cifar_rows([(0,), (1,), (number % 2,)]))
    (folder / "test_batch.bin").write_bytes(_cifar_rows([(1,), (0,), (1,)]))


def cifar100(root: Path) -> None:
    folder = root / "cifar-100-binary"
    text(folder / "fine_label_names.txt", "apple", "aquarium_fish")
    (folder / "train.bin").write_bytes(_cifar_rows([(9, i % 2) for i in range(10)]))
    (folder / "test.bin").write_bytes(_cifar_rows([(9, 1), (9, 0)]))


def dtd(root: Path) -> None:
    for split, numbers in (("train", (1, 2)), ("val", (3,)), ("test", (4, 5))):
        names = [f"{texture}/{texture}_{n:04d}.jpg" for texture in ("banded", "zigzagged") for n in numbers]
        text(root / f"dtd/labels/{split}1.txt", *names)
        pictures(root / "dtd/images", names)


def flowers102(root: Path) -> None:
    root.mkdir(parents=True)
    savemat(root / "imagelabels.mat", {"labels": np.array([[77, 3, 77, 3, 3, 77]], np.uint8)})
    splits = {"trnid": [[1, 2]], "valid": [[4, 3]], "tstid": [[6, 5]]}
    savemat(root / "setid.mat", {name: np.array(ids, np.uint16) for name, ids in splits.items()})
    pictures(root / "jpg", [f"image_{i:05d}.jpg" for i in range(1, 7)])


def food101(root: Path) -> None:
    images = {"train": {"ramen": ["ramen/1", "ramen/2"], "apple_pie": ["apple_pie/3", "apple_pie/4"]}}
    images["test"] = {"ramen": ["ramen/5"], "apple_pie": ["apple_pie/6"]}
    for split, names in images.items():
        text(root / f"food-101/meta/{split}.json", json.dumps(names))
        pictures(root / "food-101/images", [f"{image}.jpg" for of in names.values() for image in of])


def pets(root: Path) -> None:
    rows = {"trainval": [f"Abyssinian_{n} 1 1 1" for n in (1, 2)] + [f"american_bulldog_{n} 2 2 1" for n in (3, 4)]}
    rows["test"] = ["Abyssinian_100 1 1 1", "american_bulldog_200 2 2 1"]
    for split, lines in rows.items():
        text(root / f"annotations/{split}.txt", *lines)
        pictures(root / "images", [f"{line.split()[0]}.jpg" for line in lines])


def sun397(root: Path) -> None:
    text(root / "SUN397/ClassName.txt", "/a/abbey", "/c/church/indoor")
    for split, numbers in (("Training", (1, 2, 3)), ("Testing", (4,))):
        names = [f"/{scene}/sun_{n}.jpg" for scene in ("a/abbey", "c/church/indoor") for n in numbers]
        text(root / f"Partitions/{split}_01.txt", *names)
        pictures(root / "SUN397", [name[1:] for name in names])


def voc2007(root: Path) -> None:
    states = {  # of cat and of sofa
        "train": {"000001": (1, -1), "000002": (-1, 1), "000003": (1, 0)},
        "val": {"000004": (-1, 1)},
        "test": {"000005": (1, 1), "000006": (-1, -1), "000007": (0, 1)},
    }
    lists = root / "VOCdevkit/VOC2007/ImageSets/Main"
    for split, images in states.items():
        for column, name in enumerate(("cat", "sofa")):
            text(lists / f"{name}_{split}.txt", *(f"{image} {row[column]:2d}" for image, row in images.items()))
        text(lists / f"{split}.txt", *images)
        pictures(root / "VOCdevkit/VOC2007/JPEGImages", [f"{image}.jpg" for image in images])


MINIATURES: dict[str, Callable[[Path], None]] = {
    make.__name__: make
    for make in (
        aircraft, caltech101, cars, cifar10, cifar100, dtd, flowers102, food101, pets, sun397, voc2007,
    )
}  # fmt: skip
