"""What the gate tables say: routes, their order for display, and which expert sees which kind of image.

Axes: L expert layers, M clusters, E experts per layer, N images, G groups of images (domains or classes).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moce_ds.errors import ArtefactError
from moce_ds.storage.files import read_json

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Routing:
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
    expert_ML: Ints
    probs_LME: Floats
    cluster_share_M: Floats

    @classmethod
    def read(cls, path: Path) -> "Routing":
        """Read `routing.json`. Raises ArtefactError when a part is missing or shapes disagree."""
        tree = read_json(path, "the routing tables", "moce pretrain")
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
        return self.probs_LME.shape[2]

    @property
    def confidence_ML(self) -> Floats:
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


def route_name(route: Sequence[int]) -> str:
    """A route as people read it: `1→3` is expert 1 in the first expert layer, 3 in the second."""
    return "→".join(str(expert) for expert in route)


def domain_of(class_name: str) -> str:
    """First component of a class's path: `digits/3` is of the domain `digits`."""
    return class_name.split("/", 1)[0]


def group_images(classes: Sequence[str], labels_N: Ints) -> tuple[list[str], Ints]:
    """Domains, and the domain of each image, int64 [N]; -1 for images without a label."""
    domains = sorted({domain_of(name) for name in classes})
    domain_K = np.array([domains.index(domain_of(name)) for name in classes] + [-1], np.int64)
    return domains, domain_K[labels_N]


def count(group_N: Ints, column_N: Ints, n_groups: int, n_columns: int) -> Ints:
    """Images by group and column (cluster or expert), int64 [G, columns]; group -1 is left out."""
    table = np.zeros((n_groups, n_columns), np.int64)
    known_N = group_N >= 0
    np.add.at(table, (group_N[known_N], column_N[known_N]), 1)
    return table


def shares(count_GE: Ints) -> Floats:
    """Each row divided by its sum; an empty row stays zero."""
    return count_GE / np.maximum(count_GE.sum(axis=1, keepdims=True), 1)


def row_order(share_GE: Floats) -> list[int]:
    """Rows sorted by their largest column, the purest first, so that blocks show."""
    favourite_G = share_GE.argmax(axis=1)
    return sorted(range(len(share_GE)), key=lambda g: (favourite_G[g], -share_GE[g].max(), g))
