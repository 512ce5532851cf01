"""The record of a launch, RUN/launches/0001: settings and version of the code, written before a job is queued."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from moce_ds import __version__
from moce_ds.config import settings as configuration
from moce_ds.distributed.sealing import new_secret
from moce_ds.errors import ConfigError
from moce_ds.launch.slurm_job import SECRET_FILE
from moce_ds.launch.slurm_profile import SlurmProfile
from moce_ds.launch.slurm_queue import Submitted, check_scriptable, jobs_in_queue
from moce_ds.storage.files import read_json, writes_to

_LAUNCH, _JOBS = "launch.json", "jobs.json"
_PACKAGES = ("torch", "deepspeed", "timm", "numpy", "submitit")


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
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return None, b""
