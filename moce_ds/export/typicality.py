"""How typical the images of a task are of pre-training: their cosines to the centroids, compared with those of training
images.

Axes: N images of the task, M clusters.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_ds.clustering.clusters import LOW, Clusters

# Measured on the demo (docs/select.md): 2-8% for held-out images of the clustered domains, 57-100% for images of a
# domain without clusters.
UNUSUAL = 0.15
UNLIKE = 0.5


@dataclass(frozen=True)
class Typicality:
    """The cosines of a task's images to the centroids of their clusters.

    Attributes:
        low_share: share of the images that are farther from their centroid than 95% of its training images; 0.05 is
            expected for images like those. None if the clusters do not record the threshold.
        cosine: mean over the images.
        training_cosine: mean of the training images in the same clusters.
    """

    low_share: float | None
    cosine: float
    training_cosine: float

    @classmethod
    def of(cls, ids_N: NDArray[np.int64], cosine_N: NDArray[np.float32], clusters: Clusters) -> "Typicality":
        """Computed from the cluster of every image and its cosine to the centroid."""
        low_M = clusters.low_cosine_M
        low_share = None if low_M is None else float((cosine_N < low_M[ids_N]).mean())
        return cls(low_share, float(cosine_N.mean()), float(clusters.cosine_M[ids_N].mean()))

    @property
    def verdict(self) -> str:
        """The verdict as text; "unknown" if there is nothing to compare with."""
        if self.low_share is None:
            return "unknown"
        if self.low_share < UNUSUAL:
            return "typical"
        return "unusual" if self.low_share < UNLIKE else "unlike anything in the pre-training set"

    @property
    def summary(self) -> str:
        """A sentence for the terminal."""
        cosines = f"mean cosine {self.cosine:.3f}, of training images in the same clusters {self.training_cosine:.3f}"
        if self.low_share is None:
            return f"How typical: unknown, the run's clusters are of an earlier version ({cosines})."
        return (
            f"How typical: {self.verdict}. {self.low_share:.1%} of the images are farther from their cluster than "
            f"{1 - LOW:.0%} of its training images; {LOW:.0%} are expected ({cosines})."
        )

    def record(self) -> dict[str, Any]:
        """Plain data for results.json."""
        return {"verdict": self.verdict, **asdict(self)}
