"""The images of a folder that belong to a set, and their classes.

Axes: N images, K classes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_ds.common.errors import DataError
from moce_ds.common.host.machine import machine_failed, refused
from moce_ds.common.text import in_line
from moce_ds.data.sources.source import Entry


class Listed(NamedTuple):
    """An image: path below the source folder with `/` as separator, the classes that it shows, and those that it may or
    may not show, which are ignored (VOC's "difficult")."""

    path: str
    classes: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """Images with their classes.

    Attributes:
        images: in any order, each path once.
        classes: all class names, in the order of the labels.
        multi_label: whether an image may show several classes, or none.
        origin: the source to name in messages, if it is not the folder that is read.
        seed: the seed that the images may have been drawn with.
    """

    images: Sequence[Listed]
    classes: list[str]
    multi_label: bool = False
    origin: Path | None = None
    seed: int | None = None

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all classes."""
        return sha256(json.dumps([self.classes, self.multi_label, sorted(self.images)]).encode()).hexdigest()

    def files(self, source: Path) -> list[Entry]:
        """The images with their sizes, sorted by path. Raises DataError if one is missing."""
        try:
            return sorted(Entry(path, (source / path).stat().st_size) for path in self._by_path)
        except OSError as error:
            if machine_failed(error):
                raise refused(DataError, "The listed images cannot be read", error) from None
            raise DataError(
                f"{in_line(error.filename)} is listed and cannot be read ({error.strerror}): unpack the data set again."
            ) from None

    def labels(self, paths: Sequence[str]) -> NDArray[np.int32]:
        """[N], positions in `classes`; -1 for an image without a class, and everywhere with `multi_label`."""
        if self.multi_label:
            return np.full(len(paths), -1, np.int32)
        shown = (self._by_path[path].classes for path in paths)
        return np.array([self._position[classes[0]] if classes else -1 for classes in shown], np.int32)

    def targets(self, paths: Sequence[str]) -> NDArray[np.int8]:
        """[N, K]: 1 shown, 0 not shown, -1 ignored."""
        targets_NK = np.zeros((len(paths), len(self.classes)), np.int8)
        for row, path in enumerate(paths):
            image = self._by_path[path]
            targets_NK[row, [self._position[name] for name in image.unsure]] = -1
            targets_NK[row, [self._position[name] for name in image.classes]] = 1
        return targets_NK

    @cached_property
    def _by_path(self) -> dict[str, Listed]:
        return {image.path: image for image in self.images}

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}
