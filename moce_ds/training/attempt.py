"""Who may write into a run folder: one attempt at a time, also where an older job does not know that it is over.

After a network cut or a requeue an old job can go on for a while beside its successor. So every start of a run is an
*attempt* with a folder of its own, RUN/attempts/0003, in which its checkpoints are drafted. A new attempt takes the
next number and removes the folders before it: from then on an older attempt has nowhere to write, cannot rename what it
has drafted into place, and sees that it is over by the absence of its folder. `metrics.jsonl` is replaced by a copy, so
an older attempt that still has it open writes into a file that nobody reads.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moce_ds.errors import ArtefactError, MoceError
from moce_ds.files import sync
from moce_ds.runtime import Runtime

ATTEMPTS = "attempts"
METRICS = "metrics.jsonl"


class SupersededError(MoceError):
    """A newer attempt owns the run folder; nothing was written by this one since."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run: the `number`-th, 1 for the first."""

    run: Path
    number: int

    @classmethod
    def claim(cls, run: Path, runtime: Runtime) -> "Attempt":
        """Become the owner of a run folder; a collective. Every older attempt has lost it when this returns."""
        number = 0
        with runtime.together():
            if runtime.is_main:
                number = _next_number(run)
        attempt = cls(run, int(runtime.sum([float(number)])[0]))
        with runtime.together():
            if runtime.is_main:
                attempt._take_over()
        return attempt

    @property
    def folder(self) -> Path:
        """Where this attempt drafts what it writes; its absence says that the attempt is over."""
        return _folder(self.run, self.number)

    @property
    def superseded(self) -> bool:
        """Whether a newer attempt has taken over."""
        return not self.folder.exists()

    def draft(self, step: int) -> Path:
        """Where the checkpoint of a step is written before it is whole."""
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
            raise ArtefactError(f"Step {step} cannot be written to {self.run}: {error}") from None

    @contextmanager
    def file(self, path: Path, step: int) -> Iterator[Path]:
        """Yield a place for the content of a file of the run folder, which appears as `path` when the block ends.

        Raises:
            SupersededError, ArtefactError: as `writing`; then `path` is as it was.
        """
        with self.writing(step):
            path.parent.mkdir(exist_ok=True)
            draft = self.folder / path.name  # not beside `path`: an attempt that is over must not rename it either
            yield draft
            sync(draft)
            os.replace(draft, path)

    def error(self, step: int) -> SupersededError:
        """What an attempt that is over ends with."""
        return SupersededError(
            f"Step {step}: another process has taken over {self.run} (this was attempt {self.number}). Stopped "
            "without writing."
        )

    def _take_over(self) -> None:
        who = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        with self.writing(step=0):
            (self.folder / "owner.json").write_text(json.dumps(who | {"started": time.strftime("%FT%T%z")}) + "\n")
        for number in _numbers(self.run):
            if number < self.number:
                with suppress(FileNotFoundError):  # a third attempt may do the same at this moment
                    _folder(self.run, number).rename(self.run / ATTEMPTS / f".{number:04d}.over")
        for over in (self.run / ATTEMPTS).glob(".*.over"):
            shutil.rmtree(over, ignore_errors=True)
        self._renew_metrics()

    def _renew_metrics(self) -> None:
        """Put a copy in the place of a file that an older attempt may hold open; half a last line is left out."""
        metrics = self.run / METRICS
        if metrics.exists():
            lines = metrics.read_bytes().splitlines(keepends=True)
            with self.file(metrics, step=0) as draft:
                draft.write_bytes(b"".join(line for line in lines if line.endswith(b"\n")))


def _folder(run: Path, number: int) -> Path:
    return run / ATTEMPTS / f"{number:04d}"


def _numbers(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / ATTEMPTS).iterdir() if path.name.isdigit())


def _next_number(run: Path) -> int:
    """Make the folder of the next attempt, the newest there is; of several processes each gets a number of its own."""
    (run / ATTEMPTS).mkdir(parents=True, exist_ok=True)
    while True:
        number = max(_numbers(run), default=0) + 1
        with suppress(FileExistsError):
            _folder(run, number).mkdir()
            if _numbers(run)[-1] == number:
                return number
            # Others came since this one counted, and may have cleared away before its folder was there.
            with suppress(FileNotFoundError):
                _folder(run, number).rmdir()
