"""A look at images before they become shards: how many there are, how large, and some of them for measurements."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np

from moce_ds.cli.workflow.recipe import Images
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.program import progress_bar
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.common.text import in_line
from moce_ds.data.image_file import MAX_PIXELS, Accepted
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.any_source import source_at
from moce_ds.data.sources.source import Entry

_SAMPLE = 128  # images that are examined, at least; at most twice as many


@dataclass(frozen=True)
class ImageSample:
    """The images at a path.

    Attributes:
        images: their number and sizes.
        shards: the path, if it is a shard set.
        examined: those that were examined; empty for a shard set.
    """

    images: Images
    shards: Path | None
    examined: list[Accepted]

    @classmethod
    def of(cls, path: Path) -> "ImageSample":
        """Count the images of a shard set, or of anything that `moce shards` reads; examine some of them.

        Raises:
            DataError: nothing is there, or it cannot be read.
            ConfigError: it holds no image.
        """
        return cls._of_shards(path) if ShardSet.recognises(path) else cls._of_source(path)

    @classmethod
    def _of_shards(cls, path: Path) -> "ImageSample":
        shards = ShardSet.open(path)
        rows = shards.rows(np.linspace(0, shards.count - 1, min(shards.count, 2 * _SAMPLE), dtype=np.int64))
        side = int(np.median(np.minimum(rows["height"], rows["width"])))
        return cls(Images(shards.count, side, float(rows["size"].mean())), path, [])

    @classmethod
    def _of_source(cls, path: Path) -> "ImageSample":
        source = source_at(path)
        entries, count = _spread(progress_bar(source.entries(), "listing", unit="file", disable=None, delay=2))
        began = time.perf_counter()
        verdicts = list(source.examine(entries, MAX_PIXELS))
        seconds = time.perf_counter() - began
        accepted = [verdict for verdict in verdicts if isinstance(verdict, Accepted)]
        if not accepted:
            examined = f"of {count} files, {len(entries)} were examined, and none is an image" if count else "no files"
            raise ConfigError(f"--images: {in_line(path)}: {examined}; expected what `moce shards` reads.")
        images = Images(
            round(count * len(accepted) / len(entries)),
            int(median(min(image.height, image.width) for image in accepted)),
            fmean(len(image.data) for image in accepted),
            seconds / len(accepted),
        )
        return cls(images, None, accepted)

    @contextmanager
    def as_shards(self) -> Iterator[Path]:
        """A shard set of such images, to measure how fast they are read; a temporary one if they are no set yet."""
        if self.shards is not None:
            yield self.shards
            return
        with scratch_folder() as scratch:
            for number, image in enumerate(self.examined):
                (scratch / "images").mkdir(exist_ok=True)
                (scratch / "images" / f"{number:03d}").write_bytes(image.data)
            yield write_shards(scratch / "images", scratch / "shards", ShardSettings(workers=1)).path


def _spread(entries: Iterable[Entry]) -> tuple[list[Entry], int]:
    """Some of the entries, evenly spread, and the number of all; their number may exceed what memory holds."""
    kept: list[Entry] = []
    count, stride = 0, 1
    for entry in entries:
        if count % stride == 0:
            kept.append(entry)
        if len(kept) == 2 * _SAMPLE:
            kept, stride = kept[::2], 2 * stride
        count += 1
    return kept, count
