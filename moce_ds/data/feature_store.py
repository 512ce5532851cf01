"""Features on disk: one row per image of a shard set, in image order, written in blocks by any number of processes.

        features/
          block-000000.npy   float16 [block_rows, D], images 0 ...; the last block is shorter
          encoder/           the encoder that computed them
          features.json      written last, with the checksums of blocks, encoder and itself: marks a complete folder
          begun.json         the same without checksums, while the features are incomplete

Axes: N images requested or in a block, D feature width.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from safetensors.numpy import load_file

from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.errors import ArtefactError, DataError
from moce_ds.common.storage.artefact import Rows, is_marked
from moce_ds.common.storage.checksums import (
    Files,
    Findings,
    check_file,
    document_findings,
    file_findings,
    names_below,
    read_checked,
    records_of,
    write_checked,
)
from moce_ds.common.storage.encoder_folder import WEIGHTS, EncoderFolder
from moce_ds.common.storage.files import load_array, reads_from, save_array, sha256_of, write_json, writes_to

FORMAT, VERSION = "moce features", 1
RECORD, BEGUN = "features.json", "begun.json"
ENCODER = "encoder"
"""Folder with the encoder's weights and configuration, inside a features or clusters folder."""


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


def fingerprint(state: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and float32 values of an encoder's weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{state[name].shape}".encode())
        digest.update(np.ascontiguousarray(state[name], dtype="<f4").tobytes())
    return digest.hexdigest()


def check_encoder(folder: Path, expected: str, files: Files | None) -> None:
    """Raise ArtefactError if the encoder in a features or clusters folder is not the one it was made with.

    Each file is read once, without loading the weights, if `files` has their checksum.

    Args:
        expected: fingerprint of the encoder's weights.
        files: checksums of the folder's files; None if an earlier version wrote it.

    Raises:
        ArtefactError: the encoder is missing or damaged, or differs from `expected` or `files`.
    """
    recorded = [name for name in files or () if name.startswith(f"{ENCODER}/")]
    try:
        for name in recorded:
            check_file(folder, name, files, f"restore the encoder of {folder}, or write {folder} again.")
    except ArtefactError:
        check_fingerprint(folder, expected)  # it names both encoders if the weights differ
        raise
    if f"{ENCODER}/{WEIGHTS}" not in recorded:
        check_fingerprint(folder, expected)


def check_fingerprint(folder: Path, expected: str) -> None:
    """Raise ArtefactError if the encoder in a features or clusters folder has other weights; loads them.

    Raises:
        ArtefactError: the weights are missing or damaged, or their fingerprint is not `expected`.
    """
    weights = folder / ENCODER / WEIGHTS
    with reads_from(weights, f"restore it, or write {folder} again."):
        actual = fingerprint(load_file(weights))
    if actual != expected:
        raise ArtefactError(
            f"{weights} is another encoder ({actual[:12]}) than the one that {folder} was made with ({expected[:12]}): "
            f"restore that one, or write {folder} again."
        )


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
        self.path = path
        self.count = count
        self.dim = dim
        self.block_rows = block_rows
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

    def missing_blocks(self) -> list[int]:
        """Numbers of the blocks that are not on disk yet."""
        return [k for k in range(self._num_blocks) if not _block_path(self.path, k).is_file()]

    def block_ids(self, k: int) -> range:
        """Image ids of block k."""
        return range(k * self.block_rows, min((k + 1) * self.block_rows, self.count))

    def write_block(self, k: int, features_ND: np.ndarray) -> None:
        """Write the features of the images `block_ids(k)` as float16.

        Raises:
            DataError: the features have another shape.
            ArtefactError: the block cannot be written.
        """
        expected = (len(self.block_ids(k)), self.dim)
        if features_ND.shape != expected:
            raise DataError(f"Block {k} of {self.path} has shape {features_ND.shape}, expected {expected}.")
        with np.errstate(over="ignore"):  # values beyond float16 become infinite; `finish` names the image
            half_ND = features_ND.astype(np.float16)
        with writes_to(_block_path(self.path, k)):
            save_array(_block_path(self.path, k), half_ND)

    def finish(self) -> None:
        """Mark the features as complete. One process calls it once, after all blocks are written.

        Raises:
            ArtefactError: a block is missing or has the wrong shape, the encoder in the folder is another one, or the
                record cannot be written.
            DataError: a feature is NaN or infinite (the float16 maximum is 65504).
        """
        if (self.path / RECORD).is_file():
            return  # keep its checksums, even if a block has changed since
        if (self.path / ENCODER).is_dir():  # from now on its checksums replace the fingerprint
            check_fingerprint(self.path, self._description["identity"]["encoder_fingerprint"])
        checksums = {}
        for k in range(self._num_blocks):
            block_ND = _open_block(self.path, k, (len(self.block_ids(k)), self.dim))
            finite_N = np.isfinite(block_ND).all(axis=1)
            if not finite_N.all():
                image = self.block_ids(k)[int(np.argmin(finite_N))]
                raise DataError(
                    f"The features of image {image} are NaN or beyond float16 ({_block_path(self.path, k)}): "
                    f"check whether the encoder's training diverged, then delete {self.path} and write it again."
                )
            checksums[_block_path(self.path, k).name] = sha256_of(_block_path(self.path, k))
        with writes_to(self.path):
            files = records_of(self.path, names_below(self.path / ENCODER, f"{ENCODER}/"))
            write_checked(self.path / RECORD, self._description | {"sha256": checksums, "files": files})
            (self.path / BEGUN).unlink(missing_ok=True)

    @property
    def _num_blocks(self) -> int:
        return -(-self.count // self.block_rows)

    def _refuse_unknown(self) -> None:
        """Raise ArtefactError for blocks without a record, which may belong to other images or another encoder."""
        names = sorted(entry.name for entry in self.path.glob("*") if not entry.name.startswith("."))
        if names:
            raise ArtefactError(
                f"{self.path} holds {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}, but neither "
                "features.json nor begun.json, which identify features: choose another folder, or delete it."
            )


class FeatureSet:
    """Complete features, read through memory maps. The checksum of a block is verified when it is first read.

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
        self._block_rows = block_rows = record.block_rows
        self._sha256, self._whole = record.sha256, set[int]()
        count, dim = record.count, record.dim
        starts = range(0, count, block_rows)
        self._blocks = [_open_block(path, k, (min(block_rows, count - start), dim)) for k, start in enumerate(starts)]

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

    def blocks(self) -> Iterator[np.ndarray]:
        """All features in image order, in blocks of float32 [N, D]. Raises ArtefactError if a block is damaged."""
        for k in range(len(self._blocks)):
            yield self._block(k).astype(np.float32)

    def _block(self, k: int) -> np.ndarray:
        name = _block_path(self.path, k).name
        if k not in self._whole and sha256_of(self.path / name) != self._sha256.get(name):
            raise ArtefactError(f"{self.path / name} is damaged: its checksum differs: {_again(self.path)}")
        self._whole.add(k)
        return self._blocks[k]

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
        block_N, row_N = np.divmod(ids_N, self._block_rows)
        for k in np.unique(block_N):
            features_ND[block_N == k] = self._block(k)[row_N[block_N == k]]
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
        names = [_block_path(self.path, k).name for k in range(len(self._blocks))]
        differ = [name for name in names if sha256_of(self.path / name) != self._sha256.get(name)]
        found = Findings([f"{name}: is damaged: its checksum differs" for name in differ])
        found += document_findings(self.path / RECORD, RECORD) + file_findings(self.path, self.files)
        found += EncoderFolder.open(self.path / ENCODER).verify().below(ENCODER)
        if not found.faults:
            check_fingerprint(self.path, self.identity.encoder_fingerprint)
        return found

    def all(self) -> np.ndarray:
        """All features, float32 [count, D]: 4 count D bytes of memory."""
        return np.concatenate(list(self.blocks()))


def _block_path(path: Path, k: int) -> Path:
    return path / f"block-{k:06d}.npy"


def _again(path: Path) -> str:
    return f"delete {path}, and rerun the same `moce features`."


def _open_block(path: Path, k: int, shape: tuple[int, int]) -> np.ndarray:
    block_path = _block_path(path, k)
    return np.asarray(load_array(block_path, np.float16, shape, _again(path)))
