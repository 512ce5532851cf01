"""One process at a time changes a file: whoever holds the lock file beside it.

A killed process lets go of it; where the file system knows no locks, only one of the same host does."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from moce_ds.errors import ArtefactError
from moce_ds.files import writes_to

LOCK = ".lock"
"""The lock file of a folder that one process writes at a time."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def locked(lock: Path, busy: str, seconds: float = 60.0) -> Iterator[None]:
    """Hold a lock file for the length of the block, which is to be short where others wait for it.

    A file system that knows no locks (NFS and Lustre may be mounted so) gets a file whose existence is the lock.

    Args:
        busy: what is said where another process does not let go of it within so many `seconds`.

    Raises:
        ArtefactError: `busy`; or the file cannot be written.
    """
    held = _held(lock, busy, seconds)
    try:
        yield
    finally:
        held.release()


@contextmanager
def alone_in(folder: Path, busy: str) -> Iterator[None]:
    """Be the only process that writes a folder, which is made where it is not there; leaves no lock file.

    Raises:
        ArtefactError: another process does; `busy` says so. Or the folder cannot be written.
    """
    lock = folder / LOCK
    with writes_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(lock, busy, seconds=0):
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink(missing_ok=True)


def _held(lock: Path, busy: str, seconds: float) -> BaseFileLock:
    with writes_to(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _acquired(FileLock(lock, timeout=seconds), busy)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return _acquired(SoftFileLock(lock.with_name(f"{lock.name}.soft"), timeout=seconds), busy)


def _acquired(lock: BaseFileLock, busy: str) -> BaseFileLock:
    try:
        lock.acquire()
    except Timeout:
        raise ArtefactError(busy) from None
    return lock
