"""`moce dataset`: turns a public data set, as distributed, into three labelled shard sets."""

from collections.abc import Callable, Iterable
from pathlib import Path

from moce_ds.common.config.settings import option, settings
from moce_ds.common.errors import ConfigError, DataError
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.data.shard_writer import ShardReport, ShardSettings, write_shards
from moce_ds.data.sources.image_folder import leads_out
from moce_ds.data.sources.listing import Listed, Listing
from moce_ds.data.sources.public import readers
from moce_ds.data.sources.public.readers import DatasetSplits

READERS: dict[str, Callable[[Path, int], DatasetSplits]] = {
    "aircraft": readers.aircraft,
    "caltech101": readers.caltech101,
    "cars": readers.cars,
    "dtd": readers.dtd,
    "flowers102": readers.flowers102,
    "food101": readers.food101,
    "pets": readers.pets,
    "sun397": readers.sun397,
    "voc2007": readers.voc2007,
}
"""Readers by name: source folder and seed -> images by split."""

PACKED: dict[str, Callable[[Path, int, Path], DatasetSplits]] = {
    "cifar10": readers.cifar10,
    "cifar100": readers.cifar100,
}
"""Readers of data sets whose images are not files; they unpack into the third argument."""

NAMES = sorted([*READERS, *PACKED])


@settings
class DatasetSettings(ShardSettings):
    """Settings for writing a public data set as shard sets."""

    seed: int = option(0, "random seed of splits that the data set lacks: validation, Caltech101")


def write_dataset(name: str, source: Path, out: Path, config: DatasetSettings) -> dict[str, ShardReport]:
    """Write `out/train`, `out/val` and `out/test`; returns a report of each. Resumes after an interruption.

    Raises:
        ConfigError: no reader has this name.
        DataError: a file of the data set is missing or damaged, or the splits do not match; see `write_shards`.
            Complete splits are kept, and named.
    """
    if name not in NAMES:
        raise ConfigError(f"Unknown data set {name!r}; known: {', '.join(NAMES)}. For your own images use moce shards.")
    if not source.is_dir():
        raise DataError(f"{source} is not a folder: expected the data set {name}, unpacked.")
    with scratch_folder() as scratch:
        if name in PACKED:
            data = _checked(PACKED[name](source, config.seed, scratch))
        else:
            data = _checked(READERS[name](source, config.seed))
        listings = {
            split: Listing(images, data.classes, data.multi_label, source.absolute(), config.seed)
            for split, images in data.splits.items()
        }
        for listing in listings.values():
            listing.files(data.root)  # check all splits before writing, because a later one may be incomplete
        return _write_splits(data.root, out, config, listings)


def _checked(data: DatasetSplits) -> DatasetSplits:
    """The same splits, if they form a valid task.

    Raises:
        DataError: a split is empty, a path points outside of the data set, or no training image shows a class.
    """
    for split, images in data.splits.items():
        if not images:
            raise DataError(f"{data.root}: the {split} split lists no image; expected some. Unpack the data set again.")
        for image in images:
            if leads_out(image.path):
                raise DataError(
                    f"{data.root}: {image.path!r} is listed and points outside of it. Do not trust this data set."
                )
    training_classes = _names(data.splits["train"])
    for split, images in data.splits.items():
        if unknown := sorted(_names(images) - training_classes):
            raise DataError(
                f"{data.root}: the {split} split has classes {unknown[:5]} that no training image shows; "
                "expected the same classes in all splits. Unpack the data set again."
            )
    return data


def _names(images: Iterable[Listed]) -> set[str]:
    return {name for image in images for name in image.classes}


def _write_splits(
    root: Path, out: Path, config: DatasetSettings, listings: dict[str, Listing]
) -> dict[str, ShardReport]:
    """Write one split after the other; complete ones are kept if a later one fails."""
    reports: dict[str, ShardReport] = {}
    for split, listing in listings.items():
        try:
            reports[split] = write_shards(root, out / split, config, listing)
        except DataError as error:
            done = ", ".join(str(report.path) for report in reports.values())
            complete = f"\nComplete: {done}. Fix the fault and rerun the same command to resume." if done else ""
            raise DataError(f"{error}{complete}") from None
    return reports
