"""The verbs about data: shards and dataset write images, features and cluster group them."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from moce_ds.cli.next_step import beside, conclude
from moce_ds.cli.options import PATH, Verb, heads_option, words
from moce_ds.common.config.command_line import read_settings
from moce_ds.common.config.settings import word
from moce_ds.common.host.program import say, show
from moce_ds.common.host.rank import ProcessRank
from moce_ds.common.text import counted


@click.command(cls=Verb, settings="moce_ds.data.shard_writer:ShardSettings")
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@words()
def shards(source: Path, out: Path, words: Sequence[str]) -> None:
    """Turn the images of SOURCE into tar shards OUT.

    SOURCE is one of these:

    \b
    - a folder of images: the folder of an image is its class
    - a tar file such as those of webdataset, or a folder of them: the
      member .cls of an image is its class
    - a Parquet file with a column of image bytes, a folder of them (of one
      split: data/train names data/train-00000-of-00010.parquet and so on),
      or a data set that save_to_disk of the datasets library wrote: the
      column label is the class
    - a list of paths, list.txt, with a class after a tab

    Rerun the same command to resume. Files and rows that are not complete images are listed in OUT/rejected.jsonl.
    Several processes share the work (`moce launch`), each with its own workers.
    """
    from moce_ds.data.shard_writer import ShardSettings, share_shards, write_shards
    from moce_ds.data.sources.any_source import source_at

    images = source_at(source)
    config, here = read_settings(ShardSettings, words), ProcessRank.here()
    if here.rank:
        share_shards(images, out, config, here)
        return
    report = write_shards(images, out, config, here=here)
    rejected = ", ".join(f"{count} {reason}" for reason, count in report.rejected.items()) or "none"
    say(
        f"{out}: {counted(report.count, 'image')} of {counted(report.classes, 'class', 'classes')} in "
        f"{counted(report.shards, 'shard')}, "
        f"{report.bytes / 2**20:.1f} MiB{' (was complete)' if report.already_complete else ''}; rejected: {rejected}"
        + (f" (listed in {out / 'rejected.jsonl'})" if report.rejected else "")
    )
    _conclude_set(out)


def _conclude_set(out: Path) -> None:
    conclude(out, "pretrain", word("data.shards", out), word("run.out", beside(out, "mae")))


@click.command()
@click.argument("address")
@click.argument("out", type=PATH)
def attach(address: str, out: Path) -> None:
    """Use the shard set at ADDRESS, such as s3://bucket/set, as the folder OUT.

    OUT gets a copy of the tables. Images are read from ADDRESS when they are needed; data.cache keeps copies.
    """
    from moce_ds.data.attach import attach as attached

    shards = attached(address, out)
    say(f"{out}: {counted(shards.count, 'image')} in {counted(len(shards.shards), 'shard')} at {address}")
    _conclude_set(out)


@click.command(cls=Verb, settings="moce_ds.data.sources.public.datasets:DatasetSettings")
@click.argument("name")
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@words()
def dataset(name: str, source: Path, out: Path, words: Sequence[str]) -> None:
    """Turn the public data set NAME, unpacked in SOURCE, into shard sets in OUT.

    The shard sets are OUT/train, OUT/val and OUT/test. Names: aircraft, caltech101, cars, cifar10, cifar100, dtd,
    flowers102, food101, pets, sun397, voc2007.
    """
    from moce_ds.data.sources.public.datasets import DatasetSettings, write_dataset

    for report in write_dataset(name, source, out, read_settings(DatasetSettings, words)).values():
        rejected = ", ".join(f"{count} {reason}" for reason, count in report.rejected.items()) or "none"
        say(
            f"{report.path}: {counted(report.count, 'image')} of {counted(report.classes, 'class', 'classes')}"
            f"{' (was complete)' if report.already_complete else ''}; rejected: {rejected}"
        )
    conclude(out, "knn", "ENCODER", "--train", out / "train", "--test", out / "test")


@click.command(cls=Verb, settings="moce_ds.encoders.settings:FeatureSettings")
@click.argument("encoder", type=PATH)
@click.argument("shards", type=PATH)
@click.argument("out", type=PATH)
@heads_option()
@words()
def features(encoder: Path, shards: Path, out: Path, heads: int | None, words: Sequence[str]) -> None:
    """Write the features of ENCODER for the images of SHARDS to OUT.

    ENCODER is a dense run, an exported encoder, or a .pth file of the public MAE. Several processes share the work.
    Rerun the same command to resume.
    """
    from moce_ds.data.shards import ShardSet
    from moce_ds.distributed.runtime import started
    from moce_ds.encoders.features import write_features
    from moce_ds.encoders.open import open_encoder
    from moce_ds.encoders.settings import FeatureSettings

    config = read_settings(FeatureSettings, words)
    with started() as runtime:
        opened = open_encoder(encoder, runtime.device, heads)
        write_features(opened, ShardSet.open(shards), out, config, runtime)
        runtime.say(f"{out}: features of width {opened.shape.width}")
    conclude(out, "cluster", out, beside(out, "clusters"), "--shards", shards)


@click.command(cls=Verb, settings="moce_ds.clustering.settings:ClusterSettings")
@click.argument("features", type=PATH)
@click.argument("out", type=PATH)
@click.option("--shards", type=PATH, help="The shard set, for comparing the clusters with its labels.")
@words()
def cluster(features: Path, out: Path, shards: Path | None, words: Sequence[str]) -> None:
    """Cluster FEATURES into OUT: k-means, then balanced assignment (method=sinkhorn).

    Several processes share the work; the clusters do not depend on their number.
    """
    from moce_ds.clustering.build import ClusterSettings, measured_clusters, write_clusters
    from moce_ds.clustering.quality import report_table
    from moce_ds.data.shards import ShardSet
    from moce_ds.distributed.runtime import started

    config = read_settings(ClusterSettings, words)
    with started() as runtime:
        with runtime.raise_on_all_ranks():
            labelled = ShardSet.open(shards) if shards and runtime.is_main else None
        write_clusters(features, out, config, runtime)
        is_main = runtime.is_main
    if is_main:
        labels, classes = (labelled.labels, labelled.classes) if labelled else (None, [])
        _, report = measured_clusters(out, labels, classes)
        show(report_table(report, compared=shards is not None))
        _conclude_clusters(out)


def _conclude_clusters(out: Path) -> None:
    """The next command starts a run with experts from the dense run whose features were clustered."""
    from moce_ds.checkpoint.run_folder import CONFIG
    from moce_ds.common.storage.encoder_folder import read_provenance
    from moce_ds.data.kept_encoder import ENCODER

    checkpoint, known = read_provenance(out / ENCODER).get("checkpoint"), False
    run = Path(str(checkpoint)).parent.parent
    with suppress(OSError):  # it is no longer readable
        known = checkpoint is not None and (run / CONFIG).is_file()  # else it is not that of a run, or was moved
    settings = [word("experts.clusters", out), word("run.init_from", run if known else "ENCODER")]
    settings.append(word("run.out", beside(run if known else out, "moce")))
    conclude(out, "pretrain", run / CONFIG if known else "CONFIG.yaml", "model.arch=moce", *settings)


VERBS = (shards, attach, dataset, features, cluster)
