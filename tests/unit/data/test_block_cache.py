"""The cache of blocks: what it yields is what the storage has, or it yields nothing; and what fills it."""

import fcntl
import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from moce_ds.common.errors import ArtefactError
from moce_ds.data import reading_order
from moce_ds.data.block_cache import CachedShardSet
from moce_ds.data.prefetch import Prefetch, Share, shortage
from moce_ds.data.reading_order import BlockOrder, RandomOrder
from moce_ds.data.shard_storage import FolderStorage
from moce_ds.data.shards import ShardSet

PATIENCE = 60.0
PLENTY = 2**30


@dataclass(frozen=True)
class CountedStorage(FolderStorage):
    """Counts what it reads; `fails` makes it a storage that cannot be reached."""

    reads: Counter[tuple[str, int]] = field(default_factory=Counter)
    fails: threading.Event = field(default_factory=threading.Event)

    def read(self, name: str, offset: int, size: int) -> bytes:
        if self.fails.is_set():
            raise OSError(5, "Input/output error")
        self.reads[name, offset] += 1
        return super().read(name, offset, size)


@pytest.fixture
def cached(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CachedShardSet:
    """The set of 60 images with an empty cache, in blocks of a few images."""
    shards = ShardSet.open(tiny_shards)
    monkeypatch.setattr(reading_order, "BLOCK_BYTES", sum(shard.bytes for shard in shards.shards) / 15)
    return CachedShardSet.of(replace(shards, storage=CountedStorage(shards.path)), tmp_path / "cache")


def counted(cached: CachedShardSet) -> CountedStorage:
    assert isinstance(cached.storage, CountedStorage)
    return cached.storage


def fill(cached: CachedShardSet) -> None:
    cached.cache.folder.mkdir(parents=True)
    for block in range(cached.blocks):
        cached.cache.write(block, cached.read_block(block))


def test_blocks_are_of_one_shard_and_equally_long(cached: CachedShardSet) -> None:
    first_K1, shard_N = cached.first_K1, cached.samples["shard"]
    assert first_K1[0] == 0 and first_K1[-1] == 60 and (np.diff(first_K1) > 0).all()
    for first, end in itertools.pairwise(first_K1):
        assert len(set(shard_N[first:end])) == 1
    lengths = np.diff(first_K1)
    last_of_shard = np.append(np.diff(shard_N[first_K1[:-1]]) > 0, True)
    assert len(set(lengths[~last_of_shard])) == 1 and lengths.max() == lengths[0] == 4
    assert [cached.block_of(i) for i in range(60)] == np.repeat(np.arange(len(lengths)), lengths).tolist()


def test_a_small_set_has_a_block_a_shard(tiny_shards: Path, tmp_path: Path) -> None:
    assert CachedShardSet.of(ShardSet.open(tiny_shards), tmp_path).first_K1.tolist() == [0, 25, 50, 60]


def test_images_come_from_the_cache_where_it_has_them(cached: CachedShardSet, tiny_shards: Path) -> None:
    expected = [ShardSet.open(tiny_shards).read(i) for i in range(60)]
    assert [cached.read(i) for i in range(60)] == expected, "without copies"
    fill(cached)
    counted(cached).fails.set()
    assert [cached.read(i) for i in range(60)] == expected, "without the storage"


@pytest.mark.parametrize("harm", ["altered", "cut", "emptied"])
def test_a_damaged_copy_is_replaced_by_the_storage(cached: CachedShardSet, tiny_shards: Path, harm: str) -> None:
    fill(cached)
    file = cached.cache.folder / "00000002"
    whole = file.read_bytes()
    file.write_bytes({"altered": bytes(255 - b for b in whole), "cut": whole[:40], "emptied": b""}[harm])
    images = range(*cached.first_K1[2:4])
    assert [cached.read(i) for i in images] == [ShardSet.open(tiny_shards).read(i) for i in images]
    assert harm != "altered" or not file.exists()


def test_unused_caches_of_other_sets_are_removed(cached: CachedShardSet) -> None:
    place = cached.cache.folder.parent
    for name in ("moce-cache-0123456789abcdef", "moce-cache-fedcba9876543210", "photos", "moce-cache-notours"):
        (place / name).mkdir(parents=True)
        (place / name / ".used").touch()
    with open(place / "moce-cache-fedcba9876543210" / ".used", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with cached.cache.in_use():
            left = {path.name for path in place.iterdir()}
    assert left == {cached.cache.folder.name, "moce-cache-fedcba9876543210", "photos", "moce-cache-notours"}


def test_a_folder_that_cannot_be_written_is_named(cached: CachedShardSet) -> None:
    cached.cache.folder.parent.write_text("a file")
    with pytest.raises(ArtefactError, match=r"data\.cache: .* cannot be written"), cached.cache.in_use():
        pass


def wait_for(cached: CachedShardSet, blocks: set[int]) -> None:
    """Return when the cache holds exactly these blocks."""
    limit = time.monotonic() + PATIENCE
    while set(cached.cache.sizes()) != blocks:
        assert time.monotonic() < limit, (set(cached.cache.sizes()), blocks)
        time.sleep(0.002)


def blocks_of(order: BlockOrder, *windows: int) -> set[int]:
    return {block for window in windows for block in order.blocks(0, window)[0].tolist()}


def test_the_next_window_is_copied_while_one_is_read(cached: CachedShardSet) -> None:
    order = BlockOrder(cached.first_K1, 16, seed=1)
    with Prefetch(cached, order, Share(0, 1, PLENTY), position=0) as prefetch:
        begun = {b for b, begin in zip(*order.blocks(0, 1), strict=True) if begin <= 16}
        wait_for(cached, blocks_of(order, 0) | begun)
        prefetch.reach(16)
        half = {b for b, begin in zip(*order.blocks(0, 2), strict=True) if begin <= 32}
        wait_for(cached, blocks_of(order, 0, 1) | half)
        prefetch.reach(60)
        wait_for(cached, set(range(cached.blocks)))
    assert set(counted(cached).reads.values()) == {1}, "each block once, though windows share some"


def test_a_full_cache_drops_what_no_window_needs(cached: CachedShardSet) -> None:
    order = BlockOrder(cached.first_K1, 12, seed=1)
    limit = sum(sorted((cached.size_of_block(k) for k in range(cached.blocks)), reverse=True)[:9])
    with Prefetch(cached, order, Share(0, 1, limit), position=0) as prefetch:
        for place in range(0, 120, 4):
            prefetch.reach(place)
            epoch, window = place // 60, place % 60 // 12
            needed = set(order.blocks(epoch, window)[0].tolist())
            deadline = time.monotonic() + PATIENCE
            while not needed <= set(cached.cache.sizes()):
                assert time.monotonic() < deadline
                time.sleep(0.002)
            assert sum(cached.cache.sizes().values()) <= limit


def test_a_small_cache_keeps_to_its_limit(cached: CachedShardSet) -> None:
    sizes = [cached.size_of_block(k) for k in range(cached.blocks)]
    order = BlockOrder(cached.first_K1, 60, seed=1)
    limit = sum(sizes) // 2
    with Prefetch(cached, order, Share(0, 1, limit), position=0) as prefetch:
        prefetch.reach(300)
    kept = cached.cache.sizes()
    assert sum(kept.values()) <= limit and all(kept[block] == sizes[block] for block in kept)


def test_a_cache_that_cannot_hold_two_windows_is_warned_about(cached: CachedShardSet) -> None:
    total = sum(shard.bytes for shard in cached.shards)
    order = BlockOrder(cached.first_K1, 12, seed=1)
    warning = shortage(cached, order, total // 5 + 1)
    assert warning is not None and "of two windows of images" in warning and "data.shuffle_window" in warning
    assert shortage(cached, order, total * 2 // 5) is None
    assert shortage(cached, BlockOrder(cached.first_K1, 60, seed=1), total) is None, "the whole set fits"
    assert shortage(cached, RandomOrder(60, seed=1), 1) is None, "every block that fits is of use"


def test_a_random_order_keeps_the_blocks_that_fit(cached: CachedShardSet) -> None:
    """In the order of the set; all are needed as much."""
    limit = sum(cached.size_of_block(block) for block in range(5))
    with Prefetch(cached, RandomOrder(60, seed=1), Share(0, 1, limit), position=0) as prefetch:
        wait_for(cached, set(range(5)))
        prefetch.reach(600)
    assert set(cached.cache.sizes()) == set(range(5))


def test_processes_share_the_work_and_find_what_earlier_ones_left(cached: CachedShardSet) -> None:
    order = RandomOrder(60, seed=1)
    everything = set(range(cached.blocks))
    with Prefetch(cached, order, Share(1, 3, PLENTY), position=0):
        wait_for(cached, {block for block in everything if block % 3 == 1})
    with Prefetch(cached, order, Share(0, 2, PLENTY), position=0), Prefetch(cached, order, Share(1, 2, PLENTY), 0):
        wait_for(cached, everything)
    assert set(counted(cached).reads.values()) == {1}


def test_a_storage_that_fails_is_no_error_of_the_prefetch(cached: CachedShardSet) -> None:
    """It is one of the image that is read from there."""
    counted(cached).fails.set()
    with Prefetch(cached, RandomOrder(60, seed=1), Share(0, 1, PLENTY), position=0):
        pass
    assert cached.cache.sizes() == {}
