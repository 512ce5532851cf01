"""The stages of pre-training: images -> shards -> features -> clusters -> run. Each is one call and one verb of `moce`.

Every call writes a folder. The same call again continues an interrupted one, and keeps what is complete.
"""

from typing import Any

from moce_ds.api.clusters import Clusters
from moce_ds.api.given import AnyPath, Configuration, as_path, settings_of
from moce_ds.api.run import Run, open_run
from moce_ds.clustering.build import write_clusters
from moce_ds.clustering.settings import ClusterSettings
from moce_ds.common.host.program import python_call
from moce_ds.data.feature_store import FeatureSet
from moce_ds.data.shard_writer import ShardReport, ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.any_source import source_at
from moce_ds.distributed.runtime import started
from moce_ds.encoders.features import write_features
from moce_ds.encoders.open import open_encoder
from moce_ds.encoders.settings import FeatureSettings
from moce_ds.forecast.preflight import started_run
from moce_ds.forecast.step_cost import Work
from moce_ds.training.settings import PretrainSettings


@python_call()
def shards(source: AnyPath, out: AnyPath, **settings: Any) -> ShardReport:
    """Write images as a shard set, as `moce shards`.

    Args:
        source: a folder of images, tar files, Parquet files, a saved data set, or a list of paths.
        out: the folder to write, outside of `source`.
        settings: of `moce shards`, such as `workers=2`.

    Returns:
        The numbers of images (`count`), `shards` and `classes`, and of `rejected` files by reason.

    Raises:
        ConfigError: a setting is not allowed, or a package is missing.
        DataError: no image can be decoded, or `out` holds something else.
        ArtefactError: `out` cannot be written.

    Example::

        written = moce_ds.shards("images", "shards", workers=1)
        print(written.count, written.classes)
        print(written.rejected)
    """
    return write_shards(source_at(as_path(source)), as_path(out), settings_of(ShardSettings, settings))


@python_call()
def features(
    encoder: AnyPath, shards: AnyPath, out: AnyPath, *, heads: int | None = None, **settings: Any
) -> FeatureSet:
    """Write the features of a shard set, as `moce features`.

    Args:
        encoder: the run of a dense MAE, an exported encoder, or a .pth file of the public MAE.
        shards: the shard set.
        out: the folder to write.
        heads: attention heads, for a .pth file of unusual size.
        settings: of `moce features`, such as `batch_size=64`.

    Returns:
        The features: `count` N, `dim` D, and `all()`, float32 [N, D], in the order of the image ids.

    Raises:
        ConfigError: a setting is not allowed.
        ArtefactError: there is no encoder, or `out` holds features of other images or of another encoder.
        DataError: the shard set is missing, or an image is damaged.

    Example::

        found = moce_ds.features("runs/mae", "shards", "features")
        features_ND = found.all()
        print(found.count, found.dim)
    """
    config, folder = settings_of(FeatureSettings, settings), as_path(out)
    with started() as runtime:
        opened = open_encoder(as_path(encoder), runtime.device, heads)
        write_features(opened, ShardSet.open(as_path(shards)), folder, config, runtime)
    return FeatureSet.open(folder)


@python_call()
def cluster(features: AnyPath, out: AnyPath, **settings: Any) -> Clusters:
    """Cluster features, as `moce cluster`.

    Args:
        features: the folder that `features` wrote.
        out: the folder to write.
        settings: of `moce cluster`, such as `num_clusters=64`.

    Returns:
        The clusters, which label other images, and whose `quality` is what `moce cluster` prints.

    Raises:
        ConfigError: a setting is not allowed, there are more clusters than images, or a package is missing.
        DataError: the features are all alike.
        ArtefactError: the features are unfinished or damaged, or `out` holds something else.

    Example::

        clusters = moce_ds.cluster("features", "clusters", num_clusters=8)
        print(clusters.quality("shards").classes)  # agreement with the classes, if there are any
        labels_N = clusters.assign(["a.jpg", "b.jpg"])
    """
    config, folder = settings_of(ClusterSettings, settings), as_path(out)
    with started() as runtime:
        write_clusters(as_path(features), folder, config, runtime)
    return Clusters.load(folder)


@python_call()
def pretrain(config: Configuration | None = None, /, **overrides: Any) -> Run:
    """Pre-train a masked autoencoder, dense or with experts, in this process, as `moce pretrain`.

    An interrupt (Ctrl-C, or the stop button of a notebook) writes a checkpoint and returns; the same call resumes. Runs
    of several processes are started with `moce launch`.

    Args:
        config: a YAML file, a mapping of settings, or a `PretrainSettings`.
        overrides: settings that win: groups (`optim={"epochs": 3}`) or dotted keys (`**{"optim.epochs": 3}`).

    Returns:
        The opened run; `complete` tells whether it has taken all steps.

    Raises:
        ConfigError: a setting is not allowed (all faults are listed), differs from that of the run in the folder, or
            the run does not fit into the memory of this machine.
        ArtefactError: the clusters, the initial weights or the run's checkpoints are missing or damaged.
        DataError: the shard set is missing, unfinished or damaged.
        DivergedError: the losses are no longer finite.

    Example::

        run = moce_ds.pretrain("mae.yaml", data={"shards": "shards"}, **{"run.out": "runs/mae"})
        print(run.step, run.complete)
        run.metrics().loss.plot()
    """
    settings = settings_of(PretrainSettings, overrides, config)
    from moce_ds.training.pretrain import pretrain as run  # loads DeepSpeed

    with started_run(Work.of(settings), settings.run.peer_timeout) as runtime:
        run(settings, runtime)
    return open_run(settings.run.out)
