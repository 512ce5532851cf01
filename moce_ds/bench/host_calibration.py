"""The host of `moce plan --device this`: route table, plan, order of images, agreement and loading, measured.

The constants of a formula keep their proportions: all of a term are scaled by measured over predicted time.

Axes: L expert layers, M clusters, E experts, W ranks, B images of a micro-batch of a process, N images.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from moce_ds.bench.load import PHOTO, sequential_loader, write_photos
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.data.read_ahead import READERS, IntactReader, read_ahead
from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sampler import SequentialSampler, ShuffledSampler
from moce_ds.data.shards import ShardSet
from moce_ds.distributed.runtime import Runtime
from moce_ds.forecast.devices import Host
from moce_ds.forecast.host_work import HostWork, block_operators, rounds
from moce_ds.moe.gate import balanced_experts
from moce_ds.moe.placement import default_placement
from moce_ds.moe.routing_plan import make_plan
from moce_ds.training.local_sampler import LocalSampler

_DEVIATION = 3.0  # of a trained gate's logits, which need all iterations
_BATCH, _BATCHES = 64, 4  # loaded after a first batch
_PHOTOS = 128


@contextmanager
def images_to_load(shards: Path) -> Iterator[Path]:
    """The shard set of the run, or if there is none, a temporary one of photographs of 500 x 375 pixels."""
    if ShardSet.recognises(shards):
        yield shards
        return
    with scratch_folder() as scratch:
        yield write_photos(scratch / "photos", _PHOTOS, PHOTO).path


@dataclass(frozen=True)
class Loading:
    """Seconds of one process for one image: to read its file, and to read and decode it; and mean bytes of an image."""

    read: float
    load: float
    size: float

    @classmethod
    def measure(cls, host_work: HostWork, path: Path, micro: int, runtime: Runtime) -> "Loading":
        """Load a few batches in all processes at once; the slowest process counts. A collective.

        Raises:
            DataError: an image cannot be read.
        """
        shards, size = ShardSet.open(path), min(micro, _BATCH)
        input, threads = host_work.work.spec.input, host_work.data.threads
        order = SequentialSampler(0, shards.count, size)
        passes = -(-(1 + _BATCHES) // order.num_batches)
        runtime.barrier()
        with ThreadPoolExecutor(READERS) as pool:
            reader = IntactReader(shards, 0, {})
            files = read_ahead(
                reader, lambda i: order.batch(i % order.num_batches), 0, passes * order.num_batches, pool
            )
            read = _seconds_each(len(batch.files) for batch in files)
        loader = sequential_loader(shards, input, size, threads, runtime.device, passes)
        load = _seconds_each(len(batch.ids_B) for batch in loader)
        read, load = runtime.max([read, load])
        return cls(read, load, float(shards.samples["size"].mean()))


def _seconds_each(sizes: Iterator[int]) -> float:
    """Seconds for one image of the batches of these sizes that follow the first one."""
    next(sizes)
    began = time.perf_counter()
    images = sum(itertools.islice(sizes, _BATCHES))
    return (time.perf_counter() - began) / images


def host_cases(host_work: HostWork, micro: int, runtime: Runtime) -> dict[str, Callable[[], object]]:
    """What to time of the host, at the sizes of a run with micro-batches of B = `micro` images."""
    cases: dict[str, Callable[[], object]] = {}
    if runtime.world_size > 1:
        cases["agreement"] = lambda: runtime.max([0.0])
    experts = host_work.work.spec.experts
    if experts is None:
        return cases
    L, E, W, ep_size = len(experts.layers), experts.num_experts, runtime.world_size, host_work.work.ep_size
    M = host_work.clusters or Host().clusters
    random = np.random.default_rng(0)
    probs_LME = torch.softmax(_DEVIATION * torch.randn(L, M, E), dim=-1)
    expert_MLK = probs_LME.topk(experts.k, dim=-1).indices.permute(1, 0, 2).contiguous().numpy()
    slot_LE = default_placement(L, E)
    ids_N = random.integers(M, size=64 * W * micro).astype(np.int32)
    sampler = LocalSampler(
        ShuffledSampler(RandomOrder(len(ids_N), 0), W * micro), ids_N, slot_LE, W, ep_size, [(0, expert_MLK[:, :, 0])]
    )
    images_G, batches = sampler.batch(0).ids, itertools.count(1)
    if host_work.balanced:
        cases["table"] = lambda: balanced_experts(probs_LME, torch.full((M,), 1 / M), experts.k)
    if host_work.dealt:
        cases["deal"] = lambda: sampler.batch(next(batches))
    cases["plan"] = lambda: make_plan(
        ids_N[images_G].astype(np.int64).reshape(W, micro), expert_MLK, slot_LE, runtime.rank, ep_size
    )
    return cases


def measured_host(
    host_work: HostWork, seconds: Mapping[str, float], loading: Loading, micro: int, runtime: Runtime
) -> Host:
    """The host by the seconds of `host_cases`, of loading, and on a GPU of "launch": a block's pass over one image."""
    host, world_size = Host(image_bytes=loading.size), runtime.world_size
    host = replace(
        host,
        # A CPU computes what it launches.
        launch=seconds["launch"] / block_operators(host_work.work.engine.precision) if "launch" in seconds else 0.0,
        hop=seconds["agreement"] / rounds(world_size) if "agreement" in seconds else host.hop,
        file=loading.read,
        latency=0.0,
        storage=loading.size / loading.read,
        decode=1 / loading.load,
    )
    if "table" in seconds:
        host = _scaled(host, seconds["table"] / host_work.table(host), "table_iteration", "table_entry")
    if "plan" in seconds:
        predicted = host_work.plan(host, world_size, micro)
        host = _scaled(host, seconds["plan"] / predicted, "plan_layer", "plan_image", "plan_lookup")
    if "deal" in seconds:
        predicted = host_work.dealing(host) / host_work.work.optim.accumulation
        host = _scaled(host, seconds["deal"] / predicted, "deal_image", "deal_cluster")
    return host


def _scaled(host: Host, factor: float, *names: str) -> Host:
    return replace(host, **{name: factor * getattr(host, name) for name in names})
