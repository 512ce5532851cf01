"""The DALI pipeline: image files in, normalised crops out. Only this file and `bench/load.py` import DALI.

One pipeline serves CPU and GPU. Our callback feeds it, so sampler and transform determine the order of reading, the
crops and the flips, and a run resumes exactly at any batch. Reader threads read files ahead (`read_ahead`), one loading
thread schedules DALI and waits for it, and the training thread takes finished batches.

Axes: B images, H, W pixels.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.common.errors import ConfigError, DataError
from moce_ds.data.read_ahead import FILES_AHEAD, READERS, FileBatch, IntactReader, in_background, read_ahead
from moce_ds.data.sampler import ReadList
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import ImageInput, Windows

try:
    from nvidia.dali import fn, pipeline_def, types
except ImportError as error:
    raise ConfigError(
        f"Reading images for a model needs NVIDIA DALI, which does not import here ({error}). Install one of the "
        "extras: pip install 'moce-ds[cpu]', 'moce-ds[cu13]' or 'moce-ds[cu12]'."
    ) from None

# Replacement images tried for a bad one before the whole shard set counts as damaged.
_REPLACEMENTS = 100
# Batches that DALI decodes while one is taken, and finished batches that wait to be taken.
_PREFETCH = _FINISHED = 2
BATCHES_AHEAD = _FINISHED + _PREFETCH - 1 + FILES_AHEAD
"""Batches, after those taken, that may have been listed: finished, in DALI, or being read."""
# A shard with at least this many bad images, and more than this share of those read from it, is damaged as a whole.
_ALTERED_COUNT, _ALTERED_SHARE = 3, 0.1


class Crop(Protocol):
    """Chooses the window of each image; see `transform`."""

    def windows(
        self,
        ids_B: NDArray[np.int64],
        epochs_B: NDArray[np.int64],
        heights_B: NDArray[np.int32],
        widths_B: NDArray[np.int32],
    ) -> Windows:
        """The windows of images of the given sizes in pixels, in their epochs."""
        ...


@dataclass(frozen=True)
class Batch:
    """Images and their ids.

    Attributes:
        images_BCHW: float32, normalised, on the loader's device.
        ids_B, epochs_B: id of each image, and the epoch of its read; int64 on the host.
        wanted_B: the ids that the sampler requested; they differ from `ids_B` where a bad image was replaced.
    """

    images_BCHW: Tensor
    ids_B: NDArray[np.int64]
    epochs_B: NDArray[np.int64]
    wanted_B: NDArray[np.int64]


@pipeline_def(enable_conditionals=False)
def _pipeline(source: Callable[[int], tuple[Any, ...]], input: ImageInput, on_gpu: bool) -> Any:
    files, start, shape, mirror = fn.external_source(
        source=source,
        num_outputs=4,
        batch=True,
        dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
        ndim=[1, 1, 1, 0],
    )
    # An unreadable header must fail here: in the decoder it ends the process with a segmentation fault if many other
    # images are being decoded (seen in DALI 2.4.0, in batches of 64). Adding zeros makes the decoder wait for this.
    header = fn.peek_image_shape(files, dtype=types.INT32)
    start = start + 0 * header[:2]
    images = fn.decoders.image_slice(
        files,
        start,
        shape,
        axes=[0, 1],
        normalized_anchor=False,
        normalized_shape=False,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
    )
    images = fn.resize(images, size=[input.size, input.size], interp_type=types.INTERP_CUBIC, antialias=True)
    return fn.crop_mirror_normalize(
        images,
        mirror=mirror,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * m for m in input.mean],
        std=[255 * s for s in input.std],
    )


class _Feed:
    """DALI's callback: the next files and their windows. DALI calls it in `schedule_run`."""

    def __init__(self, files: Iterator[FileBatch], shards: ShardSet, crop: Crop) -> None:
        self._files, self._shards, self._crop = files, shards, crop
        self._scheduled: deque[FileBatch] = deque()
        self._fault: DataError | None = None

    def __call__(self, iteration: int) -> tuple[Any, ...]:
        try:
            read = next(self._files)
        except DataError as fault:
            self._fault = fault  # raised after the batches before it
            raise StopIteration from None
        self._scheduled.append(read)
        rows = self._shards.rows(read.ids_B)
        windows = self._crop.windows(read.ids_B, read.epochs_B, rows["height"], rows["width"])
        return read.files, windows.start_B2, windows.shape_B2, windows.mirror_B

    def next_decoded(self) -> FileBatch:
        """The batch that DALI decodes first. Raises DataError: its files could not be read."""
        if not self._scheduled and self._fault is not None:
            raise self._fault
        return self._scheduled.popleft()


