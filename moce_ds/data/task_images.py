"""Images of a task: a shard set, or another source of images, which becomes a temporary shard set. Axes: N images."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moce_ds.common.errors import DataError
from moce_ds.common.host.program import warn
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.common.text import in_line, listed, part_of, printable
from moce_ds.data.sample_table import SAMPLES
from moce_ds.data.shard_manifest import MANIFEST, Manifest
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import PROGRESS, REJECTED, ShardSet
from moce_ds.data.sources.any_source import source_at
from moce_ds.data.sources.table_files import is_split

_SKIPPED_SHOWN = 3


@contextmanager
def opened_images(path: Path, warn: Callable[[str], None] = warn) -> Iterator[ShardSet]:
    """Open a shard set; another source (`any_source`) becomes a temporary one.

    Args:
        path: the source; messages name it, even if a temporary set is read.
        warn: logs which files were skipped because they are not complete images.

    Raises:
        DataError: `path` is none of these, or holds several splits or no images.
        ConfigError: a library is needed and not installed.
    """
    with _shards_of(path) as images:
        if notice := _skipped_notice(images.path, path):
            warn(notice)
        yield images


@contextmanager
def _shards_of(path: Path) -> Iterator[ShardSet]:
    if (path / MANIFEST).exists() or (path / PROGRESS).is_dir():
        yield ShardSet.open(path)
        return
    if not path.exists() and not is_split(path):
        raise DataError(f"{path} not found: expected a shard set (`moce shards`) or a folder of images.")
    if (path / SAMPLES).exists():
        raise DataError(
            f"{path} is a shard set without its {MANIFEST}: restore it from a copy, or write the set again with "
            "`moce shards`."
        )
    source = source_at(path)
    with scratch_folder() as scratch:
        write_shards(source, scratch / "shards", ShardSettings())
        yield ShardSet.open(scratch / "shards", named=path)


def _skipped_notice(folder: Path, named: Path) -> str | None:
    """A message about the files that the shard set in `folder` skipped; None if there are none.

    Args:
        folder: the shard set.
        named: its name in the message.

    Raises:
        ArtefactError, DataError: the set's manifest is missing or damaged.
    """
    manifest = Manifest.read(folder)
    count = sum(manifest.rejected.values())
    if not count:
        return None
    reasons = ", ".join(f"{number} {reason}" for reason, number in manifest.rejected.items())
    return printable(
        f"{in_line(named)}: {part_of(count, count + manifest.count, 'file', ('was', 'were'))} skipped, "
        f"since {'it is not a complete image' if count == 1 else 'they are not complete images'}: {reasons}"
        f"{listed(_examples(folder / REJECTED), count)}"
    )


def _examples(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()[:_SKIPPED_SHOWN]
        return [in_line("{path}: {reason} ({detail})".format(**json.loads(line))) for line in lines]
    except (OSError, ValueError, LookupError, TypeError):
        return []  # a copy of the set without its list of names; the manifest still has the counts


@dataclass(frozen=True)
class Splits:
    """Labelled images of a task; if `val` is None, a part of the training images takes its place."""

    train: ShardSet
    val: ShardSet | None
    test: ShardSet


@contextmanager
def opened_task(train: Path, val: Path | None, test: Path) -> Iterator[Splits]:
    """The splits of a task, each a shard set or another source of images. Raises DataError as `opened_images`."""
    with ExitStack() as opened:
        of_train, of_test = (opened.enter_context(opened_images(path)) for path in (train, test))
        yield Splits(of_train, opened.enter_context(opened_images(val)) if val else None, of_test)


def labels_of(images: ShardSet, training: ShardSet) -> NDArray[np.integer]:
    """Labels [N], or targets [N, K] of images with several, as positions in the classes of the training split.

    Raises:
        DataError: an image has no class, or the classes are not those of the training split.
    """
    if (images.targets is None) != (training.targets is None):
        one, several = (images, training) if images.targets is None else (training, images)
        raise DataError(
            f"{one.named} has one label per image, {several.named} has several: expected the same kind in all "
            "splits of a task."
        )
    if images.targets is None and (images.labels < 0).any():
        lost = images.source(int((images.labels < 0).argmax()))
        raise DataError(
            f"{images.named}: {in_line(lost)} has no class; expected every image in the folder of its class, "
            "or a column `label` in a saved data set."
        )
    if unknown := sorted(set(images.classes) - set(training.classes)):
        raise DataError(
            f"{images.named}: classes {unknown[:5]} are not among the training classes of {training.named}: expected "
            "folders of the same names in all splits."
        )
    position = {name: k for k, name in enumerate(training.classes)}
    place_K = np.array([position[name] for name in images.classes], dtype=np.int64)
    if images.targets is None:
        return place_K[images.labels]
    targets_NK = np.zeros((images.count, len(training.classes)), np.int8)
    targets_NK[:, place_K] = images.targets
    return targets_NK
