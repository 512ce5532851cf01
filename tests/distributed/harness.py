"""Run a function in several real processes that can form a gloo group, with a time limit and readable failures."""

import faulthandler
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

_GRACE_SECONDS = 5.0

# The ranks are forked from a process that has imported what takes seconds, has one thread and has done nothing else.
# It is not the one of `multiprocessing`, which serves the product and must not know more than the product tells it.
_nursery = multiprocessing.forkserver.ForkServer()
_nursery.set_forkserver_preload(["moce_ds.training.pretrain", "moce_ds.tuning.tune", "torch._dynamo"])


class WorldError(AssertionError):
    """A rank failed, or the ranks did not end in time; the message holds what every rank printed."""


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, seconds: float = 600.0) -> list[Any]:
    """Call `fn(*args)` in `world_size` new processes that find each other through RANK, WORLD_SIZE, MASTER_...

    The function opens its process group itself, with `moce_ds.distributed.runtime.started()`, as the program does.

    Args:
        fn: a function at the top of a module, since the processes import it anew.
        world_size: number of processes.
        args: picklable, the same for every rank.
        seconds: after so long every process writes the stacks of its threads and is killed.

    Returns:
        What the function returned, by rank.

    Raises:
        WorldError: names the rank that failed first, with its traceback, or says that time was up.
    """
    # Here, since the new processes import this module too.
    from moce_ds.common.host.rank import SECRET, new_secret
    from moce_ds.distributed.rendezvous import host_on_loopback

    context = multiprocessing.get_context("forkserver")
    store = host_on_loopback()  # joined by all: no port is guessed
    given = os.environ | {"MASTER_PORT": str(store.port), SECRET: new_secret()}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(world_size)]
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(target=_rank_main, args=(fn, args, given | _place(rank, world_size), logs[rank], sender))
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                with patch("multiprocessing.forkserver.connect_to_new_process", _nursery.connect_to_new_process):
                    process.start()
                sender.close()  # the child's copy is the only one left, so that its end is seen here
            return _results([receiver for receiver, _ in pipes], processes, logs, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _place(rank: int, world_size: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    known = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return known | {name: str(number) for name, number in numbers.items()}


def _rank_main(
    fn: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str], log: Path, sender: Connection
) -> None:
    from moce_ds.common.host.program import configure_logging

    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()  # SIGABRT writes the stacks of all threads; the program handles other signals itself
    os.environ.clear()
    os.environ.update(environment)
    configure_logging()
    gc.freeze()  # what the nursery has imported is no garbage
    sender.send(fn(*args))


def _results(
    receivers: list[Connection], processes: Sequence[BaseProcess], logs: list[Path], seconds: float
) -> list[Any]:
    """Collect the results; once a rank has failed, the others get a little time to say what they saw."""
    results: dict[int, Any] = {}
    failed: int | None = None
    waiting, deadline = {receiver: rank for rank, receiver in enumerate(receivers)}, time.monotonic() + seconds
    while waiting and (left := deadline - time.monotonic()) > 0:
        for ready in wait(list(waiting), timeout=left):
            assert isinstance(ready, Connection)
            rank = waiting.pop(ready)
            try:
                results[rank] = ready.recv()
            except EOFError:
                if failed is None:
                    failed, deadline = rank, min(deadline, time.monotonic() + _GRACE_SECONDS)
    if failed is not None:
        processes[failed].join()
        reason = f"rank {failed} of {len(processes)} failed with status {processes[failed].exitcode}"
        raise WorldError(f"{reason}\n{_outputs(logs, first=failed)}")
    if waiting:
        for rank in waiting.values():
            os.kill(processes[rank].pid or 0, signal.SIGABRT)
        time.sleep(1.0)
        late = ", ".join(map(str, waiting.values()))
        raise WorldError(f"ranks {late} of {len(processes)} were not done after {seconds:g} s\n{_outputs(logs)}")
    return [results[rank] for rank in range(len(processes))]


def _outputs(logs: list[Path], first: int = 0) -> str:
    ranks = sorted(range(len(logs)), key=lambda rank: rank != first)
    texts = {rank: logs[rank].read_text(errors="replace")[-6000:] if logs[rank].exists() else "" for rank in ranks}
    return "\n".join(f"--- rank {rank} ---\n{text}" for rank, text in texts.items())