class _Decoder:
    """A running pipeline. It decodes the batches of a feed in order, up to `_PREFETCH` ahead."""

    def __init__(self, feed: _Feed, input: ImageInput, batch_size: int, threads: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._feed = feed
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._pipeline = _pipeline(
            source=feed,
            input=input,
            on_gpu=on_gpu,
            batch_size=batch_size,
            num_threads=threads,
            device_id=device.index if on_gpu else None,
            prefetch_queue_depth=_PREFETCH,
        )
        self._pipeline.build()

    def decode(self) -> tuple[FileBatch, Any]:
        """The next batch and its images, in a buffer of DALI.

        Raises:
            DataError: its files cannot be read.
            RuntimeError: DALI cannot decode an image of this batch or of the next ones; the pipeline is broken.
        """
        self._pipeline.schedule_run()
        read = self._feed.next_decoded()
        (images,) = self._pipeline.share_outputs()
        return read, images

    def take(self, images: Any) -> Tensor:
        """The images in memory that DALI does not write to again.

        On a CPU this is DALI's buffer itself: its executor leaves it to the tensor. On a GPU it is a copy, because
        DALI does not wait for kernels of other streams that read its buffer. The copy runs on a stream of this thread,
        which waits for it before DALI can use the buffer again.
        """
        if self._stream is None:
            images_BCHW = torch.from_dlpack(images.as_tensor())
        else:
            copied = torch.cuda.Event(blocking=True)
            with torch.cuda.stream(self._stream):
                images_BCHW = torch.from_dlpack(images.as_tensor()).clone()
                copied.record(self._stream)
            copied.synchronize()
        self._pipeline.release_outputs()
        return images_BCHW


class Loader:
    """Iterates over the batches `first` to `last` (exclusive) of a sampler's part.

    Args:
        shards: the images.
        read_list: batch index -> the images that this process reads; a pure function. A background thread calls it for
            at most `BATCHES_AHEAD` batches that have not been taken.
        crop: windows of the images.
        input: size and normalisation.
        batch_size: the longest batch.
        threads: decoding threads.
        device: device of the images; decoding happens there too.
        replace_damaged: read the next image instead of a damaged one; otherwise a damaged image is an error.
        beside: entered while batches are read.

    A background thread reads and decodes ahead. Iterating takes finished batches, and may stop at any time: closing the
    iterator ends the threads.

    Attributes:
        replaced: damaged image -> times that it was replaced in the batches taken so far.
        refused: image -> times that DALI refused its data, in batches read so far.

    Raises (while iterating, at the batch concerned):
        DataError: a shard was altered, or cannot be read. Single bad images are replaced.
    """

    def __init__(
        self,
        shards: ShardSet,
        read_list: Callable[[int], ReadList],
        crop: Crop,
        input: ImageInput,
        *,
        first: int,
        last: int,
        batch_size: int,
        threads: int,
        device: torch.device,
        replace_damaged: bool = True,
        beside: AbstractContextManager[object] | None = None,
    ) -> None:
        self.shards = shards
        self.replaced: dict[int, int] = {}
        self.refused: dict[int, int] = {}
        self._read_from_shard = np.zeros(len(shards.shards), dtype=np.int64)
        self._bad_in_shard = np.zeros(len(shards.shards), dtype=np.int64)
        self._read_list, self._crop, self._input = read_list, crop, input
        self._first, self._last = first, last
        self._batch_size, self._threads, self._device = batch_size, threads, device
        self._beside = beside or nullcontext()
        self._reader = IntactReader(shards, _REPLACEMENTS if replace_damaged else 0, self.refused)

    def __len__(self) -> int:
        return self._last - self._first

    def __iter__(self) -> Iterator[Batch]:
        with (
            self._beside,
            ThreadPoolExecutor(READERS, "moce-read") as readers,
            closing(in_background(self._batches(readers), _FINISHED, lambda: _use(self._device))) as batches,
        ):
            for batch in batches:
                self._count_replaced(batch.ids_B, batch.wanted_B)
                if self._device.type == "cuda":  # allocated on the loading thread's stream, read on this one
                    batch.images_BCHW.record_stream(torch.cuda.current_stream(self._device))
                yield batch

    def _batches(self, readers: ThreadPoolExecutor) -> Generator[Batch]:
        """All batches; runs in the loading thread."""
        index = self._first
        files = read_ahead(self._reader, self._read_list, index, self._last, readers)
        decoder = self._decoder(files)
        while index < self._last:
            try:
                read, images = decoder.decode()
            except RuntimeError as error:
                # A pipeline that failed to decode cannot be used again. The stream is a pure function of the index, so
                # a new pipeline continues here, with Pillow's reading of the image that DALI refused.
                files.close()
                for image_id in self._find_undecodable(index, error, readers):
                    self.refused[image_id] = self.refused.get(image_id, 0) + 1
                files = read_ahead(self._reader, self._read_list, index, self._last, readers)
                decoder = self._decoder(files)
                continue
            index += 1
            yield Batch(decoder.take(images), read.ids_B, read.epochs_B, read.wanted_B)

    def _decoder(self, files: Iterator[FileBatch]) -> _Decoder:
        feed = _Feed(files, self.shards, self._crop)
        return _Decoder(feed, self._input, self._batch_size, self._threads, self._device)

    def _find_undecodable(self, index: int, error: RuntimeError, readers: ThreadPoolExecutor) -> frozenset[int]:
        """Images of the batches in flight at `index` that fail alone; raises `error` if there are none."""
        ahead = [self._read_list(batch) for batch in range(index, min(index + _PREFETCH + 1, self._last))]
        ids, places = np.unique(np.concatenate([wanted.ids for wanted in ahead]), return_index=True)
        suspects = ReadList(ids, np.concatenate([wanted.epochs for wanted in ahead])[places])
        size = self._batch_size
        parts = (suspects[first : first + size] for first in range(0, len(ids), size))
        undecodable = frozenset[int]().union(*(self._undecodable_of(part, readers) for part in parts))
        if not undecodable:
            raise error
        return undecodable

    def _undecodable_of(self, suspects: ReadList, readers: ThreadPoolExecutor) -> frozenset[int]:
        """The suspects, or their replacements, that fail alone, found by halving: a pipeline is slow to build,
        and few images fail."""
        if self._decodes(suspects, readers):
            return frozenset()
        if len(suspects.ids) == 1:
            return frozenset({self._reader.read(int(suspects.ids[0]))[1]})
        middle = len(suspects.ids) // 2
        return self._undecodable_of(suspects[:middle], readers) | self._undecodable_of(suspects[middle:], readers)

    def _decodes(self, images: ReadList, readers: ThreadPoolExecutor) -> bool:
        """Whether a new pipeline decodes these images."""
        try:
            self._decoder(read_ahead(self._reader, lambda _: images, 0, 1, readers)).decode()
        except RuntimeError:
            return False
        return True

    def _count_replaced(self, ids_B: NDArray[np.int64], wanted_B: NDArray[np.int64]) -> None:
        shard_B = self.shards.samples["shard"][wanted_B]
        bad_B = ids_B != wanted_B
        np.add.at(self._read_from_shard, shard_B, 1)
        for image_id, shard in zip(wanted_B[bad_B].tolist(), shard_B[bad_B], strict=True):
            self._bad_in_shard[shard] += image_id not in self.replaced  # count each image once, not once per epoch
            self.replaced[image_id] = self.replaced.get(image_id, 0) + 1
        altered = (self._bad_in_shard >= _ALTERED_COUNT) & (self._bad_in_shard > _ALTERED_SHARE * self._read_from_shard)
        if altered.any():
            k = int(altered.argmax())
            raise DataError(
                f"{self.shards.storage.where(self.shards.shards[k].name)} was altered after it was written: "
                f"{self._bad_in_shard[k]} of {self._read_from_shard[k]} images read from it do not have their "
                "checksum or cannot be decoded. Copy the shard again from its source, or write the set again "
                "with `moce shards`."
            )

    def replaced_sources(self) -> list[str]:
        """One line per replaced image: its id, source and shard."""
        names = self.shards.shards
        return [
            f"image {i} ({self.shards.source(i)}) in {names[int(self.shards.samples['shard'][i])].name}"
            for i in sorted(self.replaced)
        ]


def _use(device: torch.device) -> None:
    """Make `device` the current one of this thread; a new thread has device 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
