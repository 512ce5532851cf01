"""The inputs of a run: images and the order in which they are read, the clusters that route them, and SDR's teacher.

The teacher is the dense MAE that the second phase of SDR starts from. The run folder keeps copies of clusters and
teacher.

Axes: L expert layers, M clusters, E experts, W ranks, B images of a rank, G = W B,
N images of the shard set.
"""

import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moce_ds.checkpoint.run_folder import CLUSTERS, TEACHER
from moce_ds.common.errors import ConfigError
from moce_ds.common.storage.files import atomic_folder, copy_tree, writes_to
from moce_ds.data.block_cache import CachedShardSet
from moce_ds.data.clusters import Clusters, load_ids
from moce_ds.data.kept_encoder import check_encoder
from moce_ds.data.loader import Loader
from moce_ds.data.prefetch import Prefetch, Share, shortage
from moce_ds.data.reading_order import BlockOrder, Order, RandomOrder, blocks_of
from moce_ds.data.sampler import ReadList, ShuffledSampler
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import ImageInput, RandomCrop
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import sincos_positions
from moce_ds.models.parameters import is_decoder
from moce_ds.models.sdr import Teacher
from moce_ds.models.shapes import ExpertShape
from moce_ds.models.vit import Encoder, load_encoder, save_encoder
from moce_ds.training.initial_weights import read_weights
from moce_ds.training.local_sampler import LocalSampler
from moce_ds.training.settings import DataSettings, PretrainRunSettings


@dataclass(frozen=True)
class ClusteredData:
    """The clusters of a run and the cluster of every image of its shard set."""

    clusters: Clusters
    ids_N: NDArray[np.int32]


@dataclass(frozen=True)
class Inputs:
    """The images of a run, how they are cropped, and their clusters if these route them.

    Attributes:
        order: in which the images of an epoch are read.
        cache_gib: of a node, if the shards have a cache.
        input: size and normalisation of an image of the model.
        threads: that decode images in each process.
        named: for each input its setting and folder, its key in a manifest, and its hash.
    """

    shards: ShardSet
    order: Order
    cache_gib: float
    crop: RandomCrop
    input: ImageInput
    threads: int
    clustered: ClusteredData | None
    named: list[tuple[str, str, str]]

    @property
    def clusters(self) -> Clusters | None:
        """The clusters themselves."""
        return self.clustered.clusters if self.clustered else None

    @property
    def made_from(self) -> dict[str, str | None]:
        """What a checkpoint's manifest names them by."""
        return {
            "clusters_hash": self.clusters.hash if self.clusters else None,
            "shards_fingerprint": self.shards.fingerprint,
        }

    def loader(
        self,
        sampler: ShuffledSampler | LocalSampler,
        first: int,
        last: int,
        runtime: Runtime,
    ) -> Loader:
        """Random crops of this process's part of the micro-batches `first` to `last` (exclusive); a collective."""
        batch_size = sampler.batch_size // runtime.world_size
        prefetch = self._prefetch(first * sampler.batch_size, runtime)

        def read_list(index: int) -> ReadList:
            if prefetch is not None:
                prefetch.reach(index * sampler.batch_size)
            return sampler.batch(index).part(runtime.rank, runtime.world_size)

        return Loader(
            self.shards,
            read_list,
            self.crop,
            self.input,
            first=first,
            last=last,
            batch_size=batch_size,
            threads=self.threads,
            device=runtime.device,
            beside=prefetch,
        )

    def _prefetch(self, position: int, runtime: Runtime) -> Prefetch | None:
        """What fills the cache of this node from a place of the stream on; None without a cache."""
        if not isinstance(self.shards, CachedShardSet):
            return None
        cache_bytes = int(self.cache_gib * 2**30)
        if warning := shortage(self.shards, self.order, cache_bytes):
            runtime.warn(warning)
        hosts = runtime.texts(socket.gethostname())
        peers = [rank for rank, host in enumerate(hosts) if host == hosts[runtime.rank]]
        limit = cache_bytes // len(peers)
        return Prefetch(self.shards, self.order, Share(peers.index(runtime.rank), len(peers), limit), position)


