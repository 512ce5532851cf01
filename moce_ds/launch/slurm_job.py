"""A SLURM job as its own processes see it: how its starts ended, and how it is requeued."""

import json
import logging
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from submitit.slurm.slurm import SlurmJobEnvironment

SECRET_FILE = "secret"
"""In the folder of a launch, readable by its owner alone: the key that authenticates messages of its processes."""

_logger = logging.getLogger(__name__)
_STEADY_SECONDS = 3600.0


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
