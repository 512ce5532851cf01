"""Copies the blocks that a reading order is about to need into the cache of this node, in threads of their own.

Places count the images of the endless stream of epochs (`ShuffledSampler`). While a window is read, the blocks of the
next one are copied at the same pace.
"""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from moce_ds.common.errors import DataError
from moce_ds.data.block_cache import CachedShardSet
from moce_ds.data.reading_order import BlockOrder, Order

_logger = logging.getLogger(__name__)

_FETCHERS = 8
"""Blocks that a process copies at a time: enough for the latency of an object store."""


class _Needed(NamedTuple):
    """A block, and the places of the stream from its first image to its last, before windows are shuffled."""

    begin: int
    end: int
    block: int


@dataclass(frozen=True)
class Share:
    """The part of the cache that a process of a node fills: blocks b with b % processes == index."""

    index: int
    processes: int
    limit_bytes: int

    def owns(self, block: int) -> bool:
        """Whether this process copies and removes a block."""
        return block % self.processes == self.index


class Prefetch:
    """Fills the cache of a shard set; use it as a context. `reach` says how far the stream has been read.

    Args:
        order: of the images.
        share: of this process.
        position: the place of the stream where reading begins.
    """

    def __init__(self, shards: CachedShardSet, order: Order, share: Share, position: int) -> None:
        self._shards, self._share = shards, share
        self._count, self._window = order.count, order.window if isinstance(order, BlockOrder) else order.count
        self._needed = _stream(shards, order, position)
        self._reached, self._stopped = position, False
        self._moved, self._taking = threading.Condition(), threading.Lock()
        self._kept: dict[int, tuple[int, int]] = {}  # of this share: block -> (bytes, last place that needs it)
        self._bytes = 0
        self._stack = ExitStack()

    def __enter__(self) -> "Prefetch":
        self._stack.enter_context(self._shards.cache.in_use())
        own = {block: size for block, size in self._shards.cache.sizes().items() if self._share.owns(block)}
        self._kept, self._bytes = {block: (size, -1) for block, size in own.items()}, sum(own.values())
        threads = [threading.Thread(target=self._fetch, name=f"moce-fetch-{k}", daemon=True) for k in range(_FETCHERS)]
        for thread in threads:
            thread.start()
            self._stack.callback(thread.join)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._stack.close()

    def reach(self, position: int) -> None:
        """The stream is being read at `position`. Any thread may say so."""
        with self._moved:
            self._reached = max(self._reached, position)
            self._moved.notify_all()

    def _stop(self) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify_all()

    def _fetch(self) -> None:
        """Copy blocks until stopped; runs in each thread."""
        while (needed := self._next()) is not None:
            try:
                data = self._shards.read_block(needed.block)
            except (OSError, DataError) as error:  # the image that is read from there next says so
                _logger.debug(f"block {needed.block} cannot be read ahead: {error}")
                with self._taking:
                    self._forget(needed.block)
                continue
            try:
                self._shards.cache.write(needed.block, data)
            except OSError as error:
                _logger.warning(f"data.cache: {self._shards.cache.folder}: {error.strerror}. Going on without copies.")
                self._stop()

    def _next(self) -> _Needed | None:
        """The next block to copy, when it is due and there is room for it; None: there is nothing to do any more."""
        with self._taking:
            for needed in self._needed:
                self._wait_for(needed.begin - self._window)
                if self._stopped:
                    return None
                if self._share.owns(needed.block) and not self._is_kept(needed) and self._make_room(needed):
                    return needed
        return None

    def _wait_for(self, position: int) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or self._reached >= position)

    def _is_kept(self, needed: _Needed) -> bool:
        if needed.block not in self._kept:
            return False
        size, last = self._kept[needed.block]
        self._kept[needed.block] = size, max(last, needed.end)
        return True

    def _make_room(self, needed: _Needed) -> bool:
        """Reserve the bytes of a block, and remove blocks that are no longer needed where the share is full."""
        try:
            size = self._shards.size_of_block(needed.block)
        except DataError:  # a damaged table; the image that is read from there next says so
            return False
        window_begins = self._reached - self._reached % self._count % self._window
        while self._bytes + size > self._share.limit_bytes:
            oldest = min(self._kept, key=lambda block: self._kept[block][1], default=None)
            if oldest is None or self._kept[oldest][1] > window_begins:
                return False
            self._shards.cache.drop(oldest)
            self._forget(oldest)
        self._kept[needed.block] = size, needed.end
        self._bytes += size
        return True

    def _forget(self, block: int) -> None:
        self._bytes -= self._kept.pop(block, (0, 0))[0]


def shortage(shards: CachedShardSet, order: Order, limit_bytes: int) -> str | None:
    """Why a cache of `limit_bytes` on a node makes images be read one by one, and what to do; None if it does not.

    It must hold the window that is read and the next one, or the whole set. A random order needs all of the set at any
    time, so that there every copy is of use.
    """
    if not isinstance(order, BlockOrder):
        return None
    total = sum(shard.bytes for shard in shards.shards)
    needed = min(total, 2 * order.window * total // order.count)
    if limit_bytes >= needed:
        return None
    return (
        f"data.cache_gib: {limit_bytes / 2**30:.3g} GiB is less than the {needed / 2**30:.3g} GiB of two windows of "
        "images, so some images are read one by one from where the set is stored. Raise it, or lower "
        "data.shuffle_window in a new run."
    )


def _stream(shards: CachedShardSet, order: Order, position: int) -> Iterator[_Needed]:
    """The blocks from the window of a place on, without end; of a random order, all blocks, which are needed always."""
    if not isinstance(order, BlockOrder):
        yield from (_Needed(position, sys.maxsize, block) for block in range(shards.blocks))
        return
    epoch, place = divmod(position, order.count)
    window = place // order.window
    while True:
        for block, begin in zip(*(array.tolist() for array in order.blocks(epoch, window)), strict=True):
            begin += epoch * order.count
            images = int(shards.first_K1[block + 1] - shards.first_K1[block])
            yield _Needed(begin, begin + images, block)
        window += 1
        if window * order.window >= order.count:
            epoch, window = epoch + 1, 0
