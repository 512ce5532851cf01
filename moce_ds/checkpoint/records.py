"""The records of a run: the manifest of a checkpoint, and the tables of its routes.

A manifest is checked when it is read: all other code looks entries up by name. The tables are a safetensors file of
each checkpoint, which its manifest names; a copy of the newest one lies beside the checkpoints, for readers that need
no weights. Earlier versions kept the tables in the manifest and the copy in `routing.json`.

    expert_ML         int32    the expert of every cluster in every expert layer
    probs_LME         float32  the probabilities of the gates
    cluster_share_M   float64  share of the training images in each cluster
    metadata          `moce_ds`: JSON with `format`, `step`, `layers`, and `sha256` of these and the tensors

Axes: L expert layers, M clusters, E experts per layer.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors.numpy import load

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.checksums import check_document, read_checked
from moce_ds.common.storage.files import parses, read_json, reads_from, save_tensors, valid_record

_Count = Annotated[int, Field(ge=0)]
_Table = list[list[_Count]]

ROUTING_FORMAT = "moce_ds routes 1"
_ABOUT = "moce_ds"  # the only key of the file's metadata: the library writes several in any order
_CURE = "restore it from a copy, or use another checkpoint."
_WHAT, _MADE_BY = "the routing tables", "moce pretrain"


@dataclass(frozen=True)
class RoutingTable:
    """The gate tables of a run at one step.

    Attributes:
        step: training step at which they were read.
        layers: block index of each expert layer.
        expert_ML: chosen expert of each cluster in each expert layer, int64.
        probs_LME: route probabilities P_l, float64, rows sum to 1.
        cluster_share_M: share of the training images in each cluster, float64.
    """

    step: int
    layers: tuple[int, ...]
    expert_ML: NDArray[np.int64]
    probs_LME: NDArray[np.float64]
    cluster_share_M: NDArray[np.float64]

    def write(self, path: Path) -> None:
        """Write the tables as a safetensors file. Raises OSError, or SafetensorError with its text."""
        tensors: dict[str, NDArray[Any]] = {
            "expert_ML": self.expert_ML.astype(np.int32),
            "probs_LME": self.probs_LME.astype(np.float32),
            "cluster_share_M": self.cluster_share_M.astype(np.float64),
        }
        about = {"format": ROUTING_FORMAT, "step": self.step, "layers": list(self.layers)}
        about["sha256"] = _digest(about, tensors)
        save_tensors(path, tensors, {_ABOUT: json.dumps(about)})

    @classmethod
    def read(cls, path: Path) -> "RoutingTable":
        """Read the tables, from a safetensors file or an earlier version's `routing.json`.

        Raises:
            ArtefactError: the file is damaged, a part is missing, or shapes disagree.
        """
        if path.suffix == ".json":
            return cls._of_tree(path, _read_json_tables(path))
        with reads_from(path, _CURE):
            content = path.read_bytes()
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> "RoutingTable":
        """The tables in the content of the safetensors file at `path`. Raises ArtefactError as `read`."""
        return cls._of_tree(path, _tables_in(content, path))

    @classmethod
    def _of_tree(cls, path: Path, tree: Mapping[str, Any]) -> "RoutingTable":
        try:
            routing = cls(
                step=int(tree["step"]),
                layers=tuple(tree["layers"]),
                expert_ML=np.array(tree["expert_ML"], np.int64),
                probs_LME=np.array(tree["probs_LME"], np.float64),
                cluster_share_M=np.array(tree["cluster_share_M"], np.float64),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArtefactError(f"{path} is damaged ({error!r}): expected tables of `moce pretrain`.") from None
        L, M = len(routing.layers), routing.cluster_share_M.size
        if routing.expert_ML.shape != (M, L) or routing.probs_LME.shape[:-1] != (L, M):
            raise ArtefactError(
                f"{path} is damaged: expert_ML is {routing.expert_ML.shape} and probs_LME {routing.probs_LME.shape} "
                f"for {L} layers and {M} clusters."
            )
        E = routing.probs_LME.shape[-1]
        if not ((routing.expert_ML >= 0) & (routing.expert_ML < E)).all():
            raise ArtefactError(f"{path} is damaged: expert_ML names experts that are not 0 to {E - 1}.")
        return routing

    @property
    def n_experts(self) -> int:
        """Experts per layer."""
        return self.probs_LME.shape[2]

    @property
    def confidence_ML(self) -> NDArray[np.float64]:
        """Probability of the chosen expert, [M, L]."""
        return np.take_along_axis(self.probs_LME, self.expert_ML.T[:, :, None], axis=2)[:, :, 0].T

    @property
    def routes(self) -> list[tuple[int, ...]]:
        """Route of each cluster: its expert in every expert layer."""
        return [tuple(row) for row in self.expert_ML.tolist()]

    def order(self) -> list[int]:
        """Clusters sorted by route, the most confident ones of a route first, so that equal routes form blocks."""
        confidence_M = self.confidence_ML.mean(axis=1)
        return sorted(range(len(confidence_M)), key=lambda c: (self.routes[c], -confidence_M[c], c))


def _tables_in(content: bytes, path: Path) -> dict[str, Any]:
    """The metadata and tensors of a safetensors file of routes. Raises ArtefactError."""
    with parses(path, _CURE):
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = dict(json.loads(header["__metadata__"][_ABOUT]))
        stored = about.pop("sha256", None)
    if about.get("format") != ROUTING_FORMAT:
        raise ArtefactError(f"{path}: format {about.get('format')!r}; this version reads {ROUTING_FORMAT!r}.")
    if stored != _digest(about, tensors):
        raise ArtefactError(f"{path} is damaged or was edited: its content does not match its checksum: {_CURE}")
    return about | tensors


def _digest(about: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()


def _read_json_tables(path: Path) -> Any:
    tree = read_json(path, _WHAT, _MADE_BY)
    check_document(path, tree, _WHAT, _MADE_BY)
    return tree


def read_routing_record(path: Path) -> dict[str, Any]:
    """The content of an earlier version's `routing.json`, with its checksum. Raises ArtefactError."""
    return read_checked(path, dict[str, Any], _WHAT, _MADE_BY)


