"""`moce dataset`: a public data set, as it is distributed, becomes three labelled shard sets."""

from collections.abc import Callable
from pathlib import Path

from moce_ds.config.settings import option, settings
from moce_ds.data.shard_writer import ShardReport, ShardSettings, write_shards
from moce_ds.data.sources.listing import Listing
from moce_ds.data.sources.public import mat_files, text_lists, unlisted
from moce_ds.data.sources.public.found import Found, checked
from moce_ds.errors import ConfigError, DataError
from moce_ds.storage.drafts import scratch_folder

READERS: dict[str, Callable[[Path, int], Found]] = {
    "aircraft": text_lists.aircraft,
    "caltech101": unlisted.caltech101,
    "cars": mat_files.cars,
    "dtd": text_lists.dtd,
    "flowers102": mat_files.flowers102,
    "food101": text_lists.food101,
    "pets": text_lists.pets,
    "sun397": text_lists.sun397,
    "voc2007": text_lists.voc2007,
}
"""By name: source folder and seed -> images by split."""

PACKED: dict[str, Callable[[Path, int, Path], Found]] = {"cifar10": unlisted.cifar10, "cifar100": unlisted.cifar100}
"""The same for those whose images are no files; they are unpacked into the third argument."""

NAMES = sorted([*READERS, *PACKED])


@settings
class DatasetSettings(ShardSettings):
    """How a public data set is written as shard sets."""

    seed: int = option(0, "of splits that the data set does not ship: validation, Caltech101")


def write_dataset(name: str, source: Path, out: Path, config: DatasetSettings) -> dict[str, ShardReport]:
    """Write `out/train`, `out/val` and `out/test`; returns a report of each. Interrupted, it goes on.

    Raises:
        ConfigError: no reader has this name.
        DataError: a file of the data set is missing or damaged, or the splits do not go together; see `write_shards`.
            Splits that are complete stay, and are named.
    """
    if name not in NAMES:
        raise ConfigError(f"No data set {name!r} is known; known: {', '.join(NAMES)}. For your own: moce shards.")
    if not source.is_dir():
        raise DataError(f"{source} is not a folder: expected the data set {name}, unpacked.")
    with scratch_folder() as scratch:
        if name in PACKED:
            found = checked(PACKED[name](source, config.seed, scratch))
        else:
            found = checked(READERS[name](source, config.seed))
        listings = {
            split: Listing(images, found.classes, found.multi_label, source.absolute(), config.seed)
            for split, images in found.splits.items()
        }
        for listing in listings.values():
            listing.files(found.root)  # before anything is written, since a later split may lack one
        return _write_splits(found.root, out, config, listings)


def _write_splits(
    root: Path, out: Path, config: DatasetSettings, listings: dict[str, Listing]
) -> dict[str, ShardReport]:
    """One split after the other; those that are complete stay where a later one fails, since they are right."""
    reports: dict[str, ShardReport] = {}
    for split, listing in listings.items():
        try:
            reports[split] = write_shards(root, out / split, config, listing)
        except DataError as error:
            done = ", ".join(str(report.path) for report in reports.values())
            goes_on = f"\nComplete: {done}. Mended, the same command goes on from there." if done else ""
            raise DataError(f"{error}{goes_on}") from None
    return reports
