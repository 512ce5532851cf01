"""Queue jobs at SLURM, through submitit. The record of a launch is written before its jobs are queued."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from moce_ds import __version__
from moce_ds.cli.launch.slurm_job import SECRET_FILE, Rank
from moce_ds.cli.launch.slurm_profile import SlurmProfile
from moce_ds.common.config import settings as configuration
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.rank import new_secret
from moce_ds.common.storage.files import read_json, writes_to
from moce_ds.common.text import counted, script_fault

_LAUNCH, _JOBS = "launch.json", "jobs.json"
_PACKAGES = ("torch", "deepspeed", "timm", "numpy", "submitit")


@dataclass(frozen=True)
class Submitted:
    """A job in the queue, or an array of them.

    Attributes:
        job: its number.
        what: its size, as text.
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
        ConfigError: SLURM is not installed; sbatch refuses the job (with its message); or the name of the folder or job
            cannot be written into a script.
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
        raise ConfigError(f"{error} Run this on a machine with sbatch and srun, such as a login node.") from None
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
    end = f"[ $status -eq 0 ] || {inside} -m moce_ds.cli.launch.slurm_job {arguments}"
    executor.update_parameters(job_name=name, teardown=["status=$?", end, "exit $status"], **profile.sbatch(after))
    return executor


def check_scriptable(folder: Path, name: str = "") -> None:
    """Check that a job's script can name the folder of its logs: text after a line break would be executed.

    Raises:
        ConfigError: the script cannot name it.
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


def refuse_second(parent: Path) -> None:
    """Raise ConfigError if a job of an earlier launch in `parent` is still in the queue."""
    known = [job for path in sorted(parent.glob(f"*/{_JOBS}")) for job in read_json(path, "jobs", "moce launch")]
    alive = jobs_in_queue(known)
    if alive:
        listed = ", ".join(f"{job} ({state})" for job, state in alive.items())
        raise ConfigError(
            f"{parent.parent} has work in the queue: job {listed}. Wait for it, or scancel {' '.join(alive)}."
        )


def begin_launch(parent: Path, words: Sequence[str], profile: SlurmProfile, config: Any = None) -> Path:
    """A new folder 0001, 0002, ... in `parent` with the record of a launch.

    launch.json holds command, profile and versions; config.yaml the resolved settings of the verb, if it has some;
    changes.patch the uncommitted changes of the code; secret the key of the job's processes (docs/security.md). The
    logs of the job are written there too.

    Raises:
        ArtefactError: the folder cannot be written.
        ConfigError: a job's script cannot name the folder.
    """
    check_scriptable(parent)
    commit, patch = _code()
    record = {
        "command": ["moce", *words],
        "profile": configuration.to_tree(profile),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "moce_ds": __version__,
        "commit": commit,
        "changed": bool(patch),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in _PACKAGES},
    }
    with writes_to(parent):
        folder = _new_folder(parent)
        _write_secret(folder / SECRET_FILE)
        (folder / _LAUNCH).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if config is not None:
            (folder / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
        if patch:
            (folder / "changes.patch").write_bytes(patch)
    return folder


def record_jobs(folder: Path, jobs: list[Submitted]) -> list[Submitted]:
    """Record the numbers of a launch's jobs; returns the jobs. Raises ArtefactError."""
    with writes_to(folder):
        (folder / _JOBS).write_text(json.dumps([job.job for job in jobs]) + "\n", encoding="utf-8")
    return jobs


def _new_folder(parent: Path) -> Path:
    """The next free folder; simultaneous launches get different ones."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        try:
            (folder := parent / f"{number:04d}").mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("count() does not end")


def _write_secret(path: Path) -> None:
    """Write a new secret that only its owner can read."""
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as opened:
        opened.write(f"{new_secret()}\n")


def _code() -> tuple[str | None, bytes]:
    """The commit of this program's files, and the changes since then; (None, b"") outside of git."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, check=True).stdout

    try:
        tracked = git("ls-files", "--", Path(__file__).name)
        return (git("rev-parse", "HEAD").decode().strip(), git("diff", "HEAD")) if tracked else (None, b"")
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or this is not a checkout
        return None, b""
