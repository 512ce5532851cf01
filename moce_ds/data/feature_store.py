"""Features on disk: one row per image of a shard set, in image order, written in blocks by any number of processes.

        features/
          block-000000.npy   float16 [block_rows, D], images 0 ...; the last block is shorter
          encoder/           the encoder that computed them
          features.json      written last, with the checksums of blocks, encoder and itself: marks a complete folder
          begun.json         the same without checksums, while the features are incomplete

Axes: N images requested or in a block, D feature width.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.errors import ArtefactError, DataError
from moce_ds.common.storage.artefact import Rows, is_marked
from moce_ds.common.storage.checksums import (
    Files,
    Findings,
    document_findings,
    file_findings,
    names_below,
    read_checked,
    records_of,
    write_checked,
)
from moce_ds.common.storage.encoder_folder import EncoderFolder
from moce_ds.common.storage.files import save_array, sha256_of, write_json, writes_to
from moce_ds.data.feature_blocks import FeatureBlocks, again, block_checksum
from moce_ds.data.kept_encoder import ENCODER, check_fingerprint

FORMAT, VERSION = "moce features", 1
RECORD, BEGUN = "features.json", "begun.json"


@dataclass(frozen=True)
class Identity:
    """The inputs of the features. Features with another identity are different features.

    Attributes:
        shards_fingerprint, encoder_fingerprint: of the images and of the encoder's weights.
        encoder_input: size, mean, std, interpolation, crop.
    """

    shards_fingerprint: str
    encoder_fingerprint: str
    encoder_input: dict[str, Any]


@dataclass(frozen=True)
class _Record:
    """`features.json`."""

    count: Annotated[int, Field(gt=0)]
    dim: Annotated[int, Field(gt=0)]
    block_rows: Annotated[int, Field(gt=0)]
    identity: Identity
    sha256: dict[str, str]
    files: Files | None = None


class FeatureWriter:
    """Starts a features folder, or continues an incomplete one.

    Args:
        path: the folder.
        count: images of the shard set, at least 1.
        dim: D.
        block_rows: images per block.

    Raises:
        ArtefactError: the folder holds features of another or an unknown identity or shape, or it is damaged.
    """

    def __init__(self, path: Path, count: int, dim: int, identity: Identity, block_rows: int = 4096) -> None:
        self.path, self.count, self.dim = path, count, dim
        self._blocks = FeatureBlocks(path, count, dim, block_rows)
        self._sha256: dict[str, str] = {}  # of the blocks that this process has written
        description = {
            "format": FORMAT,
            "version": VERSION,
            "count": count,
            "dim": dim,
            "block_rows": block_rows,
            "identity": asdict(identity),
        }
        self._description = json.loads(json.dumps(description))  # as JSON returns it: no tuples
        recorded = [path / name for name in (RECORD, BEGUN) if (path / name).is_file()]
        if recorded:
            found = read_checked(recorded[0], dict[str, Any], "a record of features", "moce features")
            MadeFrom(self._description).compare(found).refuse_different(f"{path} holds features")
        else:
            self._refuse_unknown()
            with writes_to(path):
                write_json(path / BEGUN, self._description)

    @property
    def is_finished(self) -> bool:
        """Whether the features are marked as complete."""
        return (self.path / RECORD).is_file()

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    def missing_blocks(self) -> list[int]:
        """Numbers of the blocks that are not on disk yet. Raises ArtefactError if the folder cannot be read."""
        missing: list[int] = np.flatnonzero(self._blocks.sizes() < 0).tolist()
        return missing

    def block_ids(self, k: int) -> range:
        """Image ids of block k."""
        return self._blocks.ids(k)

    def write_block(self, k: int, features_ND: np.ndarray) -> None:
        """Write the features of the images `block_ids(k)` as float16.

        Raises:
            DataError: the features have another shape, or one is NaN or infinite (the float16 maximum is 65504).
            ArtefactError: the block cannot be written.
        """
        expected, file = self._blocks.shape(k), self._blocks.file(k)
        if features_ND.shape != expected:
            raise DataError(f"Block {k} of {self.path} has shape {features_ND.shape}, expected {expected}.")
        with np.errstate(over="ignore"):  # values beyond float16 become infinite
            half_ND = np.ascontiguousarray(features_ND, dtype="<f2")
        self._blocks.check_finite(k, half_ND)
        with writes_to(file):
            save_array(file, half_ND)
        self._sha256[file.name] = block_checksum(half_ND)

    def checksums(self, found: Iterable[int] = ()) -> dict[str, str]:
        """SHA-256, by file name, of the blocks that this process has written and of the blocks `found`, which it reads.

        Raises:
            ArtefactError: one of `found` is missing or has the wrong shape.
            DataError: a feature in one of them is NaN or infinite.
        """
        return self._sha256 | {self._blocks.file(k).name: self._blocks.checked(k) for k in found}

    def finish(self, checksums: Mapping[str, str] | None = None) -> None:
        """Mark the features as complete. One process calls it once, after all blocks are written.

        Args:
            checksums: of blocks that other processes have written or read, as `checksums` returns them. All other
                blocks are read here.

        Raises:
            ArtefactError: a block is missing or has the wrong shape, the encoder in the folder is another one, or the
                record cannot be written.
            DataError: a feature is NaN or infinite.
        """
        if self.is_finished:
            return  # keep its checksums, even if a block has changed since
        if (self.path / ENCODER).is_dir():  # from now on its checksums replace the fingerprint
            check_fingerprint(self.path, self._description["identity"]["encoder_fingerprint"])
        self._blocks.check_sizes()
        known = self._sha256 | dict(checksums or {})
        names = [self._blocks.file(k).name for k in range(len(self._blocks))]
        sha256 = {name: known.get(name) or self._blocks.checked(k) for k, name in enumerate(names)}
        with writes_to(self.path):
            files = records_of(self.path, names_below(self.path / ENCODER, f"{ENCODER}/"))
            write_checked(self.path / RECORD, self._description | {"sha256": sha256, "files": files})
            (self.path / BEGUN).unlink(missing_ok=True)

    def _refuse_unknown(self) -> None:
        """Raise ArtefactError for blocks without a record, which may belong to other images or another encoder."""
        names = sorted(entry.name for entry in self.path.glob("*") if not entry.name.startswith("."))
        if names:
            raise ArtefactError(
                f"{self.path} holds {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}, but neither "
                "features.json nor begun.json, which identify features: choose another folder, or delete it."
            )


class FeatureSet:
    """Complete features. The checksum of a block is verified when it is first read.

    Opening lists the folder once, and reads no block. Each block is opened when it is read, and closed afterwards.

    Attributes:
        count: images.
        dim: D.
        identity: the inputs of the features.
        files: checksums of the encoder's files; None if an earlier version wrote the features.
    """

    kind: ClassVar[str] = "features"
    marks: ClassVar[tuple[str, ...]] = (RECORD,)
    last_file: ClassVar[str] = RECORD  # written last, with checksums of the others

    def __init__(self, path: Path, record: _Record) -> None:
        self.path = path
        self.count, self.dim, self.identity, self.files = record.count, record.dim, record.identity, record.files
        self._sha256 = record.sha256
        self._blocks = FeatureBlocks(path, record.count, record.dim, record.block_rows)
        self._whole = np.zeros(len(self._blocks), dtype=bool)  # blocks whose checksum has been verified
        self._blocks.check_sizes()

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether `path` is a folder of finished features."""
        return is_marked(path, cls.marks)

    @classmethod
    def open(cls, path: Path) -> "FeatureSet":
        """Open a features folder.

        Raises:
            ArtefactError: it is missing, unfinished, damaged or of an unknown version.
        """
        if (path / BEGUN).is_file() and not (path / RECORD).is_file():
            raise ArtefactError(f"{path} is unfinished: rerun the same `moce features` to complete it.")
        record = read_checked(
            path / RECORD, _Record, "a record of features", "moce features", format=FORMAT, version=VERSION
        )
        return cls(path, record)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @property
    def block_rows(self) -> int:
        """Images of a block; the last one may have fewer."""
        return self._blocks.rows

    def block_ids(self, k: int) -> range:
        """Image ids of block k."""
        return self._blocks.ids(k)

    def blocks(self, numbers: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Features in blocks of float32 [N, D]: those of these numbers, or of all images in their order.

        Raises ArtefactError if a block is damaged.
        """
        for k in range(len(self._blocks)) if numbers is None else numbers:
            yield self.block(k).astype(np.float32)

    def block(self, k: int) -> np.ndarray:
        """Block k, memory-mapped, float16 [N, D]. Raises ArtefactError if it is damaged."""
        block_ND = self._blocks.open(k)
        if not self._whole[k] and sha256_of(self._blocks.file(k)) != self._sha256.get(self._blocks.file(k).name):
            raise ArtefactError(f"{self._blocks.file(k)} is damaged: its checksum differs: {again(self.path)}")
        self._whole[k] = True
        return block_ND

    def note_verified(self) -> None:
        """Note that other processes have verified all blocks that this one has not."""
        self._whole[:] = True

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Features of these images in this order, float32 [N, D].

        Raises:
            DataError: an id is outside the set.
            ArtefactError: a block is damaged.
        """
        ids_N = np.asarray(ids, dtype=np.int64)
        outside_N = (ids_N < 0) | (ids_N >= self.count)
        if outside_N.any():
            raise DataError(f"{self.path} has images 0 to {self.count - 1}, not {ids_N[outside_N][0]}.")
        features_ND = np.empty((len(ids_N), self.dim), dtype=np.float32)
        order_N = np.argsort(ids_N, kind="stable")  # each block is opened once
        number_N, first_N = np.unique(ids_N[order_N] // self.block_rows, return_index=True)
        for k, of_block in zip(number_N.tolist(), np.split(order_N, first_N[1:]), strict=len(ids_N) > 0):
            features_ND[of_block] = self.block(k)[ids_N[of_block] % self.block_rows]
        return features_ND

    @property
    def made_from(self) -> dict[str, Any]:
        """Fingerprints of the images and of the encoder, and the encoder's input."""
        return asdict(self.identity)

    def describe(self) -> Rows:
        """Number and width of the features, images and encoder."""
        return {
            "features": f"{self.count} of width {self.dim}, float16",
            "images": f"shard set {self.identity.shards_fingerprint}",
            "encoder": self.identity.encoder_fingerprint,
            "input": str(self.identity.encoder_input),
        }

    def verify(self) -> Findings:
        """All differences from the recorded checksums; reads all files. Raises ArtefactError."""
        names = [self._blocks.file(k).name for k in range(len(self._blocks))]
        differ = [name for name in names if sha256_of(self.path / name) != self._sha256.get(name)]
        found = Findings([f"{name}: is damaged: its checksum differs" for name in differ])
        found += document_findings(self.path / RECORD, RECORD) + file_findings(self.path, self.files)
        found += EncoderFolder.open(self.path / ENCODER).verify().below(ENCODER)
        if not found.faults:
            check_fingerprint(self.path, self.identity.encoder_fingerprint)
        return found

    def all(self) -> np.ndarray:
        """All features, float32 [count, D]: 4 count D bytes of memory."""
        features_ND = np.empty((self.count, self.dim), dtype=np.float32)
        for k in range(len(self._blocks)):
            ids = self._blocks.ids(k)
            features_ND[ids.start : ids.stop] = self.block(k)
        return features_ND
