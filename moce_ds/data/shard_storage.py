"""Where the bytes of shards lie: a folder, or an address of an object store or web server that `fsspec` reads.

Storages can be pickled, and used by several threads at a time. They hold no connection or file that another process
could inherit.
"""

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Protocol

from moce_ds.common.errors import ConfigError
from moce_ds.common.storage.checksums import read_checked

_REQUESTS = 32
"""Requests for the size of a file that wait for their answers together."""

ADDRESS = "address.json"
"""The file that names the address of the tar files, if they do not lie beside it."""


class ShardStorage(Protocol):
    """Reads parts of files by their names. All methods raise OSError if the files cannot be read."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset`; fewer where it ends before."""
        ...

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of these files; those that do not exist are absent."""
        ...

    def where(self, name: str) -> str:
        """Path or address of a file, for messages."""
        ...


@dataclass(frozen=True)
class FolderStorage:
    """The files of a folder."""

    folder: Path

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Part of a file; threads that read the same file share its descriptor."""
        file = _opened(self.folder / name)  # held while it is read: another thread may drop it from the cache
        return os.pread(file.fileno(), size, offset)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of those files that exist."""
        wanted = set(names)
        with os.scandir(self.folder) as entries:  # one pass: a set may have a hundred thousand shards
            return {entry.name: entry.stat().st_size for entry in entries if entry.name in wanted and entry.is_file()}

    def where(self, name: str) -> str:
        """The path of a file."""
        return str(self.folder / name)


@dataclass(frozen=True)
class AddressStorage:
    """The files below an address, such as `s3://bucket/set`."""

    address: str

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Part of a file, by one request."""
        with _faults_as_os_errors(self.address):
            store, root = _connected(self.address, os.getpid())
            data: bytes = store.cat_file(f"{root}/{name}", start=offset, end=offset + size)
        return data if len(data) <= size else data[offset : offset + size]  # some web servers send the whole file

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of those files that exist; a request each."""
        with ThreadPoolExecutor(_REQUESTS) as pool:
            found = zip(names, pool.map(self._size, names), strict=True)
            return {name: size for name, size in found if size is not None}

    def _size(self, name: str) -> int | None:
        with suppress(FileNotFoundError), _faults_as_os_errors(self.address):
            store, root = _connected(self.address, os.getpid())
            size: int | None = store.size(f"{root}/{name}")
            return size
        return None

    def where(self, name: str) -> str:
        """The address of a file."""
        return f"{self.address}/{name}"

    def copy(self, name: str, to: Path) -> None:
        """Copy a file into a local one. Raises OSError."""
        with _faults_as_os_errors(self.address):
            store, root = _connected(self.address, os.getpid())
            store.get_file(f"{root}/{name}", str(to))


def storage_of(folder: Path) -> ShardStorage:
    """Where the tar files of the shard set in a folder lie: there, or at the address that `moce attach` recorded.

    Raises:
        ArtefactError: the record of the address is damaged.
    """
    if not (folder / ADDRESS).exists():
        return FolderStorage(folder)
    return AddressStorage(read_checked(folder / ADDRESS, _Record, "the address of shards", "moce attach").address)


@dataclass(frozen=True)
class _Record:
    """`address.json`."""

    address: str


# A set of tens of millions of images has more shards than a process may have open files. A file that leaves the cache
# is closed when its last reader releases it.
@lru_cache(maxsize=512)
def _opened(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=0)


def _connected(address: str, process: int) -> tuple[Any, str]:
    """As `_connect`; threads that ask for the same client share it, also the first time."""
    with _CONNECTING:
        return _connect(address, process)


@lru_cache(maxsize=8)
def _connect(address: str, process: int) -> tuple[Any, str]:
    """The client of a store, and the path in it. A client that a fork has copied is of no use in this process.

    Raises:
        ConfigError: the protocol is unknown, or the package of its client is missing.
    """
    import fsspec  # most runs read a folder

    try:
        store, root = fsspec.core.url_to_fs(address, skip_instance_cache=True)
    except ValueError:
        raise ConfigError(
            f"{address}: expected an address such as s3://bucket/folder, gs://... or https://..."
        ) from None
    except ImportError as error:
        raise ConfigError(
            f"{address}: its client does not import here ({error}). For s3://, install the extra: "
            "pip install 'moce-ds[s3]'."
        ) from None
    return store, root


_CONNECTING = Lock()

_CLIENT_ERRORS = {
    "botocore.exceptions": "BotoCoreError",
    "aiohttp": "ClientError",
    "gcsfs.retry": "HttpError",
    "azure.core.exceptions": "AzureError",
}
"""Errors of clients that are no OSError, by the module that defines them."""


def _client_errors() -> tuple[type[Exception], ...]:
    """Those of the clients that are loaded; another thread may be loading one."""
    named = [getattr(sys.modules.get(module), name, None) for module, name in _CLIENT_ERRORS.items()]
    return tuple(error for error in named if error is not None)


@contextmanager
def _faults_as_os_errors(address: str) -> Iterator[None]:
    try:
        yield
    except _client_errors() as error:
        raise OSError(errno.ENOTCONN, f"{type(error).__name__}: {error}", address) from None
