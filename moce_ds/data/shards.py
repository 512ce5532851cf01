"""Reading a shard set: tar files with an index, as `moce shards` writes them (docs/data-format.md).

Legend: N images. Image ids are 0 to N-1.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from moce_ds.data.image_file import open_image, to_rgb
from moce_ds.errors import DataError
from moce_ds.files import read_json, sha256_of

FORMAT_VERSION = 1
MANIFEST = "shards.json"
SAMPLES = "samples.npy"
SOURCES = "sources.jsonl"
REJECTED = "rejected.jsonl"
PROGRESS = ".progress"

SAMPLE = np.dtype(
    [
        ("shard", "<i4"),
        ("offset", "<i8"),  # of the image's bytes in the tar
        ("size", "<i8"),  # bytes
        ("height", "<i4"),  # pixels, after EXIF orientation
        ("width", "<i4"),
        ("label", "<i4"),  # position in `classes`; -1: directly in the source folder
        ("crc32", "<u4"),  # of the image's bytes
    ]
)

_TAR_BLOCK = 512
_ID_BYTES = 8


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A tar as it was when written: name, size in bytes, hex SHA-256, number of images."""

    name: str
    bytes: int
    sha256: str
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class ShardSet:
    """An opened shard set. Holds no open file of its own, so it can be forked, spawned and pickled.

    Attributes:
        path: its folder.
        count: N.
        classes: names, in the order of the labels.
        fingerprint: SHA-256 of the images' checksums, sizes and labels; equal for sets of the same images.
        shards: the tar files.
        samples: [N] structured, dtype `SAMPLE`, memory-mapped.
    """

    path: Path
    count: int
    classes: list[str]
    fingerprint: str
    shards: list[ShardFile]
    samples: np.ndarray

    @staticmethod
    def open(path: Path) -> "ShardSet":
        """Open the set in folder `path` and check that its shards are there with the sizes they were written with.

        Raises:
            ArtefactError: there is no shard set.
            DataError: the set is unfinished, of another version, or a file is missing, cut short or grown.
        """
        path = Path(path).absolute()
        if (path / PROGRESS).is_dir() and not (path / MANIFEST).exists():
            raise DataError(f"{path} is an unfinished shard set: run the same `moce shards` command to finish it.")
        manifest = read_json(path / MANIFEST, "a shard set", "moce shards")
        shards = _shard_files(path / MANIFEST, manifest)
        opened = ShardSet(
            path=path,
            count=manifest["count"],
            classes=manifest["classes"],
            fingerprint=manifest["fingerprint"],
            shards=shards,
            samples=_map_samples(path / SAMPLES, manifest["count"]),
        )
        opened.verify_sizes()
        return opened

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet.open, (self.path,)

    @property
    def labels(self) -> np.ndarray:
        """[N] int32, positions in `classes`; -1 where an image has no class."""
        return np.ascontiguousarray(self.samples["label"])

    def read(self, image_id: int) -> bytes:
        """The stored bytes of an image (JPEG or PNG). Raises DataError where the shard ends too early."""
        row = self._row(image_id)
        shard = self.shards[row["shard"]]
        data = os.pread(_opened(self.path, shard).fileno(), int(row["size"]), int(row["offset"]))
        if len(data) != row["size"]:
            raise DataError(f"{self.path / shard.name} was cut short while in use. {_restore(self.path)}")
        return data

    def decode(self, image_id: int) -> Image.Image:
        """An image as RGB, upright. Raises DataError where its bytes were altered after writing."""
        data = self.read(image_id)
        if not self.is_intact(image_id, data):
            shard = self.path / self.shards[self.samples["shard"][image_id]].name
            raise DataError(f"Image {image_id} in {shard} was altered after writing. {_restore(self.path)}")
        return to_rgb(open_image(io.BytesIO(data)))

    def source(self, image_id: int) -> str:
        """The path, relative to the source folder, that an image was read from."""
        self._row(image_id)
        return self._sources[image_id]

    def is_intact(self, image_id: int, data: bytes) -> bool:
        """Whether `data` is what was written for an image."""
        return zlib.crc32(data) == self._row(image_id)["crc32"]

    def damaged(self, image_ids: Iterable[int]) -> list[int]:
        """Those of `image_ids` whose bytes on disk are no longer what was written."""
        return [image_id for image_id in image_ids if not self.is_intact(image_id, self.read(image_id))]

    def verify_sizes(self) -> None:
        """Raise DataError if a shard is missing or its size is not the one it was written with."""
        for shard in self.shards:
            file = self.path / shard.name
            if not file.is_file():
                raise DataError(f"{file} is missing: expected {shard.bytes} bytes. {_restore(self.path)}")
            if (size := file.stat().st_size) != shard.bytes:
                raise DataError(f"{file} has {size} bytes, expected {shard.bytes}. {_restore(self.path)}")

    def verify(self) -> list[str]:
        """Read everything; one line per file that is not what was written, none if all is well."""
        faults = []
        for number, shard in enumerate(tqdm(self.shards, "verify", unit="shard", disable=None, delay=2)):
            ids = np.flatnonzero(self.samples["shard"] == number)
            if sha256_of(self.path / shard.name) != shard.sha256:
                damaged = self.damaged(ids.tolist())
                first = f", ids {', '.join(map(str, damaged[:10]))} ..." if damaged else ""
                faults.append(f"{shard.name}: altered; {len(damaged)} of {len(ids)} images damaged{first}")
            index = self.path / index_name(shard.name)
            expected = index_text(self.samples[ids], int(ids[0]))
            if not index.is_file() or index.read_text(encoding="ascii", errors="replace") != expected:
                faults.append(f"{index.name}: missing or altered")
        if fingerprint_of(self.samples) != self.fingerprint:
            faults.append(f"{SAMPLES}: altered; checksums, sizes or labels are not those of the fingerprint")
        if len(self._sources) != self.count:
            faults.append(f"{SOURCES}: {len(self._sources)} lines, expected {self.count}")
        return faults

    def _row(self, image_id: int) -> Any:
        if not 0 <= image_id < self.count:
            raise IndexError(f"image id {image_id} is not in 0 to {self.count - 1}")
        return self.samples[image_id]

    @cached_property
    def _sources(self) -> list[str]:
        try:
            lines = (self.path / SOURCES).read_text(encoding="ascii").splitlines()
            return [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path / SOURCES} cannot be read ({error}). {_restore(self.path)}") from None


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def index_name(shard: str) -> str:
    """File name of a shard's DALI index."""
    return f"{shard.removesuffix('.tar')}.idx"


