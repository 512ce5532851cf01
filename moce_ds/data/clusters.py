"""The clusters artefact: everything needed to label an image, and its provenance.

        clusters/
          clusters.safetensors   embeddings, duals, mean, sizes, cosines
          ids.npy                int32, the cluster of every image of the shard set
          encoder/               the encoder whose features are clustered
          clusters.json          written last: method, eps, fingerprints, provenance, checksums of all files

Axes: N images, M clusters, D feature width.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from safetensors.numpy import load_file

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
from moce_ds.common.storage.drafts import restore
from moce_ds.common.storage.encoder_folder import EncoderFolder
from moce_ds.common.storage.files import atomic_file, load_array, reads_from, save_tensors
from moce_ds.data.kept_encoder import ENCODER, check_fingerprint

FORMAT, VERSION = "moce clusters", 1
MADE_BY = "moce cluster"
RECORD, TENSORS, IDS = "clusters.json", "clusters.safetensors", "ids.npy"
_AGAIN = f"write the clusters again with `{MADE_BY}`."
_TENSORS = {"embeddings_MD": 2, "duals_M": 1, "mean_D": 1, "sizes_M": 1, "cosine_M": 1}
_LATER = {"low_cosine_M": 1}
"""Tensors that earlier versions did not write."""

_PART = 2**20  # images

LOW = 0.05
"""Share of a cluster's images below `low_cosine_M`."""


