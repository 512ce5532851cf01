"""Features of a task's images in the cache: the next verb with the same images and encoder neither decodes nor encodes.

Axes: N images, D width.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.common.errors import ArtefactError
from moce_ds.common.host.identity import processor
from moce_ds.common.host.program import warn
from moce_ds.common.storage.cache import Cache, entry_name
from moce_ds.common.storage.files import load_array, writes_to
from moce_ds.common.text import in_line
from moce_ds.data.shards import ShardSet
from moce_ds.models.vit import Encoder

_FEATURES = "features.npy"

_logger = logging.getLogger(__name__)

Keep = Callable[[Tensor], None]
"""Gets the features of the next images, [<= N, D] float32 on the host."""


@dataclass(frozen=True)
class KeptFeatures:
    """The features of all images of a set, found by all that their bits depend on.

    Attributes:
        cache: None: nothing is kept or found.
        name: of the entry.
        shape: N, D.
        named: name of the images in messages.
    """

    cache: Cache | None
    name: str
    shape: tuple[int, int]
    named: Path

    @classmethod
    def of(cls, encoder: Encoder, images: ShardSet, batch_size: int, device: torch.device) -> "KeptFeatures":
        """The entry for these inputs on this machine; without a cache if nobody has read the set (`ShardSet.content`).

        Batch size, threads and the kind of device may change the last bits of a feature, so others have other entries.
        """
        cache, shape = Cache.here() if images.content else None, (images.count, encoder.shape.width)
        if cache is None or not cache.fits(4 * shape[0] * shape[1]):
            return cls(None, "", shape, images.named)
        name = entry_name("features", images.content, encoder.identity, batch_size, _machine(device))
        return cls(cache, name, shape, images.named)

    @contextmanager
    def found(self) -> Iterator[NDArray[np.float32] | None]:
        """The features, [N, D] memory-mapped for the length of the block; None if they are not in the cache."""
        with self._own_folder() as folder:
            entry = folder and folder / "entry"
            there = self.cache and entry and self.cache.take(self.name, entry)
            yield load_array(entry / _FEATURES, np.float32, self.shape, "remove it.") if entry and there else None

    def log_use(self) -> None:
        """Log that the features come from the cache."""
        if self.cache is not None:
            _logger.info(f"{in_line(self.named)}: features from the cache {self.cache.folder}")

    @contextmanager
    def writing(self) -> Iterator[Keep]:
        """Keep the features that the block gives in order; without all of them, or on a full disk, nothing is kept."""
        with self._own_folder() as folder:
            if self.cache is None or folder is None:
                yield lambda _: None
                return
            growing = _Growing(folder / _FEATURES, self.shape)
            try:
                yield growing.add
            finally:
                growing.close()
            if growing.is_complete:
                self.cache.keep(self.name, folder)

    def _own_folder(self) -> AbstractContextManager[Path | None]:
        return self.cache.own_folder() if self.cache else nullcontext()


class _Growing:
    """A `.npy` file that grows until all rows are there, or writing fails once."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self._path, self._left = path, shape[0]
        self._file: BinaryIO | None = None
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        with self._noted():
            self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
            np.lib.format.write_array_header_1_0(self._file, header)

    @property
    def is_complete(self) -> bool:
        """Whether all rows are written."""
        return self._left == 0

    def add(self, features_ND: Tensor) -> None:
        """Write rows. After a failure, which is logged, no further row is written."""
        if self._left < 0 or self._file is None:
            return
        with self._noted():
            self._file.write(features_ND.numpy().tobytes())
            self._left -= len(features_ND)

    def close(self) -> None:
        """Close the file, which writes what is left of it."""
        if self._file is not None:
            with self._noted():
                self._file.close()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            with writes_to(self._path):
                yield
        except ArtefactError as error:
            if self._left >= 0:
                warn(f"{error} The features are not kept in the cache.")
            self._left = -1


def _machine(device: torch.device) -> list[object]:
    """What decides the last bits of a computation on this machine."""
    host = [processor(), torch.get_num_threads(), torch.get_float32_matmul_precision()]
    if device.type == "cuda":
        tf32 = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
        return [torch.cuda.get_device_name(device), torch.version.cuda, *tf32, *host]
    return [device.type, torch.backends.cpu.get_cpu_capability(), *host]
