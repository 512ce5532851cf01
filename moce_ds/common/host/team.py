"""A team of worker processes: each takes tasks from its own pipe, and sends what it makes of them.

If a process dies, even in the middle of a message, its pipe closes and the other side notices; the shared queue of an
executor would block forever.
"""

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from moce_ds.common.errors import LOST_PEER, MoceError
from moce_ds.common.host.threads import allowed_cpus

T = TypeVar("T")
R = TypeVar("R")


class LostWorkerError(MoceError):
    """A worker process died at `task`, perhaps for lack of memory."""

    status = LOST_PEER

    def __init__(self, task: Any) -> None:
        super().__init__(f"A worker process died at {task}: perhaps for lack of memory.")
        self.task = task


class Worker(Generic[T, R]):
    """A process that calls `work` for each task, and sends each value that it yields, in order.

    Args:
        work: a function that can be pickled. It is called in a new process, without the threads of this one.
        module: the module to import once for all workers, where `work` is defined.
    """

    def __init__(self, work: Callable[[T], Iterator[R]], module: str) -> None:
        context = multiprocessing.get_context("forkserver")  # a plain fork would copy locks that threads of torch hold
        context.set_forkserver_preload(["__main__", module])
        self.connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()
        self._task: T | None = None

    def send(self, task: T) -> None:
        """Give the process a task. Raises LostWorkerError."""
        self._task = task
        with self._alive():
            self.connection.send(task)

    def receive(self) -> R:
        """The next value; waits for it. Raises LostWorkerError, and the MoceError that `work` raised."""
        with self._alive():
            value = self.connection.recv()
        if isinstance(value, MoceError):
            raise value
        received: R = value
        return received

    def close(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self._process.terminate()
        self._process.join()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            raise LostWorkerError(self._task) from None


def as_they_come(
    work: Callable[[T], Iterator[int | R]], tasks: Iterator[T], workers: int | None, module: str
) -> Generator[tuple[T, int | R]]:
    """Each task with each value that `work` yields for it: integers, which report progress, and one other value last.

    The tasks are taken one by one, as workers become free. One worker is this process itself.

    Args:
        workers: number of processes; None: one per core.
        module: as of `Worker`.

    Raises:
        LostWorkerError: a process died.
        MoceError: as `work`.
    """
    workers = workers or allowed_cpus()
    if workers == 1:
        for task in tasks:
            for value in work(task):
                yield task, value
        return
    team: dict[Connection, tuple[Worker[T, int | R], T]] = {}
    try:
        for task in islice(tasks, workers):
            worker = Worker(work, module)
            worker.send(task)
            team[worker.connection] = worker, task
        while team:
            for connection in wait(list(team)):
                assert isinstance(connection, Connection)  # for mypy: `wait` also takes sockets and handles
                worker, task = team[connection]
                value = worker.receive()
                yield task, value
                if not isinstance(value, int):
                    _give_next(worker, tasks, team)
    finally:
        for worker, _ in team.values():
            worker.close()


def _give_next(worker: Worker[T, Any], tasks: Iterator[T], team: dict[Connection, tuple[Worker[T, Any], T]]) -> None:
    """Give a worker its next task; without one, end it."""
    try:
        task = next(tasks)
    except StopIteration:
        del team[worker.connection]
        worker.close()
        return
    worker.send(task)
    team[worker.connection] = worker, task


def _serve(connection: Connection, work: Callable[[Any], Iterator[Any]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    with suppress(EOFError, ConnectionError):  # the parent has finished, or is dead
        while True:
            task = connection.recv()
            try:
                for value in work(task):
                    connection.send(value)
            except MoceError as error:
                connection.send(error)
