"""Features on disk come from one loader for all blocks, and are those of each block alone.

Axes: N images of a block, D width.
"""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moce_ds.common.errors import DataError
from moce_ds.data.feature_store import FeatureSet
from moce_ds.data.read_ahead import READERS
from moce_ds.data.shards import ShardSet
from moce_ds.encoders.features import encode, write_features
from moce_ds.encoders.settings import FeatureSettings
from moce_ds.models.vit import load_encoder
from tests.examples.alone import ALONE
from tests.unit.data.test_loader import copy, flip_byte
from tests.unit.data.test_read_ahead import Watched

__all__ = ["copy"]  # a fixture
CPU = torch.device("cpu")


def test_blocks_are_those_of_a_loader_of_their_own(tiny_shards: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    """Block by block, byte by byte; batches of 4, 4 and 1 images in a block of 9."""
    threads = set[threading.Thread]()
    shards = replace(Watched.open(tiny_shards), before_read=lambda: threads.add(threading.current_thread()))
    encoder = load_encoder(tiny_encoder)
    config = FeatureSettings(batch_size=4, block_rows=9, threads=1)
    write_features(encoder, shards, tmp_path / "features", config, ALONE)
    assert len(threads) <= READERS  # those of one loader
    for number, features_ND in enumerate(FeatureSet.open(tmp_path / "features").blocks()):
        ids = range(9 * number, min(9 * number + 9, 60))
        alone_ND = torch.cat(list(encode(encoder, shards, [ids], config, CPU))).half().float()
        np.testing.assert_array_equal(features_ND, alone_ND)
    assert number == 6


def test_blocks_before_a_damaged_image_are_kept(copy: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    """Images are read several batches ahead, but an error is one of its own block."""
    flip_byte(copy, 41)
    config = FeatureSettings(batch_size=5, block_rows=10, threads=1)
    with pytest.raises(DataError, match=r"image 41 \(flower/01.jpg\) is not as written"):
        write_features(load_encoder(tiny_encoder), ShardSet.open(copy), tmp_path / "features", config, ALONE)
    written = sorted(path.name for path in (tmp_path / "features").glob("block-*"))
    assert written == [f"block-00000{number}.npy" for number in range(4)]