@dataclass(frozen=True)
class _Record:
    """The entries of `clusters.json` that are read."""

    hash: str
    eps: Annotated[float, Field(gt=0)]
    method: str
    shards_fingerprint: str
    encoder_fingerprint: str
    encoder_input: dict[str, Any]
    provenance: dict[str, Any]
    files: Files | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Clusters:
    """Clusters of the images of a shard set; C and g of docs/method.md.

    Attributes:
        embeddings_MD: float32, C: L2-normalised centroids.
        duals_M: float32, g; 0 for k-means.
        mean_D: float32, subtracted from features before they are normalised.
        sizes_M: int64, images of the shard set in each cluster (hard assignment).
        cosine_M: float32, mean cosine of a cluster's images to its centroid; 0 for an empty cluster.
        low_cosine_M: float32, the cosine below which the least typical 5% of a cluster's images are; 1 for an empty
            cluster. None if an earlier version wrote the clusters.
        eps: weight of the entropy, in the units of a cosine.
        method: "sinkhorn" or "kmeans".
        shards_fingerprint: of the shard set that was clustered.
        encoder_fingerprint: of the encoder whose features are clustered.
        encoder_input: input format of the encoder (size, mean, std, interpolation, crop).
        provenance: settings, features and the final state of the solver.
        files: checksums of the folder's files after loading; None if an earlier version wrote it.
        folder: their folder, after loading.
    """

    kind: ClassVar[str] = "clusters"
    marks: ClassVar[tuple[str, ...]] = (RECORD,)
    last_file: ClassVar[str] = RECORD  # written last, with checksums of the others
    embeddings_MD: np.ndarray
    duals_M: np.ndarray
    mean_D: np.ndarray
    sizes_M: np.ndarray
    cosine_M: np.ndarray
    eps: float
    method: str
    shards_fingerprint: str
    encoder_fingerprint: str
    encoder_input: dict[str, Any]
    provenance: dict[str, Any]
    low_cosine_M: np.ndarray | None = None
    files: Files | None = None
    folder: Path | None = None

    @property
    def num_clusters(self) -> int:
        """Number of clusters, M."""
        return len(self.embeddings_MD)

    @property
    def share_M(self) -> np.ndarray:
        """Share of the images in each cluster, float64; sums to 1."""
        return self.sizes_M / self.sizes_M.sum()

    @property
    def hash(self) -> str:
        """Hex SHA-256 of what determines labels: clusters with equal hashes label every image alike."""
        digest = hashlib.sha256(repr((self.embeddings_MD.shape, float(self.eps))).encode())
        for tensor in (self.embeddings_MD, self.duals_M, self.mean_D):
            digest.update(tensor.astype("<f4").tobytes())
        return digest.hexdigest()

    def assign(self, features_ND: np.ndarray) -> np.ndarray:
        """Cluster of each feature in the form that the encoder returns (not centred, not normalised): int64 [N].

        Raises:
            DataError: features of another width, or not finite.
        """
        return self.assign_with_cosine(features_ND)[0]

    def assign_with_cosine(self, features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `assign`, plus the float32 cosine of each feature to its centroid."""
        if features_ND.ndim != 2 or features_ND.shape[1] != len(self.mean_D):
            raise DataError(f"Features have shape {features_ND.shape}, these clusters need [N, {len(self.mean_D)}].")
        cosine_NM = normalised(features_ND, self.mean_D) @ self.embeddings_MD.T
        if not np.isfinite(cosine_NM).all():
            first = int(np.argmin(np.isfinite(cosine_NM).all(axis=1)))
            raise DataError(f"Feature {first} to be labelled is not finite: is this the right encoder?")
        ids_N = (cosine_NM / np.float32(self.eps) + self.duals_M).argmax(axis=1)
        return ids_N, np.take_along_axis(cosine_NM, ids_N[:, None], axis=1)[:, 0]

    def write(self, folder: Path) -> None:
        """Write clusters.safetensors, then clusters.json with the checksums of all files in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        known = {name: getattr(self, name) for name in _TENSORS | _LATER}
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in known.items() if tensor is not None}
        with atomic_file(folder / TENSORS) as temporary:
            save_tensors(temporary, tensors)
        excluded = {*known, "files", "folder"}
        record = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in excluded}
        record["files"] = records_of(folder, [name for name in names_below(folder) if name != RECORD])
        header = {"format": FORMAT, "version": VERSION, "num_clusters": self.num_clusters, "hash": self.hash}
        write_checked(folder / RECORD, header | record)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether `path` is a clusters folder."""
        return is_marked(path, cls.marks)

    @classmethod
    def open(cls, folder: Path) -> "Clusters":
        """Read a clusters folder.

        Raises:
            ArtefactError: it is missing, of an unknown version, or damaged; names the fault.
        """
        restore(folder)
        path = folder / RECORD
        record = vars(read_checked(path, _Record, "a record of clusters", MADE_BY, format=FORMAT, version=VERSION))
        stated = record.pop("hash")
        clusters = cls(**(record | _load_tensors(folder / TENSORS)), folder=folder)
        clusters._check(folder / TENSORS)
        if clusters.hash != stated:
            raise ArtefactError(
                f"{folder}: clusters.json and clusters.safetensors belong to different clusters: write them again with "
                f"`{MADE_BY}`."
            )
        check_file(folder, TENSORS, clusters.files, _AGAIN)
        return clusters

    @property
    def made_from(self) -> dict[str, Any]:
        """Fingerprints of the images and of the encoder, the encoder's input, and the settings of the clustering."""
        names = ("shards_fingerprint", "encoder_fingerprint", "encoder_input", "provenance")
        return {name: getattr(self, name) for name in names}

    def describe(self) -> Rows:
        """Number, sizes and tightness of the clusters, images and encoder."""
        relative_M = self.sizes_M / self.sizes_M.mean()
        return {
            "clusters": f"{self.num_clusters} of width {self.embeddings_MD.shape[1]}, by {self.method}",
            "sizes": "min/median/max over mean "
            f"{relative_M.min():.2f} / {np.median(relative_M):.2f} / {relative_M.max():.2f}",
            "cosine": f"{np.average(self.cosine_M, weights=self.sizes_M):.3f} to the centroid, mean over images",
            "images": f"shard set {self.shards_fingerprint}",
            "encoder": self.encoder_fingerprint,
            "hash": self.hash,
        }

    def verify(self) -> Findings:
        """All differences from what was written; reads all files. Raises ArtefactError."""
        folder = self.folder
        assert folder is not None, "clusters that were opened have a folder"
        found = document_findings(folder / RECORD, RECORD) + file_findings(folder, self.files, [TENSORS, IDS])
        found += EncoderFolder.open(folder / ENCODER).verify().below(ENCODER)
        if not found.faults:
            load_ids(folder, self.shards_fingerprint, int(self.sizes_M.sum()))
            check_fingerprint(folder, self.encoder_fingerprint)
        return found

    def _check(self, path: Path) -> None:
        """Raise ArtefactError if the tensors do not match each other."""
        m, d = self.embeddings_MD.shape
        expected = {"embeddings_MD": (m, d), "duals_M": (m,), "mean_D": (d,), "sizes_M": (m,), "cosine_M": (m,)}
        if self.low_cosine_M is not None:
            expected["low_cosine_M"] = (m,)
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor.shape != shape:
                raise ArtefactError(f"{path}: {name} has shape {tensor.shape}, expected {shape}.")
            if not np.isfinite(tensor).all():
                raise ArtefactError(f"{path}: {name} holds values that are not finite.")
        if not np.allclose(np.linalg.norm(self.embeddings_MD, axis=1), 1, atol=1e-3):
            raise ArtefactError(f"{path}: embeddings_MD has rows whose norm is not 1.")


