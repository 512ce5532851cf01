"""Images that a run was trained with, drawn by shares of its clusters.

Axes: N images of the training set, M clusters.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_ds.checkpoint.format import Checkpoint
from moce_ds.common.config.values import recorded_path
from moce_ds.common.errors import DataError
from moce_ds.data.clusters import load_ids, parts_of
from moce_ds.data.shards import ShardSet
from moce_ds.selection.run_clusters import clusters_folder


def training_images(checkpoint: Checkpoint, votes: Mapping[int, float], most: int) -> list[Image.Image]:
    """At most `most` training images of the clusters with votes, drawn by the votes.

    Raises:
        ArtefactError, DataError: the run's shards are missing or different, or hold no such image.
    """
    shards = ShardSet.open(recorded_path(str(checkpoint.entry("config", "data", "shards"))))
    ids_N = load_ids(clusters_folder(checkpoint), shards.fingerprint, shards.count)
    if not (drawn := draw_by_votes(ids_N, votes, most)):
        raise DataError(f"no image of {shards.path} is in a cluster with votes.")
    return [shards.decode(image_id) for image_id in drawn]


def draw_by_votes(ids_N: NDArray[np.int32], votes: Mapping[int, float], most: int) -> list[int]:
    """At most `most` distinct images of the clusters with votes, in proportion to the votes; deterministic, in order.

    Takes the images with the largest `log weight + Gumbel noise`, which draws them one by one by their weights
    (Efraimidis and Spirakis, 2006). Memory does not grow with the images.

    Args:
        ids_N: cluster of each image; may be memory-mapped.
        votes: share of each cluster.
    """
    sizes_M = np.zeros(max(ids_N.max(), *votes) + 1, dtype=np.int64)
    for part_N in parts_of(ids_N):
        sizes_M += np.bincount(part_N, minlength=len(sizes_M))
    weight_M = np.zeros(len(sizes_M))
    weight_M[list(votes)] = list(votes.values())
    weight_M /= np.maximum(sizes_M, 1)
    random, first = np.random.default_rng(0), 0
    drawn, keys = np.empty(0, dtype=np.int64), np.empty(0)
    for part_N in parts_of(ids_N):
        candidates = np.flatnonzero(weight_M[part_N])
        noise = random.gumbel(size=len(candidates))
        drawn = np.append(drawn, first + candidates)
        keys = np.append(keys, np.log(weight_M[part_N[candidates]]) + noise)
        best = np.argsort(-keys)[:most]
        drawn, keys, first = drawn[best], keys[best], first + len(part_N)
    return sorted(drawn.tolist())
