"""Run a command on this machine: in several processes, or in one whose output goes to a log file.

        moce launch local --nproc 2 pretrain configs/demo/mae.yaml

One Ctrl-C (or SIGTERM, SIGHUP, SIGUSR1, SIGUSR2) asks every process to stop at the next step boundary; the exit status
is then 76, so that later stages do not start. When a process fails, the others are ended and the failed one is
named; the status is 75 if it was lost. With --max-restarts, all processes are restarted when one was lost (killed, or
silent for run.peer_timeout seconds), and the run resumes from its newest checkpoint. The verbs behave the same under
`torchrun -m moce_ds VERB ...`; this launcher prints no traceback and passes signals on only once.
"""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from moce_ds.common.errors import LOST_PEER, STOPPED
from moce_ds.common.host import threads
from moce_ds.common.host.interrupts import kept_signals, leave, obeyed, wait_for
from moce_ds.common.host.rank import SECRET, new_secret
from moce_ds.common.storage.files import writes_to

_logger = logging.getLogger(__name__)

GRACE_SECONDS = 20.0
_INTERRUPTED = 130  # common exit status after a Ctrl-C
_VERDICT_SECONDS = 5.0  # time for all processes to read that one is lost
_TAIL_LINES = 8  # of a log, in messages


def run_processes(
    command: Sequence[str], nproc: int, max_restarts: int = 0, grace_seconds: float = GRACE_SECONDS
) -> int:
    """Run `command` in `nproc` processes that find each other through the usual variables; returns 0 or a failure
    status.

    If a process is lost, all are restarted, at most `max_restarts` times. A handled error is not retried, because it
    would occur again. After a failure or a second Ctrl-C the other processes have `grace_seconds` to end.
    """
    before = {number: signal.signal(number, leave) for number in obeyed()}
    received: list[int] = []
    try:
        for restart in range(max_restarts + 1):
            status, lost = _run(command, nproc, received, grace_seconds)
            if not lost or received or restart == max_restarts:
                break
            _logger.warning(f"Restart {restart + 1} of at most {max_restarts}.")
        return status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(command: Sequence[str], nproc: int, received: list[int], grace_seconds: float) -> tuple[int, bool]:
    """One start of all processes: exit status, and whether a process was lost. Received signals are appended to
    `received`."""
    # imported here, because it imports torch, which takes a second in which Ctrl-C must work
    from moce_ds.distributed.rendezvous import host_on_loopback

    # This process hosts the store that the processes join, as torchrun does, so no port is guessed.
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
        signal.signal(number, lambda number, frame: received.append(number))
    for rank in range(nproc):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # In a new session: the terminal sends Ctrl-C only to this process, which passes it on once.
        processes.append(subprocess.Popen(command, env={**os.environ, **common, **place}, start_new_session=True))
    status = _wait(processes, received, grace_seconds)
    # An unexpected error of one process is a loss for the others; any of them may end first.
    lost = status < 0 or any(process.returncode == LOST_PEER for process in processes)
    return LOST_PEER if status < 0 else status, lost


def _wait(processes: list[subprocess.Popen[bytes]], received: list[int], grace_seconds: float) -> int:
    """Wait until all have ended. After a failure or a second Ctrl-C the others get a grace period and are then killed.

    Passes received signals on. Returns 0, or the status of the first that failed (negative: a signal); STOPPED if a
    signal requested that.
    """
    failed: tuple[int, int] | None = None
    deadline, passed_on = float("inf"), 0
    while any(process.poll() is None for process in processes):
        for number in received[passed_on:]:
            for process in processes:
                process.send_signal(number)
            passed_on += 1
            if number == signal.SIGINT and received[:passed_on].count(number) == 2:
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
    insisted = received.count(signal.SIGINT) > 1 and (status < 0 or status == LOST_PEER)  # a second Ctrl-C
    if insisted or -status in received or (status == _INTERRUPTED and signal.SIGINT in received):
        return STOPPED
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    if status != STOPPED and (status != 1 or rank != 0):  # rank 0 has printed its error
        _logger.warning(f"Process {rank} {how}.")
    return status


def run_logged(command: Sequence[str], log: Path) -> int:
    """Run a command, append its output to `log`, and return its exit status, negative for a signal that killed it.

    Signals are passed on to the command, so that it stops at a point where it can resume.

    Raises:
        ArtefactError: the log cannot be written.
        KeyboardInterrupt: a signal came meanwhile; the command has ended.
    """
    with writes_to(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        opened = open(log, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    with opened, kept_signals(obeyed()) as received:
        # In a new session: the terminal sends Ctrl-C only to this process, which passes it on once.
        child = subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT, start_new_session=True)
        status = wait_for(child, received)
        if status < 0 and not received:
            opened.write(f"The process was killed by {signal.Signals(-status).name}.\n")
    if received:
        raise KeyboardInterrupt
    return status


def log_tail(log: Path) -> str:
    """The last non-empty lines of a log."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-_TAIL_LINES:])
