"""Images of a task: a shard set, or another source of images, which becomes a temporary shard set. Axes: N images."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moce_ds.common.config.settings import to_tree
from moce_ds.common.errors import ArtefactError, DataError
from moce_ds.common.host.program import warn
from moce_ds.common.storage.cache import Cache, entry_name
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.common.text import in_line, listed, part_of, printable
from moce_ds.data.image_content import of_shards, set_content, source_bytes, source_content
from moce_ds.data.sample_table import SAMPLES
from moce_ds.data.shard_manifest import MANIFEST, Manifest
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import PROGRESS, REJECTED, ShardSet
from moce_ds.data.sources.any_source import source_at
from moce_ds.data.sources.source import Source
from moce_ds.data.sources.table_files import is_split

_SKIPPED_SHOWN = 3
_SET = "shards"  # in the folder of a temporary set

_logger = logging.getLogger(__name__)


@contextmanager
def opened_images(path: Path, warn: Callable[[str], None] = warn) -> Iterator[ShardSet]:
    """Open a shard set; another source (`any_source`) becomes a temporary one, or is in the cache (`Cache.here`).

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
        images, cache = ShardSet.open(path), Cache.here()
        if cache and cache.fits(sum(shard.bytes for shard in images.shards)):  # else reading it twice would cost more
            images = replace(images, content=set_content(images))
        yield images
        return
    if not path.exists() and not is_split(path):
        raise DataError(f"{path} not found: expected a shard set (`moce shards`) or a folder of images.")
    if (path / SAMPLES).exists():
        raise DataError(
            f"{path} is a shard set without its {MANIFEST}: restore it from a copy, or write the set again with "
            "`moce shards`."
        )
    source, cache = source_at(path), Cache.here()
    with ExitStack() as stack:
        yield (cache and _kept_set(source, path, cache, stack)) or _temporary_set(source, path, stack)


def _temporary_set(source: Source, named: Path, stack: ExitStack) -> ShardSet:
    folder = stack.enter_context(scratch_folder()) / _SET
    write_shards(source, folder, ShardSettings())
    return ShardSet.open(folder, named=named)


def _kept_set(source: Source, named: Path, cache: Cache, stack: ExitStack) -> ShardSet | None:
    """The images of a source as an entry of the cache, which is made if it is missing; None if it cannot be kept.

    The set lies in a folder of this process, so the entry may be removed while it is used.

    Raises:
        DataError: as `write_shards`.
    """
    own = stack.enter_context(cache.own_folder()) if cache.fits(source_bytes(source)) else None
    if own is None:
        return None
    content, folder = source_content(source), own / _SET
    name = entry_name("images", content, to_tree(ShardSettings()))
    try:
        with cache.alone(name):
            if cache.take(name, folder):
                _logger.info(f"{in_line(named)}: decoded images from the cache {cache.folder}")
            else:
                write_shards(source, folder, ShardSettings())
                if source_content(source) == content:  # no file was changed while it was read
                    cache.keep(name, folder)
    except ArtefactError as error:
        warn(f"{error} No cache is used.")
        return None
    images = ShardSet.open(folder, named=named)
    return replace(images, content=of_shards([shard.sha256 for shard in images.shards]))


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


def task_of(data: Path) -> str:
    """The name of the task of a folder: digits for both `digits/train` and `digits`."""
    return data.absolute().parent.name if data.name in ("train", "val", "test") else data.name


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
