"""The right to write into a run folder: one attempt at a time, even if an older job does not know that it is over.

After a network cut or a requeue an old job may continue for a while beside its successor. So every start of a run is a
numbered *attempt*. RUN/attempts/0003.json records it permanently, and its checkpoints are drafted in its own folder,
RUN/attempts/0003. A new attempt takes the next number and removes the folders of earlier ones. From then on an older
attempt cannot write drafts or rename them into place, and the absence of its folder tells it that it is over.
`metrics.jsonl` is replaced by a copy, so an older attempt that still has it open writes into a file that nobody reads.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moce_ds import __version__
from moce_ds.checkpoint.run_folder import ATTEMPTS, CONFIG
from moce_ds.common.errors import ArtefactError, MoceError
from moce_ds.common.host.machine import refused
from moce_ds.common.host.program import command_of_process
from moce_ds.common.storage.checksums import FileRecord, with_checksum, write_checked
from moce_ds.common.storage.files import read_json, sync, writes_to
from moce_ds.common.storage.metrics_file import METRICS, drop_incomplete_line
from moce_ds.distributed.runtime import Runtime


class SupersededError(MoceError):
    """A newer attempt owns the run folder; this one has written nothing since."""


@dataclass(frozen=True)
class RunLease:
    """One start of a run: attempt `number`, 1 for the first."""

    run: Path
    number: int

    @classmethod
    def claim(cls, run: Path, runtime: Runtime) -> "RunLease":
        """Become the owner of a run folder; a collective. When it returns, every older attempt has lost the folder.

        Raises:
            ArtefactError: the folder cannot be written to.
            SupersededError: another attempt started at the same moment.
        """
        number = 0
        with runtime.raise_on_all_ranks(), writes_to(run):
            if runtime.is_main:
                number = _next_number(run, _started_by(runtime))
        attempt = cls(run, int(runtime.sum([float(number)])[0]))
        with runtime.raise_on_all_ranks():
            if runtime.is_main:
                attempt._take_over()
        return attempt

    @classmethod
    @contextmanager
    def claimed(cls, run: Path, runtime: Runtime) -> Iterator["RunLease"]:
        """Own a run folder for the length of a block. A run that fails before it begins leaves nothing behind.

        Raises:
            ArtefactError, SupersededError: as `claim`.
        """
        lease = cls.claim(run, runtime)
        try:
            yield lease
        except MoceError:
            if runtime.is_main and not (run / CONFIG).exists():
                lease.withdraw()
            raise

    @property
    def folder(self) -> Path:
        """The folder for drafts of this attempt; its absence means that the attempt is over."""
        return _folder(self.run, self.number)

    @property
    def superseded(self) -> bool:
        """Whether a newer attempt has taken over."""
        return not self.folder.exists()

    def draft(self, step: int) -> Path:
        """The folder where the checkpoint of a step is drafted."""
        return self.folder / f"step-{step:08d}"

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """A block that writes into the run folder.

        Raises:
            SupersededError: the attempt is over, before the block or during it.
            ArtefactError: the block could not write for another reason, such as a full disk.
        """
        if self.superseded:
            raise self.error(step)
        try:
            yield
        except (ArtefactError, OSError) as error:
            if self.superseded:
                raise self.error(step) from None
            raise refused(ArtefactError, f"{self.run} cannot be written to at step {step}", error) from None

    @contextmanager
    def file(self, path: Path, step: int) -> Iterator[Path]:
        """Yield a path for the content of a file of the run folder, which is renamed to `path` when the block ends.

        Raises:
            SupersededError, ArtefactError: as `writing`; then `path` is unchanged.
        """
        with self.writing(step):
            path.parent.mkdir(exist_ok=True)
            draft = self.folder / path.name  # not beside `path`: an attempt that is over must not be able to rename it
            yield draft
            sync(draft)
            os.replace(draft, path)

    def note(self, name: str, record: FileRecord, step: int) -> None:
        """Add the checksum of a file of the run folder to the record of the attempt, RUN/attempts/0003.json.

        Raises:
            SupersededError, ArtefactError: as `writing`.
        """
        path = self.folder.with_suffix(".json")
        with self.writing(step):
            record_of_attempt = read_json(path, "the record of an attempt", "moce pretrain")
            files = record_of_attempt.get("files", {}) | {name: asdict(record)}
            write_checked(path, record_of_attempt | {"files": files})

    def withdraw(self) -> None:
        """Remove all traces of an attempt that failed before it wrote anything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.with_suffix(".json").unlink(missing_ok=True)
        with suppress(OSError):  # not empty: it holds a run, or another attempt
            self.folder.parent.rmdir()
            self.run.rmdir()

    def error(self, step: int) -> SupersededError:
        """The error that ends an attempt that is over."""
        return SupersededError(
            f"Step {step}: another process has taken over {self.run} (this was attempt {self.number}). Stopped "
            "without writing."
        )

    def _take_over(self) -> None:
        attempts = self.run / ATTEMPTS
        with self.writing(step=0):
            for older in attempts.iterdir():
                if older.name.isdigit() and int(older.name) < self.number:
                    with suppress(FileNotFoundError):  # a third attempt may do the same now
                        older.rename(attempts / f".{older.name}.over")
            for over in attempts.glob(".*.over"):
                shutil.rmtree(over, ignore_errors=True)
        self._renew_metrics()

    def _renew_metrics(self) -> None:
        """Replace a file that an older attempt may hold open by a copy, without an incomplete last line."""
        metrics = self.run / METRICS
        if metrics.exists():
            with self.file(metrics, step=0) as draft:
                shutil.copyfile(metrics, draft)
                drop_incomplete_line(draft)


def _folder(run: Path, number: int) -> Path:
    return run / ATTEMPTS / f"{number:04d}"


def _started_by(runtime: Runtime) -> dict[str, Any]:
    """The process, program and machine that start an attempt, for the reader of the run folder."""
    on_gpu = runtime.device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "started": time.strftime("%FT%T%z"),
        "version": __version__,
        "command": command_of_process(),
        "processes": runtime.world_size,
        "device": torch.cuda.get_device_name(runtime.device) if on_gpu else runtime.device.type.upper(),
    }


def _next_number(run: Path, started_by: dict[str, Any]) -> int:
    """Create the folder of the newest attempt. No number is used twice, because records are permanent."""
    (run / ATTEMPTS).mkdir(parents=True, exist_ok=True)
    while True:
        number = _newest(run) + 1
        folder = _folder(run, number)
        with suppress(FileExistsError):  # another process created it first
            path = folder.with_suffix(".json")
            with open(path, "x", encoding="utf-8") as record, _whole_or_gone(path):
                record.write(json.dumps(with_checksum(started_by)) + "\n")
                record.flush()
            folder.mkdir()
            if _newest(run) == number:
                return number
            # A concurrent attempt may have removed the older folders before this one existed.
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _whole_or_gone(path: Path) -> Iterator[None]:
    """Remove a new file that the block could not write completely, as on a full disk."""
    try:
        yield
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _newest(run: Path) -> int:
    return max((int(path.stem) for path in (run / ATTEMPTS).iterdir() if path.stem.isdigit()), default=0)
