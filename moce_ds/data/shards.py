"""Reading a shard set: tar files with an index, as `moce shards` writes them (docs/data-format.md).

Legend: N images. Image ids are 0 to N-1.
"""

import dataclasses
import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from moce_ds.common.errors import DataError
from moce_ds.common.host.machine import refused, status_of
from moce_ds.common.host.program import progress_bar
from moce_ds.common.storage.artefact import Rows, is_marked, mebibytes, some_of
from moce_ds.common.storage.checksums import (
    Files,
    Findings,
    check_document,
    check_file,
    document_findings,
    file_findings,
)
from moce_ds.common.storage.files import load_array, read_json, read_record, reads_from, sha256_of
from moce_ds.common.text import counted
from moce_ds.data.image_file import decoded
from moce_ds.data.shard_storage import FolderStorage, ShardStorage, storage_of

FORMAT_VERSION = 1
MANIFEST = "shards.json"
SAMPLES = "samples.npy"
TARGETS = "targets.npy"
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
    """A tar file as written: name, size in bytes, hex SHA-256, number of images."""

    name: str
    bytes: int
    sha256: str
    count: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`shards.json`; see docs/data-format.md."""

    version: int
    count: int
    fingerprint: str
    rejected: dict[str, int]
    classes: list[str]
    shards: list[ShardFile]
    source: str
    made_from: dict[str, Any]
    multi_label: bool = False
    files: Files | None = None

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read the manifest of the set in folder `path`.

        Raises:
            ArtefactError: there is no shard set, or it is damaged or of another version.
            DataError: a name in it points outside of the folder.
        """
        path = path / MANIFEST
        manifest = read_record(path, cls, "a shard set", "moce shards", version=FORMAT_VERSION)
        for shard in manifest.shards:  # never open a file outside the folder, whatever the manifest says
            if not re.fullmatch(r"shard-[0-9]{6}\.tar", shard.name):
                raise DataError(f"{path} names {shard.name!r}: expected shard-NNNNNN.tar. Do not trust this set.")
        check_document(path, read_json(path, "a shard set", "moce shards"), "a shard set", "moce shards")
        return manifest


