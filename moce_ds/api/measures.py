"""Measurements: the accuracy of an encoder on a task, and the reconstruction error of a run."""

from typing import Any

from moce_ds.api.given import AnyPath, as_path, settings_of
from moce_ds.common.host.program import python_call
from moce_ds.distributed.runtime import lone_device, started
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.evaluation.frozen_features import TaskPaths, measure_encoder
from moce_ds.evaluation.metrics import MultiLabelScore, Score
from moce_ds.evaluation.reconstruction import Reconstructions, evaluate_run, routed_images
from moce_ds.evaluation.settings import KnnSettings, ProbeSettings
from moce_ds.selection.run_clusters import run_clusters


@python_call()
def knn(
    encoder: AnyPath,
    train: AnyPath,
    test: AnyPath,
    *,
    val: AnyPath | None = None,
    heads: int | None = None,
    **settings: Any,
) -> Score | MultiLabelScore:
    """The accuracy of a weighted k-nearest-neighbour vote on an encoder's features, as `moce knn`.

    Args:
        encoder: the run of a dense MAE, an exported expert, or a .pth file of the public MAE.
        train, test: labelled images: shard sets, or what `moce shards` reads.
        val: images that vote too.
        heads: attention heads, for a .pth file of unusual size.
        settings: of `moce knn`, such as `k=5`.

    Returns:
        `top1` and `mean_per_class`, shares from 0 to 1 (`map11` if images have several classes), `n_train`, `n_test`.

    Raises:
        ConfigError: a setting is not allowed.
        ArtefactError: there is no encoder.
        DataError: the splits do not match, or an image is damaged.

    Example::

        score = moce_ds.knn("expert", "task/train", "task/test", k=5)
        print(score.top1)
        print(moce_ds.knn("runs/mae", "task/train", "task/test", k=5).top1)
    """
    return _accuracy(encoder, train, val, test, settings_of(KnnSettings, settings), heads)


@python_call()
def probe(
    encoder: AnyPath,
    train: AnyPath,
    test: AnyPath,
    *,
    val: AnyPath | None = None,
    heads: int | None = None,
    **settings: Any,
) -> Score | MultiLabelScore:
    """The accuracy of a linear classifier on an encoder's features, as `moce probe`.

    Args:
        encoder, train, test, heads: as those of `knn`.
        val: images that choose the strength of the regularisation; without them a part of `train` does.
        settings: of `moce probe`, such as `method="closed_form"`.

    Returns, Raises: as `knn`.

    Example::

        score = moce_ds.probe("expert", "task/train", "task/test", method="closed_form")
        print(score.top1, score.mean_per_class)
        print(score.settings)
    """
    return _accuracy(encoder, train, val, test, settings_of(ProbeSettings, settings), heads)


def _accuracy(
    encoder: AnyPath,
    train: AnyPath,
    val: AnyPath | None,
    test: AnyPath,
    config: KnnSettings | ProbeSettings,
    heads: int | None,
) -> Score | MultiLabelScore:
    task = TaskPaths(as_path(train), None if val is None else as_path(val), as_path(test))
    with started() as runtime:
        return measure_encoder(as_path(encoder), task, config, runtime, heads)[0]


@python_call()
def evaluate(run: AnyPath, data: AnyPath, *, dense: AnyPath | None = None, **settings: Any) -> Reconstructions:
    """The reconstruction error of a run with experts on held-out images, as `moce evaluate`.

    Args:
        run: the run, or one of its checkpoints.
        data: held-out images: a shard set, or what `moce shards` reads.
        dense: the run of a dense MAE for comparison.
        settings: of `moce evaluate`, such as `batch_size=64`.

    Returns:
        Mean squared errors on hidden patches, normalised per patch: with all images on the `selected` route of these
        images, with each image on its `own`, and of the `dense` run (None without one); the `route`, and `n_images`.

    Raises:
        ConfigError: a setting is not allowed.
        ArtefactError: the run has no routes, `dense` is not a dense run, or one of them is damaged.
        DataError: there are no images in `data`, or one is damaged.

    Example::

        errors = moce_ds.evaluate("runs/moce", "task/test", dense="runs/mae")
        print(errors.selected / errors.dense)
        print(errors.route)
    """
    config, twin = settings_of(EncodeSettings, settings), None if dense is None else as_path(dense)
    checkpoint, clusters = run_clusters(as_path(run))
    with routed_images(checkpoint, clusters, as_path(data), config, device := lone_device()) as task:
        return evaluate_run(checkpoint, clusters, task, twin, config, device)
