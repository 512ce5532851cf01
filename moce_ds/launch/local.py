"""Run a `moce` verb in several processes on this machine.

    moce launch local --nproc 2 pretrain configs/demo/mae.yaml

One Ctrl-C (or SIGTERM, SIGHUP, SIGUSR1, SIGUSR2) asks every process to stop at the next step boundary; the status is 76
then, as nothing that needs the whole run may follow. When a process fails, the others are ended and the failed one is
named; the status is 75 if it was lost. With --max-restarts, all are started again when one was lost (killed,
or silent for run.peer_timeout seconds), and the run resumes from its newest checkpoint. Under
`torchrun -m moce_ds VERB ...` the verbs do the same; this launcher prints no traceback of its own, and passes signals
on once.
"""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence

from moce_ds.distributed.sealing import SECRET, new_secret
from moce_ds.errors import LOST_PEER, STOPPED
from moce_ds.host import threads
from moce_ds.host.interrupts import leave, obeyed

_logger = logging.getLogger(__name__)

GRACE_SECONDS = 20.0
_INTERRUPTED = 130  # how many programs end at a Ctrl-C
_VERDICT_SECONDS = 5.0  # in which all processes read that one is lost


def run_processes(
    command: Sequence[str], nproc: int, max_restarts: int = 0, grace_seconds: float = GRACE_SECONDS
) -> int:
    """Run `command` in `nproc` processes that find each other through the usual variables; returns 0 or a failure.

    A process that was lost costs a restart of all, at most `max_restarts` times; an error that a process has explained
    would only occur again. After a failure or a second Ctrl-C the other processes get `grace_seconds` to end.
    """
    before = {number: signal.signal(number, leave) for number in obeyed()}
    asked: list[int] = []
    try:
        for restart in range(max_restarts + 1):
            status, lost = _run(command, nproc, asked, grace_seconds)
            if not lost or asked or restart == max_restarts:
                break
            _logger.warning(f"Restart {restart + 1} of at most {max_restarts}.")
        return status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(command: Sequence[str], nproc: int, asked: list[int], grace_seconds: float) -> tuple[int, bool]:
    """One start of all processes: exit status, and whether a process was lost. Signals that arrive go into `asked`."""
    # Here, since torch comes along: it takes a second in which Ctrl-C must be obeyed already.
    from moce_ds.distributed.rendezvous import host_on_loopback

    # This process hosts the meeting point and the processes join it, as torchrun's do: no port is guessed.
    store = host_on_loopback()
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        SECRET: new_secret(),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        **threads.shared_by(nproc),
    }
    processes: list[subprocess.Popen[bytes]] = []
    for number in obeyed():
        signal.signal(number, lambda number, frame: asked.append(number))
    for rank in range(nproc):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # A session of their own: the terminal's Ctrl-C reaches this process alone, which passes it on once.
        processes.append(subprocess.Popen(command, env={**os.environ, **common, **place}, start_new_session=True))
    status = _wait(processes, asked, grace_seconds)
    # An unexpected error of one process is a loss for the others; which of them is the first to end is chance.
    lost = status < 0 or any(process.returncode == LOST_PEER for process in processes)
    return LOST_PEER if status < 0 else status, lost


def _wait(processes: list[subprocess.Popen[bytes]], asked: list[int], grace_seconds: float) -> int:
    """Wait until all have ended; once one fails, or a second Ctrl-C comes, they get a little time and are then killed.

    Passes on what is asked meanwhile. Returns 0, or what the first that failed ended with (negative: a signal); STOPPED
    where a signal requested that.
    """
    failed: tuple[int, int] | None = None
    deadline, passed_on = float("inf"), 0
    while any(process.poll() is None for process in processes):
        for number in asked[passed_on:]:
            for process in processes:
                process.send_signal(number)
            passed_on += 1
            if number == signal.SIGINT and asked[:passed_on].count(number) == 2:
                deadline = min(deadline, time.monotonic() + grace_seconds)
        for rank, process in enumerate(processes):
            status = process.poll()
            if failed is None and status:
                failed = (rank, status)
                seconds = _VERDICT_SECONDS if status == LOST_PEER else grace_seconds
                deadline = min(deadline, time.monotonic() + seconds)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    failed = failed or next(((rank, p.returncode) for rank, p in enumerate(processes) if p.returncode), None)
    if failed is None:
        return 0
    rank, status = failed
    insisted = asked.count(signal.SIGINT) > 1 and (status < 0 or status == LOST_PEER)  # an impatient user
    if insisted or -status in asked or (status == _INTERRUPTED and signal.SIGINT in asked):
        return STOPPED
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    if status != STOPPED and (status != 1 or rank != 0):  # an error of rank 0 has explained itself
        _logger.warning(f"Process {rank} {how}.")
    return status