@dataclasses.dataclass(frozen=True, eq=False)
class ShardSet:
    """An opened shard set. It holds no open files, so it can be forked, spawned and pickled.

    Attributes:
        path: its folder.
        named: its name in messages: the given folder, or the source of a temporary set.
        count: N.
        classes: names, in the order of the labels.
        fingerprint: SHA-256 of the images' checksums, sizes and labels; equal for sets of the same images.
        shards: the tar files.
        storage: where the tar files lie, unlike the tables: this folder, or an address.
        samples: [N] structured, dtype `SAMPLE`, memory-mapped.
        targets: [N, K] int8 if an image may show several of the K classes: 1 shown, 0 not shown, -1 ignored; all labels
            are then -1. None if an image has one label.
        files: checksums of the tables beside the shards; None if an earlier version wrote the set.
    """

    kind: ClassVar[str] = "shard set"
    marks: ClassVar[tuple[str, ...]] = (MANIFEST,)
    last_file: ClassVar[str] = MANIFEST  # written last, with checksums of the others
    path: Path
    named: Path
    count: int
    classes: list[str]
    fingerprint: str
    shards: list[ShardFile]
    storage: ShardStorage
    samples: np.ndarray
    targets: np.ndarray | None = None
    files: Files | None = None

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether `path` is the folder of a complete shard set."""
        return is_marked(path, cls.marks)

    @classmethod
    def open(cls, path: Path, named: Path | None = None) -> "ShardSet":
        """Open the set in folder `path` and check that all shards exist with the right sizes.

        Args:
            path: the folder.
            named: its name in messages, if different.

        Raises:
            ArtefactError: there is no shard set, or its manifest is damaged or of another version.
            DataError: the set is unfinished; a file is missing, truncated or too long; or its parts contradict each
                other.
        """
        named, path = Path(named or path), Path(path).absolute()
        if (path / PROGRESS).is_dir() and not (path / MANIFEST).exists():
            raise DataError(f"{path} is an unfinished shard set: rerun the same `moce shards` command to finish it.")
        manifest = Manifest.read(path)
        opened = cls(
            path=path,
            named=named,
            count=manifest.count,
            classes=manifest.classes,
            fingerprint=manifest.fingerprint,
            shards=manifest.shards,
            storage=storage_of(path),
            samples=_map_samples(path / SAMPLES, manifest),
            targets=_map_targets(path / TARGETS, manifest) if manifest.multi_label else None,
            files=manifest.files,
        )
        if isinstance(opened.storage, FolderStorage):  # an address was checked when it was attached
            opened.verify_sizes()
        return opened

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet.open, (self.path, self.named)

    @property
    def labels(self) -> np.ndarray:
        """[N] int32, positions in `classes`; -1 for an image without a class."""
        return np.ascontiguousarray(self.samples["label"])

    def read(self, image_id: int) -> bytes:
        """The stored bytes of an image (JPEG or PNG). Raises DataError if the shard is gone or truncated."""
        row = self._row(image_id)
        name = self.shards[row["shard"]].name
        try:
            data = self.storage.read(name, int(row["offset"]), int(row["size"]))
        except OSError as error:
            why = error.strerror or str(error)
            fault = DataError(f"{self.storage.where(name)} can no longer be read ({why}). {_restore(self.path)}")
            fault.status = status_of(error)
            raise fault from None
        if len(data) != row["size"]:
            raise DataError(f"{self.storage.where(name)} was cut short while in use. {_restore(self.path)}")
        return data

    def decode(self, image_id: int, strictly: bool = False) -> Image.Image:
        """An image as RGB, upright. It may have any size, because the set has accepted it.

        Args:
            image_id: the image.
            strictly: also check for missing pixels, which an earlier version may have accepted.

        Raises:
            DataError: its bytes were altered after writing, or it is not an image of the recorded size.
        """
        data = self.read(image_id)
        if not self.is_intact(image_id, data):
            shard = self.storage.where(self.shards[self.samples["shard"][image_id]].name)
            raise DataError(f"Image {image_id} in {shard} was altered after writing. {_restore(self.path)}")
        row = self._row(image_id)
        name = f"{self.path}: image {image_id} ({self.source(image_id)})"
        return decoded(data, (int(row["width"]), int(row["height"])), name, strictly)

    def source(self, image_id: int) -> str:
        """The path, relative to the source folder, that an image was read from."""
        self._row(image_id)
        return self._sources[image_id]

    def is_intact(self, image_id: int, data: bytes) -> bool:
        """Whether `data` is what was written for an image."""
        return zlib.crc32(data) == self._row(image_id)["crc32"]

    def damaged(self, image_ids: Iterable[int]) -> list[int]:
        """Those of `image_ids` whose bytes on disk differ from what was written."""
        return [image_id for image_id in image_ids if not self.is_intact(image_id, self.read(image_id))]

    def verify_sizes(self) -> None:
        """Raise DataError if a shard is missing or its size has changed."""
        try:
            sizes = self.storage.sizes([shard.name for shard in self.shards])
        except OSError as error:
            raise refused(DataError, f"{self.storage.where('')} cannot be listed", error) from None
        for shard in self.shards:
            where, size = self.storage.where(shard.name), sizes.get(shard.name)
            if size is None:
                raise DataError(f"{where} is missing: expected {shard.bytes} bytes. {_restore(self.path)}")
            if size != shard.bytes:
                raise DataError(f"{where} has {size} bytes, expected {shard.bytes}. {_restore(self.path)}")

    @property
    def made_from(self) -> dict[str, Any]:
        """The source folder and all that determined the content of the set. Raises ArtefactError."""
        manifest = Manifest.read(self.path)
        return {"source": manifest.source, **manifest.made_from}

    def describe(self) -> Rows:
        """Number of images, sizes, classes and rejected files. Raises ArtefactError."""
        sizes, rejected = self.samples, Manifest.read(self.path).rejected
        size = mebibytes(shard.bytes for shard in self.shards)
        return {
            "images": f"{self.count} in {counted(len(self.shards), 'shard')}, {size}",
            **({"stored at": self.storage.where("")} if self.storage != FolderStorage(self.path) else {}),
            "width": f"{sizes['width'].min()} to {sizes['width'].max()} pixels",
            "height": f"{sizes['height'].min()} to {sizes['height'].max()} pixels",
            "classes": f"{len(self.classes)}: {some_of(self.classes)}" if self.classes else "none",
            "rejected": ", ".join(f"{count} {reason}" for reason, count in rejected.items()) or "none",
            "fingerprint": self.fingerprint,
        }

    def verify(self) -> Findings:
        """All differences from what was written; reads all files."""
        tables = [SAMPLES, SOURCES, REJECTED, *([] if self.targets is None else [TARGETS])]
        found = document_findings(self.path / MANIFEST, MANIFEST) + file_findings(self.path, self.files, tables)
        return found + Findings(self._shard_faults())

    def _shard_faults(self) -> list[str]:
        faults = []
        for number, shard in enumerate(progress_bar(self.shards, "verify", unit="shard", disable=None, delay=2)):
            ids = np.flatnonzero(self.samples["shard"] == number)
            if sha256_of(self.path / shard.name) != shard.sha256:
                damaged = self.damaged(ids.tolist())
                first = f", ids {', '.join(map(str, damaged[:10]))} ..." if damaged else ""
                faults.append(f"{shard.name}: altered; {len(damaged)} of {len(ids)} images damaged{first}")
            if foreign := foreign_member(self.path / shard.name, self.samples[ids], int(ids[0])):
                faults.append(f"{shard.name}: {foreign}")
            index = self.path / index_name(shard.name)
            expected = index_text(self.samples[ids], int(ids[0]))
            if not index.is_file() or index.read_text(encoding="ascii", errors="replace") != expected:
                faults.append(f"{index.name}: missing or altered")
        if fingerprint_of(self.samples, self.targets) != self.fingerprint:
            faults.append(f"{SAMPLES}: altered; checksums, sizes or labels are not those of the fingerprint")
        if self.files is None and len(self._sources) != self.count:
            faults.append(f"{SOURCES}: {len(self._sources)} lines, expected {self.count}")
        return faults

    def _row(self, image_id: int) -> Any:
        if not 0 <= image_id < self.count:
            raise IndexError(f"image id {image_id} is not in 0 to {self.count - 1}")
        return self.samples[image_id]

    @cached_property
    def _sources(self) -> list[str]:
        check_file(self.path, SOURCES, self.files, _restore(self.path), DataError)
        with reads_from(self.path / SOURCES, _restore(self.path), DataError):
            lines = (self.path / SOURCES).read_text(encoding="ascii").splitlines()
            return [json.loads(line) for line in lines]


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def index_name(shard: str) -> str:
    """File name of a shard's DALI index."""
    return f"{shard.removesuffix('.tar')}.idx"


