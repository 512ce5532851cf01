"""The cases of `moce bench scale`: what is measured, and the synthetic inputs.

Axes: N images, D features, W ranks, B images of a rank, M clusters, L expert layers, K experts of an image, E experts.
"""

import io
import os
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from moce_ds.bench.scale import Call, ScaleCase
from moce_ds.bench.synthetic_features import write_synthetic_features
from moce_ds.bench.synthetic_sets import write_synthetic_set
from moce_ds.checkpoint.run_folder import CONFIG
from moce_ds.common.storage.checksums import write_checked
from moce_ds.common.storage.files import sha256_of, write_json
from moce_ds.common.storage.metrics_file import METRICS, sealed
from moce_ds.data.clusters import Clusters, load_ids, save_ids
from moce_ds.data.feature_store import FeatureSet
from moce_ds.data.reading_order import BlockOrder, Order, RandomOrder
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.data.shard_manifest import MANIFEST, Manifest, index_name
from moce_ds.data.shard_tar import index_text, members_of
from moce_ds.data.shards import ShardSet

_INDEX = 100
"""Cases that only read tables go to this many times the images of the others."""

_DIM, _CLUSTERS, _CLASSES, _TEST_IMAGES = 384, 256, 1000, 1000
_BATCH, _IMAGES_PER_BLOCK = 4096, 150
_EXPERTS, _LAYERS, _GROUP, _IMAGES_PER_RANK = 64, 6, 8, 256
_REPORTED_LAYERS, _REPORTED_EXPERTS = 2, 8
_FIGURES = ("epoch", "loss", "reconstruction", "lr", "grad_norm", "images_per_second", "data_wait", "imbalance")
_FINGERPRINT = "synthetic"


def _write_table(folder: Path, count: int) -> None:
    write_synthetic_set(folder / "shards", count)


def _write_whole_set(folder: Path, count: int) -> None:
    """A shard set that `moce inspect --verify` finds intact, with images of 1,000 zero bytes."""
    opened = write_synthetic_set(folder / "shards", count, image_bytes=1000)
    shards, first_id = [], 0
    for shard in opened.shards:
        file, rows = opened.path / shard.name, opened.samples[first_id : first_id + shard.count]
        with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, _, size in members_of(rows, first_id):
                member = tarfile.TarInfo(name)
                member.size = size
                tar.addfile(member, io.BytesIO(bytes(size)))
        (opened.path / index_name(shard.name)).write_text(index_text(rows, first_id), encoding="ascii")
        shards.append(replace(shard, sha256=sha256_of(file)))
        first_id += shard.count
    write_checked(opened.path / MANIFEST, asdict(replace(Manifest.read(opened.path), shards=shards)))


def _open(folder: Path, count: int) -> Call:
    return lambda: ShardSet.open(folder / "shards")


def _verify(folder: Path, count: int) -> Call:
    opened = ShardSet.open(folder / "shards")
    return lambda: opened.verify()


def _order(folder: Path, count: int) -> Call:
    return _batch(RandomOrder(count, seed=0))


def _blocks(folder: Path, count: int) -> Call:
    first_ids = np.append(np.arange(0, count, _IMAGES_PER_BLOCK), count)
    return _batch(BlockOrder(first_ids, window=1 << 18, seed=0))


