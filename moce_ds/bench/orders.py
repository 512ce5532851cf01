"""Reading orders from a slow storage: `data.order=random`, `blocks`, and `blocks` with a cache; no image is decoded."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_ds.bench.load import write_photos
from moce_ds.bench.timing import interleaved
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.data.block_cache import CachedShardSet
from moce_ds.data.prefetch import Prefetch, Share
from moce_ds.data.read_ahead import READERS, IntactReader, read_ahead
from moce_ds.data.reading_order import BlockOrder, Order, RandomOrder
from moce_ds.data.sampler import ReadList, ShuffledSampler
from moce_ds.data.shard_storage import FolderStorage
from moce_ds.data.shards import ShardSet

_SIZE = (100, 75)  # pixels
_BATCH, _BLOCK, _WINDOW = 256, 128, 1024  # images


@dataclass(frozen=True)
class _SlowStorage(FolderStorage):
    """A folder that takes `delay` seconds to answer, and counts how often."""

    delay: float
    answers: Iterator[int] = field(default_factory=count)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Part of a file, later."""
        next(self.answers)
        time.sleep(self.delay)
        return super().read(name, offset, size)


def bench_orders(images: int, delay: float, repeats: int) -> list[dict[str, Any]]:
    """Rows (name, images, delay_ms, seconds, images_per_second, ratio to random, answers of the storage in an epoch).

    Each case reads the files of one epoch, with the threads that training has.
    """
    with scratch_folder() as scratch:
        written = write_photos(scratch / "photos", images, _SIZE)
        first_K1 = np.append(np.arange(0, images, _BLOCK), images)
        orders: dict[str, tuple[Order, bool]] = {
            "random": (RandomOrder(images, 0), False),
            "blocks": (BlockOrder(first_K1, _WINDOW, 0), False),
            "blocks, cache": (BlockOrder(first_K1, _WINDOW, 0), True),
        }
        answers: dict[str, int] = {}

        def read(name: str, order: Order, cached: bool) -> None:
            storage = _SlowStorage(written.path, delay)
            shards = replace(written, storage=storage)
            opening = _cached(shards, first_K1, scratch, order) if cached else nullcontext((shards, None))
            with opening as (opened, prefetch):
                _read_epoch(opened, order, prefetch)
            answers[name] = next(storage.answers)

        seconds = interleaved({name: partial(read, name, *orders[name]) for name in orders}, repeats, warmup=1)
    return [
        {
            "name": name,
            "images": images,
            "delay_ms": 1000 * delay,
            "seconds": s,
            "images_per_second": images / s,
            "ratio": seconds["random"] / s,
            "answers": answers[name],
        }
        for name, s in seconds.items()
    ]


@contextmanager
def _cached(
    shards: ShardSet, first_K1: NDArray[np.int64], scratch: Path, order: Order
) -> Iterator[tuple[ShardSet, Prefetch]]:
    """The set with an empty cache, and what fills it."""
    with scratch_folder(scratch) as place:
        cached = replace(CachedShardSet.of(shards, place), first_K1=first_K1)
        with Prefetch(cached, order, Share(0, 1, 1 << 40), position=0) as prefetch:
            yield cached, prefetch


def _read_epoch(shards: ShardSet, order: Order, prefetch: Prefetch | None) -> None:
    sampler = ShuffledSampler(order, _BATCH)

    def read_list(index: int) -> ReadList:
        if prefetch is not None:
            prefetch.reach(index * _BATCH)
        return sampler.batch(index)

    with ThreadPoolExecutor(READERS) as pool:
        for _ in read_ahead(IntactReader(shards, 0, {}), read_list, 0, shards.count // _BATCH, pool):
            pass
