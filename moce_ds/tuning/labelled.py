"""The splits of a classification task: images with what they show, by the class names of the training images.

Axes: N images of a split, K classes.
"""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from moce_ds.data.shards import ShardSet
from moce_ds.data.task_images import labels_of
from moce_ds.errors import DataError
from moce_ds.evaluation.probe import held_out
from moce_ds.text import encoded, in_line


@dataclass(frozen=True)
class Split:
    """Some images of a shard set.

    Attributes:
        ids_N: which.
        labels: the class of each [N]; or targets [N, K]: 1 shown, 0 not shown, -1 not counted.
    """

    images: ShardSet
    ids_N: NDArray[np.int64]
    labels: NDArray[np.integer]

    @property
    def count(self) -> int:
        """N."""
        return len(self.ids_N)

    def part(self, chosen_N: NDArray[np.bool_]) -> "Split":
        """The images where `chosen_N` holds."""
        return Split(self.images, self.ids_N[chosen_N], self.labels[chosen_N])


@dataclass(frozen=True)
class Splits:
    """A task; `val` chooses among weights, if there is one, and `test` judges those chosen."""

    classes: list[str]
    train: Split
    val: Split | None
    test: Split

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several classes."""
        return self.train.labels.ndim == 2

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of images and labels of all splits."""
        digest = sha256(encoded("\0".join(self.classes)))
        for split in (self.train, self.val, self.test):
            if split is not None:
                digest.update(split.images.fingerprint.encode() + split.ids_N.tobytes() + split.labels.tobytes())
        return digest.hexdigest()


def make_splits(train: ShardSet, val: ShardSet | float | None, test: ShardSet, seed: int) -> Splits:
    """The splits of a task; `val` may be a share of `train`, stratified by class, 0-1.

    Raises:
        DataError: an image has no class; there is one class only; the splits do not have the same kind of labels, or
            one has a class that `train` lacks; a class of one image is to be shared between training and validation.
    """
    if len(train.classes) < 2:
        raise DataError(
            f"{train.named}: {len(train.classes)} class(es); expected two or more, each a folder of images."
        )
    whole, tested = (_labelled(images, train) for images in (train, test))
    if not isinstance(val, float):
        return Splits(train.classes, whole, _labelled(val, train) if val else None, tested)
    counts_K = np.bincount(whole.labels) if whole.labels.ndim == 1 else np.zeros(0)
    if (counts_K == 1).any():
        alone = train.classes[int((counts_K == 1).argmax())]
        raise DataError(
            f"{train.named}: class {in_line(alone)} has a single image, which cannot both train and validate: add "
            "images of it, or give validation images of their own with --val DATA."
        )
    held_N = held_out(whole.labels, val, seed)
    return Splits(train.classes, whole.part(~held_N), whole.part(held_N), tested)


def _labelled(images: ShardSet, train: ShardSet) -> Split:
    return Split(images, np.arange(images.count), labels_of(images, train))
