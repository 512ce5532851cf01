"""Quality of an encoder's frozen features for a task: k-NN or linear probe on its splits.

Axes: N images of a split, D features.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moce_ds.common.config.settings import to_tree
from moce_ds.common.host.program import warn
from moce_ds.data.shards import ShardSet
from moce_ds.data.task_images import Splits, labels_of, opened_task
from moce_ds.distributed.runtime import Runtime
from moce_ds.encoders.features import encode_all
from moce_ds.encoders.open import open_encoder
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.evaluation.knn import check_classes, knn_accuracy
from moce_ds.evaluation.metrics import Metric, MultiLabelScore, Score
from moce_ds.evaluation.probe import MAX_ITERATIONS, linear_probe
from moce_ds.evaluation.results_file import known_by
from moce_ds.evaluation.settings import KnnSettings, ProbeSettings, decisive
from moce_ds.models.vit import Encoder

_LONG = 2**35
"""Images x width x classes from which logistic regression takes more than an hour on two cores."""

_logger = logging.getLogger(__name__)

SETTINGS: dict[str, type[KnnSettings | ProbeSettings]] = {"knn": KnnSettings, "probe": ProbeSettings}
"""Settings class of each verb."""


@dataclass(frozen=True)
class TaskPaths:
    """The splits of a task, each a shard set or another source; without `val` a part of `train` takes its place."""

    train: Path
    val: Path | None
    test: Path


def measure_encoder(
    path: Path, task: TaskPaths, config: KnnSettings | ProbeSettings, runtime: Runtime, heads: int | None = None
) -> tuple[Score | MultiLabelScore, dict[str, str]]:
    """The score of what `open_encoder` opens, as `measure_frozen`, and what the score is known by in results.

    A collective. `heads` is that of `open_encoder`.

    Raises:
        ArtefactError: there is no encoder.
        DataError: the splits do not match, or no classifier can be evaluated on them.
    """
    with opened_task(task.train, task.val, task.test) as splits:
        encoder = open_encoder(path, runtime.device, heads)
        score = measure_frozen(encoder, splits, config, runtime)
        images = [part and part.fingerprint for part in (splits.train, splits.val, splits.test)]
    deciding = {key: value for key, value in decisive(config).items() if key not in to_tree(EncodeSettings())}
    return score, known_by(encoder, deciding, images)


def measure_frozen(
    encoder: Encoder,
    splits: Splits,
    config: KnnSettings | ProbeSettings,
    runtime: Runtime,
    choose_by: Metric | None = None,
) -> Score | MultiLabelScore:
    """The score of k-NN, or of a linear probe. Validation images vote too, or choose the strength of the probe.

    A collective: the processes share the encoding, and the training of `method=sgd`.

    Raises:
        DataError: the splits do not match, or no classifier can be evaluated on them.
    """
    check_labels(splits)
    train_ND, train_labels = encoded(encoder, splits.train, splits.train, config, runtime)
    validation = encoded(encoder, splits.val, splits.train, config, runtime) if splits.val else None
    test_ND, test_labels = encoded(encoder, splits.test, splits.train, config, runtime)
    if isinstance(config, ProbeSettings):
        _name_the_faster(config, train_ND, train_labels)
        score = linear_probe(train_ND, train_labels, test_ND, test_labels, config, validation, choose_by, runtime)
        if unfinished := score.settings.get("not_converged"):
            warn(
                f"probe: logistic regression did not converge after {MAX_ITERATIONS} iterations with "
                f"l2={', '.join(map(str, unfinished))}; l2={score.settings['l2']} was chosen. Features are nearly "
                "separable there: remove these strengths from l2, or set method=closed_form."
            )
        return score
    if validation is not None:
        train_ND, train_labels = torch.cat([train_ND, validation[0]]), torch.cat([train_labels, validation[1]])
    return knn_accuracy(train_ND, train_labels, test_ND, test_labels, config, runtime.device)


def _name_the_faster(config: ProbeSettings, train_ND: Tensor, train_labels: Tensor) -> None:
    """A notice where logistic regression takes hours."""
    classes = train_labels.shape[1] if train_labels.ndim == 2 else len(train_labels.unique())
    if config.method == "logistic" and train_ND.numel() * classes > _LONG:
        _logger.info(
            f"probe: logistic regression on {len(train_ND):,} images of {classes} classes may take hours; method=sgd "
            "fits the same classifiers in minibatches."
        )


def check_labels(splits: Splits) -> None:
    """Raise DataError if no classifier can be evaluated on the labels, before any image is encoded."""
    train = torch.from_numpy(labels_of(splits.train, splits.train))
    for name, images in (("test", splits.test), ("validation", splits.val)):
        if images is not None:
            labels = torch.from_numpy(labels_of(images, splits.train))
            if train.ndim == 1:
                check_classes(train, labels, name)


def encoded(
    encoder: Encoder, images: ShardSet, training: ShardSet, config: EncodeSettings, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Features [N, D] of a split, and its labels [N] or targets [N, K] by the classes of the training split.

    Raises:
        DataError: an image has no class, or the classes are not those of the training split.
    """
    labels = torch.from_numpy(labels_of(images, training))
    return encode_all(encoder, images, config, runtime), labels
