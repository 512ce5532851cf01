"""The DALI pipeline: image files in, normalised crops out. The only file that imports DALI.

One pipeline serves CPU and GPU. Our callback feeds it, so sampler and transform determine the order of reading, the
crops and the flips, and a run resumes exactly at any batch.

Axes: B images, H, W pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.data.image_file import as_png
from moce_ds.data.sampler import ReadList
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import ImageInput, Windows
from moce_ds.errors import ConfigError, DataError

try:
    from nvidia.dali import fn, pipeline_def, types
except ImportError as error:
    raise ConfigError(
        f"Reading images for a model needs NVIDIA DALI, which does not import here ({error}). Install one of the "
        "extras: pip install 'moce-ds[cpu]', 'moce-ds[cu13]' or 'moce-ds[cu12]'."
    ) from None

# Replacement images tried for a bad one before the whole shard set counts as damaged.
_REPLACEMENTS = 100
# Batches that DALI prefetches.
_PREFETCH = 2
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


class _Source:
    """DALI's callback: the files of batch `first + iteration`, with their windows."""

    def __init__(
        self,
        shards: ShardSet,
        read_list: Callable[[int], ReadList],
        first: int,
        last: int,
        crop: Crop,
        replacements: int,
        refusals: dict[int, int],
    ) -> None:
        self.shards, self.read_list, self.first, self.last = shards, read_list, first, last
        self.crop, self.replacements = crop, min(replacements, shards.count - 1)
        self.refusals = refusals

    def __call__(self, iteration: int) -> tuple[list[NDArray[Any]], ...]:
        index = self.first + iteration
        if index >= self.last:
            raise StopIteration
        wanted = self.read_list(index)
        files, ids = zip(*(self.read_intact(int(i)) for i in wanted.ids), strict=True)
        ids_B = np.array(ids, dtype=np.int64)
        rows = self.shards.samples[ids_B]
        windows = self.crop.windows(ids_B, wanted.epochs, rows["height"], rows["width"])
        return (
            list(files),
            list(windows.start_B2),
            list(windows.shape_B2),
            list(windows.mirror_B),
            list(np.stack([ids_B, wanted.epochs, wanted.ids], axis=1)),
        )

    def read_intact(self, wanted: int) -> tuple[NDArray[np.uint8], int]:
        """The bytes of an image, or of the next intact one.

        Raises:
            DataError: no image is intact.
        """
        fault = ""
        for offset in range(self.replacements + 1):
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

    def _decodable(self, image_id: int, data: bytes) -> bytes:
        """`data`, or a PNG of Pillow's reading if DALI refused it. Raises DataError if neither can decode it."""
        refused = self.refusals.get(image_id, 0)
        if not refused:
            return data
        image = self.shards.decode(image_id, strictly=True)
        if refused == 1:
            return as_png(image)
        raise DataError(
            f"{self.shards.path}: image {image_id} ({self.shards.source(image_id)}) is decoded by Pillow but not by "
            "DALI. Remove this image from the source, write the set again with `moce shards`, and report the "
            "image."
        )

    def _altered(self, wanted: int) -> str:
        after = f" and the {self.replacements} after it are" if self.replacements else " is"
        return (
            f"{self.shards.path}: image {wanted} ({self.shards.source(wanted)}){after} not as written, or cannot be "
            "decoded; check the set with `moce inspect --verify`, and write it again with `moce shards`."
        )


@pipeline_def(enable_conditionals=False)
def _pipeline(source: _Source, input: ImageInput, on_gpu: bool) -> tuple[Any, ...]:
    files, start, shape, mirror, numbers = fn.external_source(
        source=source,
        num_outputs=5,
        batch=True,
        dtype=[types.UINT8, types.INT32, types.INT32, types.INT32, types.INT64],
        ndim=[1, 1, 1, 0, 1],
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
    images = fn.crop_mirror_normalize(
        images,
        mirror=mirror,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * m for m in input.mean],
        std=[255 * s for s in input.std],
    )
    return images, numbers