def open_inputs(data: DataSettings, spec: ModelSpec, clusters: Path | None, seed: int) -> Inputs:
    """Open the images and the clusters that route them, checked to belong together.

    Args:
        clusters: their folder; None: nothing is routed by cluster.
        seed: of the crops and the reading order.

    Raises:
        ArtefactError: one of them cannot be read, or the clusters are those of other images.
        ConfigError: the experts have more paths than there are clusters.
    """
    images = ShardSet.open(data.shards)
    order: Order = RandomOrder(images.count, seed)
    if data.order == "blocks":
        order = BlockOrder(blocks_of(images.shards), data.shuffle_window, seed)
    if data.cache is not None:
        images = CachedShardSet.of(images, data.cache)
    named = [(f"data.shards: {data.shards}", "shards_fingerprint", images.fingerprint)]
    clustered = None
    if clusters is not None and spec.experts is not None:
        opened = Clusters.open(clusters)
        check_encoder(clusters, opened.encoder_fingerprint, opened.files)  # it labels a task's images after the run
        check_paths(spec.experts, len(opened.sizes_M))
        named.append((f"experts.clusters: {clusters}", "clusters_hash", opened.hash))
        clustered = ClusteredData(opened, load_ids(clusters, images.fingerprint, images.count))
    crop = RandomCrop(seed, data.crop_scale, flip=data.flip)
    return Inputs(images, order, data.cache_gib, crop, spec.input, data.threads, clustered, named)


def check_paths(experts: ExpertShape, clusters: int) -> None:
    """Raise ConfigError where the paths of SDR are more than the clusters, so that some groups would learn nothing."""
    paths = experts.num_experts**experts.stages  # one path where there are no stages
    if paths > clusters:
        raise ConfigError(
            f"sdr.stages: {experts.num_experts} groups in {experts.stages} stages make {paths} paths for "
            f"{clusters} clusters: expected at most as many. Lower sdr.stages, or cluster into {paths}."
        )


def keep_clusters(source: Path | None, run: Path, runtime: Runtime) -> None:
    """Put the clusters, if any, into the run folder, so that the run alone can label a task's images; a collective.

    Raises:
        ArtefactError: the folder cannot be written to.
    """
    target = run / CLUSTERS
    with runtime.raise_on_all_ranks(), writes_to(target):
        if runtime.is_main and source is not None and not target.exists():
            with atomic_folder(target) as draft:
                copy_tree(source, draft)


def read_teacher(spec: ModelSpec, run: PretrainRunSettings, runtime: Runtime) -> Encoder:
    """The teacher's encoder; a collective. Raises ArtefactError: it cannot be read, or does not fit `spec`."""
    kept = run.out / TEACHER
    if runtime.max([float(kept.exists())])[0]:
        return load_encoder(kept)
    source = run.init_from
    assert source is not None, "PretrainSettings sees to it"
    weights = read_weights(source, run.replace_positions, runtime)
    state = {name: tensor for name, tensor in weights.items() if not is_decoder(name)}
    state["pos_embed"] = sincos_positions(spec.shape, spec.shape.width)
    return Encoder.from_state(state, spec.shape, spec.input, {"init_from": str(source)}, str(source))


def keep_teacher(encoder: Encoder, run: Path, runtime: Runtime) -> Teacher:
    """Leave the teacher in the folder of the run, and make it ready on this process's device; a collective.

    Raises:
        ArtefactError: the folder cannot be written to.
    """
    folder = run / TEACHER
    with runtime.raise_on_all_ranks(), writes_to(folder):
        if runtime.is_main and not folder.exists():
            with atomic_folder(folder) as draft:
                save_encoder(draft, encoder.model.state_dict(), encoder.shape, encoder.input, encoder.provenance)
    encoder.model.to(runtime.device)
    return Teacher(encoder)
