"""The splits of a public data set, and functions that its readers share.

Nothing is executed: the readers read text, JSON, MATLAB's .mat and raw bytes, never Python pickles.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moce_ds.data.sources.listing import Listed
from moce_ds.data.sources.walk import leads_out
from moce_ds.errors import DataError
from moce_ds.storage.files import reads_from

UNPACK_AGAIN = "unpack the data set again."

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class DatasetSplits:
    """The images of a data set by split (`SPLITS`), with paths below `root`.

    `multi_label`: an image may show several classes, or none.
    """

    root: Path
    splits: dict[str, list[Listed]]
    multi_label: bool = False

    @property
    def classes(self) -> list[str]:
        """All class names, sorted."""
        images = [image for images in self.splits.values() for image in images]
        return sorted({name for image in images for name in image.classes + image.unsure})


def first_existing(source: Path, *names: str) -> Path:
    """The first of the names that exists below `source`. Raises DataError if none does."""
    for name in names:
        if (source / name).exists():
            return source / name
    raise DataError(
        f"{source} holds no {' and no '.join(names)}: expected the unpacked data set as distributed. "
        "docs/transfer.md lists the files of each one."
    )


def read_lines(path: Path, fields: int = 1) -> list[list[str]]:
    """The non-empty lines of a text file, split at spaces into `fields` (the last one may contain spaces).

    Raises:
        DataError: the file cannot be read, or a line has too few fields.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        row = line.strip().split(maxsplit=fields - 1) if fields > 1 else [line.strip()]
        if len(row) < fields:
            raise DataError(f"{path}, line {number}: got {line[:80]!r}; expected {fields} words. Unpack it again.")
        rows.append(row)
    return rows


def read_text(path: Path) -> str:
    """A text file in UTF-8. Raises DataError."""
    with reads_from(path, UNPACK_AGAIN, DataError):
        return path.read_text(encoding="utf-8")


def for_validation(images: Sequence[Listed], seed: int, share: float) -> tuple[list[Listed], list[Listed]]:
    """Training and validation images: a random `share` of each class, at least one image and never all."""
    return draw(images, seed, lambda count: min(max(1, round(share * count)), count - 1))


def draw(images: Sequence[Listed], seed: int, number: Callable[[int], int]) -> tuple[list[Listed], list[Listed]]:
    """The remaining and the drawn images: of each class, `number(count)` images are drawn at random.

    Depends on the seed and on the paths, not on the order of `images`.
    """
    of_class = defaultdict(list)
    for image in sorted(images):
        of_class[image.classes].append(image)
    rest, drawn = [], []
    random = np.random.default_rng(seed)
    for _, members in sorted(of_class.items()):
        order = random.permutation(len(members))
        taken = number(len(members))
        drawn += [members[i] for i in order[:taken]]
        rest += [members[i] for i in order[taken:]]
    return sorted(rest), sorted(drawn)


def checked(data: DatasetSplits) -> DatasetSplits:
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
