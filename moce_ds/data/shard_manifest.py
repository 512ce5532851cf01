"""`shards.json`, the manifest of a shard set, and the names of its files (docs/data-format.md)."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from moce_ds.common.errors import DataError
from moce_ds.common.storage.checksums import Files, check_document
from moce_ds.common.storage.files import read_json, record_in

FORMAT_VERSION = 1
MANIFEST = "shards.json"

_WRITTEN = ("a shard set", "moce shards")
_SHARD_NAME = re.compile(r"shard-[0-9]{6}\.tar")


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A tar file as written.

    Attributes:
        name: its file name.
        bytes: its size.
        sha256: hex SHA-256 of its content.
        count: number of images.
        rows_crc32: CRC-32 of its rows in `samples.npy`; None if an earlier version wrote the set.
    """

    name: str
    bytes: int
    sha256: str
    count: int
    rows_crc32: int | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`shards.json`; see docs/data-format.md."""

    version: int
    count: int
    fingerprint: str
    rejected: dict[str, int]
    classes: list[str]
    shards: list[ShardFile]
    source: str
    made_from: dict[str, Any]
    multi_label: bool = False
    files: Files | None = None

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read the manifest of the set in folder `path`.

        Raises:
            ArtefactError: there is no shard set, or it is damaged or of another version.
            DataError: a name in it points outside of the folder.
        """
        path = path / MANIFEST
        content = read_json(path, *_WRITTEN)
        manifest = record_in(content, path, cls, *_WRITTEN, version=FORMAT_VERSION)
        for shard in manifest.shards:  # never open a file outside the folder, whatever the manifest says
            if not _SHARD_NAME.fullmatch(shard.name):
                raise DataError(f"{path} names {shard.name!r}: expected shard-NNNNNN.tar. Do not trust this set.")
        check_document(path, content, *_WRITTEN)
        return manifest


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def index_name(shard: str) -> str:
    """File name of a shard's DALI index."""
    return f"{shard.removesuffix('.tar')}.idx"


def restore_from_copy(folder: Path) -> str:
    """What to do about a damaged set."""
    return f"Restore it from a copy, or delete {folder} and write it again with `moce shards`."
