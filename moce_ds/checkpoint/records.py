"""The JSON records of a run: the manifest of a checkpoint, and the routes of the newest one in `routing.json`.

A manifest is checked when it is read: all other code looks entries up by name. `routing.json` lies beside the
checkpoints, for readers that need no weights.

Axes: L expert layers, M clusters, E experts per layer.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.checksums import check_document, read_checked
from moce_ds.common.storage.files import read_json, valid_record

_Count = Annotated[int, Field(ge=0)]
_Table = list[list[_Count]]

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

    @classmethod
    def read(cls, path: Path) -> "RoutingTable":
        """Read `routing.json`. Raises ArtefactError: it is damaged, a part is missing, or shapes disagree."""
        tree = read_json(path, _WHAT, _MADE_BY)
        check_document(path, tree, _WHAT, _MADE_BY)
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


def read_routing_record(path: Path) -> dict[str, Any]:
    """The tables as plain data, with their checksum. Raises ArtefactError."""
    return read_checked(path, dict[str, Any], _WHAT, _MADE_BY)


@dataclass(frozen=True)
class _File:
    bytes: _Count
    xxh3: str


@dataclass(frozen=True)
class _Routing:
    expert_ML: _Table
    cluster_share_M: list[float]

    def __post_init__(self) -> None:
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
        if experts is None or self.routing is None:
            return
        for route in self.routing.expert_ML:
            if len(route) != len(experts.layers) or max(route, default=0) >= experts.num_experts:
                raise ValueError(f"route {route} is not one of {experts.num_experts} experts in each layer")


def check_manifest(content: Any, path: Path) -> None:
    """Raise ArtefactError, listing the faults, if an entry of a manifest is missing or has another type."""
    valid_record(_Manifest, content, str(path), "a checkpoint", "moce pretrain")
