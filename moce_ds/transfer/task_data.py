"""A task's images, as a shard set or as a plain folder, and their features.

Axes: N images, D width.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.errors import DataError
from moce_ds.models.encode import EncodeSettings, encode_all
from moce_ds.models.vit import Encoder


@contextmanager
def opened_images(path: Path) -> Iterator[ShardSet]:
    """A shard set; a folder of images becomes a temporary one. Raises DataError when `path` is neither."""
    if (path / "shards.json").exists():
        yield ShardSet.open(path)
        return
    if not path.is_dir():
        raise DataError(f"{path} not found: expected a shard set (`moce shards`) or a folder of images.")
    with tempfile.TemporaryDirectory(prefix="moce-") as scratch:
        write_shards(path, Path(scratch) / "shards", ShardSettings())
        yield ShardSet.open(Path(scratch) / "shards")


def encoded_split(
    encoder: Encoder, train: ShardSet, test: ShardSet, config: EncodeSettings, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [N, D] and labels [N] of the training images, then of the test images, labels by class *name*.

    Raises:
        DataError: an image has no class, or a test class is not among the training classes.
    """
    for images in (train, test):
        if (images.labels < 0).any():
            lost = images.source(int((images.labels < 0).argmax()))
            raise DataError(f"{images.path}: {lost} has no class; expected every image in the folder of its class.")
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise DataError(f"{test.path}: classes {unknown[:5]} are not among the training classes of {train.path}.")
    number_of = {name: k for k, name in enumerate(train.classes)}
    translate = np.array([number_of[name] for name in test.classes], dtype=np.int64)
    return (
        encode_all(encoder, train, config, device),
        torch.from_numpy(train.labels.astype(np.int64)),
        encode_all(encoder, test, config, device),
        torch.from_numpy(translate[test.labels]),
    )