def key_of(image_id: int) -> str:
    """Name of a sample in its tar, without the extension."""
    return f"{image_id:09d}"


def index_text(samples: np.ndarray, first_id: int) -> str:
    """DALI's index (v1.2, the same as `wds2idx` makes) of a shard with rows `samples` [n] from `first_id` on."""
    lines = [f"v1.2 {len(samples)}"]
    for key, row in zip(map(key_of, range(first_id, first_id + len(samples))), samples, strict=True):
        offset, size = int(row["offset"]), int(row["size"])
        id_offset = offset + -(-size // _TAR_BLOCK) * _TAR_BLOCK + _TAR_BLOCK
        lines.append(f"jpg {offset} {size} {key}.jpg idx {id_offset} {_ID_BYTES} {key}.idx")
    return "\n".join(lines) + "\n"


def fingerprint_of(samples: np.ndarray) -> str:
    """Hex SHA-256 over (crc32 <u4, size <i8, label <i4) of `samples` [N], in the order of the ids."""
    table = np.empty(len(samples), np.dtype([(name, SAMPLE[name]) for name in ("crc32", "size", "label")]))
    for name in table.dtype.names or ():
        table[name] = samples[name]
    return hashlib.sha256(table.tobytes()).hexdigest()


# A set of tens of millions of images has more shards than a process may have open files. A file dropped from the
# cache is closed when the last reader lets go of it.
@lru_cache(maxsize=512)
def _opened(folder: Path, shard: ShardFile) -> BinaryIO:
    return open(folder / shard.name, "rb", buffering=0)


def _restore(folder: Path) -> str:
    return f"Restore it from a copy, or delete {folder} and write it again with `moce shards`."


def _shard_files(manifest_path: Path, manifest: Any) -> list[ShardFile]:
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{manifest_path} is a shard set of version {version}, this program reads version {FORMAT_VERSION}: "
            "write it again with `moce shards`."
        )
    shards = [ShardFile(**shard) for shard in manifest["shards"]]
    for shard in shards:  # nothing outside the folder is ever opened, whatever the manifest says
        if not re.fullmatch(r"shard-[0-9]{6}\.tar", shard.name):
            raise DataError(f"{manifest_path} names {shard.name!r}: expected shard-NNNNNN.tar. Do not trust this set.")
    return shards


def _map_samples(path: Path, count: int) -> np.ndarray:
    try:
        samples: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}). {_restore(path.parent)}") from None
    if samples.dtype != SAMPLE or samples.shape != (count,):
        raise DataError(
            f"{path} holds {samples.shape} of {samples.dtype}, expected ({count},) of {SAMPLE}. {_restore(path.parent)}"
        )
    return samples
