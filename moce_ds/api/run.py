"""An opened run: its settings, metrics, routes, clusters, images and reconstructions.

Axes: R records, B images, N images of the shard set, M clusters, L expert layers.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_ds.api.clusters import AnyImage, Clusters, listed_images, pixels_of
from moce_ds.api.given import AnyPath, as_path
from moce_ds.checkpoint.format import find, steps_of
from moce_ds.checkpoint.records import RoutingTable
from moce_ds.checkpoint.run_folder import CONFIG, RECONSTRUCTIONS, RunFolder
from moce_ds.common.errors import ArtefactError, ConfigError, DataError
from moce_ds.common.host.program import python_call
from moce_ds.common.storage.metrics_file import METRICS, flat_record, read_metrics
from moce_ds.data.shards import ShardSet
from moce_ds.evaluation.reconstruction import reconstruct
from moce_ds.models.build import ModelSpec
from moce_ds.selection.routes import choose_route
from moce_ds.selection.run_clusters import run_clusters
from moce_ds.selection.training_images import training_images

if TYPE_CHECKING:
    from pandas import DataFrame


class Reconstructed(NamedTuple):
    """Reconstructions of images, and their error.

    Attributes:
        picture: a row for each image: the input, what the model sees, and the input with its hidden patches filled in.
        loss: mean squared error on the hidden patches, normalised per patch.
    """

    picture: Image.Image
    loss: float


class Run(PathLike[str]):
    """A run of `moce pretrain`, or of a verb that tunes; as a path, its folder, for the other functions.

    A run that still trains is read as it is when a part is first used: open it again for what has come since.

    Attributes:
        path: its folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path, self._folder = folder.path, folder

    def __fspath__(self) -> str:
        return fspath(self.path)

    def __repr__(self) -> str:
        length = "" if self.steps is None else f" of {self.steps}"
        return f"<Run {self.path}: step {self.step}{length}>"

    @property
    def config(self) -> dict[str, Any]:
        """All settings by group, such as `run.config["optim"]["epochs"]`. Raises ArtefactError if they are damaged."""
        return self._folder.config

    @property
    def step(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        return max(steps_of(self.path), default=0)

    @property
    def steps(self) -> int | None:
        """The steps of the whole run; None if it is tuned, or its images can no longer be counted."""
        return self._folder.length

    @property
    def complete(self) -> bool:
        """Whether the newest checkpoint is that of the last step."""
        return self.steps is not None and self.step >= self.steps

    def records(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl` by step, as plain data; statistics of layer 3 are in `["layers"]["3"]`.

        Raises:
            ArtefactError: a line is not what was written.
        """
        return read_metrics(self.path / METRICS)

    def metrics(self) -> "DataFrame":
        """The records as a data frame: a row for each record, its step as the index.

        Columns are `loss`, `lr`, ..., and with joined names `layers.3.confidence`, `layers.3.load.0`, ... What a record
        lacks is NaN.

        Raises:
            ConfigError: pandas is not installed.
            ArtefactError: a line of `metrics.jsonl` is not what was written.
        """
        if find_spec("pandas") is None:
            raise ConfigError(
                "A data frame needs pandas: pip install 'moce-ds[notebook]'. Run.records() and Run.column() do without."
            )
        import pandas

        records = self.records()
        index = pandas.Index([record["step"] for record in records], name="step")
        return pandas.DataFrame([dict(flat_record(record)) for record in records], index=index)

    def column(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The steps [R] and values [R] of one column of `metrics`, without the records that lack it; needs no pandas.

        Raises:
            ConfigError: no record has such a column.
            ArtefactError: a line of `metrics.jsonl` is not what was written.
        """
        flat = [(record["step"], dict(flat_record(record))) for record in self.records()]
        having = [(step, values[name]) for step, values in flat if name in values]
        if not having:
            known = ", ".join(dict.fromkeys(key for _, values in flat for key in values)) or "none, without records"
            raise ConfigError(f"{self.path / METRICS} has no column {name!r}; its columns: {known}.")
        steps, values = zip(*having, strict=True)
        return np.array(steps, np.int64), np.array(values, np.float64)  # a loss that was not finite is None: NaN

    @property
    def routes(self) -> RoutingTable:
        """The routes of the newest checkpoint: `expert_ML`, int64, the expert of each cluster in each expert layer;
        `probs_LME`, the probabilities of the gates; `cluster_share_M`; `layers`, the blocks with experts.

        Raises:
            ArtefactError: the run has no routes, or they are damaged.
        """
        if self._folder.routing is None:
            raise ArtefactError(f"{self.path} has no routes: it is not a run with experts by cluster, or not begun.")
        return self._folder.routing

    @cached_property
    def clusters(self) -> Clusters:
        """The clusters that the run is trained with. Raises ArtefactError if it has none."""
        return Clusters.load(self.path)

    def cluster_ids(self) -> NDArray[np.int32]:
        """The cluster of every image of the run's shard set, [N], in the order of the image ids.

        Raises:
            ArtefactError, DataError: the run has no clusters, or its shard set is missing or another one.
        """
        shards = self._shards()
        return self._folder.cluster_ids(shards.fingerprint, shards.count)

    @python_call()
    def images(
        self, *, cluster: int | None = None, route: Sequence[int] | None = None, count: int = 8
    ) -> list[Image.Image]:
        """Training images at random, always the same: of a cluster, of the clusters of a route, or of the whole set.

        Args:
            cluster: the number of a cluster.
            route: an expert for each expert layer, as in `run.routes.routes`.
            count: number of images, fewer if there are no more.

        Raises:
            ConfigError: there is no such cluster or route.
            ArtefactError, DataError: the run has no clusters, or its shard set is missing or another one.
        """
        if cluster is None and route is None:
            shards = self._shards()
            ids = np.random.default_rng(0).permutation(shards.count)[:count]
            return [shards.decode(image_id) for image_id in sorted(ids.tolist())]
        checkpoint, clusters = run_clusters(self.path)
        if route is not None:
            return training_images(checkpoint, choose_route(checkpoint, tuple(route)).clusters, count)
        self._check_cluster(cluster, clusters.num_clusters)
        assert cluster is not None
        return training_images(checkpoint, {cluster: 1.0}, count)

    def reconstructions(self) -> dict[int, Image.Image]:
        """The pictures of reconstructions that the run has drawn while it trained, by step.

        Raises:
            ArtefactError: a picture is damaged.
        """
        paths = sorted((self.path / RECONSTRUCTIONS).glob("step-*.png"))
        return {int(path.stem.removeprefix("step-")): _opened(path) for path in paths}

    @python_call()
    def reconstruct(self, images: Iterable[AnyImage], *, cluster: int | None = None, seed: int = 0) -> Reconstructed:
        """Mask images and reconstruct them with the newest checkpoint, on the CPU.

        Args:
            images: paths or Pillow images.
            cluster: let all images take the route of this cluster; None: each that of its own cluster. A dense run
                has no routes.
            seed: of the masks: equal seeds hide the same patches.

        Raises:
            ConfigError: there is no such cluster.
            ArtefactError: the run has no checkpoint, or routes by token.
            DataError: an image cannot be read.
        """
        from moce_ds.training.pictures import reconstruction_picture  # with what training needs

        checkpoint, shown = find(self.path), listed_images(images)
        if not shown:
            raise DataError("Got no images to reconstruct; expected one or more.")
        spec = ModelSpec.from_tree(checkpoint.entry("model"))
        images_BCHW, clusters, clusters_B = pixels_of(shown, spec.input), None, None
        if checkpoint.experts:
            checkpoint, clusters = run_clusters(checkpoint.folder)
            self._check_cluster(cluster, clusters.num_clusters)
            clusters_B = self.clusters.assign(shown) if cluster is None else np.full(len(shown), cluster, np.int64)
        elif cluster is not None:
            raise ConfigError(f"cluster: got {cluster}; {self.path} is a dense run, which has no routes.")
        reconstruction = reconstruct(checkpoint, clusters, images_BCHW, clusters_B, seed)
        picture_HWC = reconstruction_picture(images_BCHW, reconstruction, spec.shape.patch_size, spec.input)
        return Reconstructed(Image.fromarray(picture_HWC), float(reconstruction.loss))

    def _shards(self) -> ShardSet:
        if self._folder.shards is None:
            raise ArtefactError(f"{self.path} is a tuning run: it has no shard set.")
        return ShardSet.open(self._folder.shards)

    def _check_cluster(self, cluster: int | None, num_clusters: int) -> None:
        if cluster is not None and not 0 <= cluster < num_clusters:
            raise ConfigError(f"cluster: got {cluster}; {self.path} has clusters 0 to {num_clusters - 1}.")


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged ({error}): delete it.") from None


@python_call()
def open_run(path: AnyPath) -> Run:
    """A run folder, complete, stopped, or still training.

    Raises:
        ArtefactError: it is not one.

    Example::

        run = moce_ds.open_run("runs/moce")
        run.metrics()[["loss", "lr"]].plot(subplots=True)
        print(run.routes.expert_ML, run.images(cluster=0), run.reconstructions())
    """
    folder = as_path(path)
    if not RunFolder.recognises(folder):
        raise ArtefactError(f"{folder} is not a run: expected the folder that `moce pretrain` wrote, with {CONFIG}.")
    return Run(RunFolder.open(folder))