def key_of(image_id: int) -> str:
    """Name of a sample in its tar, without the extension."""
    return f"{image_id:09d}"


def members_of(samples: np.ndarray, first_id: int) -> Iterator[tuple[str, int, int]]:
    """Name, content offset and size of each tar member, for rows `samples` [n] starting at id `first_id`."""
    for key, row in zip(map(key_of, range(first_id, first_id + len(samples))), samples, strict=True):
        offset, size = int(row["offset"]), int(row["size"])
        yield f"{key}.jpg", offset, size
        yield f"{key}.idx", offset + -(-size // _TAR_BLOCK) * _TAR_BLOCK + _TAR_BLOCK, _ID_BYTES


def index_text(samples: np.ndarray, first_id: int) -> str:
    """DALI's index (v1.2, as `wds2idx` writes it) of a shard with rows `samples` [n] starting at id `first_id`."""
    entries = [f"{name[-3:]} {offset} {size} {name}" for name, offset, size in members_of(samples, first_id)]
    lines = [f"v1.2 {len(samples)}", *(" ".join(pair) for pair in zip(entries[::2], entries[1::2], strict=True))]
    return "\n".join(lines) + "\n"


def foreign_member(tar: Path, samples: np.ndarray, first_id: int) -> str | None:
    """A message about the first unexpected member of a tar file; None if all are as expected.

    This program reads by offset and ignores names, but unpacking the tar would follow them.
    """
    try:
        with tarfile.open(tar, "r:") as opened:
            members = opened.getmembers()
    except (tarfile.TarError, OSError, ValueError) as error:
        return f"not a tar file ({error})"
    for member, expected in zip_longest(members, members_of(samples, first_id)):
        if member is None or not member.isreg() or (member.name, member.offset_data, member.size) != expected:
            named = f"{member.name!r} of type {member.type!r}" if member else "no member"
            return f"{named} where {expected[0] if expected else 'nothing'} is expected: do not unpack it"
    return None


def fingerprint_of(samples: np.ndarray, targets: np.ndarray | None = None) -> str:
    """Hex SHA-256 over (crc32 <u4, size <i8, label <i4) of `samples` [N], by id, then over `targets`."""
    table = np.empty(len(samples), np.dtype([(name, SAMPLE[name]) for name in ("crc32", "size", "label")]))
    for name in table.dtype.names or ():
        table[name] = samples[name]
    return hashlib.sha256(table.tobytes() + (b"" if targets is None else targets.tobytes())).hexdigest()


def _restore(folder: Path) -> str:
    return f"Restore it from a copy, or delete {folder} and write it again with `moce shards`."


def _map_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An array that was written beside the shards. Raises DataError if its type or shape differs."""
    return load_array(path, dtype, shape, _restore(path.parent), DataError)


def _map_targets(path: Path, manifest: Manifest) -> np.ndarray:
    targets = _map_array(path, np.dtype(np.int8), (manifest.count, len(manifest.classes)))
    if not np.isin(targets, (-1, 0, 1)).all():
        raise DataError(f"{path} holds targets other than 1, 0 and -1. {_restore(path.parent)}")
    check_file(path.parent, TARGETS, manifest.files, _restore(path.parent), DataError)
    return targets


def _map_samples(path: Path, manifest: Manifest) -> np.ndarray:
    """The table of images, checked to refer only to existing shards and classes. Raises DataError."""
    samples = _map_array(path, SAMPLE, (manifest.count,))
    outside = len(manifest.shards)
    counts = np.bincount(samples["shard"].astype(np.uint32).clip(max=outside), minlength=outside + 1)
    if counts.tolist() != [*(shard.count for shard in manifest.shards), 0]:
        raise DataError(f"{path} and {MANIFEST} disagree on the number of images in a shard. {_restore(path.parent)}")
    size_of = np.array([shard.bytes for shard in manifest.shards])
    offset, size, label = samples["offset"], samples["size"], samples["label"]
    inside = (offset >= 0) & (size > 0) & (size <= size_of[samples["shard"]] - offset)
    inside &= (samples["height"] > 0) & (samples["width"] > 0) & (label >= -1) & (label < len(manifest.classes))
    if not inside.all():
        raise DataError(
            f"{path}: row {int(inside.argmin())} refers to a place outside its shard, an unknown class, or no pixels. "
            f"{_restore(path.parent)}"
        )
    check_file(path.parent, SAMPLES, manifest.files, _restore(path.parent), DataError)
    return samples
