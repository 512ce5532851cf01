"""Which route serves a task: votes counted per route, and the whole way from images to the vote.

Axes: N images, M clusters, L expert layers.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moce_ds.checkpoint.format import find
from moce_ds.data.clusters import load_ids
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.selection.vote import count_votes, select_route

CPU = torch.device("cpu")


@st.composite
def tasks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """(ids_N, expert_ML): few experts, so that clusters share routes."""
    m, layers = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    table = draw(st.lists(st.tuples(*[st.integers(0, 1)] * layers), min_size=m, max_size=m))
    ids = draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=40))
    return np.array(ids), np.array(table, dtype=np.int64)


@given(tasks())
def test_every_image_votes_for_the_route_of_its_cluster(task: tuple[np.ndarray, np.ndarray]) -> None:
    ids_N, expert_ML = task
    selection = count_votes(*task)
    votes = Counter(tuple(expert_ML[cluster].tolist()) for cluster in ids_N)
    n = len(ids_N)
    assert dict(selection.routes) == {route: pytest.approx(count / n) for route, count in votes.items()}
    assert selection.clusters == {c: pytest.approx(count / n) for c, count in Counter(ids_N.tolist()).items()}
    assert selection.n_images == n and selection.share == pytest.approx(max(votes.values()) / n)
    assert votes[selection.route] == max(votes.values()) and (selection.route, selection.share) == selection.routes[0]
    for shares in ([share for _, share in selection.routes], list(selection.clusters.values())):
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)


@given(tasks(), st.randoms(use_true_random=False))
def test_the_order_of_the_images_does_not_matter(task: tuple[np.ndarray, np.ndarray], random: object) -> None:
    ids_N, expert_ML = task
    shuffled = ids_N.tolist()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert count_votes(np.array(shuffled), expert_ML) == count_votes(ids_N, expert_ML)


def test_votes_are_counted_per_route_not_per_cluster() -> None:
    """The largest cluster stands alone; two smaller ones share a route and win."""
    ids_N = np.repeat([0, 1, 2, 4], [40, 25, 30, 5])
    selection = count_votes(ids_N, np.array([[3, 3], [1, 2], [1, 2], [0, 0], [3, 3]]))
    assert selection.route == (1, 2) and selection.share == pytest.approx(0.55)
    assert selection.routes == [((1, 2), 0.55), ((3, 3), 0.45)]
    assert selection.clusters == {0: 0.4, 2: 0.3, 1: 0.25, 4: 0.05}


def test_a_tie_goes_to_the_lower_route_whatever_the_clusters_are_called() -> None:
    for table in ([[1, 0], [0, 1]], [[0, 1], [1, 0]]):
        assert count_votes(np.array([0, 1]), np.array(table)).route == (0, 1)


def test_the_record_is_plain_data() -> None:
    selection = count_votes(np.array([0, 0, 1]), np.array([[2, 3], [1, 1]]))
    record = selection.record("birds")
    assert json.loads(json.dumps(record)) == record == {
        "verb": "select", "task": "birds", "route": [2, 3], "share": 2 / 3, "n_images": 3,
        "routes": [{"route": [2, 3], "share": 2 / 3}, {"route": [1, 1], "share": 1 / 3}],
        "clusters": {"0": 2 / 3, "1": 1 / 3}, "typicality": None,
    }  # fmt: skip


def test_the_training_images_as_a_task_fall_into_their_own_clusters(
    tiny_moce_run: Callable[..., Path], tiny_shards: Path, tiny_clusters: Path
) -> None:
    run, shards = tiny_moce_run(), ShardSet.open(tiny_shards)
    ids_N = load_ids(tiny_clusters, shards.fingerprint, shards.count)
    for batch_size in (7, 60):
        selection = select_route(run, shards, EncodeSettings(batch_size=batch_size, threads=1), CPU)
        assert replace(selection, typicality=None) == count_votes(ids_N, find(run).routes.expert_ML)


def test_a_task_of_its_own(
    tiny_moce_run: Callable[..., Path], tiny_images: Path, tiny_shards: Path, tiny_clusters: Path, tmp_path: Path
) -> None:
    """Only the digits: they vote as they are labelled in the training set."""
    write_shards(tiny_images / "digits", tmp_path / "digits", ShardSettings(workers=1))
    shards = ShardSet.open(tiny_shards)
    ids_N = load_ids(tiny_clusters, shards.fingerprint, shards.count)[20:40]
    selection = select_route(tiny_moce_run(), ShardSet.open(tmp_path / "digits"), EncodeSettings(threads=1), CPU)
    assert selection.clusters == {c: pytest.approx(n / 20) for c, n in Counter(ids_N.tolist()).items()}
