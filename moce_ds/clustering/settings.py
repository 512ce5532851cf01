"""The settings of `moce cluster`."""

from typing import Annotated, Literal

from pydantic import Field

from moce_ds.common.config.settings import Positive, PositiveFloat, option, settings


@settings
class ClusterSettings:
    """Clustering of images."""

    method: Literal["sinkhorn", "kmeans"] = option("sinkhorn", "sinkhorn (balanced sizes) or kmeans (unbalanced sizes)")
    num_clusters: Positive = option(256, "number of clusters, m")
    fit_images_per_cluster: Positive | None = option(
        200, "size of the sample to fit on, in images per cluster; null: fit on all images"
    )
    kmeans_iterations: Positive = option(20, "iterations of k-means, which initialises the centroids")
    eps: PositiveFloat = option(0.025, "entropy weight of the balanced assignment; smaller is stricter and slower")
    rounds: Annotated[int, Field(ge=0)] = option(0, "re-estimations of the centroids from the balanced assignment")
    tolerance: PositiveFloat = option(0.01, "largest relative error of a soft cluster size")
    max_iterations: Positive = option(1000, "maximum Newton iterations per round")
    seed: int = option(0, "random seed of the sample and of k-means")
