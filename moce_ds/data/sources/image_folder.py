"""The files of a folder of images, each examined once by a pool of processes."""

import multiprocessing
import os
import signal
from collections.abc import Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from moce_ds.data import image_file
from moce_ds.data.image_file import EMPTY, Accepted, Rejected, examine
from moce_ds.data.sources.walk import ODD, SourceFile, unwanted, why_odd
from moce_ds.errors import LOST_PEER, DataError, MoceError
from moce_ds.text import in_line

_BATCH = 16  # files per message to a worker
_BATCHES_AHEAD = 3  # per worker, so that one large image does not delay the others


def examined(
    source: Path, files: Sequence[SourceFile], max_pixels: int, workers: int | None
) -> Generator[tuple[SourceFile, Accepted | Rejected], None, None]:
    """Each of `files` with its verdict, in order; `workers` processes examine them, None: one per core.

    Batches are dealt out in turn and each worker has its own pipe. So the death of a process, even in the middle of a
    message, closes a pipe for the other side; the shared queue of an executor would block forever.

    Raises:
        DataError: a worker process died, or the machine cannot read a file (`examine`).
    """
    workers = workers or len(os.sched_getaffinity(0))
    batches = [files[start : start + _BATCH] for start in range(0, len(files), _BATCH)]
    team = [_start_worker(source, max_pixels) for _ in range(min(workers, len(batches)))]
    ahead = _BATCHES_AHEAD * len(team)
    number = 0
    try:
        for number, batch in enumerate(batches[:ahead]):
            team[number % len(team)][1].send(batch)
        for number, batch in enumerate(batches):
            _, connection = team[number % len(team)]
            verdicts = connection.recv()
            if isinstance(verdicts, MoceError):
                raise verdicts
            if number + ahead < len(batches):
                connection.send(batches[number + ahead])
            yield from zip(batch, verdicts, strict=True)
    except (EOFError, OSError):
        fault = DataError(
            f"A worker process died between {in_line(batches[number][0].path)} and "
            f"{in_line(batches[number][-1].path)}: perhaps for lack of memory. Rerun the same command to "
            "resume, with fewer `workers=` if it happens again."
        )
        fault.status = LOST_PEER  # as for a worker that prepares batches (host/machine.py)
        raise fault from None
    finally:
        for process, connection in team:
            connection.close()
            process.terminate()
            process.join()


def _start_worker(source: Path, max_pixels: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("forkserver")  # a plain fork would copy locks that threads of torch hold
    context.set_forkserver_preload(["__main__", image_file.__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, source, max_pixels), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _work(connection: Connection, source: Path, max_pixels: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    with suppress(EOFError, ConnectionError):  # the parent has finished, or is dead
        while True:
            batch = connection.recv()
            try:
                verdicts: list[Accepted | Rejected] | MoceError = [
                    _examine_listed(source, file, max_pixels) for file in batch
                ]
            except MoceError as error:
                verdicts = error
            connection.send(verdicts)


def _examine_listed(source: Path, file: SourceFile, max_pixels: int) -> Accepted | Rejected:
    if rejected := unwanted(file.path):
        return rejected
    if file.size == ODD:
        return why_odd(source / file.path)
    if file.size == 0:
        return Rejected(EMPTY, "0 bytes")
    return examine(source / file.path, max_pixels)
