"""One process at a time works on something: whoever holds its lock file. A killed process lets go of it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moce_ds.files import writes_to


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Hold a lock file for the length of the block, waiting for a process that does.

    Raises:
        ArtefactError: the file cannot be written, or its file system knows no locks.
    """
    with writes_to(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        opened = open(lock, "w")  # noqa: SIM115 (closed below; only locking is to be explained)
    with opened:
        with writes_to(lock):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock file now."""
    try:
        with open(lock, "w") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
