"""Drafts: what is written beside its place until it is whole, and what a kill has left of them.

The name of a draft says who writes it: `.NAME.MACHINE-PID.tmp`. What a new folder replaces is `.NAME.MACHINE-PID.old`
for a moment, where the file system cannot exchange two names. Each process clears the folders that it writes into of
drafts whose process is gone, and puts back what was moved aside for a folder that never came. Processes of other
machines, or of other containers, cannot be looked up: their drafts go after a day without a change.
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

from moce_ds.errors import ArtefactError
from moce_ds.host.machine import refused

_DRAFT = re.compile(r"^\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,9})\.(?P<kind>tmp|old)$")
_SCRATCH = re.compile(r"^moce-(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,9})-\w+$")
_QUIET_SECONDS = 24 * 3600.0
_BETWEEN_RENAMES_SECONDS = 300.0  # between two renames that follow one another; much more than a clock is off
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_cleared: set[Path] = set()  # folders that this process has looked through


def draft_of(path: Path, kind: str = "tmp") -> Path:
    """Where this process writes what is to become `path`; its folder is cleared of what is left there."""
    clear_leftovers(path.parent)
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}.{kind}")


def put_in_place(draft: Path, path: Path) -> None:
    """Give a whole draft folder its name, and remove what had it. Raises OSError; then `path` is as it was."""
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
            if not os.path.lexists(path):  # stopped between the two
                os.replace(replaced, path)
        _remove(replaced)


def restore(path: Path) -> None:
    """Before `path` is read or replaced: if it is missing, put back what a killed process had moved aside."""
    if not os.path.lexists(path):
        clear_leftovers(path.parent, again=True)


def clear_leftovers(folder: Path, again: bool = False) -> None:
    """Remove drafts of processes that are gone, and put back what they had moved aside and not replaced.

    Args:
        again: also if this process has done that before.
    """
    folder = folder.absolute()
    if folder in _cleared and not again:
        return
    _cleared.add(folder)
    for path, match in _matching(folder, _DRAFT):
        with suppress(OSError):  # another process was faster, or it belongs to others
            if not _is_over(path, match):
                continue
            place = folder / match["name"]
            if match["kind"] == "old" and not os.path.lexists(place):
                path.rename(place)
            else:
                _remove(path)


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder for the length of the block, by default in the system's place for temporary files; what kills have left
    of such folders there is removed first. Raises ArtefactError where none can be made."""
    parent = parent or _temporary_place()
    for path, match in _matching(parent, _SCRATCH):
        with suppress(OSError):
            if _is_own_folder(path) and _is_over(path, match):
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
        told = error.strerror or error
        raise ArtefactError(f"{told}: set TMPDIR to a folder with space that can be written to.") from None


@cache
def _machine() -> str:
    """What process numbers belong to: a boot of a host, and on it a namespace, as of a container.

    The boot tells hosts apart that share a name, as clones of one image do: the number of the first namespace is the
    same on all of them.
    """
    known = [socket.gethostname()]
    with suppress(OSError):
        known.append(str(Path("/proc/self/ns/pid").stat().st_ino))
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    return hashlib.sha256(" ".join(known).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _is_over(path: Path, match: re.Match[str]) -> bool:
    """Whether the process is gone that a leftover belongs to."""
    if match["machine"] == _machine():
        try:
            os.kill(int(match["pid"]), 0)
        except ProcessLookupError:
            return True
        except OSError:  # of another user
            return False
        return False
    if "kind" in match.groupdict() and match["kind"] == "old":
        return time.time() - os.lstat(path).st_ctime > _BETWEEN_RENAMES_SECONDS
    within = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    return time.time() - max(os.lstat(one).st_mtime for one in (path, *within)) > _QUIET_SECONDS


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    """What a folder holds whose names match; nothing where it is not there yet, or cannot be read."""
    try:
        paths = list(folder.iterdir())
    except OSError:
        return []
    return [(path, match) for path in paths if (match := pattern.match(path.name))]


def _is_own_folder(path: Path) -> bool:
    """Whether an entry of a place that everybody can write to is a folder of this user, and no link."""
    found = os.lstat(path)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, as far as that is allowed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where system or file system cannot, as NFS. Raises OSError."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False  # EPERM: how containers refuse a call that they do not know; if it is real, renaming says so
    raise OSError(number, os.strerror(number), str(one), None, str(other))
