"""The end of a job's script, when srun failed: `python -m moce_ds.launch.slurm_end FOLDER STATUS SECONDS MAX_FAILURES`.

What a process of the job meets it explains itself (`slurm_rank`). But srun fails, too, where not all processes could be
started, as on a node that died a moment before and that SLURM has not missed yet; then the job begins again.
"""

import logging
import sys
from pathlib import Path

from submitit.slurm.slurm import SlurmJobEnvironment

from moce_ds.console import run_main
from moce_ds.launch.slurm_job import JobStart


def main(folder: str, status: str, seconds: str, max_failures: str) -> None:
    """Put the job back into the queue, unless one of its processes has said how it ended."""
    start = JobStart.of(SlurmJobEnvironment(), Path(folder))
    if start.has_ended:
        return
    logging.getLogger("moce_ds").warning(f"srun ended with status {status}, and no process of the job said why.")
    start.record_end("srun", int(status), float(seconds), lost=True)
    start.begin_again(int(max_failures))


if __name__ == "__main__":
    run_main(lambda: main(*sys.argv[1:]))
