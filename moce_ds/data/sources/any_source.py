"""The source of images that a path names."""

from pathlib import Path

from moce_ds.common.errors import DataError
from moce_ds.common.text import in_line
from moce_ds.data.sources.image_folder import FolderSource
from moce_ds.data.sources.path_list import PathList
from moce_ds.data.sources.source import Source
from moce_ds.data.sources.tar_files import TarSource, holds_tars


def source_at(path: Path) -> Source:
    """The source at `path`: a folder of images or of tar files, a tar file, or a list of paths (`.txt`).

    Raises:
        DataError: it is a file of another kind.
    """
    path = path.absolute()
    if path.is_dir():
        return TarSource(path) if holds_tars(path) else FolderSource(path)
    if path.suffix == ".tar":
        return TarSource(path)
    if path.suffix == ".txt":
        return PathList(path)
    if path.is_file():
        raise DataError(f"{in_line(path)} is a file: expected a folder, a .tar file, or a list of paths named .txt.")
    return FolderSource(path)  # which says that it is missing
