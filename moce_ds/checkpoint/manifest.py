"""The schema of a checkpoint's manifest, checked when it is read: all other code looks entries up by name.

Axes: L expert layers, M clusters, E experts.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from moce_ds.storage.files import valid_record

Count = Annotated[int, Field(ge=0)]
Table = list[list[Count]]


@dataclass(frozen=True)
class _File:
    bytes: Count
    xxh3: str


@dataclass(frozen=True)
class _Routing:
    expert_ML: Table
    cluster_share_M: list[float]

    def __post_init__(self) -> None:
        if len(self.expert_ML) != len(self.cluster_share_M) or len({len(row) for row in self.expert_ML}) > 1:
            raise ValueError("expert_ML and cluster_share_M have different numbers of clusters")


@dataclass(frozen=True)
class _Placement:
    ep_size: Annotated[int, Field(ge=1)]
    slot_LE: Table


@dataclass(frozen=True)
class _DealtBy:
    first: Count
    expert_ML: Table


@dataclass(frozen=True)
class _Experts:
    num_experts: Annotated[int, Field(ge=1)]
    layers: list[Count]
    gate: Literal["cluster", "random", "token", "path"] = "cluster"


@dataclass(frozen=True)
class _Model:
    """Only the sizes that are looked up by name; `ModelSpec` checks them all."""

    shape: dict[str, Any]
    experts: _Experts | None


@dataclass(frozen=True)
class _Manifest:
    """Entries unknown to the writer are absent or null."""

    step: Annotated[int, Field(ge=0, lt=10**8)]
    files: dict[str, _File]
    skipped: Count = 0
    images_read: Count = 0
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
