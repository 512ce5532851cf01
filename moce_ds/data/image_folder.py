"""A folder of images as it is found: every file listed, and looked at once by a pool of processes."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from moce_ds.data import image_file
from moce_ds.data.image_file import EMPTY, NOT_A_FILE, NOT_AN_IMAGE, Accepted, Rejected, examine
from moce_ds.errors import DataError

_BATCH = 16  # files per message to a worker


class SourceFile(NamedTuple):
    """A file as listed: path relative to the source folder, and size in bytes (-1: not a regular file)."""

    path: str
    size: int


def list_files(source: Path) -> list[SourceFile]:
    """Everything below `source` that is not a folder, sorted by path; links are followed.

    Raises:
        DataError: `source` is not a folder, or a folder in it cannot be listed.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder: expected one that holds images, at any depth.")
    try:
        return sorted(_walk(source, "", frozenset()))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror}): make it readable.") from None


def _walk(folder: Path, prefix: str, ancestors: frozenset[tuple[int, int]]) -> Iterator[SourceFile]:
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link to one of its own parents, without end if followed
        yield SourceFile(prefix.rstrip("/"), -1)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", ancestors | {identity})
            else:
                yield SourceFile(prefix + entry.name, entry.stat().st_size if entry.is_file() else -1)


def examined(
    source: Path, files: Sequence[SourceFile], max_pixels: int, workers: int | None
) -> Generator[tuple[SourceFile, Accepted | Rejected], None, None]:
    """Each of `files` with the verdict on it, in order; at most two batches per worker are under way.

    Raises:
        DataError: a worker process died.
    """
    workers = workers or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("forkserver")  # a plain fork would copy locks that torch's threads hold
    context.set_forkserver_preload(["__main__", image_file.__name__])
    done = 0
    with ProcessPoolExecutor(workers, context, _start_worker, (max_pixels,)) as pool:
        try:
            for verdict in _in_order(pool, source, files, ahead=2 * workers):
                yield files[done], verdict
                done += 1
        except BrokenProcessPool:
            raise DataError(
                f"A worker process died at or soon after {files[done].path}: perhaps killed for lack of memory. Run "
                "the same command again to continue, with a smaller `workers=` if it happens again."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, source: Path, files: Sequence[SourceFile], ahead: int
) -> Iterator[Accepted | Rejected]:
    pending: deque[Future[list[Accepted | Rejected]]] = deque()
    for start in range(0, len(files), _BATCH):
        pending.append(pool.submit(_examine_batch, source, files[start : start + _BATCH]))
        if len(pending) > ahead:
            yield from pending.popleft().result()
    while pending:
        yield from pending.popleft().result()


def _examine_batch(source: Path, files: Sequence[SourceFile]) -> list[Accepted | Rejected]:
    return [_examine_listed(source, file) for file in files]


def _examine_listed(source: Path, file: SourceFile) -> Accepted | Rejected:
    if any(part.startswith(".") for part in file.path.split("/")):
        return Rejected(NOT_AN_IMAGE, "hidden file, or in a hidden folder")
    if file.size < 0:
        return Rejected(NOT_A_FILE, "broken link, link to a parent folder, pipe, socket or device")
    if file.size == 0:
        return Rejected(EMPTY, "0 bytes")
    return examine(source / file.path)


def _start_worker(max_pixels: int) -> None:
    Image.MAX_IMAGE_PIXELS = max_pixels
    warnings.simplefilter("ignore")
    # Pillow warns above its limit and raises only above twice its limit.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
