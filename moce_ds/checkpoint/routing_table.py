"""The routes of a run as a table: `routing.json` beside the checkpoints, for whoever reads a run without its weights.

Axes: L expert layers, M clusters, E experts per layer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_ds.errors import ArtefactError
from moce_ds.storage.checksums import check_document, read_checked
from moce_ds.storage.files import read_json

_WHAT, _MADE_BY = "the routing tables", "moce pretrain"


def read_routing_record(path: Path) -> dict[str, Any]:
    """The tables as plain data, with their checksum. Raises ArtefactError."""
    return read_checked(path, dict[str, Any], _WHAT, _MADE_BY)


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