def normalised(features_ND: np.ndarray, mean_D: np.ndarray) -> np.ndarray:
    """Centred, then L2-normalised features, float32 [N, D]; a feature equal to the mean stays 0."""
    centred_ND = features_ND.astype(np.float32) - mean_D
    norms_N1 = np.linalg.norm(centred_ND, axis=1, keepdims=True)
    return centred_ND / np.maximum(norms_N1, np.finfo(np.float32).tiny)


def save_ids(folder: Path, ids_N: np.ndarray) -> None:
    """Write the cluster of every image of the shard set, as int32, beside the clusters."""
    with ids_writer(folder, len(ids_N)) as write:
        write(ids_N)


@contextmanager
def ids_writer(folder: Path, count: int) -> Iterator[Callable[[np.ndarray], object]]:
    """Write the cluster of every image of the shard set, as int32, beside the clusters, part by part.

    Yields a function that appends the ids of the next images; `count` in all. The file is in place when the block ends.
    Raises OSError if the disk refuses it.
    """
    header = {"descr": "<i4", "fortran_order": False, "shape": (count,)}
    with atomic_file(folder / IDS) as temporary, open(temporary, "wb") as opened:
        np.lib.format.write_array_header_1_0(opened, header)
        yield lambda ids_N: opened.write(ids_N.astype("<i4").tobytes())


def load_ids(folder: Path, shards_fingerprint: str, count: int) -> np.ndarray:
    """The cluster of every image of this shard set, int32 [count], in image order: memory-mapped, read-only.

    Raises:
        ArtefactError: the folder is damaged, or was made from another shard set.
    """
    clusters = Clusters.open(folder)
    if clusters.shards_fingerprint != shards_fingerprint:
        raise ArtefactError(
            f"{folder} labels another shard set ({clusters.shards_fingerprint[:12]}, {clusters.sizes_M.sum()} images) "
            f"than the one in use ({shards_fingerprint[:12]}, {count} images): run `moce features` and `{MADE_BY}` on "
            "this one."
        )
    ids_N = np.asarray(load_array(folder / IDS, np.int32, (count,), _AGAIN))
    m = clusters.num_clusters
    counts = np.zeros(m + 1, dtype=np.int64)  # the last entry counts invalid ids
    for part_N in parts_of(ids_N):
        counts += np.bincount(part_N.view(np.uint32).clip(max=m), minlength=m + 1)
    if not np.array_equal(counts, [*clusters.sizes_M, 0]):
        raise ArtefactError(f"{folder / IDS} does not have the cluster sizes that {folder} states: {_AGAIN}")
    check_file(folder, IDS, clusters.files, _AGAIN)
    return ids_N


def parts_of(array_N: np.ndarray) -> Iterator[np.ndarray]:
    """An array in parts of some MiB, for work that copies what it reads."""
    for first in range(0, len(array_N), _PART):
        yield array_N[first : first + _PART]


def _load_tensors(path: Path) -> dict[str, np.ndarray]:
    with reads_from(path, _AGAIN):
        tensors: dict[str, np.ndarray] = load_file(path)
    if missing := [name for name in _TENSORS if name not in tensors]:
        raise ArtefactError(f"{path} is damaged: it lacks {', '.join(missing)}: {_AGAIN}")
    present = {name: axes for name, axes in (_TENSORS | _LATER).items() if name in tensors}
    for name, axes in present.items():
        if tensors[name].ndim != axes:
            raise ArtefactError(f"{path}: {name} has shape {tensors[name].shape}, expected {axes} axes: {_AGAIN}")
    return {name: tensors[name] for name in present}
