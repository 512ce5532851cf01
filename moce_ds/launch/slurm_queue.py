"""The queue of SLURM, through submitit: submit jobs, and list those that are queued."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from moce_ds.errors import ConfigError
from moce_ds.launch.slurm_profile import SlurmProfile
from moce_ds.launch.slurm_rank import Rank
from moce_ds.text import counted, script_fault


@dataclass(frozen=True)
class Submitted:
    """A job in the queue, or an array of them.

    Attributes:
        job: its number.
        what: its size, in words.
        log: the log of its first process; those of the others are beside it. Of an array: the pattern of all logs.
    """

    job: str
    what: str
    log: str


def submit(
    profile: SlurmProfile,
    commands: Sequence[Sequence[str]],
    folder: Path,
    name: str,
    after: Sequence[str] = (),
    usable_nodes: Sequence[int] = (),
) -> Submitted:
    """Queue a job for each command (words after `moce`), several as one array; logs go to `folder`.

    Args:
        after: jobs that must have succeeded first.
        usable_nodes: numbers of nodes that the commands can run on, of those that the profile allows; empty: all.

    Raises:
        ConfigError: there is no SLURM here; sbatch refuses, with its message; or the folder's or job's name cannot
            stand in a script.
    """
    check_scriptable(folder, name)
    python = str(profile.python or sys.executable)
    usable, warning = tuple(usable_nodes), signal.Signals[f"SIG{profile.signal}"]
    ranks = [Rank((python, "-m", "moce_ds", *words), usable, profile.max_failures, warning) for words in commands]
    try:
        executor = _executor(profile, python, folder, name, after)
        with executor.batch():
            jobs = [executor.submit(rank) for rank in ranks]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"sbatch refused the job: {_sbatch_message(error)}") from None
    except RuntimeError as error:  # submitit did not find srun
        raise ConfigError(f"{error} Run this where sbatch and srun are, as on a login node.") from None
    if len(jobs) == 1:
        return Submitted(jobs[0].job_id, profile.size, str(jobs[0].paths.stdout))
    number = jobs[0].job_id.partition("_")[0]
    logs = folder.absolute() / f"{number}_*_0_log.out"
    return Submitted(number, f"{counted(len(jobs), 'job')} of {profile.size}", str(logs))


def _executor(profile: SlurmProfile, python: str, folder: Path, name: str, after: Sequence[str]) -> SlurmExecutor:
    """The writer of a job's script. Raises RuntimeError if srun is not found."""
    inside = f"{profile.container} {shlex.quote(python)}".strip()
    # submitit's own count of time-outs would end a run that is requeued for weeks
    executor = SlurmExecutor(folder, max_num_timeout=10**6, python=inside)
    arguments = f"{shlex.quote(str(executor.folder))} $status $SECONDS {profile.max_failures}"
    end = f"[ $status -eq 0 ] || {inside} -m moce_ds.launch.slurm_end {arguments}"
    executor.update_parameters(job_name=name, teardown=["status=$?", end, "exit $status"], **profile.sbatch(after))
    return executor


def check_scriptable(folder: Path, name: str = "") -> None:
    """Check that a job's script can name the folder of its logs: text after a line break would be executed.

    Raises:
        ConfigError: it cannot.
    """
    for text in (str(folder.absolute()), name):
        if fault := script_fault(text):
            raise ConfigError(f"{text!r} {fault}, and the job's script names it: choose another folder.")


def jobs_in_queue(jobs: Sequence[str]) -> dict[str, str]:
    """State of those jobs that are waiting or running; empty without SLURM."""
    if not jobs:
        return {}
    try:
        command = ["squeue", "--noheader", "--me", "--format=%F %T"]
        listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        return {}
    states = dict(line.split() for line in listed)
    return {job: states[job] for job in jobs if job in states}


def _sbatch_message(error: Exception) -> str:
    """The message of sbatch in submitit's error."""
    lines = [line.removeprefix("sbatch: ") for line in str(error).splitlines() if line.startswith("sbatch: ")]
    return "; ".join(line.removeprefix("error: ") for line in lines) or str(error).strip()
