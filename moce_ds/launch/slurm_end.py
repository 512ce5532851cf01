"""The end of a job's script if srun failed: `python -m moce_ds.launch.slurm_end FOLDER STATUS SECONDS MAX_FAILURES`.

The processes of a job report their own failures (`slurm_rank`). But srun also fails if not all processes could be
started, as on a node that has just died; then the job is requeued.
"""

import logging
import sys
from pathlib import Path

from submitit.slurm.slurm import SlurmJobEnvironment

from moce_ds.console import run_main
from moce_ds.launch.slurm_job import JobStart


def main(folder: str, status: str, seconds: str, max_failures: str) -> None:
    """Requeue the job, unless one of its processes has recorded how it ended."""
    start = JobStart.of(SlurmJobEnvironment(), Path(folder))
    if start.has_ended:
        return
    logging.getLogger("moce_ds").warning(f"srun ended with status {status}, and no process of the job gave a reason.")
    start.record_end("srun", int(status), float(seconds), lost=True)
    start.begin_again(int(max_failures))


if __name__ == "__main__":
    run_main(lambda: main(*sys.argv[1:]))
