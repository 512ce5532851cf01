"""A data set of the `datasets` library, as `save_to_disk` leaves it: its images and their classes."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from moce_ds.command_line import say
from moce_ds.data.listing import Listed, Listing
from moce_ds.errors import ConfigError, DataError
from moce_ds.files import read_json, writes_to

_WRITTEN_BY = "datasets' save_to_disk"
_SPLITS = "dataset_dict.json"
_PREFERRED = ("image", "img", "label", "labels")
"""Names of the column that counts where there are several of a kind."""


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is one, or holds one for each split."""
    return (path / _SPLITS).is_file() or all((path / name).is_file() for name in ("state.json", "dataset_info.json"))


def unpack_images(path: Path, out: Path) -> Listing:
    """Write the images of a saved data set as files, undecoded, into the folder `out`; returns them with their classes.

    A file is named by its row. Rows without an image become empty files, which no shard takes.

    Raises:
        ConfigError: the library is not installed.
        DataError: `path` holds several splits, no column of images, or is damaged.
        ArtefactError: `out` cannot be written.
    """
    if (path / _SPLITS).is_file():
        splits = read_json(path / _SPLITS, "the splits of a data set", _WRITTEN_BY)["splits"]
        raise DataError(f"{path} holds the splits {', '.join(splits)}: name one of them, such as {path / splits[0]}.")
    library = _import_datasets()
    try:
        dataset = library.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}): write it again with {_WRITTEN_BY}.") from None
    image = _column(path, dataset, library.Image)
    if image is None:
        raise DataError(f"{path} has no column of images; its columns: {', '.join(dataset.column_names)}.")
    label = _column(path, dataset, library.ClassLabel)
    classes = dataset.features[label].names if label else []
    columns = dataset.select_columns([image, label] if label else [image])
    rows = columns.cast_column(image, library.Image(decode=False))
    listed = []
    with writes_to(out):
        out.mkdir()
        for number, row in enumerate(tqdm(rows, "unpacking", unit="img", delay=2)):
            name = f"{number:09d}"
            (out / name).write_bytes((row[image] or {}).get("bytes") or b"")
            listed.append(Listed(name, _classes(row[label] if label else None, classes)))
    return Listing(listed, list(classes), origin=path)


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"Reading what {_WRITTEN_BY} wrote needs the datasets library, which does not import here ({error}). "
            "Install the extra: pip install 'moce-ds[hf]'."
        ) from None
    return datasets


def _column(path: Path, dataset: Any, kind: type) -> str | None:
    """The column of a kind; of several the one of a usual name, or the first, which is said. None without any."""
    found = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(found) <= 1:
        return found[0] if found else None
    chosen = next((name for name in _PREFERRED if name in found), found[0])
    say(f"{path}: columns {', '.join(found)} are all {kind.__name__}: {chosen} is taken.", err=True)
    return chosen


def _classes(label: int | None, classes: Sequence[str]) -> tuple[str, ...]:
    return (classes[label],) if label is not None and label >= 0 else ()
