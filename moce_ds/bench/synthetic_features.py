"""Features of images that do not exist, for measurements: a complete features folder of any size.

Axes: N images of a block, D feature width.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moce_ds.common.storage.encoder_folder import WEIGHTS
from moce_ds.common.storage.files import save_tensors
from moce_ds.data.feature_blocks import FeatureBlocks, block_header
from moce_ds.data.feature_store import FeatureSet, FeatureWriter, Identity
from moce_ds.data.kept_encoder import ENCODER, fingerprint

_GROUPS, _SPREAD = 512, 1.0
"""Groups of the mixture, and the standard deviation of an image around the centre of its group; the coordinates of the
centres have deviation 1."""


def write_synthetic_features(
    path: Path, count: int, dim: int, seed: int = 0, block_rows: int = 4096, sparse: bool = False
) -> FeatureSet:
    """Write features that `FeatureSet.open` and `build_clusters` read.

    The features are random: a mixture of 512 groups of equal shares. They depend on `seed`, `count`, `dim` and
    `block_rows`. An interrupted call continues.

    Args:
        path: the folder, new or interrupted.
        count, dim: images and feature width, D.
        sparse: all features are 0, in files without data on the disk. They take almost no space and can be opened and
            read; `moce cluster` refuses them, because they are all alike.

    Raises:
        ArtefactError: `path` holds other files, or cannot be written.
    """
    encoder = {"norm.weight": np.full(1, seed, dtype=np.float32)}
    identity = Identity(f"synthetic-{count}-{seed}", fingerprint(encoder), {"size": 224})
    writer = FeatureWriter(path, count, dim, identity, block_rows)
    _write_encoder(path / ENCODER, encoder)
    if sparse:
        writer.finish(_write_zeros(FeatureBlocks(path, count, dim, block_rows)))
    else:
        centres_GD = np.random.default_rng(seed).standard_normal((_GROUPS, dim), dtype=np.float32)
        for k in writer.missing_blocks():
            writer.write_block(k, _block(centres_GD, len(writer.block_ids(k)), seed, k))
        writer.finish()
    return FeatureSet.open(path)


def _write_encoder(folder: Path, weights: Mapping[str, np.ndarray]) -> None:
    folder.mkdir(exist_ok=True)
    save_tensors(folder / WEIGHTS, weights)


def _write_zeros(blocks: FeatureBlocks) -> dict[str, str]:
    """Write all blocks as holes. Returns their checksums by name."""
    checksums: dict[str, str] = {}
    of_shape: dict[tuple[int, int], str] = {}
    for k in range(len(blocks)):
        shape, file = blocks.shape(k), blocks.file(k)
        header, size = block_header(shape), 2 * shape[0] * shape[1]
        with open(file, "wb") as opened:
            opened.write(header)
            opened.truncate(len(header) + size)
        if shape not in of_shape:
            of_shape[shape] = hashlib.sha256(header + bytes(size)).hexdigest()
        checksums[file.name] = of_shape[shape]
    return checksums


def _block(centres_GD: np.ndarray, rows: int, seed: int, k: int) -> np.ndarray:
    """Block k, float32 [rows, D]; a function of the seed and of k."""
    random = np.random.default_rng([seed, k])
    group_N = random.integers(len(centres_GD), size=rows)
    noise_ND = random.standard_normal((rows, centres_GD.shape[1]), dtype=np.float32)
    return centres_GD[group_N] + _SPREAD * noise_ND