@dataclass(frozen=True)
class _File:
    bytes: _Count
    xxh3: str


@dataclass(frozen=True)
class _Routing:
    """The name of the file with the tables; earlier versions kept the tables here."""

    file: str | None = None
    expert_ML: _Table = field(default_factory=list)
    cluster_share_M: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.file is None and not self.expert_ML:
            raise ValueError("neither a file of routes nor the routes themselves")
        if len(self.expert_ML) != len(self.cluster_share_M) or len({len(row) for row in self.expert_ML}) > 1:
            raise ValueError("expert_ML and cluster_share_M have different numbers of clusters")


@dataclass(frozen=True)
class _Placement:
    ep_size: Annotated[int, Field(ge=1)]
    slot_LE: _Table


@dataclass(frozen=True)
class _DealtBy:
    first: _Count
    expert_ML: _Table


@dataclass(frozen=True)
class _Experts:
    num_experts: Annotated[int, Field(ge=1)]
    layers: list[_Count]
    gate: Literal["cluster", "random", "token", "path"] = "cluster"


@dataclass(frozen=True)
class _Model:
    """The sizes that are looked up by name; `ModelSpec` checks all sizes."""

    shape: dict[str, Any]
    experts: _Experts | None


@dataclass(frozen=True)
class _Manifest:
    """Entries unknown to the writer are absent or null."""

    step: Annotated[int, Field(ge=0, lt=10**8)]
    files: dict[str, _File]
    skipped: _Count = 0
    images_read: _Count = 0
    config: dict[str, Any] = field(default_factory=dict)
    model: _Model | None = None
    clusters_hash: str | None = None
    shards_fingerprint: str | None = None
    routing: _Routing | None = None
    placement: _Placement | None = None
    dealt_by: list[_DealtBy] = field(default_factory=list)

    def __post_init__(self) -> None:
        experts = self.model.experts if self.model else None
        if self.routing is not None and self.routing.file is not None and self.routing.file not in self.files:
            raise ValueError(f"routing names {self.routing.file!r}, which is not among the files")
        if experts is None or self.routing is None:
            return
        for route in self.routing.expert_ML:
            if len(route) != len(experts.layers) or max(route, default=0) >= experts.num_experts:
                raise ValueError(f"route {route} is not one of {experts.num_experts} experts in each layer")


def check_manifest(content: Any, path: Path) -> None:
    """Raise ArtefactError, listing the faults, if an entry of a manifest is missing or has another type."""
    valid_record(_Manifest, content, str(path), "a checkpoint", "moce pretrain")
