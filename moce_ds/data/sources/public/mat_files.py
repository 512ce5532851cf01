"""Data sets with labels in MATLAB files: Stanford Cars, Flowers102.

`scipy.io.loadmat` reads numbers and text and executes nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from moce_ds.data.sources.listing import Listed
from moce_ds.data.sources.public.dataset_splits import UNPACK_AGAIN, DatasetSplits, first_existing, for_validation
from moce_ds.errors import DataError
from moce_ds.host.machine import machine_failed, refused

_READER_FAULTS = (OSError, ValueError, TypeError, LookupError, NotImplementedError, MatReadError)
"""What loadmat was seen to raise on damaged files, and on those of version 7.3; they have no common base."""


def cars(source: Path, seed: int) -> DatasetSplits:
    """Stanford Cars (196): `cars_{train,test}`, `devkit`, and `cars_test_annos_withlabels.mat` in either place.

    A fifth of the training images of each class is for validation.
    """
    names = _read(first_existing(source, "devkit/cars_meta.mat"), "class_names")

    def split(annotations: Path, folder: str) -> list[Listed]:
        rows = _read(annotations, "annotations")
        if not {"class", "fname"} <= set(rows.dtype.names or ()):
            raise DataError(f"{annotations} has no class or no fname: unpack the data set again.")
        try:
            listed = [(str(row["fname"]), int(row["class"])) for row in rows]
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{annotations} has a class that is not a number ({error}): unpack the data set again."
            ) from None
        return [Listed(f"{folder}/{name}", (_name(names, number, annotations),)) for name, number in listed]

    train, val = for_validation(split(first_existing(source, "devkit/cars_train_annos.mat"), "cars_train"), seed, 0.2)
    labelled = "cars_test_annos_withlabels.mat"  # the test list of the devkit has no labels
    test = split(first_existing(source, labelled, f"devkit/{labelled}"), "cars_test")
    return DatasetSplits(source, {"train": train, "val": val, "test": test})


def _name(names: Any, number: int, annotations: Path) -> str:
    if not 1 <= number <= len(names):
        raise DataError(f"{annotations} names class {number} of {len(names)}: unpack the data set again.")
    return str(names[number - 1])


def flowers102(source: Path, seed: int) -> DatasetSplits:
    """Oxford Flowers (102), official splits: `jpg`, `imagelabels.mat`, `setid.mat`. Classes have no names, only
    numbers."""
    root = first_existing(source, "flowers-102/setid.mat", "setid.mat").parent
    labels = _numbers(root / "imagelabels.mat", "labels")

    def split(key: str) -> list[Listed]:
        numbers = _numbers(root / "setid.mat", key)
        if numbers.min() < 1 or numbers.max() > len(labels):
            raise DataError(
                f"{root / 'setid.mat'} names images that {len(labels)} labels do not cover: unpack it again."
            )
        return [Listed(f"jpg/image_{number:05d}.jpg", (f"{labels[number - 1]:03d}",)) for number in numbers]

    return DatasetSplits(root, {"train": split("trnid"), "val": split("valid"), "test": split("tstid")})


def _numbers(path: Path, variable: str) -> np.ndarray:
    """A non-empty vector of integers. Raises DataError."""
    numbers = _read(path, variable)
    if not len(numbers) or numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise DataError(f"{path}: {variable} holds no integers: unpack the data set again.")
    return numbers


def _read(path: Path, variable: str) -> np.ndarray:
    """A vector out of a MATLAB file, version 5 or older. Raises DataError."""
    try:
        return np.atleast_1d(loadmat(path, squeeze_me=True, variable_names=[variable])[variable])
    except _READER_FAULTS as error:
        if isinstance(error, OSError) and machine_failed(error):
            raise refused(DataError, f"{path} cannot be read", error, path) from None
        raise DataError(f"{path}: {variable} cannot be read ({error}): {UNPACK_AGAIN}") from None
