"""What each process of a SLURM job does: run the command as one rank, pass signals on, see that the job goes on.

submitit starts a `Rank` in every process of the job. Its own handling of signals does not fit: it acts on rank 0 alone,
not while rank 0 waits in a collective, and takes every warning of a short job for the end of its time. So the command
runs in a child, which asks its peers to stop with it, and here is what remains: signals are passed on, and when the
child has ended before its work was done the job is put back into the queue, unless SLURM is about to end it anyway.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmJobEnvironment

from launchers.signals import kept_signals, wait_for
from moce_ds.errors import LOST_PEER, STOPPED

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_FIRST_PORT, _PORTS = 15000, 16000  # below the range from which the system gives ports to clients
_STEADY_SECONDS = 3600.0
_LAST_SECONDS = 90.0  # in which SLURM ends a job that was put back into the queue


@dataclass(frozen=True)
class Rank:
    """One process of a job; the same object for all of them.

    Attributes:
        command: what to run; it learns its rank from the environment.
        usable_nodes: numbers of nodes with which it can run; of more, the last stay idle. Empty: any.
        max_failures: starts after a lost process, in a row.
        warning: the signal before the end, after which the job is to go on later.
    """

    command: tuple[str, ...]
    usable_nodes: tuple[int, ...]
    max_failures: int
    warning: signal.Signals

    def __call__(self) -> None:
        """Run the command; returns when it has done its work, and else ends the process with its status."""
        with kept_signals(_PASSED_ON) as asked:
            job, began = SlurmJobEnvironment(), time.monotonic()
            nodes = max((n for n in self.usable_nodes if n <= job.num_nodes), default=job.num_nodes)
            if job.node >= nodes:
                print(f"{socket.gethostname()} stays idle: the run can use {nodes} of {job.num_nodes} nodes.")
                return
            child = subprocess.Popen(self.command, env={**os.environ, **place(job, nodes)})
            # SLURM may have sent the child the same signals, which does not mind: only the first counts.
            status = wait_for(child, asked)
            if status == 0:
                return
            stopped = status == STOPPED or -status in asked
            if stopped and job.global_rank == 0 and (self.warning in asked or signal.SIGTERM in asked):
                _requeue(job, "stopped as asked")
            if stopped:
                sys.exit(STOPPED if job.global_rank == 0 else 0)  # a failure would have the others killed
            if status < 0 or status == LOST_PEER:
                self._after_failure(job, status, time.monotonic() - began, asked)
            sys.exit(status if status > 0 else LOST_PEER)

    def checkpoint(self) -> DelayedSubmission:
        """For submitit, when the warning comes before this object is called: nothing is done yet, so begin again."""
        return DelayedSubmission(self)

    def _after_failure(self, job: SlurmJobEnvironment, status: int, seconds: float, asked: list[int]) -> None:
        """Have the job begin again after a lost process. Every process asks for that: one that is cut off cannot."""
        folder, restart, host = job.paths.folder, _restart(), socket.gethostname()
        record = {"rank": job.global_rank, "host": host, "status": status, "seconds": round(seconds)}
        with suppress(FileExistsError), open(_failure(folder, job, restart), "x") as file:
            json.dump(record, file)
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        print(f"Rank {job.global_rank} on {host} {how}.", flush=True)
        failures = _in_a_row(folder, job, restart)
        if failures > self.max_failures:
            print(f"{failures} failures in a row, of which max_failures={self.max_failures} are borne.", flush=True)
            return
        _requeue(job, f"failure {failures} of at most {self.max_failures} in a row")
        _wait_for_the_end(asked)


def place(job: SlurmJobEnvironment, nodes: int) -> dict[str, str]:
    """The variables by which the processes of a job on its first `nodes` nodes find each other."""
    each = job.num_tasks // job.num_nodes
    # Another port at each start: what the last one left may still hold the old one.
    port = _FIRST_PORT + zlib.crc32(f"{job.raw_job_id} {_restart()}".encode()) % _PORTS
    return {
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(nodes * each),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(each),
        "MASTER_ADDR": job.hostnames[0],
        "MASTER_PORT": str(port),
    }


def _requeue(job: SlurmJobEnvironment, why: str) -> None:
    """Put the job back into the queue, if it is running: else SLURM ends it, or has done that itself."""
    asked = ["squeue", "--noheader", f"--jobs={job.raw_job_id}", "--format=%T"]
    state = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    if state != "RUNNING":
        print(f"Job {job.job_id} is {state or 'gone'}: not put back into the queue by itself ({why}).", flush=True)
        return
    print(f"Job {job.job_id} goes back into the queue: {why}.", flush=True)
    done = subprocess.run(["scontrol", "requeue", job.raw_job_id], capture_output=True, text=True)
    if done.returncode:
        print(f"scontrol requeue: {done.stderr.strip()}. Submit the same command again to go on.", flush=True)


def _wait_for_the_end(asked: list[int]) -> None:
    """Wait until SLURM ends this process: to leave by itself would look like a failure of the job."""
    deadline = time.monotonic() + _LAST_SECONDS
    while signal.SIGTERM not in asked and time.monotonic() < deadline:
        time.sleep(0.05)


def _restart() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _failure(folder: Path, job: SlurmJobEnvironment, restart: int) -> Path:
    return folder / f"{job.job_id}_failure_{restart}.json"


def _in_a_row(folder: Path, job: SlurmJobEnvironment, restart: int) -> int:
    """Failures of this start and those just before it, back to one that ran steadily."""
    count = 0
    while _failure(folder, job, restart).exists():
        count += 1
        restart -= 1
        path = _failure(folder, job, restart)
        if path.exists() and json.loads(path.read_text())["seconds"] > _STEADY_SECONDS:
            break
    return count
