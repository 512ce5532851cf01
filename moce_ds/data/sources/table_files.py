"""The files of a table of images: Parquet files, or the Arrow files of a data set that `datasets` saved on disk.

The rows of a source are those of its files, one file after the other.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moce_ds.common.errors import DataError
from moce_ds.common.storage.files import reads_from
from moce_ds.common.text import in_line
from moce_ds.data.image_file import suffixes
from moce_ds.data.sources.image_folder import leads_out, unwanted, walk

PARQUET = ".parquet"

_SPLITS, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
"""Files of `save_to_disk`: the names of splits; of each split the names of its files, and the types of its columns."""
_WRITE_AGAIN = "write it again with datasets' save_to_disk."

_SPLIT_NAMES = {
    *("train", "training"),
    *("validation", "valid", "val", "dev"),
    *("test", "testing", "eval", "evaluation"),
}
"""Names of files and folders that are splits, as the hub reads them."""
_NUMBERED = re.compile(r"(.+?)-\d{5}-of-\d{5}")


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` wrote: a data set, or one per split."""
    return (path / _SPLITS).is_file() or all((path / name).is_file() for name in (_STATE, _INFO))


def holds_parquet(folder: Path) -> bool:
    """Whether Parquet files, but no images and no tar files, are in a folder, at any depth."""
    others, found = tuple(suffixes() | {".tar"}), False
    for name in _names_below(folder):
        if name.lower().endswith(others):
            return False
        found = found or name.endswith(PARQUET)
    return found


def is_split(path: Path) -> bool:
    """Whether a path names a split: `data/train` that of `data/train-00000-of-00010.parquet`."""
    return path.parent.is_dir() and not path.exists() and bool(_files_of_split(path))


def folder_of(origin: Path) -> Path:
    """The folder that the names of the files are relative to."""
    return origin if origin.is_dir() else origin.parent


def table_files(origin: Path) -> list[str]:
    """The names of the files at `origin`, in the order of their rows.

    Args:
        origin: a Parquet file, a folder of them, a split (`is_split`), or a saved data set.

    Raises:
        DataError: the folder or the record of its files cannot be read, or a data set has an indices mapping.
    """
    if is_saved_dataset(origin):
        return _files_of_saved(origin)
    if origin.is_dir():
        return [entry.path for entry in walk(origin) if entry.path.endswith(PARQUET) and not unwanted(entry.path)]
    return [origin.name] if origin.suffix == PARQUET else _files_of_split(origin)


def description_files(origin: Path) -> list[str]:
    """The names of the files beside the rows that describe a saved data set; none of other tables."""
    return [_STATE, _INFO] if is_saved_dataset(origin) else []


def saved_features(origin: Path) -> dict[str, Any] | None:
    """The types of the columns of a saved data set by their names; None for other tables. Raises DataError."""
    if not is_saved_dataset(origin):
        return None
    features = _read_json(origin / _INFO).get("features")
    return features if isinstance(features, dict) else None


def refuse_several_splits(origin: Path) -> None:
    """Raise DataError if the files are those of several splits, which would become one set."""
    if (origin / _SPLITS).is_file():
        names = _read_json(origin / _SPLITS).get("splits")
        if not isinstance(names, list) or not names:
            raise DataError(f"{origin / _SPLITS} is damaged: expected the names of the splits; {_WRITE_AGAIN}")
        splits = [str(name) for name in names]
    elif origin.is_dir() and not is_saved_dataset(origin):
        by_name: dict[str, str] = {}
        for file in table_files(origin):
            name, path = _split_of(file)
            by_name.setdefault(name, path)
        splits = list(by_name.values()) if len(by_name) > 1 else []
    else:
        return
    if splits:
        names_given = in_line(", ".join(splits))
        raise DataError(
            f"{in_line(origin)} holds several splits: name one of them, {names_given}, such as "
            f"{in_line(origin / splits[0])}."
        )


def _names_below(folder: Path) -> Iterator[str]:
    """The names of the files at any depth, of each folder once; folders that cannot be listed are left out."""
    seen = {os.path.realpath(folder)}
    for above, folders, files in os.walk(folder, followlinks=True):
        yield from (name for name in files if not unwanted(name))
        below = {name: os.path.realpath(f"{above}/{name}") for name in folders if not unwanted(name)}
        folders[:] = [name for name, real in below.items() if real not in seen]
        seen.update(below.values())


def _split_of(file: str) -> tuple[str, str]:
    """The split of a Parquet file: what tells it from others, and a path that names it.

    On the hub they are called `data/train-00000-of-00010.parquet`, `train/0000.parquet`, `train.parquet` or
    `train_0.parquet`. Numbered files of the same name in several folders are one split, unless the name is one of
    `_SPLIT_NAMES`.
    """
    *folders, name = file.removesuffix(PARQUET).split("/")
    numbered, word = _NUMBERED.match(name), re.split("[-_.]", name)[0]
    parts = [*folders, numbered[1] if numbered else word if word in _SPLIT_NAMES else name]
    for depth, part in enumerate(parts, 1):
        if part in _SPLIT_NAMES:
            return "/".join(parts[:depth]), "/".join(parts[:depth])
    return (parts[-1], "/".join(parts)) if numbered else ("", file)


def _files_of_split(path: Path) -> list[str]:
    with os.scandir(path.parent) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith(PARQUET) and not unwanted(entry.name))
    return [name for name in names if _split_of(name)[1] == path.name]


def _files_of_saved(origin: Path) -> list[str]:
    state = _read_json(origin / _STATE)
    if any(value for key, value in state.items() if key.startswith("_indices")):
        raise DataError(
            f"{in_line(origin)} was saved with an indices mapping, which orders or selects its rows: write it again "
            "with `flatten_indices()` before save_to_disk."
        )
    files = state.get("_data_files")
    listed = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    names = [name for name in listed if isinstance(name, str) and not leads_out(name)]
    if not names or names != listed:
        raise DataError(f"{in_line(origin / _STATE)} is damaged: expected the names of the Arrow files; {_WRITE_AGAIN}")
    return names


def _read_json(path: Path) -> dict[str, Any]:
    with reads_from(path, _WRITE_AGAIN, DataError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
        return content
