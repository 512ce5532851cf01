"""The source of images that a path names."""

from pathlib import Path

from moce_ds.common.errors import DataError
from moce_ds.common.text import in_line
from moce_ds.data.sources.image_folder import FolderSource
from moce_ds.data.sources.path_list import PathList
from moce_ds.data.sources.source import Source
from moce_ds.data.sources.table_files import PARQUET, holds_parquet, is_saved_dataset, is_split
from moce_ds.data.sources.tables import table_source
from moce_ds.data.sources.tar_files import TarSource, holds_tars


def source_at(path: Path) -> Source:
    """The source at `path`.

    It is a folder of images, tar files or Parquet files; a data set that the `datasets` library saved; a tar file, a
    Parquet file, or the path of a split without the number of a file; or a list of paths (`.txt`).

    Raises:
        DataError: it is a file of another kind, or holds several splits.
        ConfigError: a library is needed and not installed.
    """
    path = path.absolute()
    if path.is_dir():
        if holds_tars(path):
            return TarSource(path)
        return table_source(path) if is_saved_dataset(path) or holds_parquet(path) else FolderSource(path)
    if path.suffix == PARQUET or is_split(path):
        return table_source(path)
    if path.suffix == ".tar":
        return TarSource(path)
    if path.suffix == ".txt":
        return PathList(path)
    if path.is_file():
        raise DataError(
            f"{in_line(path)} is a file: expected a folder, a .tar or .parquet file, or a list of paths named .txt."
        )
    return FolderSource(path)  # which says that it is missing
