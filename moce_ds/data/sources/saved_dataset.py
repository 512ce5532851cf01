"""A data set of the `datasets` library, saved with `save_to_disk`: its images and their classes."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from moce_ds.common.errors import ConfigError, DataError
from moce_ds.common.host.machine import machine_failed, refused
from moce_ds.common.host.program import progress_bar, warn
from moce_ds.common.storage.files import read_json, writes_to
from moce_ds.data.sources.listing import Listed, Listing

_WRITTEN_BY = "datasets' save_to_disk"
_SPLITS = "dataset_dict.json"
_IMAGES, _LABELS = ("image", "img"), ("label", "labels")
"""Preferred column names if several columns have the same type."""
_KINDS = ("string", "large_string", "bool")
"""Value types that can be classes, besides integers."""


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is such a data set, or has one per split."""
    return (path / _SPLITS).is_file() or all((path / name).is_file() for name in ("state.json", "dataset_info.json"))


def unpack_images(path: Path, out: Path) -> Listing:
    """Write the images of a saved data set as files, undecoded, into the folder `out`; returns them with their classes.

    The name of a file is its row. Rows without an image become empty files, which no shard takes.

    The classes come from a column of type ClassLabel, or from the integers or texts in a column named label or labels.
    A negative number, or a missing value, means no class.

    Raises:
        ConfigError: the library is not installed.
        DataError: `path` holds several splits, has no image column or an invalid class, or is damaged.
        ArtefactError: `out` cannot be written.
    """
    if (path / _SPLITS).is_file():
        raise DataError(f"{path} holds several splits: {_splits(path)}.")
    library = _import_datasets()
    try:
        dataset = library.load_from_disk(str(path))
        image, label = _image_column(path, dataset, library), _label_column(path, dataset, library)
        rows = dataset.select_columns([image, label] if label else [image])
        rows = rows.cast_column(image, library.Image(decode=False))
        values: list[Any] = []
        with writes_to(out):
            out.mkdir()
        for number, row in enumerate(progress_bar(rows, "unpacking", unit="img", delay=2)):
            data = (row[image] or {}).get("bytes") or b""
            with writes_to(out):
                (out / _name(number)).write_bytes(data)
            values.append(row[label] if label else None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and machine_failed(error):
            raise refused(DataError, f"{path} cannot be read", error, path) from None
        raise DataError(f"{path} cannot be read ({error}): write it again with {_WRITTEN_BY}.") from None
    classes = _class_names(path, dataset.features[label], values) if label else {}
    listed = [
        Listed(_name(number), (classes[value],) if value in classes else ()) for number, value in enumerate(values)
    ]
    return Listing(listed, list(classes.values()), origin=path)


def _name(row: int) -> str:
    return f"{row:09d}"


def _splits(path: Path) -> str:
    content = read_json(path / _SPLITS, "the splits of a data set", _WRITTEN_BY)
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, list) or not splits:
        return f"expected their names in {_SPLITS}"
    return f"name one of them, {', '.join(map(str, splits))}, such as {path / str(splits[0])}"


def _class_names(path: Path, feature: Any, values: Sequence[Any]) -> dict[Any, str]:
    """The class name of each valid value of the label column, in the order of the labels."""
    if not hasattr(feature, "names"):
        distinct = {value for value in values if value is not None and value != ""}
        return {value: str(value) for value in sorted(distinct) if isinstance(value, str) or value >= 0}
    names = dict(enumerate(feature.names))
    for number, value in enumerate(values):
        if value is not None and value >= 0 and value not in names:
            raise DataError(
                f"{path}: row {number} has the class {value} of {len(names)}. Write it again with {_WRITTEN_BY}."
            )
    return names


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"Reading what {_WRITTEN_BY} wrote needs the datasets library, which does not import here ({error}). "
            "Install the extra: pip install 'moce-ds[hf]'."
        ) from None
    return datasets


def _image_column(path: Path, dataset: Any, library: ModuleType) -> str:
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, library.Image)]
    if not columns:
        raise DataError(f"{path} has no column of images; its columns: {', '.join(dataset.column_names)}.")
    return _preferred(path, columns, "Image")


def _label_column(path: Path, dataset: Any, library: ModuleType) -> str | None:
    """The label column; None, with a warning, if no column can be one."""
    features = dataset.features
    if columns := [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]:
        return _preferred(path, columns, "ClassLabel")
    candidates = [name for name in _LABELS if name in features]
    for name in candidates:
        kind = str(getattr(features[name], "dtype", ""))
        if isinstance(features[name], library.Value) and ("int" in kind or kind in _KINDS):
            return name
    types = "; ".join(f"{name} is {features[name]}" for name in candidates) or "there is no column label"
    warn(
        f"{path}: its images have no classes: no column has type ClassLabel, and no column label holds integers or "
        f"text ({types})."
    )
    return None


def _preferred(path: Path, columns: Sequence[str], kind: str) -> str:
    """The preferred column among several of one type, or the first of them, with a warning."""
    column = next((name for name in (*_IMAGES, *_LABELS) if name in columns), columns[0])
    if len(columns) > 1:
        warn(f"{path}: columns {', '.join(columns)} all have type {kind}; using {column}.")
    return column
