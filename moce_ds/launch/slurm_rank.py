"""Each process of a SLURM job: runs the command as one rank, passes signals on, and requeues the job.

submitit starts a `Rank` in every process of the job. Its own signal handling is unsuitable: it acts on rank 0 only, not
while rank 0 waits in a collective, and it treats every warning of a short job as its time limit. So the command runs in
a child, which asks its peers to stop with it. This process passes signals on, and requeues the job if the child ended
before its work was done, unless SLURM is ending the job anyway.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass

from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmJobEnvironment

from moce_ds.console import configure_logging, say_error
from moce_ds.distributed.sealing import SECRET
from moce_ds.errors import LOST_PEER, STOPPED
from moce_ds.host.interrupts import kept_signals, wait_for
from moce_ds.host.machine import MachineError, refused
from moce_ds.launch.slurm_job import SECRET_FILE, JobStart

_logger = logging.getLogger(__name__)

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_FIRST_PORT, _PORTS = 15000, 16000  # below the range from which the system gives ports to clients
_LAST_SECONDS = 90.0  # time in which SLURM ends a requeued job


@dataclass(frozen=True)
class Rank:
    """One process of a job; the same object for all of them.

    Attributes:
        command: the command to run, which reads its rank from the environment.
        usable_nodes: numbers of nodes that it can run on; surplus nodes stay idle. Empty: any number.
        max_failures: consecutive starts after a lost process.
        warning: the signal before the end of the job, after which the job is requeued.
    """

    command: tuple[str, ...]
    usable_nodes: tuple[int, ...]
    max_failures: int
    warning: signal.Signals

    def __call__(self) -> None:
        """Run the command. Returns when it has done its work, else ends the process with its status.

        A system error before that, such as one of the disk with the logs, is reported as one message, not as submitit's
        traceback.
        """
        configure_logging()
        try:
            self._run()
        except OSError as error:
            fault = refused(MachineError, f"This process of the job on {socket.gethostname()} cannot run", error)
            say_error(f"Error: {fault}")
            sys.exit(fault.status)

    def _run(self) -> None:
        with kept_signals(_PASSED_ON) as received:
            job, began = SlurmJobEnvironment(), time.monotonic()
            start = JobStart.of(job, job.paths.folder)
            nodes = max((n for n in self.usable_nodes if n <= job.num_nodes), default=job.num_nodes)
            if job.node >= nodes:
                _logger.info(f"{socket.gethostname()} stays idle: the run can use {nodes} of {job.num_nodes} nodes.")
                return
            child = subprocess.Popen(self.command, env={**os.environ, **place(job, start, nodes)})
            # The child may receive the same signals from SLURM too; only the first counts.
            status = wait_for(child, received)
            if status == 0:
                return
            stopped = status == STOPPED or -status in received
            lost = not stopped and (status < 0 or status == LOST_PEER)
            if stopped and job.global_rank == 0 and (self.warning in received or signal.SIGTERM in received):
                start.requeue("stopped as requested")
            who = f"rank {job.global_rank} on {socket.gethostname()}"
            recorded = True
            if not stopped or job.global_rank == 0:  # others may be stopped by a failing srun
                recorded = _recorded(start, who, status, time.monotonic() - began, lost)
            if stopped:
                sys.exit(STOPPED if job.global_rank == 0 else 0)  # a failure would have the others killed
            if lost:
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                _logger.warning(f"{who.capitalize()} {how}.")
                # Every process asks for that: one that is cut off cannot. A loss that is not recorded is not counted,
                # so the job could begin again for ever.
                if recorded and start.begin_again(self.max_failures):
                    _wait_for_the_end(received)
            sys.exit(status if status > 0 else LOST_PEER)

    def checkpoint(self) -> DelayedSubmission:
        """For submitit, when the warning comes before this object is called: nothing is done yet, so begin again."""
        return DelayedSubmission(self)


def place(job: SlurmJobEnvironment, start: JobStart, nodes: int) -> dict[str, str]:
    """The variables by which the processes of a job on its first `nodes` nodes find each other."""
    each = job.num_tasks // job.num_nodes
    secret = start.folder / SECRET_FILE
    # Another port at each start: what the last one left may still hold the old one.
    port = _FIRST_PORT + zlib.crc32(f"{start.name} {start.restart}".encode()) % _PORTS
    return {
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(nodes * each),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(each),
        "MASTER_ADDR": job.hostnames[0] if nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(port),
        # Its own for each start: jobs of one array share the file. It is absent from launches of older versions.
        SECRET: f"{secret.read_text().strip()}-{start.name}-{start.restart}" if secret.exists() else "",
    }


def _recorded(start: JobStart, who: str, status: int, seconds: float, lost: bool) -> bool:
    """Record how a process ended. If the disk refuses it, print an error and return False; the status is unchanged."""
    try:
        start.record_end(who, status, seconds, lost=lost)
    except OSError as error:
        say_error(f"Error: {refused(MachineError, f'The end of {who} cannot be recorded', error)}")
        return False
    return True


def _wait_for_the_end(received: list[int]) -> None:
    """Wait until SLURM ends this process: to leave by itself would look like a failure of the job."""
    deadline = time.monotonic() + _LAST_SECONDS
    while signal.SIGTERM not in received and time.monotonic() < deadline:
        time.sleep(0.05)
