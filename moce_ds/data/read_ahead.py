"""What happens before a batch is needed: `read_ahead` reads files, `in_background` makes items in another thread.

A read waits for the storage without holding Python's global lock, so a few threads hide the latency of a network file
system.

Axes: B images.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moce_ds.common.errors import DataError
from moce_ds.data.image_file import as_png
from moce_ds.data.sampler import ReadList
from moce_ds.data.shards import ShardSet

T = TypeVar("T")

READERS = 16
"""Reads in flight. On a local disk 1 and 32 cost the same CPU time (docs/performance.md)."""
FILES_AHEAD = 4
"""Batches whose files are read while the next batch to decode waits or is used."""
_BYTES_AHEAD = 1 << 28
"""No further batch is begun while so many bytes wait to be decoded, for large images."""


@dataclass(frozen=True)
class FileBatch:
    """The files of a batch.

    Attributes:
        files: their bytes, uint8.
        ids_B, epochs_B, wanted_B: id of each image, epoch of its read, and the requested id; int64.
    """

    files: list[NDArray[np.uint8]]
    ids_B: NDArray[np.int64]
    epochs_B: NDArray[np.int64]
    wanted_B: NDArray[np.int64]


@dataclass(frozen=True)
class IntactReader:
    """Reads images, or the next intact ones in place of damaged ones.

    Attributes:
        replacements: images tried in place of a damaged one before it is an error.
        refused: image id -> times that DALI refused its data. A change applies to reads that begin later.
    """

    shards: ShardSet
    replacements: int
    refused: dict[int, int]

    def read(self, wanted: int) -> tuple[NDArray[np.uint8], int]:
        """The bytes of an image, or of the next intact one, and its id.

        Raises:
            DataError: no image is intact, or a shard cannot be read.
        """
        fault = ""
        for offset in range(min(self.replacements, self.shards.count - 1) + 1):
            image_id = (wanted + offset) % self.shards.count
            data = self.shards.read(image_id)
            if not self.shards.is_intact(image_id, data):
                fault = fault or self._altered(wanted)
                continue
            try:
                return np.frombuffer(self._decodable(image_id, data), dtype=np.uint8), image_id
            except DataError as error:
                fault = fault or str(error)
        raise DataError(fault)

    def read_all(self, wanted: list[int]) -> list[tuple[NDArray[np.uint8], int]]:
        """`read` of several images, in order."""
        return [self.read(image_id) for image_id in wanted]

    def _decodable(self, image_id: int, data: bytes) -> bytes:
        """`data`, or a PNG of Pillow's reading if DALI refused it. Raises DataError if neither can decode it."""
        times = self.refused.get(image_id, 0)
        if not times:
            return data
        image = self.shards.decode(image_id, strictly=True)
        if times == 1:
            return as_png(image)
        raise DataError(
            f"{self.shards.path}: image {image_id} ({self.shards.source(image_id)}) is decoded by Pillow but not by "
            "DALI. Remove this image from the source, write the set again with `moce shards`, and report the "
            "image."
        )

    def _altered(self, wanted: int) -> str:
        tried = min(self.replacements, self.shards.count - 1)
        after = f" and the {tried} after it are" if tried else " is"
        return (
            f"{self.shards.path}: image {wanted} ({self.shards.source(wanted)}){after} not as written, or cannot be "
            "decoded; check the set with `moce inspect --verify`, and write it again with `moce shards`."
        )


@dataclass(frozen=True)
class _Reading:
    """A batch whose files are being read, in parts of consecutive images."""

    wanted: ReadList
    parts: list[Future[list[tuple[NDArray[np.uint8], int]]]]
    bytes: int

    def result(self) -> FileBatch:
        """Wait for the files. Raises DataError as `IntactReader.read`."""
        files, ids = zip(*(read for part in self.parts for read in part.result()), strict=True)
        return FileBatch(list(files), np.array(ids, dtype=np.int64), self.wanted.epochs, self.wanted.ids)


def read_ahead(
    reader: IntactReader, read_list: Callable[[int], ReadList], first: int, last: int, pool: ThreadPoolExecutor
) -> Generator[FileBatch]:
    """The files of the batches `first` to `last` (exclusive), in order.

    While a batch is in use, up to `FILES_AHEAD` further ones are read, as long as they are small.

    Args:
        read_list: batch index -> the images to read; called in the thread of the caller.
        pool: of at most `READERS` threads.

    Raises (while iterating):
        DataError: as `IntactReader.read`, at the batch that cannot be read.
    """
    reading: deque[_Reading] = deque()
    index = first
    try:
        while index < last or reading:
            while index < last and len(reading) <= FILES_AHEAD and sum(r.bytes for r in reading) < _BYTES_AHEAD:
                reading.append(_begin(reader, read_list(index), pool))
                index += 1
            yield reading.popleft().result()
    finally:
        for part in (part for batch in reading for part in batch.parts):
            part.cancel()


def _begin(reader: IntactReader, wanted: ReadList, pool: ThreadPoolExecutor) -> _Reading:
    parts = np.array_split(wanted.ids, min(READERS, len(wanted.ids)))
    size = int(reader.shards.samples["size"][wanted.ids].sum())
    return _Reading(wanted, [pool.submit(reader.read_all, part.tolist()) for part in parts], size)


def in_background(items: Generator[T], ahead: int, prepare: Callable[[], object]) -> Generator[T]:
    """The items of a generator, none of them None, made in another thread up to `ahead` items before they are taken.

    An exception of the generator is raised at the item that it belongs to. Closing the iterator, also by an exception
    where it is used, closes the generator and ends the thread.

    Args:
        prepare: called once in that thread.
    """
    with closing(items), ThreadPoolExecutor(1, "moce-load", prepare) as thread:
        coming = deque(thread.submit(next, items, None) for _ in range(ahead))
        try:
            while (item := coming.popleft().result()) is not None:
                coming.append(thread.submit(next, items, None))
                yield item
        finally:
            for future in coming:
                future.cancel()
