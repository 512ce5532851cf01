"""Reading a shard set: tar files with an index, as `moce shards` writes them (docs/data-format.md).

Legend: N images. Image ids are 0 to N-1.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_ds.common.errors import DataError
from moce_ds.common.host.machine import refused, status_of
from moce_ds.common.storage.artefact import Rows, is_marked, mebibytes, some_of
from moce_ds.common.storage.checksums import Files, Findings, check_file, document_findings, file_findings
from moce_ds.common.storage.files import reads_from
from moce_ds.common.text import counted
from moce_ds.data.image_file import decoded
from moce_ds.data.sample_table import SAMPLES, TARGETS, SampleTable, fingerprint_of, load_targets
from moce_ds.data.shard_manifest import MANIFEST, Manifest, ShardFile, restore_from_copy
from moce_ds.data.shard_storage import FolderStorage, ShardStorage, storage_of

if TYPE_CHECKING:
    from moce_ds.common.storage.text_lines import TextLines

SOURCES = "sources.jsonl"
REJECTED = "rejected.jsonl"
PROGRESS = ".progress"


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
        table: the rows of the images, and their checks.
        targets: [N, K] int8 if an image may show several of the K classes: 1 shown, 0 not shown, -1 ignored; all labels
            are then -1. None if an image has one label.
        files: checksums of the tables beside the shards; None if an earlier version wrote the set.
        content: SHA-256 of all shards, as they were read when the set was opened; None if nobody read them (`open`).
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
    table: SampleTable
    targets: np.ndarray | None = None
    files: Files | None = None
    content: str | None = None

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether `path` is the folder of a complete shard set."""
        return is_marked(path, cls.marks)

    @classmethod
    def open(cls, path: Path, named: Path | None = None) -> "ShardSet":
        """Open the set in folder `path` and check that all shards exist with the right sizes.

        The rows of a large set are checked when they are used (`SampleTable`).

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
            table=SampleTable(path, manifest),
            targets=load_targets(path, manifest) if manifest.multi_label else None,
            files=manifest.files,
        )
        if isinstance(opened.storage, FolderStorage):  # an address was checked when it was attached
            opened.verify_sizes()
        return opened

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet.open, (self.path, self.named)

    @property
    def samples(self) -> np.ndarray:
        """[N] structured, dtype `SAMPLE`, memory-mapped. A row that is used has to be checked first: see `rows`."""
        return self.table.rows

    def rows(self, image_ids: Sequence[int] | NDArray[np.integer]) -> np.ndarray:
        """The rows of some images, checked. Raises DataError: the table is damaged."""
        self.table.check(image_ids)
        rows: np.ndarray = self.samples[image_ids]
        return rows

    @property
    def labels(self) -> np.ndarray:
        """[N] int32, positions in `classes`; -1 for an image without a class. Raises DataError: the table is
        damaged."""
        self.table.check_all()
        return np.ascontiguousarray(self.samples["label"])

    def read(self, image_id: int) -> bytes:
        """The stored bytes of an image (JPEG or PNG). Raises DataError if the shard is gone or truncated."""
        row = self._row(image_id)
        name = self.shards[row["shard"]].name
        try:
            data = self.storage.read(name, int(row["offset"]), int(row["size"]))
        except OSError as error:
            why = error.strerror or str(error)
            fault = DataError(
                f"{self.storage.where(name)} can no longer be read ({why}). {restore_from_copy(self.path)}"
            )
            fault.status = status_of(error)
            raise fault from None
        if len(data) != row["size"]:
            raise DataError(f"{self.storage.where(name)} was cut short while in use. {restore_from_copy(self.path)}")
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
            raise DataError(f"Image {image_id} in {shard} was altered after writing. {restore_from_copy(self.path)}")
        row = self._row(image_id)
        name = f"{self.path}: image {image_id} ({self.source(image_id)})"
        return decoded(data, (int(row["width"]), int(row["height"])), name, strictly)

    def source(self, image_id: int) -> str:
        """The path, relative to the source folder, that an image was read from."""
        self._row(image_id)
        with reads_from(self.path / SOURCES, restore_from_copy(self.path), DataError):
            path: str = json.loads(self._sources[image_id])
        return path

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
                raise DataError(f"{where} is missing: expected {shard.bytes} bytes. {restore_from_copy(self.path)}")
            if size != shard.bytes:
                raise DataError(f"{where} has {size} bytes, expected {shard.bytes}. {restore_from_copy(self.path)}")

    @property
    def made_from(self) -> dict[str, Any]:
        """The source folder and all that determined the content of the set. Raises ArtefactError."""
        manifest = Manifest.read(self.path)
        return {"source": manifest.source, **manifest.made_from}

    def describe(self) -> Rows:
        """Number of images, sizes, classes and rejected files. Raises ArtefactError, and DataError: damaged rows."""
        self.table.check_all()
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
        from moce_ds.data.shard_verification import ShardVerification  # which few commands need

        tables = [SAMPLES, SOURCES, REJECTED, *([] if self.targets is None else [TARGETS])]
        found = document_findings(self.path / MANIFEST, MANIFEST) + file_findings(self.path, self.files, tables)
        shards = ShardVerification(self.storage, self.shards, self.table)
        return found + Findings(shards.faults() + self._table_faults())

    def _table_faults(self) -> list[str]:
        faults = []
        if fingerprint_of(self.samples, self.targets) != self.fingerprint:
            faults.append(f"{SAMPLES}: altered; checksums, sizes or labels are not those of the fingerprint")
        if self.files is None and len(self._sources) != self.count:
            faults.append(f"{SOURCES}: {len(self._sources)} lines, expected {self.count}")
        return faults

    def _row(self, image_id: int) -> Any:
        if not 0 <= image_id < self.count:
            raise IndexError(f"image id {image_id} is not in 0 to {self.count - 1}")
        self.table.check(image_id)
        return self.samples[image_id]

    @cached_property
    def _sources(self) -> "TextLines":
        from moce_ds.common.storage.text_lines import TextLines  # which few commands need

        check_file(self.path, SOURCES, self.files, restore_from_copy(self.path), DataError)
        with reads_from(self.path / SOURCES, restore_from_copy(self.path), DataError):
            return TextLines(self.path / SOURCES)