class Loader:
    """Iterates over the batches `first` to `last` (exclusive) of a sampler's part.

    Args:
        shards: the images.
        read_list: batch index -> the images that this process reads; a pure function.
        crop: windows of the images.
        input: size and normalisation.
        batch_size: the longest batch.
        threads: decoding threads.
        device: device of the images; decoding happens there too.
        replace_damaged: read the next image instead of a damaged one; otherwise a damaged image is an error.

    Raises (while iterating):
        DataError: a shard was altered, or cannot be read. Single bad images are replaced and counted in `replaced` (id
            -> times).
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
    ) -> None:
        self.shards = shards
        self.replaced: dict[int, int] = {}
        self._read_from_shard = np.zeros(len(shards.shards), dtype=np.int64)
        self._bad_in_shard = np.zeros(len(shards.shards), dtype=np.int64)
        self._read_list, self._crop, self._input = read_list, crop, input
        self._first, self._last = first, last
        self._batch_size, self._threads, self._device = batch_size, threads, device
        self._replacements = _REPLACEMENTS if replace_damaged else 0
        self._refusals: dict[int, int] = {}  # image id -> times that DALI refused its data

    def __len__(self) -> int:
        return self._last - self._first

    def __iter__(self) -> Iterator[Batch]:
        index = self._first
        pipeline = self._started(self._source(self._read_list, index, self._last))
        while index < self._last:
            try:
                images, numbers = pipeline.run()
            except RuntimeError as error:
                # A pipeline that failed to decode cannot be used again. The stream is a pure function of the index, so
                # a new pipeline continues here, with Pillow's reading of the image that DALI refused.
                for image_id in self._find_undecodable(index, error):
                    self._refusals[image_id] = self._refusals.get(image_id, 0) + 1
                pipeline = self._started(self._source(self._read_list, index, self._last))
                continue
            index += 1
            numbers_B3 = np.asarray(numbers.as_tensor())
            ids_B, epochs_B, wanted_B = (numbers_B3[:, k].copy() for k in range(3))
            self._count_replaced(ids_B, wanted_B)
            # the pipeline reuses its buffers, so copy them
            yield Batch(torch.from_dlpack(images.as_tensor()).clone(), ids_B, epochs_B, wanted_B)

    def _source(self, read_list: Callable[[int], ReadList], first: int, last: int) -> _Source:
        return _Source(self.shards, read_list, first, last, self._crop, self._replacements, self._refusals)

    def _started(self, source: _Source) -> Any:
        """A pipeline fed by `source`."""
        on_gpu = self._device.type == "cuda"
        pipeline = _pipeline(
            source=source,
            input=self._input,
            on_gpu=on_gpu,
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=_PREFETCH,
        )
        pipeline.build()
        return pipeline

    def _find_undecodable(self, index: int, error: RuntimeError) -> frozenset[int]:
        """Images of the batches in flight at `index` that fail alone; raises `error` if there are none."""
        ahead = [self._read_list(batch) for batch in range(index, min(index + _PREFETCH + 1, self._last))]
        ids, places = np.unique(np.concatenate([wanted.ids for wanted in ahead]), return_index=True)
        suspects = ReadList(ids, np.concatenate([wanted.epochs for wanted in ahead])[places])
        size = self._batch_size
        parts = (suspects[first : first + size] for first in range(0, len(ids), size))
        undecodable = frozenset[int]().union(*map(self._undecodable_of, parts))
        if not undecodable:
            raise error
        return undecodable

    def _undecodable_of(self, suspects: ReadList) -> frozenset[int]:
        """The suspects, or their replacements, that fail alone, found by halving: a pipeline is slow to build,
        and few images fail."""
        source = self._source(lambda _: suspects, 0, 1)
        if self._runs(source):
            return frozenset()
        if len(suspects.ids) == 1:
            return frozenset({source.read_intact(int(suspects.ids[0]))[1]})
        middle = len(suspects.ids) // 2
        return self._undecodable_of(suspects[:middle]) | self._undecodable_of(suspects[middle:])

    def _runs(self, source: _Source) -> bool:
        """Whether a new pipeline decodes the first batch of a source."""
        try:
            self._started(source).run()
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
                f"{self.shards.path / self.shards.shards[k].name} was altered after it was written: "
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
