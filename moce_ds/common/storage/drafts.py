"""Drafts: temporary files and folders beside their target, and the cleanup of those that killed processes left.

The name of a draft identifies its writer: `.NAME.MACHINE-PID.tmp`. If the file system cannot exchange two names, a
folder that is being replaced is `.NAME.MACHINE-PID.old` for a moment. Before a process writes into a folder, it removes
the drafts of dead processes there and restores folders that were moved aside and never replaced. Processes on other
machines or in other containers cannot be checked: their drafts are removed after a day without a change.
"""

import ctypes
import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from moce_ds.common.errors import ArtefactError
from moce_ds.common.host.machine import refused

_DRAFT = re.compile(r"^\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,9})\.(?P<kind>tmp|old)$")
_SCRATCH = re.compile(r"^moce-(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,9})-\w+$")
_QUIET_SECONDS = 24 * 3600.0
_BETWEEN_RENAMES_SECONDS = (
    300.0  # upper bound for the time between two consecutive renames, larger than any clock error
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_cleared: set[Path] = set()  # folders that this process has cleaned up


def draft_of(path: Path, kind: str = "tmp") -> Path:
    """The temporary path where this process writes `path`; cleans up old drafts in the folder first."""
    clear_leftovers(path.parent)
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}.{kind}")


def put_in_place(draft: Path, path: Path) -> None:
    """Rename a complete draft folder to `path` and remove what was there. Raises OSError; then `path` is unchanged."""
    if not os.path.lexists(path):
        os.replace(draft, path)
    elif _exchange(draft, path):
        _remove(draft)
    else:
        replaced = draft_of(path, "old")
        os.replace(path, replaced)
        try:
            os.replace(draft, path)
        finally:
            if not os.path.lexists(path):  # stopped between the two renames
                os.replace(replaced, path)
        _remove(replaced)


def restore(path: Path) -> None:
    """Restore `path` if it is missing and a killed process moved it aside; call before reading or replacing it."""
    if not os.path.lexists(path):
        clear_leftovers(path.parent, again=True)


def clear_leftovers(folder: Path, again: bool = False) -> None:
    """Remove drafts of dead processes, and restore folders that they moved aside without replacing them.

    Args:
        again: repeat the cleanup even if this process has done it before.
    """
    folder = folder.absolute()
    if folder in _cleared and not again:
        return
    _cleared.add(folder)
    for path, match in _matching(folder, _DRAFT):
        with suppress(OSError):  # another process removed it first, or it belongs to another user
            if not _is_over(path, match):
                continue
            place = folder / match["name"]
            if match["kind"] == "old" and not os.path.lexists(place):
                path.rename(place)
            else:
                _remove(path)


@contextmanager
def scratch_folder(parent: Path | None = None, quiet_seconds: float = _QUIET_SECONDS) -> Iterator[Path]:
    """A temporary folder for the length of the block, by default in the system's folder for temporary files.

    Removes scratch folders of killed processes there first.

    Args:
        quiet_seconds: time without a change after which the process of another machine is taken for dead.

    Raises:
        ArtefactError: no folder can be made.
    """
    parent = parent or _temporary_place()
    for path, match in _matching(parent, _SCRATCH):
        with suppress(OSError):
            if _is_own_folder(path) and _is_over(path, match, quiet_seconds):
                _remove(path)
    try:
        made = tempfile.TemporaryDirectory(prefix=f"moce-{_machine()}-{os.getpid()}-", dir=parent)
    except OSError as error:
        raise refused(ArtefactError, f"No temporary folder can be made in {parent}", error) from None
    with made as folder:
        yield Path(folder)


def _temporary_place() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        reason = error.strerror or error
        raise ArtefactError(f"{reason}: set TMPDIR to a writable folder with free space.") from None


@cache
def _machine() -> str:
    """Identifies the scope of process ids: one boot of a host, and a process namespace on it, such as a container's.

    The boot id distinguishes hosts with equal names, such as clones of one image: the inode of their first namespace is
    the same.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    return hashlib.sha256(" ".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _is_over(path: Path, match: re.Match[str], quiet_seconds: float = _QUIET_SECONDS) -> bool:
    """Whether the process that a leftover belongs to is dead."""
    if match["machine"] == _machine():
        try:
            os.kill(int(match["pid"]), 0)
        except ProcessLookupError:
            return True
        except OSError:  # it belongs to another user
            return False
        return False
    if "kind" in match.groupdict() and match["kind"] == "old":
        return time.time() - os.lstat(path).st_ctime > _BETWEEN_RENAMES_SECONDS
    within = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    return time.time() - max(os.lstat(one).st_mtime for one in (path, *within)) > quiet_seconds


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    """Entries of a folder whose names match; none if the folder is missing or unreadable."""
    try:
        paths = list(folder.iterdir())
    except OSError:
        return []
    return [(path, match) for path in paths if (match := pattern.match(path.name))]


def _is_own_folder(path: Path) -> bool:
    """Whether an entry of a world-writable folder is a folder of this user, not a link."""
    status = os.lstat(path)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder; ignore entries that cannot be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False if the system or the file system (such as NFS) cannot. Raises OSError."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False  # EPERM: containers refuse unknown calls with it; if it is real, the rename that follows fails too
    raise OSError(number, os.strerror(number), str(one), None, str(other))
