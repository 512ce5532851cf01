"""The settings of `moce cluster`."""

from typing import Annotated, Literal

from pydantic import Field

from moce_ds.config.settings import option, settings

Positive = Annotated[int, Field(ge=1)]


@settings
class ClusterSettings:
    """How images are clustered."""

    method: Literal["sinkhorn", "kmeans"] = option("sinkhorn", "sinkhorn (balanced sizes) or kmeans (as they fall)")
    num_clusters: Positive = option(256, "m, the number of clusters")
    fit_images_per_cluster: Positive | None = option(
        200, "fit on a sample of this many images per cluster and label the rest; null fits on all"
    )
    kmeans_iterations: Positive = option(20, "iterations of k-means, which gives the first centroids")
    eps: Annotated[float, Field(gt=0)] = option(
        0.025, "entropy of the balanced assignment; smaller is stricter, slower"
    )
    rounds: Annotated[int, Field(ge=0)] = option(0, "how often centroids are re-estimated from the balanced assignment")
    tolerance: Annotated[float, Field(gt=0)] = option(0.01, "largest relative error of a soft cluster size")
    max_iterations: Positive = option(1000, "Sinkhorn iterations a round, converged or not")
    seed: int = option(0, "of the sample and of k-means")
