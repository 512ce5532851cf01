"""What the machine refuses (disk, permissions, descriptors, memory), as one sentence with what to do about it."""

import errno
import os
from pathlib import Path

from moce_ds.errors import LOST_PEER, MoceError

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
# A disk, a file server or a network that fails under one process: elsewhere, or later, the same command may succeed.
_PASSING = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNABORTED}
_PASSING |= {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET}

# torch reports an allocation that failed as a RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")
_MEMORY = "Use a smaller batch, model or number of workers, or a machine with more memory"


class MachineError(MoceError):
    """The machine did not allow something: its disk is full, a permission is missing, a limit is reached.

    Its status is LOST_PEER where a disk, a file server or the network has failed, as it may under one process alone.
    """

    every_process = True


def reason(error: OSError, named: Path | None = None) -> str:
    """Why the system refused, and what to do, such as "No space left on device. Free some space ...".

    The path is told where the system names one, unless it is `named` already.
    """
    path = _path_of(error)
    where = f" ({path})" if path and (named is None or Path(path) != named) else ""
    why = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "Try again, or name another place")
    if "AF_UNIX path too long" in why:
        remedy = "Set TMPDIR to a folder with a shorter name"
    return f"{why.removesuffix('.')}{where}. {remedy}."


def _path_of(error: OSError) -> str:
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""


def machine_fault(error: BaseException) -> MachineError | None:
    """What to tell of an error that the machine caused; None for another one, which is a defect of this program."""
    if isinstance(error, OSError):
        path = _path_of(error)
        fault = MachineError(f"{path or 'The system refused an operation'}: {reason(error, Path(path))}")
        fault.status = LOST_PEER if error.errno in _PASSING else MachineError.status
        return fault
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # by Path.resolve, no OSError
        return MachineError(f"{error}. {_REMEDIES[errno.ELOOP]}.")
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        detail = str(error).splitlines()[0].strip() if str(error) else ""
        return MachineError(f"Out of memory{f' ({detail})' if detail else ''}. {_MEMORY}.")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory ran out, of this machine or of a GPU."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
