"""Data sets without lists: Caltech101, whose splits are drawn at random, and CIFAR, whose images are raw bytes."""

from pathlib import Path

import numpy as np
from PIL import Image

from moce_ds.data.sources.listing import Listed
from moce_ds.data.sources.public.dataset_splits import DatasetSplits, draw, first_existing, for_validation, read_lines
from moce_ds.data.sources.walk import ODD, list_files, unwanted
from moce_ds.errors import DataError

_CALTECH_TRAINING, _CALTECH_VALIDATION = 30, 5  # images of each class; the rest is for testing
_SIDE = 32  # pixels of a CIFAR image


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
    return _cifar(training, root / "test_batch.bin", root / "batches.meta.txt", 1, seed, scratch)


def cifar100(source: Path, seed: int, scratch: Path) -> DatasetSplits:
    """CIFAR-100 by fine label, binary version: `train.bin`, `test.bin`, `fine_label_names.txt`."""
    root = _binary(source, "cifar-100-binary", "train.bin")
    return _cifar([root / "train.bin"], root / "test.bin", root / "fine_label_names.txt", 2, seed, scratch)


def _binary(source: Path, folder: str, name: str) -> Path:
    for pickled in source.glob("cifar-*-py*"):
        if not (source / folder).exists():
            raise DataError(f"{pickled} holds pickles, which can run arbitrary code: get the binary version, {folder}.")
    return first_existing(source, f"{folder}/{name}", name).parent


def _cifar(training: list[Path], testing: Path, names: Path, labels: int, seed: int, scratch: Path) -> DatasetSplits:
    """Unpack to PNG below `scratch`; a tenth of the training images of each class is for validation.

    The last of the `labels` bytes before each image is its class.
    """
    classes = [name for (name,) in read_lines(names)]
    train, val = for_validation(_unpacked(training, classes, labels, scratch, "train"), seed, 0.1)
    return DatasetSplits(
        scratch, {"train": train, "val": val, "test": _unpacked([testing], classes, labels, scratch, "test")}
    )


def _unpacked(files: list[Path], classes: list[str], labels: int, scratch: Path, split: str) -> list[Listed]:
    (scratch / split).mkdir()
    images: list[Listed] = []
    for file in files:
        for row in _rows(file, labels + 3 * _SIDE**2):
            if row[labels - 1] >= len(classes):
                raise DataError(f"{file} names class {row[labels - 1]} of {len(classes)}: unpack the data set again.")
            image = Listed(f"{split}/{len(images):05d}.png", (classes[row[labels - 1]],))
            pixels_HWC = row[labels:].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)
            Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(scratch / image.path)
            images.append(image)
    return images


def _rows(file: Path, size: int) -> np.ndarray:
    """[images, bytes of each]."""
    try:
        data = np.fromfile(file, np.uint8)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): unpack the data set again.") from None
    if not len(data) or len(data) % size:
        raise DataError(f"{file} has {len(data)} bytes; expected a multiple of {size}: unpack the data set again.")
    return data.reshape(-1, size)
