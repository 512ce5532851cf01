"""Data sets without lists: Caltech101, whose splits are drawn at random, and CIFAR, whose images are raw bytes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_ds.data.sources.listing import Listed
from moce_ds.data.sources.public.dataset_splits import (
    UNPACK_AGAIN,
    DatasetSplits,
    draw,
    first_existing,
    for_validation,
    read_lines,
)
from moce_ds.data.sources.walk import ODD, list_files, unwanted
from moce_ds.errors import DataError
from moce_ds.storage.files import reads_from

_CALTECH_TRAINING, _CALTECH_VALIDATION = 30, 5  # images of each class; the rest is for testing
_SIDE = 32  # pixels of a CIFAR image

_Rows = NDArray[np.uint8]


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


def caltech101(source: Path, seed: int) -> DatasetSplits:
    """Caltech 101 (101 and the background): `101_ObjectCategories/CLASS/*.jpg`.

    There is no official split. As in the literature, 30 images of each class are drawn for training, five of them for
    validation.
    """
    root = first_existing(source, "101_ObjectCategories", "caltech-101/101_ObjectCategories")
    # The folder of the background contains a file that is not an image.
    files = [file for file in list_files(root) if file.size != ODD and not unwanted(file.path)]
    paths = [file.path for file in files if file.path.endswith(".jpg") and "/" in file.path]
    images = [Listed(path, (path.rpartition("/")[0],)) for path in paths]
    test, drawn = draw(images, seed, lambda count: min(_CALTECH_TRAINING, count - 1))
    train, val = draw(drawn, seed, lambda count: min(_CALTECH_VALIDATION, count - 1))
    return DatasetSplits(root, {"train": train, "val": val, "test": test})


def cifar10(source: Path, seed: int, scratch: Path) -> DatasetSplits:
    """CIFAR-10, binary version: `data_batch_{1-5}.bin`, `test_batch.bin`, `batches.meta.txt`."""
    root = _binary(source, "cifar-10-batches-bin", "data_batch_1.bin")
    training = [root / f"data_batch_{number}.bin" for number in range(1, 6)]
    splits = _Cifar(training, root / "test_batch.bin", times=1, labels=1)
    return _cifar(splits, root / "batches.meta.txt", seed, scratch)


def cifar100(source: Path, seed: int, scratch: Path) -> DatasetSplits:
    """CIFAR-100 by fine label, binary version: `train.bin`, `test.bin`, `fine_label_names.txt`."""
    root = _binary(source, "cifar-100-binary", "train.bin")
    splits = _Cifar([root / "train.bin"], root / "test.bin", times=5, labels=2)
    return _cifar(splits, root / "fine_label_names.txt", seed, scratch)


def _binary(source: Path, folder: str, name: str) -> Path:
    for pickled in source.glob("cifar-*-py*"):
        if not (source / folder).exists():
            raise DataError(f"{pickled} holds pickles, which can run arbitrary code: get the binary version, {folder}.")
    return first_existing(source, f"{folder}/{name}", name).parent


def _cifar(files: _Cifar, names: Path, seed: int, scratch: Path) -> DatasetSplits:
    """Unpack to PNG below `scratch`; a tenth of the training images of each class is for validation."""
    classes = [name for (name,) in read_lines(names)]
    rows = {file: _rows(file, files.labels + 3 * _SIDE**2) for file in (*files.training, files.testing)}
    of_test = len(rows[files.testing])
    for file in files.training:  # detects a file that was cut between two images
        if len(rows[file]) != files.times * of_test:
            raise DataError(
                f"{file} holds {len(rows[file])} images and {files.testing.name} {of_test}; expected "
                f"{files.times * 10_000} and 10000: {UNPACK_AGAIN}"
            )
    train = _unpacked(files.training, rows, files.labels, classes, scratch, "train")
    test = _unpacked([files.testing], rows, files.labels, classes, scratch, "test")
    train, val = for_validation(train, seed, 0.1)
    return DatasetSplits(scratch, {"train": train, "val": val, "test": test})


def _unpacked(
    files: list[Path], rows: dict[Path, _Rows], labels: int, classes: list[str], scratch: Path, split: str
) -> list[Listed]:
    (scratch / split).mkdir()
    images: list[Listed] = []
    for file in files:
        for row in rows[file]:
            if row[labels - 1] >= len(classes):
                raise DataError(f"{file} names class {row[labels - 1]} of {len(classes)}: {UNPACK_AGAIN}")
            image = Listed(f"{split}/{len(images):05d}.png", (classes[row[labels - 1]],))
            pixels_HWC = row[labels:].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)
            Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(scratch / image.path)
            images.append(image)
    return images


def _rows(file: Path, size: int) -> _Rows:
    """[images, bytes of each]."""
    with reads_from(file, UNPACK_AGAIN, DataError):
        data = np.frombuffer(file.read_bytes(), np.uint8)  # np.fromfile ends in silence where the disk fails
    if not len(data) or len(data) % size:
        raise DataError(f"{file} has {len(data)} bytes; expected a multiple of {size}: {UNPACK_AGAIN}")
    return data.reshape(-1, size)
