"""The readers of public data sets: from the distributed files to the images of each split.

Nothing is executed: the readers read text, JSON, MATLAB's .mat (numbers and text only) and raw bytes, never Python
pickles.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from moce_ds.common.errors import DataError
from moce_ds.common.host.machine import machine_failed, refused
from moce_ds.common.storage.files import reads_from
from moce_ds.data.sources.image_folder import ODD, list_files, unwanted
from moce_ds.data.sources.listing import Listed

SPLITS = ("train", "val", "test")

_UNPACK_AGAIN = "unpack the data set again."
_LOADMAT_FAULTS = (OSError, ValueError, TypeError, LookupError, NotImplementedError, MatReadError)
"""Errors that loadmat raises on damaged files and on version 7.3; they have no common base."""

_CALTECH_TRAINING, _CALTECH_VALIDATION = 30, 5  # images of each class; the rest is for testing
_CIFAR_SIDE = 32  # pixels

_Rows = NDArray[np.uint8]


@dataclass(frozen=True)
class DatasetSplits:
    """The images of a data set by split (`SPLITS`), with paths below `root`.

    `multi_label`: an image may show several classes, or none.
    """

    root: Path
    splits: dict[str, list[Listed]]
    multi_label: bool = False

    @property
    def classes(self) -> list[str]:
        """All class names, sorted."""
        images = [image for images in self.splits.values() for image in images]
        return sorted({name for image in images for name in image.classes + image.unsure})


def aircraft(source: Path, seed: int) -> DatasetSplits:
    """FGVC Aircraft by variant (100), official splits: `data/images_variant_{train,val,test}.txt`."""
    data = _first_existing(source, "fgvc-aircraft-2013b/data", "data")

    def split(name: str) -> list[Listed]:
        rows = _read_lines(data / f"images_variant_{name}.txt", 2)
        return [Listed(f"images/{image}.jpg", (variant,)) for image, variant in rows]

    return DatasetSplits(data, {name: split(name) for name in SPLITS})


def caltech101(source: Path, seed: int) -> DatasetSplits:
    """Caltech 101 (101 and the background): `101_ObjectCategories/CLASS/*.jpg`.

    There is no official split. As in the literature, 30 images of each class are drawn for training, five of them for
    validation.
    """
    root = _first_existing(source, "101_ObjectCategories", "caltech-101/101_ObjectCategories")
    # The folder of the background contains a file that is not an image.
    files = [file for file in list_files(root) if file.size != ODD and not unwanted(file.path)]
    paths = [file.path for file in files if file.path.endswith(".jpg") and "/" in file.path]
    images = [Listed(path, (path.rpartition("/")[0],)) for path in paths]
    test, drawn = _draw(images, seed, lambda count: min(_CALTECH_TRAINING, count - 1))
    train, val = _draw(drawn, seed, lambda count: min(_CALTECH_VALIDATION, count - 1))
    return DatasetSplits(root, {"train": train, "val": val, "test": test})


def cars(source: Path, seed: int) -> DatasetSplits:
    """Stanford Cars (196): `cars_{train,test}`, `devkit`, and `cars_test_annos_withlabels.mat` in either place.

    A fifth of the training images of each class is for validation.
    """
    names = _mat_variable(_first_existing(source, "devkit/cars_meta.mat"), "class_names")

    def split(annotations: Path, folder: str) -> list[Listed]:
        rows = _mat_variable(annotations, "annotations")
        if not {"class", "fname"} <= set(rows.dtype.names or ()):
            raise DataError(f"{annotations} has no class or no fname: unpack the data set again.")
        try:
            listed = [(str(row["fname"]), int(row["class"])) for row in rows]
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{annotations} has a class that is not a number ({error}): unpack the data set again."
            ) from None
        return [Listed(f"{folder}/{name}", (_class_name(names, number, annotations),)) for name, number in listed]

    train, val = _for_validation(split(_first_existing(source, "devkit/cars_train_annos.mat"), "cars_train"), seed, 0.2)
    labelled = "cars_test_annos_withlabels.mat"  # the test list of the devkit has no labels
    test = split(_first_existing(source, labelled, f"devkit/{labelled}"), "cars_test")
    return DatasetSplits(source, {"train": train, "val": val, "test": test})


def cifar10(source: Path, seed: int, scratch: Path) -> DatasetSplits:
    """CIFAR-10, binary version: `data_batch_{1-5}.bin`, `test_batch.bin`, `batches.meta.txt`."""
    root = _binary_folder(source, "cifar-10-batches-bin", "data_batch_1.bin")
    training = [root / f"data_batch_{number}.bin" for number in range(1, 6)]
    splits = _Cifar(training, root / "test_batch.bin", times=1, labels=1)
    return _cifar(splits, root / "batches.meta.txt", seed, scratch)


def cifar100(source: Path, seed: int, scratch: Path) -> DatasetSplits:
    """CIFAR-100 by fine label, binary version: `train.bin`, `test.bin`, `fine_label_names.txt`."""
    root = _binary_folder(source, "cifar-100-binary", "train.bin")
    splits = _Cifar([root / "train.bin"], root / "test.bin", times=5, labels=2)
    return _cifar(splits, root / "fine_label_names.txt", seed, scratch)


def dtd(source: Path, seed: int) -> DatasetSplits:
    """Describable textures (47), the first of the ten official splits: `labels/{train,val,test}1.txt`."""
    root = _first_existing(source, "dtd/labels", "labels").parent

    def split(name: str) -> list[Listed]:
        return [_in_its_folder("images/", path) for (path,) in _read_lines(root / f"labels/{name}1.txt")]

    return DatasetSplits(root, {name: split(name) for name in SPLITS})


def flowers102(source: Path, seed: int) -> DatasetSplits:
    """Oxford Flowers (102), official splits: `jpg`, `imagelabels.mat`, `setid.mat`. Classes have no names, only
    numbers."""
    root = _first_existing(source, "flowers-102/setid.mat", "setid.mat").parent
    labels = _mat_integers(root / "imagelabels.mat", "labels")

    def split(key: str) -> list[Listed]:
        numbers = _mat_integers(root / "setid.mat", key)
        if numbers.min() < 1 or numbers.max() > len(labels):
            raise DataError(
                f"{root / 'setid.mat'} names images that {len(labels)} labels do not cover: unpack it again."
            )
        return [Listed(f"jpg/image_{number:05d}.jpg", (f"{labels[number - 1]:03d}",)) for number in numbers]

    return DatasetSplits(root, {"train": split("trnid"), "val": split("valid"), "test": split("tstid")})


def food101(source: Path, seed: int) -> DatasetSplits:
    """Food (101): `meta/{train,test}.json`; a tenth of the training images of each class is for validation."""
    root = _first_existing(source, "food-101/meta", "meta").parent

    def split(name: str) -> list[Listed]:
        path = root / f"meta/{name}.json"
        try:
            names = TypeAdapter(dict[str, list[str]]).validate_python(json.loads(_read_text(path)))
        except (ValidationError, ValueError, RecursionError):
            raise DataError(f"{path} is not a list of images by class: unpack the data set again.") from None
        return [Listed(f"images/{image}.jpg", (food,)) for food, images in names.items() for image in images]

    train, val = _for_validation(split("train"), seed, 0.1)
    return DatasetSplits(root, {"train": train, "val": val, "test": split("test")})


def pets(source: Path, seed: int) -> DatasetSplits:
    """Oxford-IIIT Pets by breed (37): `annotations/{trainval,test}.txt`; a fifth of trainval is for validation."""

    def split(name: str) -> list[Listed]:
        rows = _read_lines(_first_existing(source, f"annotations/{name}.txt"), 2)
        return [Listed(f"images/{image}.jpg", (image.rpartition("_")[0],)) for image, _ in rows]

    train, val = _for_validation(split("trainval"), seed, 0.2)
    return DatasetSplits(source, {"train": train, "val": val, "test": split("test")})


def sun397(source: Path, seed: int) -> DatasetSplits:
    """Scenes (397), the first of the ten official partitions: `{Training,Testing}_01.txt`, beside the images or in
    `Partitions`.

    A fifth of the training images is for validation.
    """
    root = _first_existing(source, "SUN397/ClassName.txt", "ClassName.txt").parent
    folder = _first_existing(source, "Training_01.txt", "Partitions/Training_01.txt", "SUN397/Training_01.txt").parent

    def split(name: str) -> list[Listed]:
        return [_in_its_folder("", path.lstrip("/")) for (path,) in _read_lines(folder / f"{name}_01.txt")]

    train, val = _for_validation(split("Training"), seed, 0.2)
    return DatasetSplits(root, {"train": train, "val": val, "test": split("Testing")})


def voc2007(source: Path, seed: int) -> DatasetSplits:
    """PASCAL VOC 2007 (20), several classes per image: `ImageSets/Main/CLASS_{train,val,test}.txt`.

    trainval and test must be unpacked into the same folder. Classes marked as difficult (0 in the list) are ignored.
    """
    root = _first_existing(source, "VOCdevkit/VOC2007/ImageSets", "VOC2007/ImageSets", "ImageSets").parent
    lists = root / "ImageSets/Main"
    classes = sorted(path.name.removesuffix("_train.txt") for path in lists.glob("[!.]*_train.txt"))
    if not classes:
        raise DataError(f"{lists} holds no CLASS_train.txt: unpack the data set again.")

    def split(name: str) -> list[Listed]:
        shown: dict[str, dict[str, list[str]]] = {}
        for object_class in classes:
            for image, state in _read_lines(lists / f"{object_class}_{name}.txt", 2):
                shown.setdefault(image, {"1": [], "0": [], "-1": []}).setdefault(state, []).append(object_class)
        return [
            Listed(f"JPEGImages/{image}.jpg", tuple(states["1"]), tuple(states["0"])) for image, states in shown.items()
        ]

    return DatasetSplits(root, {name: split(name) for name in SPLITS}, multi_label=True)


def _first_existing(source: Path, *names: str) -> Path:
    """The first of the names that exists below `source`. Raises DataError if none does."""
    for name in names:
        if (source / name).exists():
            return source / name
    raise DataError(
        f"{source} holds no {' and no '.join(names)}: expected the unpacked data set as distributed. "
        "docs/transfer.md lists the files of each one."
    )


def _read_lines(path: Path, fields: int = 1) -> list[list[str]]:
    """The non-empty lines of a text file, split at spaces into `fields` (the last one may contain spaces).

    Raises:
        DataError: the file cannot be read, or a line has too few fields.
    """
    rows = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        row = line.strip().split(maxsplit=fields - 1) if fields > 1 else [line.strip()]
        if len(row) < fields:
            raise DataError(f"{path}, line {number}: got {line[:80]!r}; expected {fields} words. Unpack it again.")
        rows.append(row)
    return rows


def _read_text(path: Path) -> str:
    """A text file in UTF-8. Raises DataError."""
    with reads_from(path, _UNPACK_AGAIN, DataError):
        return path.read_text(encoding="utf-8")


def _in_its_folder(prefix: str, path: str) -> Listed:
    return Listed(prefix + path, (path.rpartition("/")[0],))


def _for_validation(images: Sequence[Listed], seed: int, share: float) -> tuple[list[Listed], list[Listed]]:
    """Training and validation images: a random `share` of each class, at least one image and never all."""
    return _draw(images, seed, lambda count: min(max(1, round(share * count)), count - 1))


def _draw(images: Sequence[Listed], seed: int, number: Callable[[int], int]) -> tuple[list[Listed], list[Listed]]:
    """The remaining and the drawn images: of each class, `number(count)` images are drawn at random.

    Depends on the seed and on the paths, not on the order of `images`.
    """
    of_class = defaultdict(list)
    for image in sorted(images):
        of_class[image.classes].append(image)
    rest, drawn = [], []
    random = np.random.default_rng(seed)
    for _, members in sorted(of_class.items()):
        order = random.permutation(len(members))
        taken = number(len(members))
        drawn += [members[i] for i in order[:taken]]
        rest += [members[i] for i in order[taken:]]
    return sorted(rest), sorted(drawn)


def _class_name(names: Any, number: int, annotations: Path) -> str:
    if not 1 <= number <= len(names):
        raise DataError(f"{annotations} names class {number} of {len(names)}: unpack the data set again.")
    return str(names[number - 1])


def _mat_integers(path: Path, variable: str) -> np.ndarray:
    """A non-empty vector of integers. Raises DataError."""
    numbers = _mat_variable(path, variable)
    if not len(numbers) or numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise DataError(f"{path}: {variable} holds no integers: unpack the data set again.")
    return numbers


def _mat_variable(path: Path, variable: str) -> np.ndarray:
    """A vector from a MATLAB file, version 5 or older. Raises DataError."""
    try:
        return np.atleast_1d(loadmat(path, squeeze_me=True, variable_names=[variable])[variable])
    except _LOADMAT_FAULTS as error:
        if isinstance(error, OSError) and machine_failed(error):
            raise refused(DataError, f"{path} cannot be read", error, path) from None
        raise DataError(f"{path}: {variable} cannot be read ({error}): {_UNPACK_AGAIN}") from None


@dataclass(frozen=True)
class _Cifar:
    """The files of a set in CIFAR's binary format: label bytes (the last one is the class), then pixels, per image.

    Attributes:
        training, testing: the files.
        times: images in a training file per image in the test file.
        labels: number of label bytes of each image.
    """

    training: list[Path]
    testing: Path
    times: int
    labels: int


def _binary_folder(source: Path, folder: str, name: str) -> Path:
    for pickled in source.glob("cifar-*-py*"):
        if not (source / folder).exists():
            raise DataError(f"{pickled} holds pickles, which can run arbitrary code: get the binary version, {folder}.")
    return _first_existing(source, f"{folder}/{name}", name).parent


def _cifar(files: _Cifar, names: Path, seed: int, scratch: Path) -> DatasetSplits:
    """Unpack to PNG below `scratch`; a tenth of the training images of each class is for validation."""
    classes = [name for (name,) in _read_lines(names)]
    rows = {file: _cifar_rows(file, files.labels + 3 * _CIFAR_SIDE**2) for file in (*files.training, files.testing)}
    of_test = len(rows[files.testing])
    for file in files.training:  # detects a file that was cut between two images
        if len(rows[file]) != files.times * of_test:
            raise DataError(
                f"{file} holds {len(rows[file])} images and {files.testing.name} {of_test}; expected "
                f"{files.times * 10_000} and 10000: {_UNPACK_AGAIN}"
            )
    train = _unpacked_cifar(files.training, rows, files.labels, classes, scratch, "train")
    test = _unpacked_cifar([files.testing], rows, files.labels, classes, scratch, "test")
    train, val = _for_validation(train, seed, 0.1)
    return DatasetSplits(scratch, {"train": train, "val": val, "test": test})


def _unpacked_cifar(
    files: list[Path], rows: dict[Path, _Rows], labels: int, classes: list[str], scratch: Path, split: str
) -> list[Listed]:
    (scratch / split).mkdir()
    images: list[Listed] = []
    for file in files:
        for row in rows[file]:
            if row[labels - 1] >= len(classes):
                raise DataError(f"{file} names class {row[labels - 1]} of {len(classes)}: {_UNPACK_AGAIN}")
            image = Listed(f"{split}/{len(images):05d}.png", (classes[row[labels - 1]],))
            pixels_HWC = row[labels:].reshape(3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(1, 2, 0)
            Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(scratch / image.path)
            images.append(image)
    return images


def _cifar_rows(file: Path, size: int) -> _Rows:
    """[images, bytes of each]."""
    with reads_from(file, _UNPACK_AGAIN, DataError):
        data = np.frombuffer(file.read_bytes(), np.uint8)  # np.fromfile does not report disk errors
    if not len(data) or len(data) % size:
        raise DataError(f"{file} has {len(data)} bytes; expected a multiple of {size}: {_UNPACK_AGAIN}")
    return data.reshape(-1, size)
