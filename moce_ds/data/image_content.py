"""What images are, by the bytes of their files: names, sizes and dates are no content.

Results that are kept (`common/storage/cache.py`) are found by these digests. Every file is read once.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from moce_ds.common.errors import DataError
from moce_ds.common.host.machine import machine_failed, refused
from moce_ds.common.host.program import progress_bar
from moce_ds.common.text import in_line, shortened
from moce_ds.data.image_file import file_digest
from moce_ds.data.shard_storage import FolderStorage
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.source import Source

_READERS = 16


def source_content(source: Source) -> str:
    """SHA-256 over the files of a source in their order, with their names and listed classes.

    Raises:
        DataError: the source cannot be listed, or the machine cannot read a file.
    """
    files = list(source.files())
    digests = _digests([path for _, path in files], source.origin)
    parts = [type(source).__name__, *zip((name for name, _ in files), digests, strict=True)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def source_bytes(source: Source) -> int:
    """Bytes of the files of a source. Raises DataError: the source cannot be listed."""
    size = 0
    for _, path in source.files():
        with suppress(OSError, ValueError):  # it holds no image
            size += path.stat().st_size
    return size


def set_content(images: ShardSet) -> str | None:
    """SHA-256 over the shards of a set in their order, as they are on the disk now; None for a set at an address.

    Raises:
        DataError: the machine cannot read a shard.
    """
    if not isinstance(images.storage, FolderStorage):
        return None
    return of_shards(_digests([Path(images.storage.where(one.name)) for one in images.shards], images.named))


def of_shards(digests: Sequence[str]) -> str:
    """As `set_content`, from the SHA-256 of each shard."""
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _digests(paths: Sequence[Path], named: Path) -> list[str]:
    with ThreadPoolExecutor(_READERS, "moce-content") as readers:
        found = readers.map(_digest, paths)
        name = f"reading {shortened(named, 60)}"
        return list(progress_bar(found, name, len(paths), unit="file", disable=None, delay=2))


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        if machine_failed(error):
            raise refused(DataError, f"{in_line(path)} cannot be read", error, path) from None
        return f"unreadable: {error.strerror or error}"
    except ValueError:  # a null character in a listed path
        return "unreadable"
