"""The files of a features folder that hold the features: `block-000000.npy` and following, float16 [rows, D].

A block is opened when it is read and closed with the array that was read from it, so the number of blocks is limited by
neither open files nor memory.

Axes: N images of a block, D feature width.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from moce_ds.common.errors import ArtefactError, DataError
from moce_ds.common.host.machine import refused
from moce_ds.common.storage.files import load_array, sha256_of

_NAME = re.compile(r"block-(\d{6,12})\.npy")
_DTYPE = np.dtype("<f2")


@dataclass(frozen=True)
class FeatureBlocks:
    """The blocks of a features folder.

    Attributes:
        folder: that holds them.
        count: images in all blocks.
        dim: D.
        rows: images of a block; the last one may have fewer.
    """

    folder: Path
    count: int
    dim: int
    rows: int

    def __len__(self) -> int:
        return -(-self.count // self.rows)

    def ids(self, k: int) -> range:
        """Image ids of block k."""
        return range(k * self.rows, min((k + 1) * self.rows, self.count))

    def file(self, k: int) -> Path:
        """The path of block k."""
        return self.folder / f"block-{k:06d}.npy"

    def shape(self, k: int) -> tuple[int, int]:
        """Images and feature width of block k."""
        return len(self.ids(k)), self.dim

    def sizes(self) -> np.ndarray:
        """Bytes of the file of every block, int64; -1 for a missing file. Lists the folder once.

        Raises:
            ArtefactError: the folder cannot be read.
        """
        sizes = np.full(len(self), -1, dtype=np.int64)
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    found = _NAME.fullmatch(entry.name)
                    if found and (k := int(found[1])) < len(sizes) and entry.is_file():
                        sizes[k] = entry.stat().st_size
        except OSError as error:
            raise refused(ArtefactError, f"{self.folder} cannot be read", error, self.folder) from None
        return sizes

    def check_sizes(self) -> None:
        """Raise ArtefactError for the first block that is missing, cut, or of another shape. Reads no features.

        Another file of the same size passes; its checksum differs.
        """
        sizes = self.sizes()
        expected = np.full(len(self), _bytes(self.shape(0)), dtype=np.int64)
        expected[-1] = _bytes(self.shape(len(self) - 1))
        for k in np.flatnonzero(sizes != expected):  # another version of numpy may have written a longer header
            self.open(int(k))

    def open(self, k: int) -> np.ndarray:
        """Block k, memory-mapped, float16 [N, D]. Raises ArtefactError if it is missing, cut or has another shape."""
        return np.asarray(load_array(self.file(k), np.float16, self.shape(k), again(self.folder)))

    def checked(self, k: int) -> str:
        """SHA-256 of the file of block k.

        Raises:
            ArtefactError: as `open`.
            DataError: a feature is not finite.
        """
        self.check_finite(k, self.open(k))
        return sha256_of(self.file(k))

    def check_finite(self, k: int, block_ND: np.ndarray) -> None:
        """Raise DataError if a feature of block k is NaN or infinite, which names its image."""
        finite_N = np.isfinite(block_ND).all(axis=1)
        if not finite_N.all():
            raise DataError(
                f"The features of image {self.ids(k)[int(np.argmin(finite_N))]} are NaN or beyond float16 "
                f"({self.file(k)}): check whether the encoder's training diverged, then delete {self.folder} and write "
                "it again."
            )


def again(folder: Path) -> str:
    """What to do about damaged features."""
    return f"delete {folder}, and rerun the same `moce features`."


def block_checksum(block_ND: np.ndarray) -> str:
    """SHA-256 of the file that `save_array` writes for a block."""
    digest = hashlib.sha256()
    np.lib.format.write_array(SimpleNamespace(write=digest.update), block_ND, allow_pickle=False)
    return digest.hexdigest()


def block_header(shape: tuple[int, int]) -> bytes:
    """The bytes of a block's file before its features."""
    header = BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(_DTYPE), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _bytes(shape: tuple[int, int]) -> int:
    return len(block_header(shape)) + shape[0] * shape[1] * _DTYPE.itemsize
