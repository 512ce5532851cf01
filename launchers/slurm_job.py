"""A job of SLURM as its own processes see it: how its starts have ended, and how it begins again."""

import json
import os
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from submitit.slurm.slurm import SlurmJobEnvironment

_STEADY_SECONDS = 3600.0


@dataclass(frozen=True)
class JobStart:
    """One start of a job; the next one is another.

    Attributes:
        name: number of the job, and of an array's task, as in the names of its files.
        number: by which scontrol knows it.
        folder: of its logs.
        restart: how often it was put back into the queue before.
    """

    name: str
    number: str
    folder: Path
    restart: int

    @classmethod
    def of(cls, job: SlurmJobEnvironment, folder: Path) -> "JobStart":
        """The start that this process belongs to."""
        return cls(job.job_id, job.raw_job_id, folder, int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    @property
    def is_explained(self) -> bool:
        """Whether a process has recorded how it ended."""
        return self._end(self.restart).exists()

    def record_end(self, who: str, status: int, seconds: float, *, lost: bool) -> None:
        """Keep how this start ended, unless another process has done so; `lost`: a failure that may not come again."""
        record = {"who": who, "status": status, "seconds": round(seconds), "lost": lost}
        draft = self._end(self.restart).with_suffix(f".{socket.gethostname()}-{os.getpid()}")
        draft.write_text(json.dumps(record))
        with suppress(FileExistsError):
            os.link(draft, self._end(self.restart))  # whole at once, for processes that read it now
        draft.unlink()

    def begin_again(self, max_failures: int) -> bool:
        """Put the job back into the queue after a loss, the `max_failures`th in a row at most; whether it was tried."""
        failures = self._in_a_row()
        if failures > max_failures:
            print(f"{failures} failures in a row, of which max_failures={max_failures} are borne.", flush=True)
            return False
        self.requeue(f"failure {failures} of at most {max_failures} in a row")
        return True

    def requeue(self, why: str) -> None:
        """Put the job back into the queue, if it is running: else SLURM ends it, or has done that itself."""
        asked = ["squeue", "--noheader", f"--jobs={self.number}", "--format=%T"]
        state = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        if state != "RUNNING":
            print(f"Job {self.name} is {state or 'gone'}: not put back into the queue by itself ({why}).", flush=True)
            return
        print(f"Job {self.name} goes back into the queue: {why}.", flush=True)
        done = subprocess.run(["scontrol", "requeue", self.number], capture_output=True, text=True)
        if done.returncode:
            print(f"scontrol requeue: {done.stderr.strip()}. Submit the same command again to go on.", flush=True)

    def _in_a_row(self) -> int:
        """Losses of this start and those just before it, back to one that ran steadily."""
        count, restart = 0, self.restart
        while (record := self._read(restart)) and record["lost"]:
            if count and record["seconds"] > _STEADY_SECONDS:
                return count
            count, restart = count + 1, restart - 1
        return count

    def _read(self, restart: int) -> dict[str, float] | None:
        path = self._end(restart)
        return json.loads(path.read_text()) if path.exists() else None

    def _end(self, restart: int) -> Path:
        return self.folder / f"{self.name}_end_{restart}.json"
