"""Errors of the machine (disk, permissions, descriptors, memory), each as one sentence with a remedy."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

from moce_ds.common.errors import LOST_PEER, MoceError

_OTHER_PLACE = "Free some space there, or name a place on another disk (for temporary files: TMPDIR)"
_PERMISSION = "Ask its owner for permission, or name another place"
_LIMIT_OF_FILES = "Raise the limit on open files (`ulimit -n 4096`), or use fewer workers and threads"
_LIMIT_OF_PROCESSES = "Raise the limit on processes (`ulimit -u`), or use fewer workers and threads"
_FILE_SERVER = "The connection to the file server is lost: run the same command again"
_NETWORK = "Check the network, and the address and port if you set them"

_REMEDIES: dict[int, str] = {
    errno.ENOSPC: _OTHER_PLACE,
    errno.EDQUOT: f"Your quota is used up. {_OTHER_PLACE}",
    errno.EFBIG: "Raise the limit on the size of files (`ulimit -f`), or name a place on another file system",
    errno.EROFS: "The file system is read-only: name another place",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EMFILE: _LIMIT_OF_FILES,
    errno.ENFILE: "All programs of this machine together have too many open files: end some of them",
    errno.EAGAIN: _LIMIT_OF_PROCESSES,
    errno.ENOMEM: "Use a machine with more memory, or a smaller batch, model or number of workers",
    errno.ENAMETOOLONG: "Choose shorter names",
    errno.ELOOP: "A symbolic link leads back to itself: remove it",
    errno.ENOENT: "Check the path",
    errno.ENOTDIR: "Part of the path is a file: name a place in a folder",
    errno.EISDIR: "It is a folder where a file is expected: name another path, or move the folder away",
    errno.EEXIST: "Something is already there: name another path, or move it away",
    errno.ENOTEMPTY: "The folder is not empty: another process may be writing to it",
    errno.EINVAL: "The file system does not support this: name a place on another one",
    errno.ENOTSUP: "The file system does not support this: name a place on another one",
    errno.ENOLCK: "The file system does not support locks: name a place on another one",
    errno.EXDEV: "Name a place on the same file system",
    errno.EBUSY: "Another program is using it: end that program, then try again",
    errno.ETXTBSY: "Another program is using it: end that program, then try again",
    errno.EIO: "The disk or its connection is failing: copy what you need from it, and look at `dmesg`",
    errno.ESTALE: "The file server has replaced the file: run the same command again",
    errno.ENODEV: "The disk is gone: mount it again",
    errno.ENXIO: "The disk is gone: mount it again",
    errno.EADDRINUSE: "Another program uses the port: choose another MASTER_PORT",
    errno.EADDRNOTAVAIL: _NETWORK,
    errno.ECONNREFUSED: _NETWORK,
    errno.ECONNRESET: _NETWORK,
    errno.EHOSTUNREACH: _NETWORK,
    errno.ENETUNREACH: _NETWORK,
    errno.ETIMEDOUT: _NETWORK,
    errno.ENOTCONN: _FILE_SERVER,
    errno.ESHUTDOWN: _FILE_SERVER,
}
_OF_THE_TARGET = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# A disk, a file server or a network can fail under one process only: elsewhere, or later, the command may succeed.
_PASSING = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNABORTED}
_PASSING |= {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET}

# What says nothing about the file that was to be read: the machine, or this process, cannot read others either.
_OF_THE_MACHINE = _PASSING | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV}

E = TypeVar("E", bound=MoceError)

# torch reports an allocation that failed as a RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")
_MEMORY = "Use a smaller batch, model or number of workers, or a machine with more memory"

# How torch's DataLoader reports, anywhere in the main thread, that one of its worker processes is gone; and how a
# worker reports that /dev/shm is full, through which its tensors are sent.
_WORKER_DIED = "DataLoader worker (pid"
_NO_SHARED_MEMORY = ("unable to allocate shared memory", "unable to write to file </torch_")
_WORKERS = (
    "Use fewer workers (`data.workers`; 0 needs none), a machine with more memory, or more shared memory (/dev/shm; "
    "for a container: --shm-size)"
)


class MachineError(MoceError):
    """The machine refused something: its disk is full, a permission is missing, a limit is reached.

    The exit status is LOST_PEER where a disk, a file server or the network failed, which may affect one process only.
    """

    every_process = True


def reason(error: OSError, named: Path | None = None) -> str:
    """Why the system refused an operation, and a remedy, such as "No space left on device. Free some space ...".

    The path is included if the system names one, unless it is `named` already.
    """
    path = _path_of(error)
    where = f" ({path})" if path and (named is None or Path(path) != named) else ""
    why = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "Try again, or name another place")
    if "AF_UNIX path too long" in why:
        remedy = "Set TMPDIR to a folder with a shorter name"
    return f"{why.removesuffix('.')}{where}. {remedy}."


def refused(kind: type[E], what: str, error: OSError | MoceError, named: Path | None = None) -> E:
    """An error of class `kind` with the failed action, the reason, and the exit status of its cause.

    Args:
        what: the failed action, such as "runs/a cannot be written".
        named: the path that `what` contains, as for `reason`.
    """
    fault = kind(f"{what}: {reason(error, named) if isinstance(error, OSError) else error}")
    fault.status = status_of(error)
    return fault


def status_of(error: OSError | MoceError) -> int:
    """The exit status for this cause: LOST_PEER if the fault may be temporary."""
    if isinstance(error, MoceError):
        return error.status
    return LOST_PEER if error.errno in _PASSING else MoceError.status


def machine_failed(error: BaseException) -> bool:
    """Whether a file could not be read through no fault of its own: its disk or file server fails, or a limit is
    reached. Where odd files are skipped, such a file is an error, since others would be skipped for the same cause."""
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


def system_error(error: Exception) -> OSError | None:
    """The system error that a library written in Rust passes on as text, "... (os error 28)"; None if there is none."""
    match = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def _path_of(error: OSError) -> str:
    """The path that an error is about. A copy or a link names its source, and then its target, which is what lacks
    space."""
    path = error.filename2 if error.filename2 is not None and error.errno in _OF_THE_TARGET else error.filename
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""


def machine_fault(error: BaseException) -> MachineError | None:
    """The error to report for a fault of the machine; None for any other error, which is a defect of this program."""
    if isinstance(error, OSError):
        path = _path_of(error)
        return refused(MachineError, path or "The system refused an operation", error, Path(path))
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # Path.resolve raises no OSError
        return MachineError(f"{error}. {_REMEDIES[errno.ELOOP]}.")
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        detail = str(error).splitlines()[0].strip() if str(error) else ""
        return MachineError(f"Out of memory{f' ({detail})' if detail else ''}. {_MEMORY}.")
    return _fault_of_workers(error)


def _fault_of_workers(error: BaseException) -> MachineError | None:
    message = str(error)
    if not isinstance(error, RuntimeError):
        return None
    if message.startswith(_WORKER_DIED):  # killed by a signal; a new start may have enough memory
        fault = MachineError(f"A data worker died, perhaps for lack of memory ({message}). {_WORKERS}.")
        fault.status = LOST_PEER
        return fault
    if message.startswith(_NO_SHARED_MEMORY):
        return MachineError(f"Out of shared memory ({message.splitlines()[0]}). {_WORKERS}.")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch reports that this machine or a GPU is out of memory."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def control_groups(
    controller: str, own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> Iterator[Path]:
    """Folders of the control groups that limit this process, as SLURM and systemd make them: its own and all parents.

    Args:
        controller: a controller such as "memory". Groups of version 1 have one folder per controller, those of version
            2 one folder for all.
        own, mounted: the file that lists the groups of this process, and the folder where they are mounted.
    """
    try:
        lines = own.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mounted / controller if controllers else mounted
        parts = [part for part in PurePosixPath(group).parts if part not in ("/", "..")]
        # In a container the group may be that of the host, which has no folder here; the topmost group always has one.
        yield from (folder for n in range(len(parts), -1, -1) if (folder := top.joinpath(*parts[:n])).is_dir())
