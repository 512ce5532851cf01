"""Lock files: one process at a time works on something.

The system releases the locks of a killed process. On file systems without locks (some mounts of NFS and Lustre), the
existence of a file is the lock. The next process on the same host removes the file of a killed one. A process on
another host cannot be checked, so its file has to be deleted by hand.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.files import writes_to

LOCK = ".lock"
"""The lock file of a folder with one writer at a time."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def locked(lock: Path, busy: str, seconds: float = 60.0) -> Iterator[None]:
    """Hold a lock file for the length of the block, which should be short if other processes wait for it.

    Args:
        busy: message if another process does not release the lock within `seconds`.

    Raises:
        ArtefactError: `busy`; or the file cannot be written.
    """
    acquired = _acquired(lock, seconds)
    if acquired is None:
        raise ArtefactError(busy)
    try:
        yield
    finally:
        acquired.release()


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Hold a lock file for the length of the block; wait without a limit for its current holder.

    Raises:
        ArtefactError: the file cannot be written.
    """
    with locked(lock, "", seconds=-1):
        yield


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock file now. Raises ArtefactError if the file cannot be written."""
    if not (lock.exists() or _marker(lock).exists()):
        return False
    acquired = _acquired(lock, seconds=0)
    if acquired is not None:
        acquired.release()
    return acquired is None


@contextmanager
def alone_in(folder: Path, busy: str) -> Iterator[None]:
    """Be the only writer of a folder, which is created if needed. Removes the lock file afterwards.

    Raises:
        ArtefactError: another process writes it (`busy`), or the folder cannot be written.
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


def _acquired(lock: Path, seconds: float) -> BaseFileLock | None:
    """The lock, or None if another process holds it for that many seconds; negative: wait without a limit."""
    with writes_to(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _wait_for(FileLock(lock, timeout=seconds))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return _wait_for(SoftFileLock(_marker(lock), timeout=seconds))


def _marker(lock: Path) -> Path:
    """The file whose existence is the lock on file systems without locks."""
    return lock.with_name(f"{lock.name}.soft")


def _wait_for(lock: BaseFileLock) -> BaseFileLock | None:
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock
