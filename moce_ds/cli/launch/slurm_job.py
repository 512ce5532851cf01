"""A SLURM job from inside: each process runs the command as one rank, passes signals on, and requeues the job.

submitit starts a `Rank` in every process of the job. Its own signal handling is unsuitable: it acts on rank 0 only, not
while rank 0 waits in a collective, and it treats every warning of a short job as its time limit. So the command runs in
a child, which asks its peers to stop with it. The process passes signals on, and requeues the job if the child ended
before its work was done, unless SLURM is ending the job anyway.

    python -m moce_ds.cli.launch.slurm_job FOLDER STATUS SECONDS MAX_FAILURES

The job's script ends with this command if srun failed. The processes of a job report their own failures. But srun also
fails if not all processes could be started, for example on a node that has just died; then the job is requeued.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmJobEnvironment

from moce_ds.common.errors import LOST_PEER, STOPPED
from moce_ds.common.host.interrupts import kept_signals, wait_for
from moce_ds.common.host.machine import MachineError, refused
from moce_ds.common.host.program import configure_logging, run_main, say_error
from moce_ds.common.host.rank import SECRET

_logger = logging.getLogger("moce_ds.cli.launch.slurm_job")  # also if this module runs as a program

SECRET_FILE = "secret"
"""In the folder of a launch, readable only by its owner: the key that authenticates messages of its processes."""

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_FIRST_PORT, _PORTS = 15000, 16000  # below the range from which the system gives ports to clients
_LAST_SECONDS = 90.0  # time in which SLURM ends a requeued job
_STEADY_SECONDS = 3600.0


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
            asked = self.warning in received or signal.SIGTERM in received
            # srun also asks for a stop after another process has failed, which has recorded its end by then.
            if stopped and job.global_rank == 0 and asked and not start.has_ended:
                start.requeue("stopped as requested")
            who = f"rank {job.global_rank} on {socket.gethostname()}"
            recorded = True
            if not stopped or job.global_rank == 0:  # others may be stopped by a failing srun
                recorded = _recorded(start, who, status, time.monotonic() - began, lost)
            if stopped:
                sys.exit(STOPPED if job.global_rank == 0 else 0)  # after a failure SLURM would kill the others
            if lost:
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                _logger.warning(f"{who.capitalize()} {how}.")
                # Every process requests this, because one may be cut off. An unrecorded loss is not counted,
                # so the job could restart for ever.
                if recorded and start.begin_again(self.max_failures):
                    _wait_for_the_end(received)
            sys.exit(status if status > 0 else LOST_PEER)

    def checkpoint(self) -> DelayedSubmission:
        """For submitit, when the warning comes before this object is called: no work was done yet, so start again."""
        return DelayedSubmission(self)


@dataclass(frozen=True)
class JobStart:
    """One start of a job, which may be requeued several times.

    Attributes:
        name: number of the job, with that of an array task: 7, 7_2. (Its raw number may be that of the whole array.)
        folder: of its logs.
        restart: number of previous requeues.
    """

    name: str
    folder: Path
    restart: int

    @classmethod
    def of(cls, job: SlurmJobEnvironment, folder: Path) -> "JobStart":
        """The start that this process belongs to."""
        return cls(job.job_id, folder, int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    @property
    def has_ended(self) -> bool:
        """Whether a process has recorded how it ended."""
        return self._file("end", self.restart).exists() or self._file("lost", self.restart).exists()

    def record_end(self, who: str, status: int, seconds: float, *, lost: bool) -> None:
        """Record how a process of this start ended; `lost`: by a fault that may not occur again. Raises OSError."""
        record = {"who": who, "status": status, "seconds": round(seconds)}
        draft = self.folder / f"{self.name}_{socket.gethostname()}-{os.getpid()}.draft"
        draft.write_text(json.dumps(record))
        draft.replace(self._file("lost" if lost else "end", self.restart))  # atomic, because others may read it now

    def begin_again(self, max_failures: int) -> bool:
        """Requeue the job after a lost process, unless too many failed in a row; returns whether it tried."""
        failures = self._in_a_row()
        if failures > max_failures:
            _logger.warning(f"{failures} failures in a row; max_failures={max_failures} are allowed.")
            return False
        self.requeue(f"failure {failures} of at most {max_failures} in a row")
        return True

    def requeue(self, why: str) -> None:
        """Requeue the job if it is running; in another state SLURM is ending it, or has requeued it itself."""
        command = ["squeue", "--noheader", f"--jobs={self.name}", "--format=%T"]
        state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if state != "RUNNING":
            _logger.info(f"Job {self.name} is {state or 'gone'}: it does not requeue itself ({why}).")
            return
        _logger.info(f"Job {self.name} goes back into the queue: {why}.")
        done = subprocess.run(["scontrol", "requeue", self.name], capture_output=True, text=True)
        if done.returncode:
            _logger.warning(f"scontrol requeue: {done.stderr.strip()}. Submit the same command again to resume.")

    def _in_a_row(self) -> int:
        """Consecutive starts that lost a process, up to this one and back to one that ran for long."""
        count, restart = 0, self.restart
        while (file := self._file("lost", restart)).exists():
            if count and json.loads(file.read_text())["seconds"] > _STEADY_SECONDS:
                break
            count, restart = count + 1, restart - 1
        return count

    def _file(self, kind: str, restart: int) -> Path:
        return self.folder / f"{self.name}_{kind}_{restart}.json"


def place(job: SlurmJobEnvironment, start: JobStart, nodes: int) -> dict[str, str]:
    """The environment variables with which the processes on the first `nodes` nodes of a job find each other."""
    each = job.num_tasks // job.num_nodes
    secret = start.folder / SECRET_FILE
    # Another port at each start: processes of the last start may still hold the old one.
    port = _FIRST_PORT + zlib.crc32(f"{start.name} {start.restart}".encode()) % _PORTS
    return {
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(nodes * each),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(each),
        "MASTER_ADDR": job.hostnames[0] if nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(port),
        # Different for each start: jobs of one array share the file. It is absent from launches of older versions.
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
    """Wait until SLURM ends this process: an earlier exit would look like a failure of the job."""
    deadline = time.monotonic() + _LAST_SECONDS
    while signal.SIGTERM not in received and time.monotonic() < deadline:
        time.sleep(0.05)


def main(folder: str, status: str, seconds: str, max_failures: str) -> None:
    """Requeue a job whose srun failed, unless one of its processes has recorded how it ended."""
    start = JobStart.of(SlurmJobEnvironment(), Path(folder))
    if start.has_ended:
        return
    _logger.warning(f"srun ended with status {status}, and no process of the job gave a reason.")
    start.record_end("srun", int(status), float(seconds), lost=True)
    start.begin_again(int(max_failures))


if __name__ == "__main__":
    run_main(lambda: main(*sys.argv[1:]))