def _batch(order: Order) -> Call:
    sampler = ShuffledSampler(order, _BATCH)
    return lambda: sampler.batch(order.count // _BATCH)  # it ends one epoch and begins the next


def _write_sparse_features(folder: Path, count: int) -> None:
    write_synthetic_features(folder / "features", count, _DIM, sparse=True)


def _write_features(folder: Path, count: int) -> None:
    write_synthetic_features(folder / "features", count, _DIM)


def _features(folder: Path, count: int) -> Call:
    return lambda: FeatureSet.open(folder / "features").rows(np.array([0, count - 1]))


def _cluster(folder: Path, count: int) -> Call:
    from moce_ds.clustering.build import build_clusters
    from moce_ds.clustering.settings import ClusterSettings

    out = folder / f"clusters-{os.getpid()}"  # a process measures once
    return lambda: build_clusters(folder / "features", out, ClusterSettings(num_clusters=_CLUSTERS))


def _label(folder: Path, count: int) -> Call:
    features, clusters = FeatureSet.open(folder / "features"), _clusters(count, _DIM)

    def label() -> None:
        for block_ND in features.blocks():
            clusters.assign_with_cosine(block_ND)

    return label


def _clusters(count: int, dim: int) -> Clusters:
    """Random clusters of `count` images: image i is in cluster i modulo M."""
    embeddings_MD = np.random.default_rng(0).standard_normal((_CLUSTERS, dim), dtype=np.float32)
    zeros_M = np.zeros(_CLUSTERS, dtype=np.float32)
    return Clusters(
        embeddings_MD=embeddings_MD / np.linalg.norm(embeddings_MD, axis=1, keepdims=True),
        duals_M=zeros_M,
        mean_D=np.zeros(dim, dtype=np.float32),
        sizes_M=np.full(_CLUSTERS, count // _CLUSTERS) + (np.arange(_CLUSTERS) < count % _CLUSTERS),
        cosine_M=zeros_M,
        eps=0.025,
        method="kmeans",
        shards_fingerprint=_FINGERPRINT,
        encoder_fingerprint="",
        encoder_input={},
        provenance={},
    )


def _write_ids(folder: Path, count: int) -> None:
    save_ids(folder, np.arange(count, dtype=np.int32) % _CLUSTERS)
    _clusters(count, 8).write(folder)


def _ids(folder: Path, count: int) -> Call:
    return lambda: load_ids(folder, _FINGERPRINT, count)


def _plan(folder: Path, count: int) -> Call:
    from moce_ds.moe.routing_plan import make_plan

    random = np.random.default_rng(0)
    ranks = max(1, count // (_IMAGES_PER_RANK * _GROUP)) * _GROUP
    clusters_WB = random.integers(0, _CLUSTERS, (ranks, max(1, count // ranks)))
    expert_MLK = random.integers(0, _EXPERTS, (_CLUSTERS, _LAYERS, 1))
    slot_LE = np.stack([random.permutation(_EXPERTS) for _ in range(_LAYERS)])
    return lambda: make_plan(clusters_WB, expert_MLK, slot_LE, rank=0, ep_size=_GROUP)


def _knn(folder: Path, count: int) -> Call:
    import torch

    from moce_ds.evaluation.knn import knn_accuracy

    random = torch.Generator().manual_seed(0)
    train_ND, test_ND = (torch.randn(n, _DIM, generator=random) for n in (count, _TEST_IMAGES))
    train_N, test_N = (torch.arange(n) % min(_CLASSES, count) for n in (count, _TEST_IMAGES))
    return lambda: knn_accuracy(train_ND, train_N, test_ND, test_N)


def _write_run(folder: Path, count: int) -> None:
    """A run of a MoCE with a record in each of `count` steps."""
    layers = list(range(_REPORTED_LAYERS))
    experts = {"num": _REPORTED_EXPERTS, "layers": layers}
    config = {"model": {"arch": "moce"}, "experts": experts, "data": {"shards": str(folder)}, "run": {"out": "run"}}
    write_json(folder / CONFIG, config)  # JSON is YAML
    random = np.random.default_rng(0)
    before = ""
    with open(folder / METRICS, "w", encoding="utf-8") as lines:
        for step in range(1, count + 1):
            load_LE = random.dirichlet(np.ones(_REPORTED_EXPERTS), _REPORTED_LAYERS)
            figures = dict(zip(_FIGURES, random.random(len(_FIGURES)).tolist(), strict=True))
            states = [{"load": load_E.tolist(), "live": _REPORTED_EXPERTS, "confidence": 0.5} for load_E in load_LE]
            states_L = {str(layer): state for layer, state in zip(layers, states, strict=True)}
            record = {"step": step, "attempt": 1, **figures, "layers": states_L}
            line, before = sealed(record, before)
            lines.write(line)


def _report(folder: Path, count: int) -> Call:
    from moce_ds.report.build import build_report

    return lambda: build_report(folder, out=folder / f"report-{os.getpid()}.html")


CASES: dict[str, ScaleCase] = {
    "open": ScaleCase("ShardSet.open", _open, "table", _write_table, _INDEX),
    "features": ScaleCase("FeatureSet.open and two rows", _features, "sparse", _write_sparse_features, _INDEX),
    "ids": ScaleCase("load_ids: the cluster of every image", _ids, "ids", _write_ids, _INDEX),
    "order": ScaleCase(f"a batch of {_BATCH} images at the end of an epoch", _order, times=_INDEX),
    "blocks": ScaleCase(f"the same with data.order=blocks, {_IMAGES_PER_BLOCK} images a block", _blocks, times=_INDEX),
    "plan": ScaleCase(
        f"make_plan; n is the global batch: ranks of {_IMAGES_PER_RANK} images, {_EXPERTS} experts, {_LAYERS} layers",
        _plan,
    ),
    "cluster": ScaleCase(f"moce cluster: {_CLUSTERS} clusters, width {_DIM}", _cluster, "features", _write_features),
    "label": ScaleCase("the cluster of every image, from features", _label, "features", _write_features),
    "knn": ScaleCase(f"knn_accuracy of {_TEST_IMAGES} test images, width {_DIM}", _knn),
    "verify": ScaleCase("moce inspect --verify of a shard set", _verify, "shards", _write_whole_set, 0.1),
    "report": ScaleCase("moce report; n is the records of a run", _report, "run", _write_run, 0.5),
}
"""The cases by name, in the order of the table."""
